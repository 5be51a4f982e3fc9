"""What a member keeps between its lives: which life it is at, its spill log, and who is owed what is in it.

    state = MemberState.open(directory, limits, name="rank-0", boot=boot_id)
    state.incarnation                # of the life that begins; on disk before this returns (RULES N1)
    state.feeds()                    # what earlier lives left
    state.log.append(...); state.save_registrations(blob)
    state.close()

The directory belongs to one process at a time: the log's lock is the lock of all of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_64_hexdigest

from fabric.config import Spill
from fabric.errors import SpillBrokenError, StateDirectoryError
from fabric.storage.disk import OS_DISK, Directory, Disk
from fabric.storage.recovering import Damage
from fabric.storage.segments import write_all
from fabric.storage.spill import SpillLog

__all__ = ["LETTERS", "LETTERS_FEED", "FeedName", "KeptFeed", "MemberState", "read_owner"]

log = logging.getLogger("fabric.storage")

LIFE, REGISTRATIONS = "life", "registrations"
LETTERS = "letters"
"""The directory of the dead letters; it is not there without any."""
LETTERS_FEED = 2**64 - 1
"""Under which a log keeps the large values of dead letters, each at the number of its letter. Feeds of members are
hashes: this one is as unlikely among them as any."""
_NEW = ".new"
_FILE_BYTES_MAX = 256 * 1024 * 1024
"""Ten million positions of subscriptions in feeds; what is larger is none of ours."""
_SUM_BYTES = 16
"""A file ends with the XXH3-64 of what comes before, in hexadecimal."""
FEEDS_REMEMBERED_MAX = 4096
"""Ends of past feeds of which no record is left, for subscribers that come back late; the oldest give way."""


class FeedName(NamedTuple):
    """What the log says of a feed besides its number: the body of the entry that names it."""

    topic: str
    policy: str
    sync: str
    """What a durable feed survives, `process` or `power`. `closed` for another one, once its member closed and the log
    has all that it owed. Empty until then."""

    def encode(self) -> bytes:
        """Its bytes; none of the three holds a zero."""
        return "\0".join(self).encode()

    @classmethod
    def decode(cls, data: bytes) -> FeedName:
        """The name in these bytes, which the log has verified. Older logs named the topic alone."""
        topic, policy, sync = (*bytes(data).decode(errors="replace").split("\0"), "reliable", "")[:3]
        return cls(topic, policy, sync)


class KeptFeed(NamedTuple):
    """A feed of an earlier life."""

    feed: int
    incarnation: int
    name: FeedName
    end: int
    exact: bool
    """Whether it ended there for certain (RULES P7)."""
    bursts: tuple[tuple[int, int, int], ...]
    """First offset, end, and size in bytes of what is left, lowest first."""


class MemberState:
    """The state of one member, open; `MemberState.open` makes one. One thread at a time uses it."""

    def __init__(self, directory: Directory, path: str, log: SpillLog, boot: str) -> None:
        self._directory, self._path, self.log, self._boot = directory, path, log, boot
        self.incarnation = 0
        self._doubtful: set[int] = set()
        """Lives that ended with the power, or of which that is not known: only what was synced is certain."""
        self.registrations: bytes | None = b""
        """What the last life saved; empty if nothing, None if it cannot be read."""
        self.kept = True
        """Whether the directory stays when nothing is owed from it."""
        self.is_adopted = False
        """Whether its member is not expected back: who may come for more is owed no more than what lies here."""
        self._is_owed = False

    @classmethod
    def open(
        cls,
        directory: Path,
        limits: Spill,
        *,
        name: str,
        boot: str,
        disk: Disk = OS_DISK,
        wall_ns: Callable[[], int] = time.time_ns,
        **options: Any,  # noqa: ANN401 - the log's own
    ) -> MemberState:
        """Take the directory and begin a life.

        Args:
            directory: Private, 0700; made if it is not there.
            limits: The settings of the log.
            name: Of the member, for whoever looks for orphans.
            boot: The kernel's boot id: what a process wrote outlives it only as long as the kernel does.
            disk: The seam for faults.
            wall_ns: Wall clock in nanoseconds.
            options: For `SpillLog.open`.

        Raises:
            StateDirectoryError: the directory is not private, cannot be used, or is another member's.
            SpillLockedError: its last owner lives.
            SpillBrokenError: the disk failed.
        """
        path = str(directory)
        log = SpillLog.open(directory, limits, disk=disk, keep_unsynced=True, clock=wall_ns, **options)
        try:
            state = cls(disk.enter(directory), path, log, boot)
        except BaseException:
            log.abandon()
            raise
        try:
            state._begin(name, wall_ns())
        except BaseException as error:
            state.abandon()
            if isinstance(error, OSError):
                raise SpillBrokenError(f"a new life cannot begin: {error}", directory=path) from error
            raise
        return state

    def _begin(self, name: str, now_ns: int) -> None:
        lives = {entry.incarnation for entry in self.log.names.values()}
        last = self._last_life(name)
        if last is None:
            self._doubtful = lives
            stored = max(lives, default=0)
        else:
            stored = last["incarnation"]
            self._doubtful = set(last["doubtful"]) & lives
            if last["boot"] != self._boot:
                self._doubtful.add(stored)
        self.registrations = _summed(self._read(REGISTRATIONS))
        if self.registrations is None:
            log.error("who is owed what cannot be read in %s: all of it is kept for a while", self._path)
        self._is_owed = self.registrations != b""  # until this life saves what it knows
        self.incarnation = max(stored + 1, now_ns)
        self.log.begin_life(self.incarnation)
        life = {"name": name, "incarnation": self.incarnation, "boot": self._boot, "doubtful": sorted(self._doubtful)}
        self._put(LIFE, json.dumps(life).encode())

    def _last_life(self, name: str) -> dict[str, Any] | None:
        data = self._read(LIFE)
        last = _checked_life(data)
        if last is None and data:
            log.error("which life was the last cannot be read in %s: the ends of its feeds are not certain", self._path)
        if last is not None and last["name"] != name:
            raise StateDirectoryError(f"it is the state of {last['name']}, not of {name}", directory=self._path)
        return last

    # What earlier lives left.

    def feeds(self) -> list[KeptFeed]:
        """The feeds of earlier lives, oldest first; of those without any record left only the latest."""
        kept = sorted(self._kept(), key=lambda feed: (feed.incarnation, feed.feed))
        empty = [feed for feed in kept if not feed.bursts]
        for feed in empty[:-FEEDS_REMEMBERED_MAX]:
            self.log.forget(feed.feed)
            kept.remove(feed)
        return kept

    def _kept(self) -> Iterator[KeptFeed]:
        for feed, entry in self.log.names.items():
            if entry.incarnation == self.incarnation or feed == LETTERS_FEED:
                continue
            name = FeedName.decode(bytes(entry.frame))
            is_certain = self._is_certain(entry.incarnation, name)
            damage = [one for one in self.log.damage if not self._was_never_taken(one, entry.incarnation, name)]
            ends = [one.lost.end for one in damage if one.lost is not None and one.lost.feed == feed]
            mention = self.log.last_mention(feed)
            unknown = any(one.lost is None and (one.segment, one.position) > mention for one in damage)
            bursts = tuple((place.first, place.end, place.size) for place in self.log.places(feed))
            end = max([self.log.end_of(feed), *ends])
            yield KeptFeed(feed, entry.incarnation, name, end, is_certain and not unknown, bursts)

    def _is_certain(self, incarnation: int, name: FeedName) -> bool:
        """What is written before it is sent ends where the log ends; what was written down at a close, too."""
        if name.policy != "durable" and name.sync != "closed":
            return False
        return name.sync == "power" or incarnation not in self._doubtful or incarnation in self.log.ended

    def _was_never_taken(self, damage: Damage, incarnation: int, name: FeedName) -> bool:
        """Whether a write was cut short here, so that nobody was told that it worked."""
        return damage.torn and (damage.cut or (name.sync == "power" and incarnation in self._doubtful))

    # Files beside the log.

    def save_registrations(self, blob: bytes, *, outlives: bool = True) -> None:
        """Replace what was saved before; on return it survives a loss of power.

        Args:
            blob: The core's.
            outlives: Whether some of them have names, and so outlive a clean end.

        Raises:
            SpillBrokenError: the disk failed; what was saved before is still there.
        """
        self._is_owed = outlives
        if len(blob) > _FILE_BYTES_MAX:
            raise SpillBrokenError(f"who is owed what takes {len(blob)} bytes", directory=self._path)
        try:
            self._put(REGISTRATIONS, blob)
        except OSError as error:
            raise SpillBrokenError(f"who is owed what cannot be written: {error}", directory=self._path) from error

    def _put(self, name: str, data: bytes) -> None:
        with contextlib.closing(self._directory.open(name + _NEW, create=True)) as file:
            file.truncate(0)
            write_all(file, [data, xxh3_64_hexdigest(data).encode()], 0)
            file.sync()
        self._directory.rename(name + _NEW, name)
        self._directory.sync()

    def _read(self, name: str) -> bytes:
        return _read(self._directory, name)

    def require_directory(self) -> None:
        """Raises `SpillBrokenError` if somebody removed it: what is written there ends with this process."""
        if not self._directory.is_there():
            raise SpillBrokenError("somebody removed it", directory=self._path)

    # Ending.

    def close(self) -> None:
        """End this life clean. Twice is once. A directory that is not `kept` is removed if nothing is owed from it.

        Raises:
            SpillError: the end could not be written or synced, or a file could not be deleted. All is closed the same.
        """
        try:
            is_awaited = self._is_owed and not self.is_adopted
            if self.kept or self.log.entries or is_awaited or LETTERS in self._directory.names():
                self.log.close()
            else:
                self._destroy()
        finally:
            self._directory.close()

    def _destroy(self) -> None:
        try:
            for name in {LIFE, REGISTRATIONS} & set(self._directory.names()):
                self._directory.unlink(name)
        except OSError as error:
            raise SpillBrokenError(f"it cannot be removed: {error}", directory=self._path) from error
        self.log.destroy()

    def abandon(self) -> None:
        """Close all descriptors and touch nothing: what a forked child does."""
        self.log.abandon()
        self._directory.close()


def _read(directory: Directory, name: str) -> bytes:
    """Empty if it is not there. Raises `OSError`: what cannot be read now may be there all the same."""
    if name not in directory.names():
        return b""
    with contextlib.closing(directory.open(name)) as file:
        return file.read(0, min(file.size(), _FILE_BYTES_MAX + _SUM_BYTES))


def _summed(data: bytes) -> bytes | None:
    """What stands before the checksum; None if that is not right. Nothing has none."""
    body = data[:-_SUM_BYTES]
    return body if not data or data[-_SUM_BYTES:] == xxh3_64_hexdigest(body).encode() else None


def _checked_life(data: bytes) -> dict[str, Any] | None:
    try:
        life = json.loads(_summed(data) or b"")
        incarnation, doubtful = life["incarnation"], life["doubtful"]
        sound = isinstance(life["boot"], str) and isinstance(life["name"], str) and isinstance(doubtful, list)
        sound = sound and all(type(number) is int and 0 < number < 2**63 for number in (incarnation, *doubtful))
    except (ValueError, KeyError, TypeError):
        return None
    return life if sound else None


def read_owner(directory: Path, *, disk: Disk = OS_DISK) -> str | None:
    """The name of the member whose state lies here; None if it is no such directory."""
    try:
        with contextlib.closing(disk.enter(directory)) as opened:
            life = _checked_life(_read(opened, LIFE))
    except (StateDirectoryError, OSError):
        return None
    return life["name"] if life is not None else None
