"""What is in a spill directory after whatever ended its last owner: good entries, damage, and which lives ended clean.

Reads only. Nothing is repaired in place: the next segment's head says where the last one ended, so that what a crash
cut short lies behind the end for good, and a recovery that is itself cut short has changed nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fabric.storage.disk import Directory, DiskFile
from fabric.storage.records import (
    ENTRY_BYTES,
    HEAD_BYTES,
    Bad,
    Entry,
    Good,
    Header,
    Kind,
    MalformedEntryError,
    Read,
    Reason,
    SegmentHead,
    decode_head,
    read_entry,
    scan,
)

__all__ = ["Damage", "Found", "Span", "recover", "segment_name", "segment_number"]

_PREFIX, _SUFFIX = "seg-", ".log"
_NUMBER_END = 2**63
_PAGE = 4096
"""A write that a signal ends has written whole pages."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Offsets of a feed: first <= offset < end."""

    feed: int
    first: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A range of a segment that holds no whole entry. The file is kept."""

    segment: int
    position: int
    size: int
    reason: Reason
    lost: Span | None = None
    """What stood there: known if its header still stands and it was a burst."""
    after: Span | None = None
    """The last good burst before it in its segment ..."""
    before: Span | None = None
    """... and the first one behind it."""
    torn: bool = False
    """Nothing good stands behind it, and its writer's life ended there: it may never have been written whole."""
    cut: bool = False
    """It ends in zeros from a page on, as a write does that its process did not live to end. With `torn`, and unless
    power was lost, that tells a record that was never taken from one that the disk damaged."""


@dataclass(slots=True)
class Found:
    """One segment."""

    number: int
    head: SegmentHead | None
    allocated: int
    """Size of the file."""
    end: int
    """Where what was written ends."""
    damage: list[Damage] = field(default_factory=list)


Take: TypeAlias = Callable[[int, int, Header, Entry | None], None]
"""What is done with a good entry: segment, position, header, and the entry itself if it names a feed."""


def segment_name(number: int) -> str:
    """As in `seg-000000000000002a.log`."""
    return f"{_PREFIX}{number:016x}{_SUFFIX}"


def segment_number(name: str) -> int | None:
    """The number in a name that we gave; None of any other, which is not ours to touch."""
    digits = name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    try:
        number = int(digits, 16)
    except ValueError:
        return None
    return number if number < _NUMBER_END and name == segment_name(number) else None


@dataclass(slots=True)
class _Opened:
    number: int
    file: DiskFile
    head: SegmentHead | None
    bad_heads: list[int]


def recover(directory: Directory, take: Take, *, sync: bool = False) -> Iterator[Found]:
    """The segments of a directory, oldest first, each read once; with `sync` what is found is then durable.

    A process that died left its last writes to the kernel: who builds on them must know that they stay.
    """
    numbers = sorted(number for name in directory.names() if (number := segment_number(name)) is not None)
    current: _Opened | None = None
    try:
        for number in numbers:
            file = directory.open(segment_name(number))
            previous, current = current, _Opened(number, file, *decode_head(_read_head(file)))
            if previous is not None:
                with closing(previous.file):
                    yield _examine(previous, current, take)
                    if sync:
                        previous.file.sync()
        if current is not None:
            yield _examine(current, None, take)
            if sync:
                current.file.sync()
    finally:
        if current is not None:
            current.file.close()


def _read_head(file: DiskFile) -> bytes:
    try:
        return file.read(0, HEAD_BYTES)
    except OSError:
        return b""  # unreadable is as good as damaged, and is reported as such


def _examine(opened: _Opened, successor: _Opened | None, take: Take) -> Found:
    """Scan one segment; its successor says where it ends."""
    size, head = opened.file.size(), opened.head
    found = Found(opened.number, head, size, size)
    ends_life = successor is None or bool(successor.head and successor.head.first)
    follows = successor is not None and successor.number == opened.number + 1
    writer = _Reporter(opened.number, ends_life)
    if head is None:
        writer.bad(Bad(0, size, Reason.HEAD))
    else:
        for at in opened.bad_heads:
            writer.bad(Bad(at, HEAD_BYTES // 2, Reason.HEAD))
        end = successor.head.previous_end if successor and successor.head and follows else None
        found.end = _scan(opened, head.seed, size, end, writer, take)
    found.damage = writer.finish()
    if successor is not None and not follows:
        found.damage.append(Damage(segment=opened.number + 1, position=0, size=0, reason=Reason.MISSING))
    return found


def _scan(opened: _Opened, seed: int, size: int, end: int | None, writer: _Reporter, take: Take) -> int:
    """Take what is good, report what is not; where the segment ends."""
    reached = HEAD_BYTES
    read = opened.file.read
    for item in scan(read, seed, size if end is None else min(end, size), exact=end is not None):
        judged = _judged(item, read, seed, size)
        if isinstance(judged, Bad):
            writer.bad(judged, cut=_is_cut(judged, read))
            reached = judged.position + judged.size
        else:
            position, header, entry = judged
            writer.good(header)
            take(opened.number, position, header, entry)
            reached = position + header.size
    if end is not None and end > size:
        writer.bad(Bad(size, end - size, Reason.MISSING))
        reached = end
    return reached


def _is_cut(bad: Bad, read: Read) -> bool:
    """Whether what should end this entry is zero, from a page on: the sum of its header, or the end of its body."""
    if bad.reason not in (Reason.HEADER, Reason.BODY):
        return bad.reason is Reason.CUT
    if bad.header is None:
        begin, end = bad.position + ENTRY_BYTES - 8, bad.position + ENTRY_BYTES
    else:
        end = bad.position + ENTRY_BYTES + bad.header.body
        begin = max(bad.position + ENTRY_BYTES, (end - 1) // _PAGE * _PAGE)
    try:
        return not any(read(begin, end - begin))
    except OSError:
        return False


def _judged(item: Good | Bad, read: Read, seed: int, size: int) -> tuple[int, Header, Entry | None] | Bad:
    """What the scanner found, with the entry itself if it names a feed."""
    if isinstance(item, Bad):
        return item
    position, header = item
    if header.kind != Kind.FEED:
        return position, header, None
    try:
        return position, header, read_entry(read, seed, position, size)[1]
    except (MalformedEntryError, OSError):
        return Bad(position, header.size, Reason.BODY, header)


class _Reporter:
    """Makes damage of bad ranges: each with the bursts around it."""

    __slots__ = ("_after", "_damage", "_ends_life", "_segment", "_torn", "_waiting")

    def __init__(self, segment: int, ends_life: bool) -> None:
        self._segment, self._ends_life = segment, ends_life
        self._after: Span | None = None
        self._damage: list[Damage] = []
        self._waiting = 0
        """Damage from here on has no burst behind it yet."""
        self._torn = 0
        """So much of it, the last, has no entry behind it."""

    def good(self, header: Header) -> None:
        if self._torn:
            self._damage[-self._torn :] = [replace(one, torn=False) for one in self._damage[-self._torn :]]
            self._torn = 0
        span = _span(header)
        if span is not None:
            for at in range(self._waiting, len(self._damage)):
                self._damage[at] = replace(self._damage[at], before=span)
            self._waiting, self._after = len(self._damage), span

    def bad(self, bad: Bad, *, cut: bool = False) -> None:
        torn = self._ends_life and bad.position >= HEAD_BYTES
        self._torn += torn
        self._damage.append(
            Damage(
                segment=self._segment,
                position=bad.position,
                size=bad.size,
                reason=bad.reason,
                lost=_span(bad.header),
                after=self._after,
                torn=torn,
                cut=cut,
            )
        )

    def finish(self) -> list[Damage]:
        return self._damage


def _span(header: Header | None) -> Span | None:
    return Span(header.feed, header.first, header.end) if header and header.kind == Kind.BURST else None
