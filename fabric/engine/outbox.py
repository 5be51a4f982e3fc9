"""A publisher's open burst and its numbering, under a lock of its own; the core sees a closed burst as one event.

Room is reserved when a burst is opened, for all that it may take, so that a record is numbered only when nothing can
refuse it any more (RULES N2). Values on a device are numbered at once and leave when their copies are done; what
follows in the feed waits behind them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from fabric.config import BURST_BYTES_MAX, Guard, Policy, WhenFull
from fabric.core.events import RoomNeeded
from fabric.core.wire import (
    ADDRESSED,
    NONE,
    OFFSET_END,
    RECORD_BYTES,
)
from fabric.engine.budget import Budget
from fabric.engine.columns import Int64s
from fabric.engine.durable import Durability
from fabric.engine.filling import Room, fill
from fabric.engine.leaving import Closed, Leaving
from fabric.engine.many import ROOM, Many
from fabric.engine.pacing import Pacing
from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import BrokenError, ClosedError, QueueFullError
from fabric.payloads import BYTES, Pending, Plan, pack_metadata, plan
from fabric.topics import check_seed
from transports.arena import Slot

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["ROW", "Outbox"]

US = 1_000
QUIET_BURST_BYTES = 4 * 1024
QUIET_ROOM = QUIET_BURST_BYTES + 4 * 1024
"""Reserved for an open burst of a topic whose last one left half empty; a busy topic has the whole: with 80 KiB for
each of ten thousand quiet topics nothing would be left for the busy ones."""
ATTEND_BYTES = 2 * 1024 * 1024
"""A thread that floods sees to the sockets after so many bytes: half of what is acknowledged at once."""
FLOOD_NS = 300 * US
"""Large values in shared memory that follow each other faster share bursts ..."""
FLOOD_VALUES = 4
"""... of so many, or of what comes within the age of a burst: what a burst costs both sides is then a quarter."""
SHARED_PACE = 4
"""What lies in shared memory passes no socket: those are seen to less often."""
T = TypeVar("T")
ROW = 5
"""Entries of one record in `Outbox.rows`."""


class Outbox:
    """One topic of one member, as its publishing threads see it."""

    def __init__(
        self,
        engine: Engine,
        budget: Budget,
        topic: str,
        policy: Policy,
        when_full: WhenFull,
        feed: int,
        sync: str = "",
    ) -> None:
        self.engine, self.budget, self.topic, self.policy, self.when_full, self.feed = (
            engine,
            budget,
            topic,
            policy,
            when_full,
            feed,
        )
        self.lock = threading.Lock()
        self._turn = deque([None])
        """Who took the one entry has the open burst to himself. `deque` is documented to pop and append atomically, and
        both cost 25 ns where `with lock` costs 165, a third of what a small record takes; nobody can wait for it, so
        all but the fast path hold `lock` first (`_alone`)."""
        self.closed = False
        self.next = 0
        """The offset of the next record."""
        self._lanes: dict[int, list[int]] = {}
        """By seed: the next sequence and the offset of the record before it."""
        self._limit = engine.config.inboxes.payload_bytes_max
        self.leaving = Leaving(engine, topic, feed)
        self.room = self._unpaced = self._filled = self._addressed_ns = 0
        self._burst_max = BURST_BYTES_MAX
        """Where the open burst is full."""
        self._is_busy = True
        self._pacing = Pacing(engine, topic)
        self._record_bytes = 1
        """Of the last burst, on average."""
        self._clear()
        self.guard = Guard.OFF
        self.durability = Durability(self, sync, ROOM) if policy is Policy.DURABLE else None
        engine.outboxes.append(self)

    def _clear(self) -> None:
        self.first, self.due_ns = self.next, 0
        self.size = BURST_BYTES_MAX
        """Bytes in the open burst; while none is open it is full, so that nothing goes into it."""
        self.rows: list[Any] = []
        """Of each record of the open burst `ROW` entries: seed, sequence, previous, kind, body. One flat list, because
        its columns are slices: to turn a list of tuples took longer than all the rest of closing a burst."""
        self._add = self.rows.extend
        self.metadata: dict[int, bytes] = {}
        self.payloads: dict[int, Any] = {}
        self.waiting: list[tuple[int, Pending]] = []

    # Publishing.

    def publish(self, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None) -> int:
        """Publish a snapshot of `value` in the lane of `seed`; returns its sequence in that lane.

        Returns when the record is in retention. Raises `QueueFullError` (nothing was taken), `UnsupportedValueError`,
        `PayloadTooLargeError`, `SeedError`, `ClosedError`, `BrokenError`, `WrongProcessError`.
        """
        # Fast path: a few bytes into an open burst of a known lane.
        if value.__class__ is bytes and metadata is None and seed.__class__ is int:
            turn = self._turn
            try:
                turn.pop()
            except IndexError:
                pass  # another thread is at it: wait for it
            except BaseException:  # a signal's handler raised once it was taken
                turn.append(None)
                raise
            else:
                try:
                    size = self.size + len(value) + RECORD_BYTES
                    lane = self._lanes.get(seed)
                    if size <= self._burst_max and lane is not None:
                        sequence, previous = lane
                        lane[1] = offset = self.next
                        lane[0] = sequence + 1
                        self.size, self.next = size, offset + 1
                        self._add((seed, sequence, previous, BYTES, value))  # last: a handler may raise after any call
                        return sequence
                finally:
                    turn.append(None)
        return self._publish(value, seed, metadata)

    def _publish(self, value: object, seed: int, metadata: Mapping[str, object] | None) -> int:
        """Any value, into any burst."""
        if self.durability is not None:
            return run_steps(self.durability.publishing(value, seed, metadata), self._until)
        packed = pack_metadata(metadata) if metadata else b""
        planned = plan(value, limit=self._limit)
        seed = check_seed(seed)
        if planned.on_device or planned.size + len(packed) + RECORD_BYTES > BURST_BYTES_MAX:
            return self._publish_addressed(planned, seed, packed)
        return self._publish_small(planned.kind, planned.tobytes(), seed, packed)

    def publish_many(self, values: Any, *, seeds: Any) -> list[int] | Int64s:  # noqa: ANN401 - any sequences
        """Publish each of `values` in the lane of the seed beside it; returns their sequences.

        The rows of an array or tensor are values, as `publish` would take them, and their sequences come as an array.
        Raises as `publish`; then those before it were taken. `ValueError`: there are not as many seeds as values.
        """
        many = Many(self, values, seeds)
        while not many.is_over:
            many.go_on()
        return many.sequences

    def _publish_rest(self, values: Sequence[object], checked: Sequence[int], sequences: list[int]) -> None:
        """Publish the values from `len(sequences)` on; if it raises, `sequences` says what was taken."""
        while len(sequences) < len(values):
            self._alone(self._append_plain, values, checked, sequences)
            if len(sequences) < len(values):
                at = len(sequences)
                sequences.append(self.publish(values[at], seed=checked[at]))

    def _append_plain(self, values: Sequence[object], seeds: Sequence[int], sequences: list[int]) -> None:
        """Append plain bytes to the open burst, from `len(sequences)` on, until it is full or something else comes."""
        begin, size, lanes, add = len(sequences), self.size, self._lanes, self._add
        for value, seed in zip(islice(values, begin, None), islice(seeds, begin, None), strict=True):
            size += len(value) + RECORD_BYTES if value.__class__ is bytes else BURST_BYTES_MAX
            lane = lanes.get(seed)
            if size > self._burst_max or lane is None:
                break
            sequence, previous = lane
            lane[1] = offset = self.next
            lane[0] = sequence + 1
            self.size, self.next = size, offset + 1
            add((seed, sequence, previous, BYTES, value))
            sequences.append(sequence)

    def _publish_small(self, kind: int, body: bytes, seed: int, packed: bytes) -> int:
        while (taken := self._alone(self._take_small, kind, body, seed, packed)) is None:
            self._wait_for_room(self._room_for(len(body) + len(packed) + RECORD_BYTES))
        sequence, filled = taken
        if filled:  # who fills a burst sends it
            self.engine.push()
            self._pace(filled)
        return sequence

    def _take_small(self, kind: int, body: bytes, seed: int, packed: bytes) -> tuple[int, int] | None:
        """Into the open burst or a new one: its sequence, and the bytes of bursts that it filled; None without room."""
        self._require_open()
        size = len(body) + len(packed) + RECORD_BYTES
        if self.rows and self.size + size > self._burst_max:
            self._filled += self.size
            self._close()
        if not self.rows:
            if not self._open(self._room_for(size)):
                return None
            self.engine.note_open(self)
        sequence = self._append(seed, kind, body, packed, size)
        if self.size + size > self._burst_max:
            self._filled += self.size
            self._close()
        filled, self._filled = self._filled, 0
        return sequence, filled

    def _lanes_of_burst(self) -> list[tuple[int, int, int]]:
        """Seed, sequence and previous of each record in the open burst."""
        rows = self.rows
        return list(zip(rows[0::ROW], rows[1::ROW], rows[2::ROW], strict=True))

    def _room_for(self, size: int) -> int:
        return ROOM if self._is_busy or size > QUIET_BURST_BYTES else QUIET_ROOM

    def _append(self, seed: int, kind: int, body: bytes, packed: bytes, size: int) -> int:
        lane = self._lanes.get(seed)
        if lane is None:
            lane = self._lanes[seed] = [0, NONE]
        sequence, previous = lane
        if packed:
            self.metadata[len(self.rows) // ROW] = packed
        lane[0], lane[1] = sequence + 1, self.next
        self.size, self.next = self.size + size, self.next + 1
        self._add((seed, sequence, previous, kind, body))
        return sequence

    def _publish_addressed(self, planned: Plan, seed: int, packed: bytes) -> int:
        """The value has memory of its own; the burst carries its descriptor, and leaves at once but in a flood."""
        if not self._has_room(ROOM + planned.size):  # before it takes memory that another has to leave first
            self._wait_for_room(ROOM + planned.size)
        buffer, pending, descriptor = fill(self.engine, planned, self.feed)
        is_shared = isinstance(buffer, Slot)
        if self.guard is not Guard.OFF and not planned.on_device:
            buffer = self.engine.guarding.guarded(self, planned, buffer, seed)
        place = buffer, pending, planned.kind | ADDRESSED, seed, descriptor, packed
        try:
            while (sequence := self._alone(self._take_addressed, *place, may_wait=is_shared)) is None:
                self.engine.push()
                self._wait_for_room(ROOM + planned.size)
        except BaseException:
            buffer.release()  # it was not taken
            raise
        self.engine.push()
        if pending is not None:
            self.engine.note_open(self)
        self._record_bytes = planned.size
        self._pace(planned.size // SHARED_PACE if is_shared else planned.size)
        return sequence

    def _take_addressed(
        self,
        buffer: Room,
        pending: Pending | None,
        kind: int,
        seed: int,
        descriptor: bytes,
        packed: bytes,
        *,
        may_wait: bool = False,
    ) -> int | None:
        """Into the open burst or a new one, which leaves at once unless `may_wait` for the rest of a flood.

        None if there is no room for it.
        """
        self._require_open()
        size, large = RECORD_BYTES + len(packed) + len(descriptor), len(buffer.view)
        joins = bool(self.rows) and may_wait and self.size + size <= self._burst_max and self.budget.take(large)
        if joins:
            self.room += large
        else:
            if self.rows:
                self._close()
            if not self._open(ROOM + large):
                return None
        self.payloads[self.next] = buffer
        if pending is not None:
            self.waiting.append((self.next, pending))
        sequence = self._append(seed, kind, descriptor, packed, size)
        now = self.engine.clock()
        is_flood, self._addressed_ns = now - self._addressed_ns < FLOOD_NS, now
        if not (may_wait and is_flood) or len(self.payloads) >= FLOOD_VALUES:
            self._close()
        elif not joins:
            self.engine.note_open(self)
        return sequence

    # The open burst; all of these need it to themselves.

    def _alone(self, work: Callable[..., T], *arguments: Any, **named: Any) -> T:  # noqa: ANN401 - the work's own
        """Do some work while nobody else touches the open burst."""
        turn = self._turn
        with self.lock:
            while True:
                try:
                    turn.pop()
                except IndexError:
                    time.sleep(
                        0
                    )  # only a fast path can be before us: a few instructions of a thread that is not running
                except BaseException:  # as in `publish`
                    turn.append(None)
                    raise
                else:
                    try:
                        return work(*arguments, **named)
                    finally:
                        turn.append(None)

    def _require_open(self) -> None:
        engine = self.engine
        engine.require_open()
        if self.closed:
            raise ClosedError(what=f"the publisher of {self.topic}")
        if engine.fenced_by:
            raise BrokenError("a newer incarnation of this member lives", what="the fabric")
        if self.next > OFFSET_END - BURST_BYTES_MAX:  # more than the open burst takes: none of it may wrap
            raise BrokenError("its offsets are used up", what=f"the publisher of {self.topic}")

    def _open(self, room: int) -> bool:
        """Reserve room and begin a burst; False if there is none."""
        if self.due_ns:  # a signal's handler raised before its first row
            self.budget.give(self.room)
            self.due_ns = 0
        if not self.budget.take(room):
            return False
        self.first, self.room, self.size = self.next, room, 0
        self._burst_max = QUIET_BURST_BYTES if room == QUIET_ROOM else BURST_BYTES_MAX
        self.due_ns = self.engine.clock() + int(self.engine.config.work.burst_age_ms * 1000 * US)
        return True

    def _close(self) -> None:
        """End the open burst; it leaves now, or once the copies before it are done."""
        self._record_bytes = max(1, self.size * ROW // len(self.rows))
        self._is_busy = 2 * self.size > self._burst_max
        rows = self.rows
        columns = [rows[column::ROW] for column in range(ROW)]
        with_seeds = self.policy is Policy.LATEST
        closed = Closed(
            self.first, columns, self.metadata, self.payloads, self.waiting, self.room, with_seeds=with_seeds
        )
        self.leaving.add(closed)
        self._clear()
        self.leaving.go()

    # Leaving.

    def close_if_due(self, now: int) -> int:
        """Close the open burst if it is old enough; returns when it is due next, 0 if nothing waits.

        Called by the driver.
        """
        if not self.lock.acquire(blocking=False):
            return now + 100 * US
        turn = self._turn
        try:
            try:
                turn.pop()  # nor is this waited for: it may be held further up this very stack
            except IndexError:
                return now + 100 * US
            except BaseException:
                turn.append(None)
                raise
            try:
                return self._close_due(now)
            finally:
                turn.append(None)
        finally:
            self.lock.release()

    def _close_due(self, now: int) -> int:
        if self.rows and now >= self.due_ns:
            self._close()
        elif self.leaving:
            self.leaving.go()
        return now + 1000 * US if self.leaving else 0  # a burst that was opened since is noted by itself

    def close_burst(self) -> None:
        """Let the open burst leave now."""
        self._alone(self._close_now)

    def _close_now(self) -> None:
        if self.rows:
            self._close()
        elif self.leaving:
            self.leaving.go()

    def shut(self) -> None:
        """No record is taken any more."""
        self.close_burst()
        with self.lock:
            self.closed = True

    def abandon(self) -> None:
        """In a forked child: what is open belongs to the parent."""
        self.lock, self.closed = threading.Lock(), True
        self._turn = deque([None])
        self.leaving.clear()
        self._clear()

    @property
    def has_left(self) -> bool:
        """Whether everything that was taken has left for the core."""
        return not self.rows and not self.leaving

    def _pace(self, size: int) -> None:
        """A flooding thread sees to the sockets now and then."""
        self._unpaced += size
        if self._unpaced >= ATTEND_BYTES:
            self._unpaced = 0
            self.engine.attend()
            self._give_way()

    def _give_way(self) -> None:
        run_steps(self._giving_way(), self._until)

    def _giving_way(self) -> Steps[None]:
        return self._pacing.giving_way(lambda: self.next, self._record_bytes)

    def _wait_for_room(self, room: int) -> None:
        run_steps(self._making_room(room), self._until)

    def _until(self, wait: Wait) -> bool:
        return self.engine.until(wait.is_over, wait.timeout_s)

    def _making_room(self, room: int) -> Steps[None]:
        """Wait until there is room, as `when_full` says. Raises `QueueFullError`."""
        engine = self.engine
        if self.when_full in (WhenFull.DROP_OLDEST, WhenFull.SPILL):
            engine.submit(RoomNeeded(self.topic, room + self.budget.reserved))
            if self._has_room(room):
                return
        timeout_s = 0.0 if self.when_full is WhenFull.FAIL else engine.config.retention.publish_timeout_s
        engine.counts["publish_waited"] += 1
        if not (yield Wait(lambda: self._has_room(room), timeout_s)):
            limit = engine.config.retention.owed_bytes_max
            raise QueueFullError(
                queue=f"the retention of {self.topic}", limit=limit, used=self.budget.used, waited_s=timeout_s
            ) from engine.store.error

    def _has_room(self, room: int) -> bool:
        used = self.budget.used
        return not used or used + room <= self.engine.config.retention.owed_bytes_max
