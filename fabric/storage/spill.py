"""The spill log: the on-disk continuation of retention. One log holds all feeds of a member.

    log = SpillLog.open(directory, limits)
    log.append([Entry(Kind.FEED, feed, incarnation, end, 0, b"its topic and policy"), burst, burst])
    log.read(feed, first).frame
    log.release(feed, below=acknowledged)           # whole segments leave, oldest first
    log.close()

A group of entries is appended whole or not at all. A disk that fails once gets a new segment, one that fails twice
is reported, and nothing that failed is ever written or synced again: after a failed fsync the kernel calls the pages
clean, and the next one would lie (PostgreSQL panics since 2018). One thread at a time uses it.
"""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from fabric.config import Spill
from fabric.errors import (
    ClosedError,
    InternalError,
    SpillBrokenError,
    SpillError,
    SpillFullError,
)
from fabric.storage.clock import steady_wall_ns
from fabric.storage.disk import OS_DISK, Directory, Disk, DiskFile
from fabric.storage.index import Contents, Place
from fabric.storage.reading import Reader
from fabric.storage.records import HEAD_BYTES, Entry, Header, Kind, Reason, encode_group, most_bytes, owned
from fabric.storage.recovering import Damage, Span, recover
from fabric.storage.segments import Segment, Shelf, take_lock, write_all

__all__ = ["Damage", "Entry", "Kind", "Reason", "Span", "SpillLog"]

_DIRTY_MAX = 64
"""Segments that wait for a sync with their files open; beyond it rotation syncs them. A descriptor that was closed
and opened again may not be told of a failed write."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class SpillLog:
    """An open spill log; `SpillLog.open` makes one."""

    def __init__(
        self,
        directory: Directory,
        lock: DiskFile,
        path: str,
        shelf: Shelf,
        limits: Spill,
        *,
        incarnation: int,
        keep_unsynced: bool,
        clock: Callable[[], int],
    ) -> None:
        self._directory, self._lock, self._path, self._shelf = directory, lock, path, shelf
        self._limits, self._incarnation, self._clock = limits, incarnation, clock
        self._contents = Contents()
        self._reader = Reader(self._contents, shelf)
        self._active: Segment | None = None
        self._begun = self._closed = False
        self._dirty: dict[int, Segment] = {}
        self._keep = keep_unsynced
        self._unsynced: list[Entry] = []
        self._adrift = False
        """Something that was not synced lies in a segment that never will be."""

    @classmethod
    def open(
        cls,
        directory: Path,
        limits: Spill,
        *,
        disk: Disk = OS_DISK,
        incarnation: int = 0,
        keep_unsynced: bool = False,
        clock: Callable[[], int] = steady_wall_ns,
        identity: Callable[[int], bytes] = os.urandom,
    ) -> SpillLog:
        """Lock a directory and find what is in it.

        Nothing of it is changed. The first append begins a new segment: a member that never spills takes no room, and
        what lies on a full disk can be read.

        Args:
            directory: Private, 0700; made if it is not there.
            limits: The settings.
            disk: The seam for faults.
            incarnation: Of the writer; stands in the entry that says it ended clean.
            keep_unsynced: For power safety: what is found is synced, and what is appended is held until it is synced,
                so that a failed sync can be mended.
            clock: Wall clock in nanoseconds: ages outlive a process.
            identity: So many random bytes.

        Raises:
            StateDirectoryError: the directory is not private, or cannot be used.
            SpillLockedError: somebody has it.
            SpillBrokenError: the disk failed.
        """
        opened, path = disk.enter(directory), str(directory)
        lock: DiskFile | None = None
        try:
            lock = take_lock(opened, path)
            shelf = Shelf(opened, path, limits, clock=clock, identity=identity, power=keep_unsynced)
            log = cls(
                opened, lock, path, shelf, limits, incarnation=incarnation, keep_unsynced=keep_unsynced, clock=clock
            )
            log._recover()
        except BaseException:
            if lock is not None:
                lock.close()
            opened.close()
            raise
        return log

    def _recover(self) -> None:
        segments: defaultdict[int, Segment] = defaultdict(Segment.unknown)

        def take(number: int, position: int, header: Header, entry: Entry | None) -> None:
            segment = segments[number]
            segment.number = number
            self._contents.note(segment, header, position, entry)

        try:
            for found in recover(self._directory, take, sync=self._keep):
                self._shelf.adopt(found, segments[found.number])
                self._reader.damage += found.damage
        except OSError as error:
            raise SpillBrokenError(f"it cannot be recovered: {error}", directory=self._path) from error

    # What is here.

    @property
    def bytes(self) -> int:
        """What the log takes on disk, preallocated room included."""
        return self._shelf.bytes

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return len(self._shelf)

    @property
    def entries(self) -> int:
        """How many bursts there are that are not released."""
        return self._contents.bursts

    @property
    def damage(self) -> Sequence[Damage]:
        """What was found damaged, in recovery or by `read`."""
        return tuple(self._reader.damage)

    @property
    def ended(self) -> frozenset[int]:
        """The incarnations that ended clean: what they wrote is all that they had to say."""
        return frozenset(self._contents.ended)

    @property
    def names(self) -> Mapping[int, Entry]:
        """The entry that names each feed."""
        return MappingProxyType(self._contents.names)

    def spans(self, feed: int) -> list[tuple[int, int]]:
        """The offsets of a feed that are here, as ranges."""
        return self._contents.spans(feed)

    def last_mention(self, feed: int) -> tuple[int, int]:
        """Segment and position of the last entry that tells where a feed ends; before all if there is none."""
        places = [(place.segment, place.position) for place in self.places(feed)][-1:]
        named = [(segment.number, 0) for segment in self._shelf if feed in segment.named]
        return max([(-1, 0), *places, *named])

    def end_of(self, feed: int) -> int:
        """Where a feed ends, as far as it was ever written here."""
        return self._contents.ends.get(feed, 0)

    def places(self, feed: int) -> Iterator[Place]:
        """The bursts of a feed that are not released, lowest first."""
        return self._contents.places(feed)

    def find(self, feed: int, offset: int) -> Span | None:
        """The burst that holds this offset."""
        place = self._contents.find(feed, offset)
        return Span(feed, place.first, place.end) if place is not None else None

    def recovered(self) -> Iterator[Entry]:
        """All bursts in the order of writing, read one at a time. A damaged one is left out and stands in `damage`."""
        return self._reader.all()

    def read(self, feed: int, first: int) -> Entry:
        """The burst that begins with this offset, verified.

        Raises:
            DamagedRecordError: it is not what was written.
        """
        self._check_open()
        return self._reader.read(feed, first)

    # Writing.

    def begin_life(self, incarnation: int) -> None:
        """From now on it is this incarnation that writes, and that ends when the log is closed."""
        self._incarnation = incarnation

    def append(self, entries: Sequence[Entry], *, hold: bool = True) -> None:
        """Write all of these or none; on return they can be read, and survive the death of this process.

        A feed is named before or with its first burst. Bursts of a feed do not overlap; one with the same first offset
        as an older one replaces it. Frames and payloads are not copied, unless they are kept for a sync.

        Args:
            entries: One group.
            hold: With `keep_unsynced`: whether to hold a copy until these are synced.

        Raises:
            SpillFullError: there is no room, by a ceiling or on the disk; nothing was taken.
            SpillBrokenError: the disk failed twice; nothing was taken.
        """
        self._check_open()
        if len(self._dirty) > _DIRTY_MAX:
            self.sync()
        hold = hold and self._keep
        if hold:
            entries = [owned(entry) for entry in entries]
        self._write(entries)
        if hold:
            self._unsynced += entries

    def _write(self, entries: Sequence[Entry]) -> None:
        failure: OSError | None = None
        for _ in range(2) if entries else ():
            try:
                self._write_once(entries)
            except OSError as error:
                failure = error
            else:
                return
        if failure is not None:
            raise self._failed(failure) from failure

    def _failed(self, error: OSError) -> SpillError:
        if error.errno in _FULL:
            return self._shelf.full(str(error))
        return SpillBrokenError(str(error), directory=self._path)

    def _write_once(self, entries: Sequence[Entry]) -> None:
        segment, group = self._placed(entries)
        parts, positions, end = encode_group(group, segment.seed, segment.used)
        try:
            assert segment.file is not None
            write_all(segment.file, parts, segment.used)
        except OSError:
            self._give_up(segment)
            raise
        segment.used = end
        self._dirty[segment.number] = segment
        self._contents.note_all(segment, group, positions)

    def _placed(self, entries: Sequence[Entry]) -> tuple[Segment, Sequence[Entry]]:
        """Where this group goes, and the group with the names that it needs there."""
        segment = self._active
        if segment is not None:
            group = self._named(entries, segment.named)
            fits = segment.used + most_bytes(group) <= segment.allocated
            if fits and not self._is_old(segment):
                return segment, group
        try:
            begun = self._rotate(entries)
        except (OSError, SpillFullError):
            if segment is None or segment is not self._active or not fits:
                raise
            return segment, group  # old, and the only one that there is room for
        return begun, self._named(entries, begun.named)

    def _is_old(self, segment: Segment) -> bool:
        return self._clock() - segment.created_ns >= self._limits.segment_age_s * 1e9

    def _named(self, entries: Sequence[Entry], named: set[int]) -> Sequence[Entry]:
        """The entries, and before them the names of feeds that this segment does not name yet."""
        feeds = {entry.feed for entry in entries}
        if feeds <= named:  # fast path
            return entries
        contents = self._contents
        needed = {entry.feed for entry in entries if entry.kind == Kind.BURST}
        if self._keep and not named:  # a new segment of a log that outlives this process: it says where each feed ended
            needed |= contents.names.keys()
        missing = sorted(needed - named - {entry.feed for entry in entries if entry.kind == Kind.FEED})
        unknown = [feed for feed in missing if feed not in contents.names]
        if unknown:
            raise InternalError(f"bursts of feeds that were never named: {unknown[:8]}")
        return [*(contents.names[feed]._replace(first=self.end_of(feed)) for feed in missing), *entries]

    def _rotate(self, entries: Sequence[Entry]) -> Segment:
        group = self._named(entries, set())
        try:
            segment = self._shelf.begin(HEAD_BYTES + most_bytes(group), first=not self._begun)
        except OSError:
            if self._shelf.newest() is not self._active:
                self._retire()  # a successor has its name, and says where this one ended
            raise
        self._retire()
        self._active, self._begun = segment, True
        self._shelf.prepare_spare()
        return segment

    def _retire(self) -> None:
        """Write no more to the active segment."""
        segment, self._active = self._active, None
        if segment is not None:
            self._shelf.seal(segment)
            if segment.number not in self._dirty:
                self._shelf.settle(segment)

    def _give_up(self, segment: Segment) -> None:
        """Never write or sync this segment again."""
        self._shelf.seal(segment)  # a disk that fails for a minute would fill its ceiling with unused room
        segment.bad = True
        if segment is self._active:
            self._active = None
        if self._dirty.pop(segment.number, None) is not None:
            self._adrift = True
        self._shelf.settle(segment)

    # Durability.

    def sync(self) -> None:
        """Return when everything that was appended survives a loss of power.

        A failed sync is never repeated on its segment. With `keep_unsynced` what may be lost is written and synced
        again elsewhere, once.

        Raises:
            SpillBrokenError: it is not durable. With `keep_unsynced` the next sync tries again, elsewhere.
            SpillFullError: the same, since there is no room to write it again.
        """
        self._check_open()
        failure = self._sync_dirty()
        if self._adrift and self._keep:
            self._write(self._unsynced)
            self._adrift = False
            failure = self._sync_dirty()
        if self._adrift:
            self._adrift = self._keep
            why = failure or "a segment went bad before it was synced"
            raise SpillBrokenError(str(why), directory=self._path) from failure
        self._unsynced.clear()

    def _sync_dirty(self) -> OSError | None:
        """Sync each segment that waits for it; what failed is adrift."""
        failure = None
        for segment in list(self._dirty.values()):
            assert segment.file is not None
            try:
                segment.file.sync()
            except OSError as error:
                self._give_up(segment)
                failure = error
                continue
            del self._dirty[segment.number]
            if segment is not self._active:
                self._shelf.settle(segment)
        return failure

    # Leaving.

    def forget(self, feed: int) -> None:
        """Nobody will ask about this feed again: it is not named in new segments."""
        self.release(feed, self.end_of(feed))
        self._contents.names.pop(feed, None)

    def release(self, feed: int, below: int) -> None:
        """Bursts of this feed that end at or below are not needed: delete the oldest segments that nobody needs.

        Raises:
            SpillBrokenError: a file could not be deleted; the next release tries again.
        """
        self._check_open()
        self._contents.release(feed, below)
        self._delete_unneeded()

    def discard(self, feed: int, firsts: Collection[int]) -> None:
        """These bursts are not needed, whatever lies before them. Raises as `release`."""
        self._check_open()
        self._contents.discard(feed, firsts, self._shelf)
        self._delete_unneeded()

    def held_up(self, feed: int) -> list[int]:
        """Where the bursts of this feed begin that alone keep the oldest segment of a log that is half full."""
        segment = self._shelf.oldest()
        if segment is None or self._is_last(segment) or 2 * self.bytes <= self._limits.bytes_max:
            return []
        return self._contents.alone(segment, feed)

    def _delete_unneeded(self) -> None:
        segment = self._shelf.oldest()
        while segment is not None and not (self._contents.is_needed(segment) or self._is_last(segment)):
            self._delete(segment)
            segment = self._shelf.oldest()

    def _is_last(self, segment: Segment) -> bool:
        """Whether it is written to, or says for a log that outlives this process where its feeds ended."""
        return segment is self._active or (self._keep and self._shelf.tells_ends(segment))

    def _delete(self, segment: Segment) -> None:
        self._dirty.pop(segment.number, None)
        try:
            self._shelf.delete(segment)
        except OSError as error:
            raise SpillBrokenError(f"a segment cannot be deleted: {error}", directory=self._path) from error

    def expire(self, now_ns: int) -> list[Span]:
        """Give up the oldest segments whose newest entry is older than `age_s`; what was lost by it and still needed.

        A segment is written to for at most `segment_age_s`.

        Raises:
            SpillBrokenError: a file could not be deleted; what it holds is still there.
        """
        self._check_open()
        age_ns = int((self._limits.age_s + self._limits.segment_age_s) * 1e9)
        lost: list[Span] = []
        segment = self._shelf.oldest()
        while segment is not None and segment.created_ns + age_ns <= now_ns:
            if self._keep and segment is self._shelf.newest():
                break
            try:
                self._delete(segment)
            except SpillBrokenError:
                if segment in self._shelf and not lost:
                    raise
                if segment in self._shelf:
                    break  # what is lost already must be told; the next call says that it cannot go on
            if segment is self._active:
                self._active = None
            lost += self._contents.forget(segment)
            segment = self._shelf.oldest()
        return lost

    # Ending.

    def close(self, *, clean: bool = True) -> None:
        """Say that this incarnation ended, sync, give back unused room and the lock. Twice is once.

        Args:
            clean: Without it nothing is said or synced: what was written may not be everything.

        Raises:
            SpillError: the end could not be written or synced. The log is closed all the same.
        """
        if self._closed:
            return
        try:
            if clean and self._begun:
                self.append([Entry(Kind.END, 0, self._incarnation, 0, 0, b"")])
                self._sync_at_end()
        finally:
            self._retire()
            self._shelf.discard_spare()
            self.abandon()

    def _sync_at_end(self) -> None:
        """Without `keep_unsynced` nobody was promised that what lies in a bad segment survives a loss of power."""
        if self._keep:
            self.sync()
        elif (failure := self._sync_dirty()) is not None:
            raise SpillBrokenError(str(failure), directory=self._path) from failure

    def destroy(self) -> None:
        """Remove all of it, oldest first, and close. Twice is once, and a closed log is left as it is.

        Raises:
            SpillBrokenError: a file could not be deleted. The log is closed all the same.
        """
        if self._closed:
            return
        try:
            for segment in list(self._shelf):
                self._delete(segment)
            self._shelf.discard_spare()
            self._shelf.remove_rest()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close all descriptors and touch nothing: what a forked child does. The parent's lock is not ours to lose."""
        self._closed = True
        self._active = None
        self._shelf.close()
        self._lock.close()
        self._directory.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(what="the spill log")
