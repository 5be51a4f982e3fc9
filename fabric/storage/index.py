"""Where the bursts of each feed lie: sorted columns of plain numbers, 40 bytes a burst.

A spill of 8 GiB may hold two million bursts of 4 KiB: as tuples they would take 480 MB, as columns 80.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from fabric.storage.records import Entry, Header, Kind
from fabric.storage.recovering import Span
from fabric.storage.segments import Segment

__all__ = ["Contents", "FeedIndex", "Place", "joined"]

_COMPACT = 1024
"""Released bursts stay in front of the columns until there are so many and they are half of all."""


class Place(NamedTuple):
    """Where one burst lies."""

    first: int
    end: int
    segment: int
    position: int
    size: int
    """What reading it brings into memory, in bytes."""


class FeedIndex:
    """The bursts of one feed, by first offset. Bursts do not overlap; the same first offset again replaces."""

    __slots__ = ("_ends", "_firsts", "_head", "_positions", "_segments", "_sizes", "below")

    def __init__(self) -> None:
        self._firsts, self._ends = array("Q"), array("Q")
        self._segments, self._positions, self._sizes = array("Q"), array("Q"), array("Q")
        self._head = 0
        self.below = 0
        """Bursts that end here or earlier are not needed."""

    def __iter__(self) -> Iterator[Place]:
        return (self._place(at) for at in range(self._head, len(self._firsts)))

    def _place(self, at: int) -> Place:
        return Place(*(column[at] for column in self._columns()))

    def add(self, first: int, end: int, segment: int, position: int, size: int) -> int:
        """Note a burst, unless it is released already; how many more there are now, 0 or 1."""
        firsts = self._firsts
        if end <= self.below:
            return 0
        if not firsts or first > firsts[-1]:  # fast path: in order
            firsts.append(first)
            self._ends.append(end)
            self._segments.append(segment)
            self._positions.append(position)
            self._sizes.append(size)
            return 1
        at = bisect_left(firsts, first, self._head)
        if at < len(firsts) and firsts[at] == first:
            for column, value in zip(self._columns(), (first, end, segment, position, size), strict=True):
                column[at] = value
            return 0
        for column, value in zip(self._columns(), (first, end, segment, position, size), strict=True):
            column.insert(at, value)
        return 1

    def _columns(self) -> tuple[array[int], ...]:
        return self._firsts, self._ends, self._segments, self._positions, self._sizes

    def find(self, offset: int) -> Place | None:
        """The burst that holds this offset."""
        at = bisect_right(self._firsts, offset, self._head) - 1
        return self._place(at) if at >= self._head and offset < self._ends[at] else None

    def exactly(self, first: int) -> Place | None:
        """The burst that begins with this offset."""
        at = bisect_left(self._firsts, first, self._head)
        return self._place(at) if at < len(self._firsts) and self._firsts[at] == first else None

    def spans(self) -> list[tuple[int, int]]:
        """What is here, as ranges of offsets in order."""
        return joined((place.first, place.end) for place in self)

    def release(self, below: int) -> int:
        """Forget what ends at or below; how many bursts that were."""
        self.below = max(self.below, below)
        # Bursts do not overlap: their ends are in the same order as their firsts.
        head = bisect_right(self._ends, self.below, self._head)
        gone, self._head = head - self._head, head
        if head >= _COMPACT and 2 * head >= len(self._firsts):
            for column in self._columns():
                del column[:head]
            self._head = 0
        return gone

    def discard(self, firsts: Collection[int]) -> int:
        """Forget the bursts that begin there; how many those were."""
        return len(self._keep(lambda place: place.first not in firsts))

    def drop(self, segment: int) -> list[tuple[int, int]]:
        """Forget what lies in this segment; the offsets, each burst as a range."""
        return self._keep(lambda place: place.segment != segment)

    def _keep(self, wanted: Callable[[Place], bool]) -> list[tuple[int, int]]:
        kept: list[Place] = []
        gone: list[Place] = []
        for place in self:
            (kept if wanted(place) else gone).append(place)
        if gone:
            self._head = 0
            self._firsts, self._ends, self._segments, self._positions, self._sizes = (
                array("Q", column) for column in (zip(*kept, strict=True) if kept else ((),) * 5)
            )
        return [(place.first, place.end) for place in gone]


def joined(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch made one."""
    whole: list[tuple[int, int]] = []
    for first, end in ranges:
        if whole and whole[-1][1] == first:
            whole[-1] = whole[-1][0], end
        else:
            whole.append((first, end))
    return whole


class Contents:
    """Everything that a log holds: the bursts of all feeds, their names, and which lives ended clean."""

    __slots__ = ("bursts", "ended", "ends", "feeds", "names")

    def __init__(self) -> None:
        self.feeds: dict[int, FeedIndex] = {}
        self.names: dict[int, Entry] = {}
        self.ends: dict[int, int] = {}
        """Where each feed ends, as far as was ever written: by its bursts, and by its name where those are deleted."""
        self.ended: set[int] = set()
        self.bursts = 0
        """That are not released."""

    def note(self, segment: Segment, header: Header | Entry, position: int, entry: Entry | None) -> None:
        """This entry counts. `entry` is given if it names a feed."""
        if header.kind == Kind.BURST:
            feed, end = header.feed, header.first + header.records
            index = self.feeds.get(feed)
            if index is None:
                index = self.feeds[feed] = FeedIndex()
            self.bursts += index.add(header.first, end, segment.number, position, _size_of(header))
            if end > segment.ends.get(feed, 0):
                segment.ends[feed] = end
            if end > self.ends.get(feed, 0):
                self.ends[feed] = end
        elif header.kind == Kind.FEED and entry is not None:
            self.names[header.feed] = entry
            self.ends[header.feed] = max(header.first, self.ends.get(header.feed, 0))
            segment.named.add(header.feed)
        elif header.kind == Kind.END:
            self.ended.add(header.incarnation)

    def note_all(self, segment: Segment, entries: Sequence[Entry], positions: Sequence[int]) -> None:
        """These entries count."""
        for entry, position in zip(entries, positions, strict=True):
            self.note(segment, entry, position, entry)

    def spans(self, feed: int) -> list[tuple[int, int]]:
        """The offsets of a feed, as ranges."""
        index = self.feeds.get(feed)
        return index.spans() if index is not None else []

    def find(self, feed: int, offset: int) -> Place | None:
        """The burst that holds this offset."""
        index = self.feeds.get(feed)
        return index.find(offset) if index is not None else None

    def exactly(self, feed: int, first: int) -> Place | None:
        """The burst that begins with this offset."""
        index = self.feeds.get(feed)
        return index.exactly(first) if index is not None else None

    def in_order(self) -> list[tuple[int, int]]:
        """Feed and first offset of all bursts, in the order in which they were written."""
        places = (
            (place.segment, place.position, feed, place.first) for feed, index in self.feeds.items() for place in index
        )
        return [(feed, first) for _, _, feed, first in sorted(places)]

    def places(self, feed: int) -> Iterator[Place]:
        """The bursts of a feed, lowest first."""
        return iter(self.feeds.get(feed, ()))

    def release(self, feed: int, below: int) -> None:
        """Bursts of this feed that end at or below are not needed."""
        index = self.feeds.get(feed)
        if index is not None:
            self.bursts -= index.release(below)

    def discard(self, feed: int, firsts: Collection[int], segments: Iterable[Segment]) -> None:
        """These bursts are not needed, whatever lies before them; nor are older copies of the others."""
        index = self.feeds[feed]
        self.bursts -= index.discard(firsts)
        ends = {place.segment: place.end for place in index}  # in order: the last one of each segment counts
        for segment in segments:
            if segment.ends.pop(feed, None) is not None and segment.number in ends:
                segment.ends[feed] = ends[segment.number]

    def alone(self, segment: Segment, feed: int) -> list[int]:
        """Where the bursts of this feed in a segment begin, if no other feed needs it."""
        if any(end > self.feeds[other].below for other, end in segment.ends.items() if other != feed):
            return []
        return [place.first for place in self.places(feed) if place.segment == segment.number]

    def is_needed(self, segment: Segment) -> bool:
        """Whether anything in it is not released. The feed that needed it last is asked first."""
        ends, feeds = segment.ends, self.feeds
        if segment.witness in ends and ends[segment.witness] > feeds[segment.witness].below:
            return True
        segment.witness = next((feed for feed, end in ends.items() if end > feeds[feed].below), -1)
        return segment.witness >= 0

    def forget(self, segment: Segment) -> list[Span]:
        """Give up what lies in this segment: what that loses."""
        lost = []
        for feed in segment.ends:
            gone = self.feeds[feed].drop(segment.number)
            self.bursts -= len(gone)
            lost += [Span(feed, first, end) for first, end in joined(iter(gone))]
        return lost


def _size_of(burst: Header | Entry) -> int:
    if isinstance(burst, Header):
        return burst.body
    return len(burst.frame) + sum(memoryview(payload).nbytes for payload in burst.payloads.values())
