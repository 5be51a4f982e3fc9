"""What this member reads in the arenas of its publishers, and what it tells them of that (RULES: shared memory).

A publisher reuses a slot once its retention has let go of it and no reader needs it. A reader needs the slots of a feed
from the floor on that it told last, and those that it still looks at below: both are told at once, in HOLDS, whatever
came before, so a lost HOLDS costs nothing but time. Nothing below a told floor is ever read in the arena again, and
nothing before the publisher has said (LEASED) that it listens: so what is read is leased, whichever frames are lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fabric.core.guards import Retry
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context
from fabric.core.ranges import RangeSet
from fabric.core.sharing import ArenaReached, SlotsReleased
from fabric.core.wire import OFFSET_END, Kind

__all__ = ["Holding"]

HELD_RANGES_MAX = 1000
"""Ranges of one feed in a HOLDS; the floor stays below the rest."""
FEEDS_PER_FRAME = 10
ASK = Retry.beyond(20 * MS, 1000 * MS)


class _Hold:
    """One feed that some publisher keeps in its arena.

    `views`: how often each offset is looked at. `inbounds` are those of the subscriptions that follow it now.
    """

    __slots__ = ("asking", "began", "feed", "floor", "inbounds", "is_leased", "passed", "peer", "views")

    def __init__(self, feed: int, peer: str) -> None:
        self.feed, self.peer = feed, peer
        self.inbounds: Sequence[InboundFeed] = ()
        self.views: dict[int, int] = {}
        self.is_leased = False
        self.floor = self.began = 0
        """What was told last, since we follow it; the serial number of the first that was told."""
        self.asking = ASK
        self.passed = 0
        """Where what its publisher has forgotten ends, as far as nobody is owed it."""

    def floor_now(self) -> int:
        """Below it nothing is read any more that is not read now."""
        floor = min((inbound.floor for inbound in self.inbounds), default=OFFSET_END)
        return max(self.floor, self.passed, floor)

    def pass_by(self, end: int) -> None:
        """Slots below `end` are waited for. Who is owed them settles them; who is not may never hear of them."""
        if all(inbound.best_effort for inbound in self.inbounds):
            self.passed = max(self.passed, min(end, OFFSET_END))


class Holding:
    """All feeds whose slots this member reads."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._reached: dict[str, int] = {}
        """The incarnations of members whose arenas we can read."""
        self._holds: dict[int, _Hold] = {}
        self._asking: dict[int, _Hold] = {}
        """Feeds that are not leased to us yet."""
        self._dirty: dict[int, _Hold] = {}
        self._serial = context.incarnation
        """Of the last row that was told: greater than any of an earlier life, whose answers may reach this one."""
        self._due_ns = self._released_bytes = 0

    def on_reached(self, event: ArenaReached) -> None:
        """We can read this member's arena."""
        self._reached[event.name] = event.incarnation

    def reaches(self, peer: str, incarnation: int) -> bool:
        """Whether this life of a member has an arena that we can read."""
        return self._reached.get(peer) == incarnation

    # Reading.

    def begin(self, feed: int, peer: str, inbounds: Sequence[InboundFeed]) -> None:
        """A large value of this feed is to come: ask its publisher to lease us its slots from now on."""
        hold = self._holds.get(feed)
        if hold is None:
            hold = self._holds[feed] = _Hold(feed, peer)
        if not hold.inbounds:
            hold.began, hold.inbounds, hold.asking = self._serial + 1, inbounds, ASK
            hold.floor = hold.passed = 0
            self._ask(hold)

    def _ask(self, hold: _Hold) -> None:
        hold.asking = hold.asking.after(self._context.now, self._context.chance())
        self._asking[hold.feed] = hold
        self._context.wake_by(hold.asking.due_ns)
        self._tell([hold])

    def may_read(self, feed: int, offset: int) -> bool:
        """Whether the slot of this record cannot be reused before we let it go."""
        hold = self._holds.get(feed)
        return hold is not None and hold.is_leased and offset >= hold.floor

    def on_leased(self, entries: Iterable[tuple[int, int]]) -> None:
        """Its publisher waits for us from now on."""
        for feed, serial in entries:
            hold = self._asking.get(feed)
            if hold is not None and hold.began <= serial <= self._serial:
                hold.is_leased = True
                del self._asking[feed]

    def read(self, feed: int, offset: int) -> None:
        """A view of this record's slot is made."""
        views = self._holds[feed].views
        views[offset] = views.get(offset, 0) + 1

    def _unread(self, feed: int, offset: int) -> None:
        hold = self._holds[feed]
        hold.views[offset] -= 1
        if not hold.views[offset]:
            del hold.views[offset]
            self.touch(feed)

    def on_released(self, event: SlotsReleased) -> None:
        """Views of these records died."""
        for feed, offset, _ in event.views:
            self._unread(feed, offset)
        self._released(sum(size for _, _, size in event.views))

    # Telling.

    def settled(self, feed: int, size: int) -> None:
        """A subscription settled so many bytes of this feed: its publisher may use the slots that nobody looks at."""
        hold = self._holds.get(feed)
        if hold is not None:
            self.touch(feed)
            if not hold.views:  # otherwise the death of a view follows soon
                self._released(size)

    def _released(self, size: int) -> None:
        self._released_bytes += size
        if self._released_bytes >= self._context.config.liveness.acknowledge_bytes:
            self.tell()

    def touch(self, feed: int) -> None:
        """What we need of this feed may be less now."""
        hold = self._holds.get(feed)
        if hold is not None and feed not in self._dirty:
            if not self._dirty:
                self._due_ns = self._context.now + self._context.config.liveness.acknowledge_ms * MS
                self._context.wake_by(self._due_ns)
            self._dirty[feed] = hold

    def end(self, feed: int) -> None:
        """We follow this feed no longer; what we look at stays ours."""
        hold = self._holds.get(feed)
        if hold is not None:
            hold.inbounds, hold.is_leased = (), False
            self._asking.pop(feed, None)
            self.touch(feed)

    def end_all(self) -> None:
        """We close: nothing more is read, and nothing more will be told."""
        for feed in list(self._holds):
            self.end(feed)
        self.tell()

    def tell(self) -> None:
        """Tell all publishers what changed."""
        holds = list(self._dirty.values())
        self._dirty.clear()
        self._released_bytes = 0
        self._tell(holds)
        for hold in holds:
            if not hold.inbounds and not hold.views:
                del self._holds[hold.feed]

    def _tell(self, holds: Iterable[_Hold]) -> None:
        by_peer: dict[str, list[tuple[Any, ...]]] = {}
        for hold in holds:
            by_peer.setdefault(hold.peer, []).append(self._row(hold))
        for peer, rows in by_peer.items():
            self._send(peer, rows)

    def _send(self, peer: str, rows: list[tuple[Any, ...]]) -> None:
        for begin in range(0, len(rows), FEEDS_PER_FRAME):
            self._context.send(peer, Kind.HOLDS, rows[begin : begin + FEEDS_PER_FRAME])

    def _row(self, hold: _Hold) -> tuple[Any, ...]:
        floor = hold.floor_now()
        ranges = list(RangeSet((offset, offset + 1) for offset in hold.views if offset < floor))
        if len(ranges) > HELD_RANGES_MAX:  # then `hold.floor` is below them, too: no more were ever left out
            floor = ranges[HELD_RANGES_MAX][0]
        hold.floor = max(hold.floor, floor)
        self._serial += 1
        return hold.feed, self._serial, hold.feed in self._asking, hold.floor, ranges[:HELD_RANGES_MAX]

    def on_recall(self, name: str, feeds: Iterable[tuple[int, int]]) -> None:
        """A publisher waits for slots: tell it again. Of a feed that we do not know we hold nothing."""
        unknown = []
        for feed, end in feeds:
            hold = self._holds.get(feed)
            if hold is None:
                unknown.append(feed)
            elif hold.peer == name:
                hold.pass_by(end)
                self._dirty[feed] = hold
        self._send(name, [(feed, self._serial + n, False, OFFSET_END, []) for n, feed in enumerate(unknown, 1)])
        self._serial += len(unknown)
        self.tell()

    def tick(self) -> None:
        """Tell what changed, and ask again."""
        now = self._context.now
        if self._dirty and now >= self._due_ns:
            self.tell()
        for hold in [hold for hold in self._asking.values() if now >= hold.asking.due_ns]:
            self._ask(hold)

    def next_deadline_ns(self) -> int | None:
        """When something has to be told."""
        dues = [hold.asking.due_ns for hold in self._asking.values()]
        dues += [self._due_ns] if self._dirty else []
        return min(dues, default=None)

    def check_invariants(self) -> None:
        """Assert that nobody waits for a lease that he does not need, and that nothing told is read again."""
        for hold in self._holds.values():
            assert all(count > 0 for count in hold.views.values())
            assert not hold.is_leased or hold.inbounds
