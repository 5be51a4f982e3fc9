"""Meeting in a directory that all ranks can reach: `file:///shared/dir`.

Each job has a private subdirectory, named by a digest of job and restart count; each rank has one file there,
`rank-3.json`, that it replaces as a whole. Needs a file system on which a rename is seen by the
other hosts (NFS does, within its attribute cache: some seconds).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar

from fabric.errors import RendezvousError
from fabric.rendezvous.boards import Entry, entry_bytes_max
from fabric.rendezvous.cards import Card
from fabric.rendezvous.files import digest, private_directory, read_small, remove, write_whole
from fabric.rendezvous.identity import Identity
from fabric.rendezvous.lives import Life, is_dead

__all__ = ["FileBoard"]

_LIFE_BYTES_MAX = 256


class FileBoard:
    """Entries as files. What a dead process of this host left behind does not count; its own last word does."""

    kept: ClassVar[bool] = True

    def __init__(self, directory: Path, identity: Identity) -> None:
        self._identity = identity
        self._directory = directory / f"tensor-fabric-{digest(identity.job, str(identity.restart_count))}"
        self._limit = entry_bytes_max(identity.world_size) + _LIFE_BYTES_MAX
        self._closed = False

    def open(self, timeout_s: float) -> None:
        """Make our subdirectory, private."""
        private_directory(self._directory)

    def post(self, entry: Entry) -> None:
        """Put up our entry unless a newer incarnation of our rank is there."""
        assert entry.card.rank is not None
        path = self._path(entry.card.rank)
        with contextlib.suppress(RendezvousError):  # what cannot be read is replaced
            there = self._entry(path)
            if there is not None and there[0].card.incarnation > entry.card.incarnation:
                return
        life = Life.of(entry.card.pid)
        fields = entry.to_fields() | ({"life": asdict(life)} if life else {})
        write_whole(path, json.dumps(fields, separators=(",", ":")))

    def read(self, ranks: Iterable[int]) -> tuple[dict[int, Entry], dict[int, str]]:
        """The entries of these ranks as far as they are there and alive; and why one cannot be read."""
        entries: dict[int, Entry] = {}
        refused: dict[int, str] = {}
        for rank in ranks:
            try:
                found = self._entry(self._path(rank))
            except RendezvousError as error:
                refused[rank] = error.detail
                continue
            if found is None:
                continue
            entry, life = found
            if not entry.left and is_dead(entry.card, life):
                refused[rank] = f"process {entry.card.pid} has died"
            else:
                entries[rank] = entry
        return entries, refused

    def wait(self, seconds: float) -> None:
        """No file system tells other hosts of a change; sleep."""
        time.sleep(seconds)

    def met(self, cards: Mapping[int, Card]) -> None:
        """Nothing to do."""

    def close(self, entry: Entry | None) -> None:
        """Leave our last word; the last to leave tidies the subdirectory away."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(RendezvousError):  # leaving must not fail; a file that stays is recognised as old
            if entry is not None:
                self.post(entry)
                self._tidy()

    def _tidy(self) -> None:
        """Remove all files if everyone who is not dead has left; a rank that comes meanwhile puts its own up again."""
        ranks = range(self._identity.world_size)
        entries, _ = self.read(ranks)
        if all(entry.left for entry in entries.values()):
            for rank in ranks:
                remove(self._path(rank))

    def _entry(self, path: Path) -> tuple[Entry, Life | None] | None:
        data = read_small(path, self._limit)
        if data is None:
            return None
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise RendezvousError("its file is not JSON") from error
        entry = Entry.from_fields(found)
        return entry, Life.from_fields(found.get("life"))

    def _path(self, rank: int) -> Path:
        return self._directory / f"rank-{rank}.json"
