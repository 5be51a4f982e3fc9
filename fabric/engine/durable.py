"""Publishing on a durable topic: numbered, written, and only then sent; `publish` returns when the disk has it.

One burst of a topic is under way at a time. One that the disk refuses never was: its offsets, and its places in their
lanes, are used again (RULES N2). Who gives up waiting leaves it under way; whoever publishes next sees what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fabric.config import BURST_BYTES_MAX, WhenFull
from fabric.core.wire import ADDRESSED, RECORD_BYTES, checksum_of, encode_descriptor
from fabric.engine.steps import Steps, Wait
from fabric.errors import PayloadError, QueueFullError, WaitTimeoutError
from fabric.payloads import Pending, Plan, pack_metadata, plan
from fabric.topics import check_seed

if TYPE_CHECKING:
    from fabric.core.feeds import OutFeed
    from fabric.engine.outbox import Outbox

__all__ = ["Durability"]

T = TypeVar("T")
PAUSE_S = 0.05
"""Between two tries of who waits for room on disk: a try that fails is a write of nothing."""


class _Attempt(Generic[T]):
    """A burst under way.

    `result`: what its publisher returns. `lanes`: what its seeds come back to if it is refused.
    """

    __slots__ = ("end", "first", "is_taken", "lanes", "refused", "result")

    def __init__(self, first: int, end: int, refused: int, lanes: dict[int, tuple[int, int]], result: T) -> None:
        self.first, self.end, self.refused, self.lanes, self.result = first, end, refused, lanes, result
        self.is_taken: bool | None = None


class _Frozen:
    """A value that may be put into one burst after another, until the disk takes one of them."""

    __slots__ = ("view",)

    def __init__(self, view: memoryview) -> None:
        self.view = view

    def freeze(self) -> memoryview:
        """As a pooled buffer's, but as often as it is asked; the buffer comes back when the last view dies."""
        return self.view


class Durability:
    """What makes an outbox durable."""

    def __init__(self, outbox: Outbox, sync: str, room: int) -> None:
        self._outbox, self.sync, self._room = outbox, sync, room
        self._attempt: _Attempt[Any] | None = None

    # The steps of publishing.

    def publishing(self, value: object, seed: int, metadata: Mapping[str, object] | None) -> Steps[int]:
        """The steps of `publish`."""
        packed = pack_metadata(metadata) if metadata else b""
        planned = plan(value, limit=self._outbox._limit)
        seed = check_seed(seed)
        if self._is_large(planned, packed):
            return (yield from self._publishing_large(planned, seed, packed))
        size = planned.size + len(packed) + RECORD_BYTES
        body = planned.tobytes()
        return (yield from self._taking(0, partial(self._outbox._append, seed, planned.kind, body, packed, size)))

    def publishing_many(self, values: Sequence[object], seeds: Sequence[int], sequences: list[int]) -> Steps[None]:
        """The steps of `publish_many`; `sequences` says what was taken, also when this raises."""
        while len(sequences) < len(values):
            at = len(sequences)
            planned = plan(values[at], limit=self._outbox._limit)
            if self._is_large(planned, b""):
                sequences.append((yield from self._publishing_large(planned, seeds[at], b"")))
            else:
                sequences += yield from self._taking(0, partial(self._append_some, values, seeds, at))

    @staticmethod
    def _is_large(planned: Plan, packed: bytes) -> bool:
        return planned.on_device or planned.size + len(packed) + RECORD_BYTES > BURST_BYTES_MAX

    def _append_some(self, values: Sequence[object], seeds: Sequence[int], at: int) -> list[int]:
        """As many of the values from `at` on as fit into one burst; the first does."""
        outbox, taken = self._outbox, list[int]()
        for value, seed in zip(values[at:], seeds[at:], strict=True):
            try:
                planned = plan(value, limit=outbox._limit)
            except PayloadError:
                if taken:
                    break  # its turn to say so comes
                raise
            size = planned.size + RECORD_BYTES
            if taken and (self._is_large(planned, b"") or outbox.size + size > BURST_BYTES_MAX):
                break
            taken.append(outbox._append(seed, planned.kind, planned.tobytes(), b"", size))
        return taken

    def _publishing_large(self, planned: Plan, seed: int, packed: bytes) -> Steps[int]:
        outbox = self._outbox
        buffer, pending, descriptor = outbox._fill(planned)
        if pending is not None:
            yield from self._copying(pending)
        frozen = _Frozen(buffer.freeze())
        descriptor = descriptor or encode_descriptor(len(frozen.view), checksum_of(frozen.view))
        add = partial(self._append_large, frozen, planned.kind | ADDRESSED, seed, descriptor, packed)
        return (yield from self._taking(planned.size, add))

    def _copying(self, pending: Pending) -> Steps[None]:
        """A value on a device is numbered when it is here: the disk could not take it sooner. Raises `StagingError`."""
        timeout_s = self._outbox.engine.config.retention.publish_timeout_s
        if not (yield Wait(pending.poll, timeout_s)):
            raise WaitTimeoutError("a copy from the device is not done", waited_s=timeout_s, state="nothing was taken")

    def _append_large(self, buffer: _Frozen, kind: int, seed: int, descriptor: bytes, packed: bytes) -> int:
        outbox = self._outbox
        outbox.payloads[outbox.next] = buffer
        return outbox._append(seed, kind, descriptor, packed, RECORD_BYTES + len(packed))

    def _taking(self, more: int, add: Callable[[], T]) -> Steps[T]:
        """Until the disk has what `add` puts into a burst, `more` bytes of values beside it."""
        outbox, engine = self._outbox, self._outbox.engine
        deadline_ns = engine.clock() + int(engine.config.retention.publish_timeout_s * 1e9)

        def left_s() -> float:
            return max(0.0, (deadline_ns - engine.clock()) / 1e9)

        while True:
            attempt: _Attempt[T] | None = outbox._alone(self._begin, more, add)
            if attempt is None:
                if not (yield Wait(lambda: self._may_begin(more), left_s())):
                    raise self._full()
                continue
            engine.push()
            yield Wait(partial(self._is_over, attempt), left_s())
            outbox._alone(self.resolve)
            if attempt.is_taken:
                return attempt.result
            if attempt.is_taken is None:
                raise self._unanswered(attempt)
            if outbox.when_full is WhenFull.FAIL or not left_s():
                raise self._full()
            yield Wait(lambda: False, min(PAUSE_S, left_s()))

    def _full(self) -> QueueFullError:
        engine = self._outbox.engine
        limit, used = engine.config.retention.owed_bytes_max, self._outbox.budget.used
        waited_s = 0.0 if self._outbox.when_full is WhenFull.FAIL else engine.config.retention.publish_timeout_s
        error = QueueFullError(queue=f"the log of {self._outbox.topic}", limit=limit, used=used, waited_s=waited_s)
        error.__cause__ = engine.store.error
        return error

    def _unanswered(self, attempt: _Attempt[T]) -> WaitTimeoutError:
        waited_s = self._outbox.engine.config.retention.publish_timeout_s
        text = f"the disk has not answered for {self._outbox.topic}; these records may still be taken"
        return WaitTimeoutError(text, waited_s=waited_s, state=f"offsets {attempt.first} to {attempt.end - 1}")

    # The burst under way. All but `_is_over` and `_may_begin` need the outbox to themselves.

    @property
    def _feed(self) -> OutFeed | None:
        return self._outbox.engine.core.publishing.feeds.get(self._outbox.topic)

    def _begin(self, more: int, add: Callable[[], T]) -> _Attempt[T] | None:
        """Number a burst and ask for it to be written; None if another is under way, or there is no room."""
        outbox = self._outbox
        outbox._require_open()
        feed = self._feed
        if not self.resolve() or feed is None or not outbox._open(self._room + more):
            return None
        first = outbox.next
        try:
            result = add()
        finally:
            lanes: dict[int, tuple[int, int]] = {}
            for seed, sequence, previous in outbox._lanes_of_burst():
                lanes.setdefault(seed, (sequence, previous))
            if lanes:
                outbox._close()
        attempt = self._attempt = _Attempt(first, outbox.next, feed.refused, lanes, result)
        return attempt

    def _may_begin(self, more: int) -> bool:
        attempt, feed = self._attempt, self._feed
        if feed is None or (attempt is not None and not self._is_over(attempt)):
            return False
        return self._outbox._has_room(self._room + more)

    def _is_over(self, attempt: _Attempt[Any]) -> bool:
        feed = self._feed
        return feed is not None and (feed.end >= attempt.end or feed.refused > attempt.refused)

    def resolve(self) -> bool:
        """Whether nothing is under way any more. What was refused is undone."""
        attempt, feed = self._attempt, self._feed
        if attempt is None:
            return True
        if feed is None or not self._is_over(attempt):
            return False
        self._attempt, attempt.is_taken = None, feed.end >= attempt.end
        if not attempt.is_taken:
            self._undo(attempt)
        return True

    def _undo(self, attempt: _Attempt[Any]) -> None:
        """These records never were: their numbers are given again."""
        outbox = self._outbox
        outbox.next = attempt.first
        outbox._lanes.update({seed: list(lane) for seed, lane in attempt.lanes.items()})
        outbox._clear()
