"""Publishing on a durable topic: numbered, written, and only then sent; `publish` returns when the disk has it.

One burst of a topic is under way at a time. Whoever publishes meanwhile waits without a number, and all who wait go
into the next burst together: one write and one sync for as many threads as there are. A burst that the disk refuses
never was: its offsets, and its places in their lanes, are used again (RULES N2), and each of its publishers is told.
Who gives up waiting leaves the burst under way; whoever publishes next sees what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from fabric.config import BURST_BYTES_MAX, WhenFull
from fabric.core.wire import ADDRESSED, NONE, RECORD_BYTES
from fabric.engine.filling import Frozen, describe, fill, freeze
from fabric.engine.steps import Steps, Wait
from fabric.errors import PayloadError, QueueFullError, WaitTimeoutError
from fabric.payloads import Pending, Plan, pack_metadata, plan
from fabric.topics import check_seed

if TYPE_CHECKING:
    from fabric.core.feeds import OutFeed
    from fabric.engine.outbox import Outbox

__all__ = ["Durability"]

PAUSE_S = 0.05
"""Between two tries of who waits for room on disk: a try that fails is a write of nothing."""
LAST_TRY_S = 0.25
"""A disk that refused is not tried again so shortly before the time is over: unanswered, one could not say that nothing
was taken."""


_Row: TypeAlias = tuple[int, int, bytes, bytes]
"""A record without a number: seed, kind, body, and packed metadata."""


class _Attempt:
    """A burst under way. `lanes`: what its seeds come back to if it is refused; `refused`: how many were before it."""

    __slots__ = ("end", "first", "is_taken", "lanes", "refused")

    def __init__(self, first: int, refused: int) -> None:
        self.first = self.end = first
        self.refused = refused
        self.lanes: dict[int, tuple[int, int]] = {}
        self.is_taken: bool | None = None


class _Request:
    """What one call wants to be written, all of it in one burst. `more`: bytes of values beside the burst.

    `attempt`: the burst that carries it; None while it waits. `sequences`: what its records are numbered there.
    """

    __slots__ = ("attempt", "buffer", "first", "more", "rows", "sequences", "size")

    def __init__(self, rows: Sequence[_Row], size: int, *, more: int = 0, buffer: Frozen | None = None) -> None:
        self.rows, self.size, self.more, self.buffer = rows, size, more, buffer
        self.attempt: _Attempt | None = None
        self.first = 0
        self.sequences: list[int] = []


class Durability:
    """What makes an outbox durable."""

    def __init__(self, outbox: Outbox, sync: str, room: int) -> None:
        self._outbox, self.sync, self._room = outbox, sync, room
        self._out: OutFeed | None = None
        self._attempt: _Attempt | None = None
        self._waiting: list[_Request] = []
        """Those who go into the next burst, in the order in which they came."""

    # The steps of publishing.

    def publishing(self, value: object, seed: int, metadata: Mapping[str, object] | None) -> Steps[int]:
        """The steps of `publish`."""
        packed = pack_metadata(metadata) if metadata else b""
        planned = plan(value, limit=self._outbox._limit)
        seed = check_seed(seed)
        if self._is_large(planned, packed):
            return (yield from self._publishing_large(planned, seed, packed))
        size = planned.size + len(packed) + RECORD_BYTES
        row = (seed, planned.kind, planned.tobytes(), packed)
        (sequence,) = yield from self._taking(_Request((row,), size))
        return sequence

    def publishing_many(self, values: Sequence[object], seeds: Sequence[int], sequences: list[int]) -> Steps[None]:
        """The steps of `publish_many`; `sequences` says what was taken, also when this raises."""
        while len(sequences) < len(values):
            at = len(sequences)
            planned = plan(values[at], limit=self._outbox._limit)
            if self._is_large(planned, b""):
                sequences.append((yield from self._publishing_large(planned, seeds[at], b"")))
            else:
                sequences += yield from self._taking(self._some(values, seeds, at))

    @staticmethod
    def _is_large(planned: Plan, packed: bytes) -> bool:
        return planned.on_device or planned.size + len(packed) + RECORD_BYTES > BURST_BYTES_MAX

    def _some(self, values: Sequence[object], seeds: Sequence[int], at: int) -> _Request:
        """As many of the values from `at` on as fit into one burst; the first does."""
        rows, size, limit = list[_Row](), 0, self._outbox._limit
        for position in range(at, len(values)):
            try:
                planned = plan(values[position], limit=limit)
            except PayloadError:
                if rows:
                    break  # its turn to say so comes
                raise
            more = planned.size + RECORD_BYTES
            if rows and (self._is_large(planned, b"") or size + more > BURST_BYTES_MAX):
                break
            rows.append((seeds[position], planned.kind, planned.tobytes(), b""))
            size += more
        return _Request(rows, size)

    def _publishing_large(self, planned: Plan, seed: int, packed: bytes) -> Steps[int]:
        outbox = self._outbox
        buffer, pending, descriptor = fill(outbox.engine, planned, None)  # only the disk keeps it
        if pending is not None:
            yield from self._copying(pending)
        frozen = freeze(buffer)
        return (yield from self._publishing_frozen(planned.kind, frozen, descriptor, seed, packed))

    def _publishing_frozen(self, kind: int, frozen: Frozen, descriptor: bytes, seed: int, packed: bytes) -> Steps[int]:
        row = (seed, kind | ADDRESSED, descriptor or describe(frozen, 0), packed)
        request = _Request((row,), RECORD_BYTES + len(packed), more=len(frozen.view), buffer=frozen)
        (sequence,) = yield from self._taking(request)
        return sequence

    def publishing_loan(self, kind: int, frozen: Frozen, seed: int, packed: bytes) -> Steps[int]:
        """The steps of publishing what was written in place."""
        size = len(frozen.view) + len(packed) + RECORD_BYTES
        if size > BURST_BYTES_MAX:
            return (yield from self._publishing_frozen(kind, frozen, b"", seed, packed))
        (sequence,) = yield from self._taking(_Request(((seed, kind, bytes(frozen.view), packed),), size))
        return sequence

    def _copying(self, pending: Pending) -> Steps[None]:
        """A value on a device is numbered when it is here: the disk could not take it sooner. Raises `StagingError`."""
        timeout_s = self._outbox.engine.config.retention.publish_timeout_s
        if not (yield Wait(pending.poll, timeout_s)):
            raise WaitTimeoutError("a copy from the device is not done", waited_s=timeout_s, state="nothing was taken")

    def _taking(self, request: _Request) -> Steps[list[int]]:
        """Until the disk has it; returns the sequences of its records."""
        outbox, engine = self._outbox, self._outbox.engine
        deadline_ns = engine.clock() + int(engine.config.retention.publish_timeout_s * 1e9)

        def left_s() -> float:
            return max(0.0, (deadline_ns - engine.clock()) / 1e9)

        try:
            while True:
                self._go_on(self._enter, request)
                yield from self._awaiting(request, left_s)
                attempt = request.attempt
                if attempt is not None and attempt.is_taken:
                    return request.sequences
                if attempt is not None and attempt.is_taken is None:
                    raise self._unanswered(request)
                if attempt is None or outbox.when_full is WhenFull.FAIL or left_s() <= LAST_TRY_S:
                    raise self._full()
                yield Wait(lambda: False, min(PAUSE_S, left_s()))
        finally:
            if request in self._waiting:
                outbox._alone(self._waiting.remove, request)
                engine.on_progress()  # who stood behind it may be the first now

    def _awaiting(self, request: _Request, left_s: Callable[[], float]) -> Steps[None]:
        """Until its burst is over, or the time is.

        That it may go on can be so no longer when it does: another took it along. So only the clock says that time is
        over, and not that a wait came to nothing.
        """
        while request.attempt is None or request.attempt.is_taken is None:
            is_last = not left_s()
            yield Wait(partial(self._may_go_on, request), left_s())
            self._go_on(self._advance, request)
            if is_last:
                return

    def _go_on(self, work: Callable[[_Request], bool], request: _Request) -> None:
        if self._outbox._alone(work, request):
            self._outbox.engine.push()

    def _full(self) -> QueueFullError:
        engine = self._outbox.engine
        limit, used = engine.config.retention.owed_bytes_max, self._outbox.budget.used
        waited_s = 0.0 if self._outbox.when_full is WhenFull.FAIL else engine.config.retention.publish_timeout_s
        cause, queue = engine.store.error, f"the log of {self._outbox.topic}"
        why = f": {cause}" if cause is not None else ""
        error = QueueFullError(why, queue=queue, limit=limit, used=used, waited_s=waited_s)
        error.__cause__ = cause
        return error

    def _unanswered(self, request: _Request) -> WaitTimeoutError:
        waited_s = self._outbox.engine.config.retention.publish_timeout_s
        text = f"the disk has not answered for {self._outbox.topic}; these records may still be taken"
        last = request.first + len(request.rows) - 1
        return WaitTimeoutError(text, waited_s=waited_s, state=f"offsets {request.first} to {last}")

    # The burst under way. Whoever drives asks `_is_over` and `_may_go_on`; all else needs the outbox to itself.

    @property
    def _feed(self) -> OutFeed | None:
        """None until the core knows it, and then for ever the same."""
        if self._out is None:
            self._out = self._outbox.engine.core.publishing.feeds.get(self._outbox.topic)
        return self._out

    def _enter(self, request: _Request) -> bool:
        """Wait for the next burst, which may begin at once. Raises what keeps the outbox from taking anything."""
        self._outbox._require_open()
        request.attempt = None
        self._waiting.append(request)
        return self._advance(request)

    def _advance(self, request: _Request) -> bool:
        """See what came of the burst under way, and begin the next if there is none; whether one was begun."""
        outbox = self._outbox
        if not self.resolve() or not self._waiting:
            return False
        if request.attempt is None:
            outbox._require_open()
        elif outbox.closed:
            return False  # that is for those who wait to say
        feed = self._feed
        if feed is None or not outbox._open(self._room + self._waiting[0].more):
            return False
        self._begin(self._next_ones(), _Attempt(outbox.next, feed.refused))
        return True

    def _next_ones(self) -> list[_Request]:
        """Those of the waiting that fit into one burst. A large value is alone in its burst."""
        first, *others = self._waiting
        chosen, size = [first], first.size
        for request in others if first.buffer is None else ():
            size += request.size
            if size > BURST_BYTES_MAX or request.buffer is not None:
                break
            chosen.append(request)
        return chosen

    def _begin(self, requests: list[_Request], attempt: _Attempt) -> None:
        """Number their records and ask for them to be written: all, or none if a signal's handler raises."""
        outbox, rows, lanes = self._outbox, list[Any](), dict[int, list[int]]()
        metadata, payloads = dict[int, bytes](), dict[int, Frozen]()
        for request in requests:
            request.first, request.sequences = attempt.end, []
            for seed, kind, body, packed in request.rows:
                sequence, previous = lanes.get(seed) or outbox._lanes.get(seed) or (0, NONE)
                attempt.lanes.setdefault(seed, (sequence, previous))
                if packed:
                    metadata[attempt.end - attempt.first] = packed
                rows += seed, sequence, previous, kind, body
                lanes[seed] = [sequence + 1, attempt.end]
                request.sequences.append(sequence)
                attempt.end += 1
            if request.buffer is not None:
                payloads[request.first] = request.buffer
        try:
            outbox._lanes.update(lanes)
            outbox.next, outbox.size = attempt.end, sum([request.size for request in requests])
            outbox.metadata, outbox.payloads = metadata, payloads
            outbox._add(rows)
        finally:
            if outbox.rows:
                self._attempt = attempt
                for request in requests:
                    request.attempt = attempt
                del self._waiting[: len(requests)]
                outbox._close()
            else:
                outbox.budget.give(outbox.room)
                self._undo(attempt)

    def _may_go_on(self, request: _Request) -> bool:
        """Whether its burst is over, or the next may begin and it is the first to go into it."""
        attempt = request.attempt
        if attempt is not None:
            return self._is_over(attempt)
        under_way = self._attempt
        if request not in self._waiting[:1] or not (under_way is None or self._is_over(under_way)):
            return False
        return self._feed is not None and self._outbox._has_room(self._room + request.more)

    def _is_over(self, attempt: _Attempt) -> bool:
        if attempt.is_taken is not None:
            return True
        feed = self._feed
        return feed is not None and (feed.end >= attempt.end or feed.refused > attempt.refused)

    def resolve(self) -> bool:
        """Whether nothing is under way any more. What was refused is undone."""
        attempt, feed = self._attempt, self._feed
        if attempt is None:
            return True
        if feed is None or not self._is_over(attempt):
            return False
        is_taken = feed.end >= attempt.end
        if not is_taken:
            self._undo(attempt)
        attempt.is_taken, self._attempt = is_taken, None
        return True

    def _undo(self, attempt: _Attempt) -> None:
        """These records never were: their numbers are given again."""
        outbox = self._outbox
        outbox.next = attempt.first
        outbox._lanes.update({seed: list(lane) for seed, lane in attempt.lanes.items()})
        outbox._clear()
