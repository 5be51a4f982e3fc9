"""The publisher's side: what is retained of each feed, what of it is owed and to whom, what gives way (RULES P1, P2).

*Owed* is what a current reliable subscription has not acknowledged. *Kept* is history; the oldest gives way at no cost.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush

from fabric.config import Policy
from fabric.core.events import Buffer
from fabric.core.ranges import RangeSet

__all__ = ["OutFeed", "Reader", "Retention", "StoredBurst"]

Reader = tuple[str, int]
"""A subscription of a member: (its name, subscription number)."""


LOST_RANGES_MAX = 1024
"""Lost ranges in one answer to a pull; it has to fit into a frame, and what follows is asked for again."""


class StoredBurst:
    """A burst in retention: its frame as it went out, and the values of its addressed records by offset."""

    __slots__ = ("end", "first", "frame", "live", "payloads", "serial", "size")

    def __init__(
        self, first: int, count: int, frame: bytes, payloads: Mapping[int, Buffer] | None, serial: int
    ) -> None:
        self.first, self.end, self.frame, self.payloads, self.serial = first, first + count, frame, payloads, serial
        self.size = len(frame) + (sum(memoryview(payload).nbytes for payload in payloads.values()) if payloads else 0)
        self.live = count
        """Records that are not superseded; counted for `latest` only."""


class OutFeed:
    """One feed of this incarnation. `readers` are the owed subscriptions and the floor that each acknowledged.

    Its retained bursts lie in two queues, oldest first: `kept`, below what all readers acknowledged, and then `owed`.
    """

    __slots__ = (
        "acknowledged",
        "closed",
        "end",
        "evicted",
        "feed",
        "incarnation",
        "kept",
        "last_data_ns",
        "listeners",
        "marked_ns",
        "newest",
        "owed",
        "policy",
        "readers",
        "topic",
    )

    def __init__(self, feed: int, topic: str, policy: Policy, incarnation: int) -> None:
        self.feed, self.topic, self.policy, self.incarnation = feed, topic, policy, incarnation
        self.end = self.acknowledged = self.evicted = 0
        self.kept: deque[StoredBurst] = deque()
        self.owed: deque[StoredBurst] = deque()
        self.readers: dict[Reader, int] = {}
        self.listeners: set[Reader] = set()
        """Subscriptions that follow without being owed anything."""
        self.newest: dict[int, StoredBurst] = {}
        """The burst that holds each seed's newest record; `latest` only."""
        self.closed = False
        self.last_data_ns = self.marked_ns = 0

    @property
    def first_available(self) -> int:
        """Nothing below it can be had, for want of room. What a `latest` feed lacks above it was superseded."""
        return self.evicted if self.policy is Policy.LATEST else self._oldest

    @property
    def _oldest(self) -> int:
        return self.kept[0].first if self.kept else self.owed[0].first if self.owed else self.end

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

        And what of them is lost.
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
                    credit -= len(burst.frame)
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
            self.owed_bytes -= burst.size
            self._keep(out, burst)
        self.evict()

    def owe_again(self, out: OutFeed, offset: int) -> None:
        """A new reader begins at `offset`, among the history: from there on everything is owed."""
        out.acknowledged = min(out.acknowledged, offset)
        while out.policy is Policy.RELIABLE and out.kept and out.kept[-1].end > offset:
            burst = out.kept.pop()
            self.kept_bytes -= burst.size
            self.owed_bytes += burst.size
            out.owed.appendleft(burst)

    def evict(self) -> None:
        """Let the oldest kept bursts of all feeds go until the history is within its ceiling."""
        while self.kept_bytes > self.kept_bytes_max and self._oldest:
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
            while out.kept:
                self.kept_bytes -= out.kept.popleft().size
            oldest = out.owed.popleft()
            self.owed_bytes -= oldest.size
            dropped += oldest.end - max(oldest.first, out.acknowledged)
            out.acknowledged = max(out.acknowledged, oldest.end)
        self.dropped += dropped
        return dropped

    def check_invariants(self, feeds: Iterable[OutFeed]) -> None:
        """Assert the sums, and that `owed` is what some reader needs (I6, I7)."""
        feeds = list(feeds)
        assert self.owed_bytes == sum(burst.size for out in feeds for burst in out.owed)
        assert self.kept_bytes == sum(burst.size for out in feeds for burst in out.kept)
        for out in feeds:
            assert out.first_available <= out.end
            assert all(burst.end > out.acknowledged for burst in out.owed)


def _end_of(burst: StoredBurst) -> int:
    return burst.end
