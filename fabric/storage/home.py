"""Where the spill log of a member lies while the member lives, and its state, which outlives it.

A base directory holds one directory for each log, or for the state of each member. Names are hashes: no text of a user
becomes a path. What killed members without state left behind is swept away.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from xxhash import xxh3_64_hexdigest

from fabric.config import Letters, Spill
from fabric.errors import SpillError, StateDirectoryError
from fabric.storage.disk import OS_DISK, Directory, Disk
from fabric.storage.letter_rows import LETTERS_LOCK
from fabric.storage.segments import LOCK
from fabric.storage.spill import SpillLog

if TYPE_CHECKING:
    from fabric.storage.dead_letters import DeadLetterStore

__all__ = ["base_of", "open_home", "open_letters", "state_home", "states_home", "sweep"]

log = logging.getLogger("fabric.storage")

_NAME = re.compile(r"(?:life|letters)-[0-9a-f]{16}")


def base_of(limits: Spill) -> Path:
    """The directory under which logs lie: the one that is set, or a private one among the temporary files.

    Raises `StateDirectoryError` if there are no temporary files here.
    """
    if limits.directory is not None:
        return Path(limits.directory)
    try:
        return Path(tempfile.gettempdir()) / f"tensor-fabric-spill-{os.geteuid()}"
    except FileNotFoundError as error:
        where = "the directory of temporary files"
        raise StateDirectoryError("there is none that can be written; set spill.directory", directory=where) from error


def open_home(limits: Spill, job: str, name: str, incarnation: int, *, disk: Disk = OS_DISK) -> SpillLog:
    """The log of one life of a member. Raises as `SpillLog.open`."""
    path = _private(limits, "life", job, name, incarnation, disk)
    return SpillLog.open(path, limits, disk=disk, incarnation=incarnation)


def open_letters(
    limits: Spill, letters: Letters, job: str, name: str, incarnation: int, directory: Path | None = None
) -> DeadLetterStore:
    """The dead letters of one life of a member, beside its log; or those of all its lives, in a given directory.

    Raises as `DeadLetterStore.open`.
    """
    from fabric.storage.dead_letters import DeadLetterStore  # only who has a letter needs SQLite

    path = directory or _private(limits, "letters", job, name, incarnation, OS_DISK)
    return DeadLetterStore.open(path, letters, durable=directory is not None)


def _private(limits: Spill, kind: str, job: str, name: str, incarnation: int, disk: Disk) -> Path:
    base = base_of(limits)
    # It has to be private, too: who may rename in it could put another log in the place of ours.
    disk.enter(base).close()
    key = xxh3_64_hexdigest(f"{job}\0{name}\0{incarnation}".encode())
    return base / f"{kind}-{key}"


def state_home(directory: Path | None, job: str, name: str, *, base: Path | None = None, disk: Disk = OS_DISK) -> Path:
    """The directory of a member's state: in the one that is given, or in one for each job under `base`.

    The latter is by default `$XDG_STATE_HOME/tensor-fabric`, or `~/.local/state/tensor-fabric`.

    Raises:
        StateDirectoryError: a directory above it is not private, or cannot be used.
    """
    home = states_home(directory, job, base=base)
    for level in [home] if directory is not None else [home.parent, home]:
        disk.enter(level).close()  # each has to be private, too: who may rename in it could put another in its place
    return home / f"member-{xxh3_64_hexdigest(name.encode())}"


def states_home(directory: Path | None, job: str, *, base: Path | None = None) -> Path:
    """Where the states of all members of a job lie; see `state_home`. Nothing is made."""
    if directory is not None:
        return directory
    return (base if base is not None else _of_user()) / f"job-{xxh3_64_hexdigest(job.encode())}"


def _of_user() -> Path:
    given = Path(os.environ.get("XDG_STATE_HOME") or "-")
    try:
        return (given if given.is_absolute() else Path.home() / ".local" / "state") / "tensor-fabric"
    except RuntimeError as error:
        raise StateDirectoryError("this user has none; give state_directory", directory="the home") from error


def sweep(limits: Spill, *, disk: Disk = OS_DISK) -> int:
    """Remove the logs whose members were killed: nobody holds their locks. Returns how many there were.

    Raises nothing: who cannot look has nothing to do with what is there.
    """
    try:
        base = base_of(limits)
        if not base.is_dir():
            return 0
        with contextlib.closing(disk.enter(base)) as directory:
            names = directory.names()
    except (SpillError, OSError) as error:
        log.warning("what killed members left is not looked for: %s", error)
        return 0
    return sum(_remove(base / name, disk) for name in names if _NAME.fullmatch(name))


def _remove(path: Path, disk: Disk) -> bool:
    try:
        with contextlib.closing(disk.enter(path)) as directory:
            _remove_files(directory)
    except BlockingIOError:
        return False  # its member lives
    except (SpillError, OSError) as error:
        log.warning("what a killed member left in %s cannot be removed: %s", path, error)
        return False
    return True


def _remove_files(directory: Directory) -> None:
    with contextlib.ExitStack() as held:
        for name in (LOCK, LETTERS_LOCK):
            held.enter_context(contextlib.closing(directory.open(name, create=True))).lock()
        for name in directory.names():
            directory.unlink(name)
        directory.remove()
