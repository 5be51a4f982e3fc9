"""The segment files of one directory: made, written, closed, deleted; their ceilings, and the spare one."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fabric.config import Spill
from fabric.errors import SpillBrokenError, SpillFullError, SpillLockedError, StateDirectoryError
from fabric.storage.disk import IOV_MAX, Bytes, Directory, DiskFile
from fabric.storage.records import HEAD_BYTES, SegmentHead, encode_head
from fabric.storage.recovering import Found, segment_name

__all__ = ["LOCK", "Segment", "Shelf", "take_lock", "write_all"]

LOCK = "lock"

SPARE = "spare"
"""The next segment, its blocks allocated already: a full disk is met at rotation, not inside a record."""
_OPEN_MAX = 32
"""Sealed segments kept open for reading. Rotation by age makes 1,440 a day, descriptors often end at 1,024."""


@dataclass(slots=True, eq=False)
class Segment:
    """One segment."""

    number: int
    seed: int
    created_ns: int
    used: int
    """Where its last entry that counts ends."""
    allocated: int
    """What it takes on disk."""
    file: DiskFile | None = None
    bad: bool = False
    """A write or sync failed: it is never written or synced again. What it holds stays readable."""
    ends: dict[int, int] = field(default_factory=dict)
    """Of each feed that has bursts here, where the last one ends."""
    named: set[int] = field(default_factory=set)
    """The feeds that are named here: every segment can be understood without the ones before it."""
    witness: int = -1
    """A feed that needed this segment when we last looked."""

    @classmethod
    def unknown(cls) -> Segment:
        """One that recovery has just met."""
        return cls(number=0, seed=0, created_ns=0, used=0, allocated=0)


def write_all(file: DiskFile, parts: Sequence[Bytes], position: int) -> None:
    """Write all parts, and go on after a short write.

    Raises:
        OSError: it did not work; some bytes may be written.
    """
    for begin in range(0, len(parts), IOV_MAX):
        chunk = parts[begin : begin + IOV_MAX]
        size = sum(map(len, chunk))
        written = file.write(chunk, position)
        if written < size:
            _finish(file, chunk, position, written)
        position += size


def _finish(file: DiskFile, parts: Sequence[Bytes], position: int, written: int) -> None:
    """The rest after a short write, part by part: the next call may be as short, or say why."""
    for part in parts:
        view = memoryview(part)
        while written < len(view):
            more = file.write([view[written:]], position + written)
            if more <= 0:
                raise OSError(errno.EIO, "the disk takes no more")
            written += more
        written -= len(view)
        position += len(view)


class Shelf:
    """The segments of one log, oldest first."""

    __slots__ = (
        "_by_number",
        "_clock",
        "_directory",
        "_identity",
        "_limits",
        "_next",
        "_opened",
        "_path",
        "_power",
        "_spare",
        "_spare_bytes",
        "bytes",
    )

    def __init__(
        self,
        directory: Directory,
        path: str,
        limits: Spill,
        *,
        clock: Callable[[], int],
        identity: Callable[[int], bytes],
        power: bool,
    ) -> None:
        self._directory, self._path, self._limits = directory, path, limits
        self._clock, self._identity, self._power = clock, identity, power
        self._by_number: dict[int, Segment] = {}
        self._opened: dict[int, DiskFile] = {}
        self._next = 0
        self._spare: DiskFile | None = None
        self._spare_bytes = 0
        self.bytes = 0
        """What all files take on disk, preallocated room included."""

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._by_number.values())

    def __len__(self) -> int:
        return len(self._by_number)

    def __getitem__(self, number: int) -> Segment:
        return self._by_number[number]

    def oldest(self) -> Segment | None:
        """The first that is there."""
        return next(iter(self), None)

    def newest(self) -> Segment | None:
        """The last that is there."""
        return next(reversed(self._by_number.values()), None)

    def tells_ends(self, segment: Segment) -> bool:
        """Whether it is the newest, or the newest that names feeds, or of those that are not bad.

        One that was begun by a write that failed names nothing, and one that was given up may be torn.
        """
        named = [other for other in self if other.named]
        good = [other for other in named if not other.bad]
        return segment in (self.newest(), *named[-1:], *good[-1:])

    def adopt(self, found: Found, segment: Segment) -> None:
        """Take over what recovery found."""
        head = found.head
        segment.number = found.number
        segment.seed = head.seed if head else 0
        segment.created_ns = head.created_ns if head else self._clock()
        segment.used, segment.allocated = found.end, found.allocated
        self._add(segment)
        self.bytes += segment.allocated

    def _add(self, segment: Segment) -> None:
        self._by_number[segment.number] = segment
        self._next = segment.number + 1

    # Making.

    def begin(self, size: int, *, first: bool) -> Segment:
        """A new segment with room for so many bytes, open for writing.

        Raises:
            SpillFullError: a ceiling forbids it; nothing was written.
            OSError: the disk does.
        """
        size = max(size, self._limits.segment_bytes)
        self._prepare(size)
        file, number, last = self._spare, self._next, self.newest()
        assert file is not None
        identity = self._identity(16)
        head = SegmentHead(
            number=number,
            created_ns=self._clock(),
            identity=identity,
            previous_end=last.used if last else 0,
            first=first,
        )
        try:
            write_all(file, [encode_head(head)], 0)
            if self._power:
                # A segment that has its name has its head: without it nothing in it could be verified. 1 to 4 ms of
                # the 11 to 20 that 64 MiB take into the page cache, so only where power safety is asked for.
                file.sync()
            self._directory.rename(SPARE, segment_name(number))
        except OSError:
            self.discard_spare()
            raise
        segment = Segment(number, head.seed, head.created_ns, HEAD_BYTES, self._spare_bytes, file)
        self._spare, self._spare_bytes = None, 0
        self._add(segment)
        try:
            self._directory.sync()
        except OSError:
            segment.bad = True
            self.settle(segment)
            raise
        return segment

    def prepare_spare(self) -> None:
        """Allocate the next segment, if there is room. If there is none, the next rotation will say so."""
        with contextlib.suppress(OSError, SpillFullError):
            self._prepare(self._limits.segment_bytes)

    def _prepare(self, size: int) -> None:
        more = size - self._spare_bytes
        if more <= 0:
            return
        self._check_ceilings(more)
        try:
            if self._spare is None:
                with contextlib.suppress(FileNotFoundError):
                    self._directory.unlink(SPARE)  # of an earlier life
                self._spare = self._directory.open(SPARE, create=True)
            self._spare.allocate(size)
        except OSError:
            self.discard_spare()
            raise
        self._spare_bytes = size
        self.bytes += more

    def _check_ceilings(self, more: int) -> None:
        limits = self._limits
        if self.bytes + more > limits.bytes_max:
            raise self.full(f"bytes_max is {limits.bytes_max}")
        free = self._directory.free_bytes()
        if free - more < limits.free_bytes_min:
            raise self.full(f"free_bytes_min is {limits.free_bytes_min}, {free} bytes are free")

    def full(self, why: str) -> SpillFullError:
        """The error that says so."""
        return SpillFullError(why, directory=self._path, used=self.bytes)

    def discard_spare(self) -> None:
        """Give the spare back, or what there is of it."""
        spare, self._spare = self._spare, None
        if spare is None:
            return
        with contextlib.suppress(OSError):
            spare.close()
        with contextlib.suppress(OSError):
            self._directory.unlink(SPARE)
        self.bytes -= self._spare_bytes
        self._spare_bytes = 0

    # Using.

    def seal(self, segment: Segment) -> None:
        """Nothing more is written to it: give back the room that it did not use."""
        assert segment.file is not None and not segment.bad
        with contextlib.suppress(OSError):  # then it takes the room until it is deleted, and is counted so
            segment.file.truncate(segment.used)
            self.bytes -= segment.allocated - segment.used
            segment.allocated = segment.used

    def settle(self, segment: Segment) -> None:
        """Nothing of it waits for a sync: close it, if many are open."""
        assert segment.file is not None
        self._opened[segment.number], segment.file = segment.file, None
        self._close_many()

    def file(self, segment: Segment) -> DiskFile:
        """The segment, open for reading."""
        if segment.file is not None:
            return segment.file
        file = self._opened.pop(segment.number, None) or self._directory.open(segment_name(segment.number))
        self._opened[segment.number] = file  # the last one used stands last
        self._close_many()
        return file

    def _close_many(self) -> None:
        while len(self._opened) > _OPEN_MAX:
            file = self._opened.pop(next(iter(self._opened)))
            with contextlib.suppress(OSError):
                file.close()

    def delete(self, segment: Segment) -> None:
        """Remove a segment, for good when this returns.

        One directory sync each: a crash between two deletions must not leave a hole that looks like a loss.
        """
        self._directory.unlink(segment_name(segment.number))
        del self._by_number[segment.number]
        self.bytes -= segment.allocated
        for file in (segment.file, self._opened.pop(segment.number, None)):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._directory.sync()

    def remove_rest(self) -> None:
        """Remove the lock, and the directory if it is empty then. Raises `SpillBrokenError`."""
        try:
            self._directory.unlink(LOCK)
            if not self._directory.names():
                self._directory.remove()
        except OSError as error:
            raise SpillBrokenError(f"it cannot be removed: {error}", directory=self._path) from error

    def close(self) -> None:
        """Close all files; nothing is written."""
        files = [*self._opened.values(), self._spare, *(segment.file for segment in self)]
        for file in files:
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._opened.clear()
        for segment in self:
            segment.file = None
        self._spare = None


def take_lock(directory: Directory, path: str) -> DiskFile:
    """The lock of a directory, ours."""
    file: DiskFile | None = None
    try:
        file = directory.open(LOCK, create=True)
        file.lock()
        if SPARE in directory.names():
            directory.unlink(SPARE)  # of an earlier life; it was never more than room
    except OSError as error:
        if file is not None:
            file.close()
        if isinstance(error, BlockingIOError):
            raise SpillLockedError(directory=path) from error
        raise StateDirectoryError(error.strerror or str(error), directory=path) from error
    return file
