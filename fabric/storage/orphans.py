"""State that nobody has open: of members that died and did not come back, or left and may yet.

What they owed lies there until they begin again, or another member adopts it.
"""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from pathlib import Path

from fabric.errors import SpillError
from fabric.storage.disk import OS_DISK, Directory
from fabric.storage.recovering import segment_number
from fabric.storage.segments import LOCK
from fabric.storage.state import read_owner

__all__ = ["Orphan", "find_orphans"]

log = logging.getLogger("fabric.storage")


@dataclass(frozen=True, slots=True)
class Orphan:
    """The state of one member.

    `bytes`: what its log takes on disk, with room that is not used yet, and some of it settled; only who adopts it
    learns how much is owed.
    """

    name: str
    """Of the member, `rank-3` for a rank."""
    bytes: int


def find_orphans(home: Path) -> list[Orphan]:
    """The states under a directory that nobody has open, by name. Nothing of them is changed or locked.

    What cannot be looked at is left out with a warning, and so is a member that is beginning or ending just now.
    """
    if not home.is_dir():  # looking makes nothing
        return []
    try:
        with contextlib.closing(OS_DISK.enter(home)) as opened:
            names = opened.names()
    except (SpillError, OSError) as error:
        log.warning("what members left in %s cannot be listed: %s", home, error)
        return []
    found = (_look(home / name) for name in names if name.startswith("member-"))
    return sorted((orphan for orphan in found if orphan is not None), key=lambda orphan: orphan.name)


def _look(directory: Path) -> Orphan | None:
    name = read_owner(directory)
    if name is None:
        return None
    try:
        with contextlib.closing(OS_DISK.enter(directory)) as opened:
            files = opened.names()
            if _is_open(opened):
                return None
            size = sum(_size(opened, file) for file in files if segment_number(file) is not None)
    except (SpillError, OSError) as error:
        log.warning("the state of %s in %s cannot be looked at: %s", name, directory, error)
        return None
    return Orphan(name, size)


def _is_open(directory: Directory) -> bool:
    try:
        with contextlib.closing(directory.open(LOCK)) as lock:
            return lock.is_locked()
    except BlockingIOError:
        return True  # by this process


def _size(directory: Directory, name: str) -> int:
    with contextlib.closing(directory.open(name)) as file:
        return file.size()
