"""Cards of running members in this user's runtime directory, where observers of the same host find them.

A member announces itself when it has joined and withdraws when it leaves. What a killed process leaves behind is
recognised by its process id and start, ignored, and swept by the next who looks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fabric.errors import RendezvousError
from fabric.rendezvous.cards import CARD_BYTES_MAX, Card
from fabric.rendezvous.files import digest, private_directory, read_small, remove, write_whole
from fabric.rendezvous.lives import Life, is_dead

__all__ = ["announce", "find", "runtime_directory", "withdraw"]

_FILE_BYTES_MAX = CARD_BYTES_MAX + 512
_JOBS_MAX = 1024
_CARDS_MAX = 4096


def runtime_directory() -> Path:
    """The private directory of this user's members on this host, made if missing.

    `$XDG_RUNTIME_DIR/tensor-fabric` if that is ours, else `tensor-fabric-<uid>` in the directory for temporary files.

    Raises:
        RendezvousError: It cannot be made, is a link, belongs to another user, or others may enter it.
    """
    given = Path(os.environ.get("XDG_RUNTIME_DIR") or "-")
    # Under sudo the variable often still names the caller's directory.
    if given.is_absolute() and _is_ours(given):
        return private_directory(given / "tensor-fabric")
    return private_directory(Path(tempfile.gettempdir()) / f"tensor-fabric-{os.geteuid()}")


def announce(card: Card, *, directory: Path | None = None) -> None:
    """Put our card where observers of this host look.

    Raises:
        RendezvousError: It cannot be written.
    """
    life = Life.of(card.pid)
    fields = {"card": json.loads(card.to_json())} | ({"life": asdict(life)} if life else {})
    root = runtime_directory() if directory is None else private_directory(directory)
    private_directory(root / "cards")
    write_whole(_path(root, card), json.dumps(fields, separators=(",", ":")))


def withdraw(card: Card, *, directory: Path | None = None) -> None:
    """Take our card away again. Idempotent.

    Raises:
        RendezvousError: The runtime directory cannot be used.
    """
    remove(_path(runtime_directory() if directory is None else directory, card))


def find(job: str | None = None, *, host: str | None = None, directory: Path | None = None) -> list[Card]:
    """The cards of living members, by job, rank (observers last) and name: of one job or of all, of one host or of all.

    At most 4,096 files of 1,024 jobs are read. Malformed ones are skipped, those of dead processes removed.

    Raises:
        RendezvousError: The runtime directory cannot be used.
    """
    root = runtime_directory() if directory is None else directory
    newest: dict[tuple[str, str], Card] = {}
    for card in _living(root / "cards", job):
        wanted = job in (None, card.job) and host in (None, card.host)
        known = newest.get((card.job, card.name))
        if wanted and (known is None or known.incarnation < card.incarnation):
            newest[card.job, card.name] = card
    return sorted(newest.values(), key=_order)


def _order(card: Card) -> tuple[str, int, str]:
    return card.job, card.world_size if card.rank is None else card.rank, card.name


def _living(cards: Path, job: str | None) -> Iterator[Card]:
    jobs = [cards / digest(job)] if job is not None else _names(cards, _JOBS_MAX)
    paths = (path for folder in jobs for path in _names(folder, _CARDS_MAX))
    for path in itertools.islice(paths, _CARDS_MAX):
        with contextlib.suppress(RendezvousError):  # a malformed card is nobody's
            found = _read(path)
            if found is None:
                continue
            card, life = found
            if is_dead(card, life):
                remove(path)
            else:
                yield card


def _names(folder: Path, limit: int) -> list[Path]:
    """What stands in a directory of ours, sorted, at most `limit`; temporary files are left out."""
    if not _is_ours(folder):
        return []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found:
        names = itertools.islice((entry.name for entry in found if not entry.name.startswith(".")), limit)
        return [folder / name for name in sorted(names)]
    return []


def _is_ours(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid()


def _read(path: Path) -> tuple[Card, Life | None] | None:
    data = read_small(path, _FILE_BYTES_MAX)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RendezvousError("its file is not JSON") from error
    if not isinstance(found, dict):
        raise RendezvousError("its file is malformed")
    return Card.from_fields(found.get("card")), Life.from_fields(found.get("life"))


def _path(root: Path, card: Card) -> Path:
    """Names by digest: what a peer calls itself never becomes a path."""
    return root / "cards" / digest(card.job) / f"{digest(card.name, str(card.incarnation))}.json"
