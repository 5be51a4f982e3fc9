"""The publisher's side: what is retained of each feed, what of it is owed and to whom, what gives way (RULES P1, P2).

*Owed* is what a current reliable subscription has not acknowledged. *Kept* is history; the oldest gives way at no cost.
What is owed of a feed that spills may lie on disk, its oldest first: see `spilling.py`.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from heapq import heappop, heappush

from fabric.config import Policy
from fabric.core.events import Buffer
from fabric.core.ranges import RangeSet

__all__ = ["OutFeed", "Place", "Reader", "Retention", "StoredBurst"]

Reader = tuple[str, int]
"""A subscription of a member: (its name, subscription number)."""


LOST_RANGES_MAX = 1024
"""Lost ranges in one answer to a pull; it has to fit into a frame, and what follows is asked for again."""


class Place(Enum):
    """Where an owed burst lies."""

    MEMORY = "memory"
    WRITING = "writing"
    """In memory, while the disk is asked to take it."""
    DISK = "disk"


class StoredBurst:
    """A burst in retention: its frame as it went out, and the values of its addressed records by offset.

    Of one on disk they are there only while it is loaded; `frame` is empty otherwise.
    """

    __slots__ = ("end", "first", "frame", "frame_size", "live", "payloads", "place", "serial", "size")

    def __init__(
        self, first: int, count: int, frame: bytes, payloads: Mapping[int, Buffer] | None, serial: int
    ) -> None:
        self.first, self.end, self.frame, self.payloads, self.serial = first, first + count, frame, payloads, serial
        self.frame_size, self.place = len(frame), Place.MEMORY
        self.size = len(frame) + (sum(memoryview(payload).nbytes for payload in payloads.values()) if payloads else 0)
        self.live = count
        """Records that are not superseded; counted for `latest` only."""

    @classmethod
    def on_disk(cls, first: int, end: int, size: int) -> StoredBurst:
        """One of which only the disk has the bytes, `size` of them."""
        burst = cls(first, end - first, b"", None, 0)
        burst.place, burst.size = Place.DISK, size
        return burst


class OutFeed:
    """One feed of this incarnation. `readers` are the owed subscriptions and the floor that each acknowledged.

    Its retained bursts lie in two queues, oldest first: `kept`, below what all readers acknowledged, and then `owed`.
    """

    __slots__ = (
        "acknowledged",
        "closed",
        "end",
        "evicted",
        "exact",
        "feed",
        "incarnation",
        "is_named",
        "is_written_down",
        "kept",
        "last_data_ns",
        "listeners",
        "marked_ns",
        "newest",
        "owed",
        "policy",
        "queued",
        "readers",
        "refused",
        "released",
        "spills",
        "sync",
        "topic",
        "unwritten",
    )

    def __init__(
        self, feed: int, topic: str, policy: Policy, incarnation: int, *, spills: bool = False, sync: str = ""
    ) -> None:
        self.feed, self.topic, self.policy, self.incarnation, self.spills = feed, topic, policy, incarnation, spills
        self.sync = sync
        self.is_named = policy is not Policy.DURABLE
        """Whether the next life would know it: nobody hears of a durable feed before."""
        self.is_written_down = False
        """Whether this life closes, and the disk has all that it owes, and where it ended."""
        self.refused = 0
        """Bursts of a durable feed that the disk did not take: nobody ever saw them."""
        self.exact: bool | None = None
        """Of a feed of an earlier life: whether it ended at `end` for certain. None: this life's."""
        self.end = self.acknowledged = self.evicted = self.released = 0
        self.kept: deque[StoredBurst] = deque()
        self.owed: deque[StoredBurst] = deque()
        self.unwritten: deque[StoredBurst] = deque()
        """Those of the owed that the disk may still be asked to take, in their order; only of a feed that spills."""
        self.readers: dict[Reader, int] = {}
        self.listeners: set[Reader] = set()
        """Subscriptions that follow without being owed anything."""
        self.newest: dict[int, StoredBurst] = {}
        """The burst that holds each seed's newest record; `latest` only."""
        self.closed = self.queued = False
        self.last_data_ns = self.marked_ns = 0

    @property
    def first_available(self) -> int:
        """Nothing below it can be had, for want of room. What a `latest` feed lacks above it was superseded."""
        return self.evicted if self.policy is Policy.LATEST else self._oldest

    @property
    def _oldest(self) -> int:
        return self.kept[0].first if self.kept else self.owed[0].first if self.owed else self.end

    @property
    def is_past(self) -> bool:
        """Whether an earlier life of this member published it."""
        return self.exact is not None

    @property
    def is_acknowledged(self) -> bool:
        """Whether every reader said so itself: what was dropped before it was read has to be told, too."""
        return all(floor >= self.end for floor in self.readers.values())

    def find(self, offset: int) -> StoredBurst | None:
        """The retained burst that holds `offset`."""
        burst = self._at_or_after(offset)
        return burst if burst is not None and burst.first <= offset else None

    def select(self, ranges: Iterable[tuple[int, int]], credit: int) -> tuple[list[StoredBurst], list[tuple[int, int]]]:
        """Bursts that hold the ranges, lowest first, within `credit` bytes of frames, one at least (P5).

        And what of them is lost. Of what has to be loaded the values count, too: they come into memory with it.
        """
        chosen: list[StoredBurst] = []
        lost = RangeSet()
        for first, end in ranges:
            offset, end = max(first, self.first_available), min(end, self.end)
            while offset < end and (credit > 0 or not chosen) and len(lost) < LOST_RANGES_MAX:
                burst = self._at_or_after(offset)
                lost.add(offset, min(burst.first if burst else end, end))
                if burst is None or burst.first >= end:
                    break
                if not chosen or chosen[-1] is not burst:
                    credit -= burst.size if burst.place is Place.DISK else burst.frame_size
                    if credit < 0 and chosen:
                        break
                    chosen.append(burst)
                offset = burst.end
        return chosen, list(lost)

    def _at_or_after(self, offset: int) -> StoredBurst | None:
        bursts = self.owed if self.owed and offset >= self.owed[0].first else self.kept
        index = bisect_right(bursts, offset, key=_end_of)
        if index < len(bursts):
            return bursts[index]
        return self.owed[0] if bursts is self.kept and self.owed else None

    def join_offset(self, start: str) -> int:
        """Where a subscription with this start begins."""
        if start == "retained":
            return self._oldest
        return max(self.end - 1, self._oldest) if start == "last" else self.end

    def __repr__(self) -> str:
        return f"OutFeed({self.topic}, {self._oldest}..{self.end}, acknowledged={self.acknowledged})"


class Retention:
    """What all feeds of this member keep in memory."""

    def __init__(self, *, owed_bytes_max: int, kept_bytes_max: int) -> None:
        self.owed_bytes_max, self.kept_bytes_max = owed_bytes_max, kept_bytes_max
        self.owed_bytes = self.kept_bytes = 0
        self.dropped = 0
        """Records that gave way while they were owed."""
        self._serial = 0
        self._oldest: list[tuple[int, int, OutFeed]] = []
        """A heap of feeds by the serial of their first burst at the time of entry; stale entries are met and
        corrected."""
        self.spilled_bytes = self.writing_bytes = 0
        """Owed and on disk; asked to be written."""
        self._unwritten: list[tuple[int, int, OutFeed]] = []
        """A heap of feeds with unwritten bursts, by the serial of the first at the time of entry, as `_oldest`."""
        self.released: dict[int, int] = {}
        """Feeds of which the disk need not keep what lies below these offsets."""
        self.passing_bytes = 0
        """Part of what is owed: bursts of durable feeds that no one has before the disk has them."""

    def append(
        self, out: OutFeed, first: int, count: int, frame: bytes, payloads: Mapping[int, Buffer] | None
    ) -> StoredBurst:
        """Retain a burst; it is owed if the feed has readers.

        Room was reserved before its first record was accepted.
        """
        assert first == out.end, "offsets are dense"
        self._serial += 1
        burst = StoredBurst(first, count, frame, payloads, self._serial)
        out.end = burst.end
        if out.readers and out.policy is Policy.RELIABLE:
            out.owed.append(burst)
            self.owed_bytes += burst.size
            if out.spills:
                out.unwritten.append(burst)
                self._queue(out)
            return burst
        if not out.readers:
            out.acknowledged = out.end
        if (
            out.policy is not Policy.LOSSY or payloads
        ):  # an addressed value waits until it is fetched, whatever the policy
            self._keep(out, burst)
            self.evict()
        return burst

    def _keep(self, out: OutFeed, burst: StoredBurst) -> None:
        if not out.kept:
            heappush(self._oldest, (burst.serial, out.feed, out))
        out.kept.append(burst)
        self.kept_bytes += burst.size

    def supersede(self, out: OutFeed, burst: StoredBurst, seeds: Iterable[int]) -> None:
        """In a `latest` feed a seed's newest record takes the place of the one before; a burst without any goes."""
        for seed in seeds:
            before = out.newest.get(seed)
            if before is not None:
                before.live -= 1
                if not before.live and before in out.kept:
                    self._remove_kept(out, before)
            out.newest[seed] = burst

    def _remove_kept(self, out: OutFeed, burst: StoredBurst) -> None:
        out.kept.remove(burst)
        self.kept_bytes -= burst.size
        heappush(self._oldest, (out.kept[0].serial, out.feed, out))  # the burst that superseded it is there

    def acknowledge(self, out: OutFeed) -> None:
        """The readers of a feed moved or left: what all of them acknowledged is owed no more (P1)."""
        out.acknowledged = max(out.acknowledged, min(out.readers.values(), default=out.end))
        while out.owed and out.owed[0].end <= out.acknowledged:
            burst = out.owed.popleft()
            if out.unwritten and out.unwritten[0] is burst:
                out.unwritten.popleft()
            if burst.place is not Place.MEMORY:
                self.released[out.feed] = out.released = out.acknowledged
            if burst.place is Place.DISK:
                self._leave_disk(out, burst)
                continue
            burst.place = Place.MEMORY
            self.owed_bytes -= burst.size
            self._keep(out, burst)
        self.evict()

    def _leave_disk(self, out: OutFeed, burst: StoredBurst) -> None:
        """It is no history: that lies in memory, and has no holes."""
        self.spilled_bytes -= burst.size
        self._forget_kept(out)

    def _forget_kept(self, out: OutFeed) -> None:
        while out.kept:
            self.kept_bytes -= out.kept.popleft().size

    def owe_again(self, out: OutFeed, offset: int) -> None:
        """A new reader begins at `offset`, among the history: from there on everything is owed."""
        out.acknowledged = min(out.acknowledged, offset)
        while out.policy is Policy.RELIABLE and out.kept and out.kept[-1].end > offset:
            burst = out.kept.pop()
            self.kept_bytes -= burst.size
            self.owed_bytes += burst.size
            out.owed.appendleft(burst)
            # What the disk was told to forget stays in memory: it is history, and bounded.
            if out.spills and burst.end > out.released:
                self._wait_for_disk(out, burst)

    def evict(self, size: int = 0) -> None:
        """Let the oldest kept bursts of all feeds go until the history is within its ceiling, or `size` smaller."""
        most = min(self.kept_bytes_max, self.kept_bytes - size)
        while self.kept_bytes > most and self._oldest:
            serial, _, out = heappop(self._oldest)
            if out.kept and out.kept[0].serial == serial:
                burst = out.kept.popleft()
                self.kept_bytes -= burst.size
                out.evicted = burst.end
            if out.kept:
                heappush(self._oldest, (out.kept[0].serial, out.feed, out))

    def drop_oldest(self, out: OutFeed, size: int) -> int:
        """The oldest bursts of a feed give way for everybody until `size` owed bytes are free (P2).

        Returns the records dropped.
        """
        dropped = 0
        while out.owed and self.owed_bytes + size > self.owed_bytes_max:
            self._forget_kept(out)
            oldest = out.owed.popleft()
            self.owed_bytes -= oldest.size
            dropped += oldest.end - max(oldest.first, out.acknowledged)
            out.acknowledged = max(out.acknowledged, oldest.end)
        self.dropped += dropped
        return dropped

    # The disk.

    def write_next(self, most: int) -> tuple[OutFeed, StoredBurst] | None:
        """The oldest burst for the disk, while more than `most` bytes are owed in memory and not being written."""
        if self.owed_bytes - self.writing_bytes <= most:
            return None
        while self._unwritten:
            serial, _, out = heappop(self._unwritten)
            out.queued = False
            burst = out.unwritten[0] if out.unwritten else None
            if burst is not None and burst.serial == serial:
                out.unwritten.popleft()
                burst.place = Place.WRITING
                self.writing_bytes += burst.size
            self._queue(out)
            if burst is not None and burst.place is Place.WRITING:
                return out, burst
        return None

    def _queue(self, out: OutFeed) -> None:
        """The heap has one entry of a feed with unwritten bursts, and at most one of any other."""
        if out.unwritten and not out.queued:
            out.queued = True
            heappush(self._unwritten, (out.unwritten[0].serial, out.feed, out))

    def _wait_for_disk(self, out: OutFeed, burst: StoredBurst) -> None:
        """A burst among those that wait for the disk; before most of them."""
        insort(out.unwritten, burst, key=_end_of)
        self._queue(out)

    def spill_rest(self, out: OutFeed) -> None:
        """All that a feed owes is for the disk, whatever its publisher wanted while it was open."""
        if not out.spills:
            out.spills = True
            out.unwritten.extend(
                burst for burst in out.owed if burst.place is Place.MEMORY and burst.end > out.released
            )
            self._queue(out)

    def written(self, out: OutFeed, burst: StoredBurst, *, done: bool) -> None:
        """A write is over. What was acknowledged meanwhile stays where it is."""
        self.writing_bytes -= burst.size
        if burst.place is not Place.WRITING:
            return
        if not done:
            burst.place = Place.MEMORY
            self._wait_for_disk(out, burst)
            return
        burst.place = Place.DISK
        burst.frame, burst.payloads = b"", None
        self.owed_bytes -= burst.size
        self.spilled_bytes += burst.size

    def append_written(self, out: OutFeed, first: int, end: int, size: int) -> None:
        """A burst of a durable feed, or of an earlier life, is on disk, and only there."""
        assert first >= out.end, "bursts do not overlap"
        out.owed.append(StoredBurst.on_disk(first, end, size))
        out.end = end
        self.spilled_bytes += size

    def lose(self, out: OutFeed, burst: StoredBurst) -> None:
        """An owed burst on disk is damaged, or given up: it becomes a gap."""
        out.owed.remove(burst)
        self.spilled_bytes -= burst.size

    def check_invariants(self, feeds: Iterable[OutFeed]) -> None:
        """Assert the sums, and that `owed` is what some reader needs (I6, I7)."""
        feeds = list(feeds)
        owed = [burst for out in feeds for burst in out.owed]
        in_memory = sum(burst.size for burst in owed if burst.place is not Place.DISK)
        assert self.owed_bytes == in_memory + self.passing_bytes
        assert self.spilled_bytes == sum(burst.size for burst in owed if burst.place is Place.DISK)
        assert self.kept_bytes == sum(burst.size for out in feeds for burst in out.kept)
        for out in feeds:
            assert out.first_available <= out.end
            assert all(burst.end > out.acknowledged for burst in out.owed)
            waiting = [burst for burst in out.owed if burst.place is Place.MEMORY and burst.end > out.released]
            assert list(out.unwritten) == (waiting if out.spills else [])
            assert out.queued or not out.unwritten


def _end_of(burst: StoredBurst) -> int:
    return burst.end
