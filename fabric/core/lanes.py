"""The subscriber's side of one feed: order, duplicates, gaps, room (RULES N3 to N6, S3 to S7).

One rule gives order in a lane, isolation between lanes and joining in mid-lane: a record may be handed over when its
`previous` is taken, that is, settled or in the application's hand. No state per lane exists here. Offsets lie like
this:

    settled | floor ... in hand or settled ... | next ... taken, held, missing ... | known

Everything below `next` is taken. Above it `taken` and `have` (taken or held) are sets of ranges, empty while all
goes well: then a whole burst is deliverable by one comparison. Gaps are taken only at the floor, once `next` stands
there too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush

from fabric.core.events import Buffer, Deliver, ReportGap
from fabric.core.ranges import RangeSet
from fabric.core.rooms import STALE_MAX, Claims, Highest, Room
from fabric.core.wire import ADDRESSED, NONE, Burst, Descriptor, Drop, feed_id

__all__ = ["InboundFeed"]


class InboundFeed:
    """What one subscription knows of one incarnation's feed. Created at its join offset."""

    __slots__ = (
        "_claims",
        "_emit",
        "_highest",
        "_holders",
        "_ready",
        "_waiting",
        "awaiting",
        "best_effort",
        "committed",
        "counts",
        "durable",
        "feed",
        "fin",
        "first_available",
        "floor",
        "have",
        "held",
        "incarnation",
        "join",
        "known",
        "latest",
        "lost",
        "next",
        "outlives",
        "reasons",
        "room",
        "seeds",
        "settled",
        "source",
        "subscription",
        "taken",
        "topic",
        "turned_away",
    )

    def __init__(
        self,
        *,
        subscription: int,
        source: str,
        topic: str,
        incarnation: int,
        join: int,
        room: Room,
        emit: Callable[[object], None],
        seeds: frozenset[int] | None = None,
        best_effort: bool = False,
    ) -> None:
        self.subscription, self.source, self.topic, self.incarnation = subscription, source, topic, incarnation
        self.feed = feed_id(source, incarnation, topic)
        self.join = self.floor = self.next = self.known = join
        self.room, self.seeds, self.best_effort = room, seeds, best_effort
        self.first_available = 0
        self.settled, self.taken, self.have, self.lost = RangeSet(), RangeSet(), RangeSet(), RangeSet()
        self.held: dict[int, Burst] = {}
        self.awaiting: set[int] = set()
        """Held records whose addressed value has not come yet."""
        self.reasons: dict[int, str] = {}
        self.fin: int | None = None
        """Where the feed ended, once its publisher told or was lost."""
        self.latest = self.durable = self.outlives = False
        self.committed: int | None = None
        """What the application's last saved cursor says of this feed; None: what is handled counts (S2)."""
        self.turned_away = False
        """Whether something was not taken for lack of room since the engine last looked."""
        self.counts: Counter[str] = Counter()
        self._holders: dict[Burst, int] = {}
        self._highest = Highest(self.held)
        self._waiting: dict[int, int] = {}
        self._ready: list[int] = []
        self._claims = Claims(room, self.held, self.awaiting)
        self._emit = emit

    def resume(self, settled: Iterable[tuple[int, int]]) -> None:
        """Before anything is received: this was settled above the floor when the application saved its cursor."""
        for first, end in settled:
            for ranges in (self.settled, self.taken, self.have):
                ranges.add(first, end)
            self.known = max(self.known, end)
            self.counts["handled"] += end - first

    @property
    def told_floor(self) -> int:
        """What its publisher may know to be settled."""
        return self.floor if self.committed is None else self.committed

    # Receiving.

    def receive(self, burst: Burst) -> None:
        """Take in a burst. Its addressed values are fetched as `claim` says."""
        if burst.end > self.known:
            self.known = burst.end
        # Fast path: the next burst in order, and nothing is held: all of it is deliverable.
        if (
            burst.first == self.next
            and not self.have.firsts
            and self.seeds is None
            and not burst.has_addressed
            and self.room.hand < self.room.hand_max
        ):
            self.next = burst.end
            self.room.hand += burst.size
            self._emit(Deliver(self.subscription, self, burst, None, burst.size, (burst.first, burst.end)))
            return
        if self.seeds is not None and burst.first == self.next and not self.have and not burst.has_addressed:
            self._receive_filtered(burst, self.seeds)
        else:
            self._receive_rows(burst)

    def _receive_filtered(self, burst: Burst, wanted: frozenset[int]) -> None:
        """In order, but only some seeds are asked for: settling a record also settles the unwanted ones before it."""
        rows = tuple(index for index, seed in enumerate(burst.columns[0]) if seed in wanted)
        if rows and not self._has_hand():
            self._receive_rows(burst)
            return
        self.next = burst.end
        if rows:
            self.room.hand += burst.size
            self._emit(Deliver(self.subscription, self, burst, rows, burst.size, (burst.first, burst.end)))
        else:
            self.counts[Drop.NOT_ASKED] += burst.count
            self.settled.add(burst.first, burst.end)
        self.advance()

    def _receive_rows(self, burst: Burst) -> None:
        previous, seeds, kinds = burst.previous, burst.columns[0], burst.columns[2]
        if self.best_effort and burst.first > self.next:
            self.lost.add(max(self.next, self.have.end), burst.first)
        for index, offset in enumerate(range(burst.first, burst.end)):
            if offset < self.next or offset in self.have or (self.best_effort and offset in self.lost):
                self.counts[Drop.DUPLICATE] += 1  # or too late: its lane went on without it
            elif self.seeds is not None and seeds[index] not in self.seeds:
                self._pass_over(offset)
            elif self._hold(offset, burst):
                if kinds[index] & ADDRESSED:
                    self.awaiting.add(offset)
                    self._claims.expect(offset)
                self._expect(offset, previous[index])
        self._hand_over()
        self.advance()

    def _pass_over(self, offset: int) -> None:
        if not self._fits(offset):
            self._turn_away(offset)
            return
        self.counts[Drop.NOT_ASKED] += 1
        self._take(offset)
        self.settled.add(offset, offset + 1)

    # Holding.

    def _hold(self, offset: int, burst: Burst) -> bool:
        """Keep a record that is not deliverable yet, within the room; the highest offset gives way (S4)."""
        size = 0 if burst in self._holders else burst.size
        if self.room.hold + size > self.room.hold_max and not self._make_room(offset, burst, size):
            self._turn_away(offset)
            return False
        if burst not in self._holders:
            self._holders[burst] = 0
            self.room.hold += burst.size
        self._holders[burst] += 1
        self.held[offset] = burst
        self.have.add(offset, offset + 1)
        self._highest.note(offset)
        return True

    def _make_room(self, offset: int, burst: Burst, size: int) -> bool:
        """What is next, or leaves the hold at once, comes in even if nothing can give way."""
        if offset == self.next:
            return True
        while self.room.hold + size > self.room.hold_max and self.held:
            highest = self._highest.find()
            if highest < offset:
                return self._is_deliverable(offset, burst)
            self._forget(highest)
            self._turn_away(highest)
        return self.room.hold + size <= self.room.hold_max or self._is_deliverable(offset, burst)

    def _is_deliverable(self, offset: int, burst: Burst) -> bool:
        index = offset - burst.first
        whole = not burst.columns[2][index] & ADDRESSED
        return whole and self._is_taken(burst.previous[index]) and self._has_hand() and self._fits(offset)

    def _turn_away(self, offset: int) -> None:
        """It counts as not received. A best-effort lane goes on without it."""
        self.counts[Drop.NO_ROOM] += 1
        self.turned_away = True
        if self.best_effort:
            self.lost.add(offset, offset + 1)

    def _forget(self, offset: int) -> None:
        """A held record is held no longer, and was not taken."""
        self._unhold(offset)
        self.have.remove(offset, offset + 1)
        successor = self._waiting.pop(offset, None) if self.best_effort else None
        if successor is not None and successor in self.held:
            self._expect(successor, offset)  # behind what is still held of its lane, if anything is

    def _unhold(self, offset: int) -> Burst:
        burst = self.held.pop(offset)
        self.awaiting.discard(offset)
        self._claims.give(offset)
        self._holders[burst] -= 1
        if not self._holders[burst]:
            del self._holders[burst]
            self.room.hold -= burst.size
        return burst

    def _expect(self, offset: int, previous: int) -> None:
        if self.best_effort and previous not in self.held and not self._is_taken(previous):
            previous = self._held_before(offset)  # what is absent in between will not come
        if self._is_taken(previous):
            if offset not in self.awaiting:
                if len(self._ready) > STALE_MAX + 2 * len(self.held):
                    self._compact()
                heappush(self._ready, offset)
        elif (other := self._waiting.get(previous, offset)) != offset and other in self.held:
            self._lose(offset, Drop.UNDECODABLE)  # two records name the same one before them: a lane has one way on
        else:
            self._waiting[previous] = offset

    def _held_before(self, offset: int) -> int:
        """The held record before this one in its lane, or none; best-effort lanes have holes."""
        burst = self.held[offset]
        seed = burst.columns[0][offset - burst.first]
        lane = (at for at, other in self.held.items() if at < offset and other.columns[0][at - other.first] == seed)
        return max(lane, default=NONE)

    def _compact(self) -> None:
        """Forget what gave way: ready offsets and waiting lanes of records that are no longer held."""
        self._ready = sorted(set(self._ready) & self.held.keys())
        self._waiting = {previous: offset for previous, offset in self._waiting.items() if offset in self.held}

    # Addressed values.

    def claim(self) -> Iterator[tuple[int, Descriptor]]:
        """The addressed values that there is room for now, lowest first."""
        while (lowest := self._claims.lowest()) is not None:
            offset, descriptor, problem = lowest
            if problem is not None:
                self.payload_lost(offset, problem)
            elif self._claims.take(offset, descriptor.size, is_next=offset == self.next):
                yield offset, descriptor
            else:
                return

    def claimed(self) -> list[tuple[int, Descriptor]]:
        """The values that were claimed and have not come."""
        return self._claims.under_way()

    @property
    def has_unclaimed(self) -> bool:
        """Whether addressed values wait for room."""
        return bool(self._claims)

    def payload_arrived(self, offset: int, payload: Buffer) -> None:
        """The addressed value of a held record is complete. One that we had no room to ask for is not kept."""
        burst = self.held.get(offset)
        if burst is None or offset not in self.awaiting:
            return
        if not self._claims.take(offset, len(payload), is_next=offset == self.next):
            return
        self.awaiting.discard(offset)
        burst.payloads = burst.payloads or {}
        burst.payloads[offset] = payload
        self._expect(offset, burst.previous[offset - burst.first])
        self._hand_over()
        self.advance()

    def payload_lost(self, offset: int, reason: str) -> None:
        """The addressed value of a held record cannot be had: it becomes a gap when the floor reaches it."""
        if offset in self.held:
            self._lose(offset, reason)
            self.advance()

    def _lose(self, offset: int, reason: str) -> None:
        self._forget(offset)
        self.lost.add(offset, offset + 1)
        self.reasons[offset] = reason

    # Handing over.

    def _is_taken(self, offset: int) -> bool:
        return offset < self.next or offset in self.taken

    def _has_hand(self) -> bool:
        return self.room.hand < self.room.hand_max

    def _fits(self, offset: int) -> bool:
        """Bounds the cursor: at the floor, or next to a range, an offset may always be taken (N6)."""
        return offset == self.next or len(self.taken) < self.room.ranges_max or self.taken.touches(offset)

    def _take(self, offset: int) -> None:
        self.taken.add(offset, offset + 1)
        self.have.add(offset, offset + 1)
        self._wake(offset)
        if offset == self.next:
            self._move_next(self.taken.end_of(offset))

    def _wake(self, taken: int) -> None:
        successor = self._waiting.pop(taken, None)
        if successor is not None and successor in self.held and successor not in self.awaiting:
            heappush(self._ready, successor)

    def _move_next(self, to: int) -> None:
        self.next = to
        self.taken.trim(to)
        self.have.trim(to)

    def _hand_over(self) -> None:
        """Deliver what is ready, lowest first, as far as there is room."""
        groups: dict[Burst, list[int]] = {}
        room = self.room
        while self._ready:
            offset = self._ready[0]
            burst = self.held.get(offset)
            if burst is not None and not (burst in groups or self._has_hand()):
                room.queue[self] = None
                break
            if burst is not None and not self._fits(offset):
                break
            heappop(self._ready)
            if burst is None:
                continue
            if burst not in groups:
                groups[burst] = []
                room.hand += burst.size
            groups[burst].append(offset - burst.first)
            self._unhold(offset)
            self._take(offset)
        for burst in sorted(groups, key=lambda burst: burst.first):
            rows = tuple(sorted(groups[burst]))
            extra = sum(len(burst.payloads.get(burst.first + row, b"")) for row in rows) if burst.payloads else 0
            room.hand += extra
            self._emit(Deliver(self.subscription, self, burst, rows, burst.size + extra))

    # Settling.

    def settle(self, first: int, end: int, size: int) -> None:
        """The application is done with `first <= offset < end`, all of it taken; `size` bytes of room return."""
        room = self.room
        room.hand -= size
        if first <= self.floor and not self.settled.firsts:
            self.floor = max(self.floor, end)
        else:
            self.settled.add(max(first, self.floor), end)
        self.advance()
        while room.queue and self._has_hand():
            other = next(iter(room.queue))
            del room.queue[other]
            other.advance()

    def advance(self) -> None:
        """Move the floor over what is settled, and over what is gone once it stands there (S6)."""
        # Fast path: something is in hand at the floor, or all that is known is settled; and nothing waits for a move.
        if (self.floor < self.next or self.floor >= self.known) and not self._ready and not self.settled.firsts:
            return
        moved = True
        while moved:
            moved = False
            self.floor = self.settled.end_of(self.floor)
            self.settled.trim(self.floor)
            if self.floor >= self.next:
                assert self.floor == self.next, "only what was taken can be settled"
                moved = self._pass_gap()
        if self._ready:
            self._hand_over()

    def _pass_gap(self) -> bool:
        first = self.floor
        end, reason = self._gone_until(first)
        if end == first:
            return False
        self.counts[reason] += end - first
        if reason == Drop.GAP or reason in _LETTERS:
            self._emit(ReportGap(self.subscription, self.source, self.topic, self.incarnation, first, end, reason))
        self.floor = end
        self._move_next(self.taken.end_of(end))
        self.lost.trim(end)
        keys = (
            range(first, end)
            if end - first < len(self._waiting)
            else [key for key in self._waiting if first <= key < end]
        )
        self.reasons.pop(first, None)
        for key in keys:
            self._wake(key)
        return True

    def _gone_until(self, offset: int) -> tuple[int, str]:
        """The end of the range of gone offsets that begins here, and why they are gone."""
        _, limit = next(self.have.missing(offset, self.known), (offset, offset))
        if limit <= offset or offset in self.have:
            return offset, Drop.GAP
        if offset in self.reasons:
            return offset + 1, self.reasons[offset]
        limit = min((other for other in self.reasons if offset < other < limit), default=limit)
        reason = Drop.BEST_EFFORT if self.best_effort else self.reasons.get(-1, Drop.GAP)
        if offset < self.first_available:
            return min(limit, self.first_available), Drop.BEST_EFFORT if self.best_effort else Drop.GAP
        if offset in self.lost:
            return min(limit, self.lost.end_of(offset)), reason
        if self.fin is not None and offset >= self.fin:
            return limit, Drop.BEST_EFFORT if self.best_effort else Drop.GAP
        return offset, reason

    def learn(self, first_available: int, end: int, lost: Iterable[tuple[int, int]] = ()) -> None:
        """What the publisher says can be had: nothing below `first_available`, nothing that is `lost`, up to `end`."""
        self.first_available = max(self.first_available, first_available)
        self.known = max(self.known, end)
        for begin, stop in lost:
            self.lost.add(max(begin, self.floor), min(stop, self.known))
        self.advance()

    def finish(self, end: int) -> None:
        """The feed ended at `end`, or its publisher is lost and `end` is all that can still be had."""
        self.fin = end
        self.advance()

    def name_losses(self, reason: str) -> None:
        """From now on what the publisher no longer has counts under this reason (`latest`: superseded)."""
        self.reasons[-1] = reason

    @property
    def is_finished(self) -> bool:
        """Whether the feed ended and all of it is settled."""
        return self.fin is not None and self.floor >= self.known and not self.held

    # Asking for what is missing.

    def missing(self, target: int, *, most: int) -> list[tuple[int, int]]:
        """At most `most` ranges below `target` that were not received and are not gone, lowest first (S5)."""
        target = target if self.fin is None else min(target, self.fin)
        if self.best_effort or self.next >= target:
            return []
        ranges: list[tuple[int, int]] = []
        ceiling = self._highest.find() if self.held and self.room.left <= 0 else target
        for first, end in self.have.missing(max(self.next, self.first_available), min(target, ceiling)):
            ranges += self.lost.missing(first, end)
            if len(ranges) >= most:
                break
        return ranges[:most]

    # Looking.

    def check_invariants(self) -> None:
        """Assert what must always hold; called after every event in tests (I7, I8, I14)."""
        assert self.join <= self.floor <= self.next <= max(self.known, self.next)
        assert all(offset >= self.next and offset in self.have for offset in self.held)
        assert sum(self._holders.values()) == len(self.held)
        assert not any(offset in self.taken for offset in self.held)
        assert self.awaiting <= self.held.keys()
        assert self._claims.sizes.keys() <= self.held.keys()
        assert self.room.payload >= sum(self._claims.sizes.values())
        assert all(first > self.floor for first, _ in self.settled), "a range at the floor is absorbed"
        ready = set(self._ready)
        for offset, burst in self.held.items():
            previous = burst.previous[offset - burst.first]
            if self._is_taken(previous) and offset not in self.awaiting:
                assert offset in ready, f"{offset} could be handed over and is forgotten"

    def __repr__(self) -> str:
        return (
            f"InboundFeed({self.source}/{self.topic}, floor={self.floor}, next={self.next}, known={self.known}, "
            f"held={len(self.held)}, fin={self.fin})"
        )


_LETTERS = frozenset({Drop.CORRUPT_AT_SOURCE, Drop.TOO_LARGE, Drop.UNDECODABLE})
