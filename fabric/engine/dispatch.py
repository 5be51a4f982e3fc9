"""Where handlers run: never under the engine's lock, one at a time, each lane in order.

A message whose handler raised is tried again after a while; what follows in its lane waits behind it, other lanes go
on. After the last attempt it becomes a dead letter. In `thread` mode one thread runs all handlers of a member and
drives the engine while it waits; in `step` mode they run inside `Fabric.step` and `Fabric.serve`, and inside
`request` while that waits.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from fabric.config import Handlers
from fabric.core import events
from fabric.core.wire import ADDRESSED, TOMBSTONE, Drop, checksum_of, encode_descriptor
from fabric.engine.inbox import Hand, Inbox
from fabric.errors import FabricError, PayloadError
from fabric.message import Message, Request, TriedMessage
from fabric.payloads import plan

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["DeadLetter", "Dispatcher", "Handler", "Job", "Lane", "pack_value"]

log = logging.getLogger("fabric.handlers")

MS, S = 1_000_000, 1_000_000_000
GRACE_NS = 2_000 * MS
"""A request may be sooner than the responder of a member that has just joined; it waits so long for it."""
RETRY_FIRST_NS = 100 * MS
"""A handler that raised is tried again after this, then after twice as long each time (reliability notes, section
4.11)."""
FAILURE_TEXT_MAX = 2048
INLINE_BYTES_MAX = 64 * 1024
"""Values of requests and replies below this size travel in their frame."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that will not be delivered, and why. Kept in memory until the dead-letter store exists."""

    source: str
    topic: str
    incarnation: int
    seed: int
    sequence: int
    offset: int
    reason: str
    detail: str
    attempts: int


Lane = tuple[object, int]
"""A feed and a seed."""


class Job(NamedTuple):
    """A message to be handled, and its place in a hand."""

    message: TriedMessage
    hand: Hand
    position: int


class Handler:
    """One function on one pattern. `blocked`: lanes whose first message runs, or waits for its next attempt."""

    __slots__ = ("attempts", "blocked", "function", "hand", "inbox", "position", "retries")

    def __init__(self, function: Callable[[Message], object], inbox: Inbox, attempts: int) -> None:
        self.function, self.inbox, self.attempts = function, inbox, attempts
        self.blocked: dict[Lane, deque[Job]] = {}
        self.retries: list[tuple[int, int, Lane]] = []
        self.hand: Hand | None = None
        self.position = 0

    def due_ns(self) -> int | None:
        """When the next attempt is due."""
        return self.retries[0][0] if self.retries else None


class Dispatcher:
    """All handlers of one member."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.threaded = engine.config.work.handlers is Handlers.THREAD
        # On a thread of ours `sys.exit` would end that thread alone, and without a word: there it counts as a failure.
        self._outcomes: tuple[type[BaseException], ...] = (Exception, SystemExit) if self.threaded else (Exception,)
        self._handlers: list[Handler] = []
        self._responders: dict[str, Callable[[Request], Any]] = {}
        self._requests: list[tuple[int, int, events.ExecuteRequest, memoryview | None]] = []
        self._unclaimed: list[tuple[int, events.ExecuteRequest, memoryview | None]] = []
        """Requests of methods that have no responder yet, and until when they wait for one; oldest first."""
        self._order = itertools.count()  # not an integer: the driver and the handlers count at once
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        with engine.lock:  # requests are handed over under it; those that came with the first greetings wait
            engine.on_request = self._take_request
            while engine.early:
                self._take_request(*engine.early.pop(0))

    def add(self, function: Callable[[Message], object], inbox: Inbox, attempts: int) -> None:
        """Run a function for each message of an inbox."""
        self._handlers.append(Handler(function, inbox, attempts))
        self._start()

    def respond(self, method: str, function: Callable[[Request], Any]) -> None:
        """Run a function for each request of a method."""
        self._responders[method] = function
        with self.engine.lock:
            self._claim(lambda execute, _: execute.method == method)
        self._start()

    def _start(self) -> None:
        if self.threaded and self._thread is None:
            name = f"fabric-handlers-{self.engine.card.name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        engine = self.engine
        while not (self._closing.is_set() or engine.closed or engine.broken is not None):
            due_ns = self.due_ns()
            wait_s = 3600.0 if due_ns is None else max(0.0, (due_ns - engine.clock()) / S)
            try:
                engine.until(lambda: self._closing.is_set() or self.has_work(), wait_s, patient=True)
            except FabricError:
                return
            while self.run_one():
                if self._closing.is_set():
                    return

    @property
    def is_current(self) -> bool:
        """Whether a handler of this member runs on the calling thread."""
        return threading.current_thread() is self._thread

    # What there is to do.

    def _take_request(self, execute: events.ExecuteRequest, payload: memoryview | None) -> None:
        """From the driver, under its lock: only queue. One without a responder has a while for it to appear."""
        if execute.method in self._responders:
            heappush(self._requests, (execute.priority, next(self._order), execute, payload))
            return
        self._unclaimed.append((self.engine.clock() + GRACE_NS, execute, payload))
        self._on_unclaimed()

    def _on_unclaimed(self) -> None:
        """Somebody has to say no, in time."""
        self._start()

    def _claim(self, is_claimed: Callable[[events.ExecuteRequest, int], bool]) -> None:
        """Queue the requests that found their responder, or that waited long enough for one."""
        waiting, self._unclaimed = self._unclaimed, []
        for due_ns, execute, payload in waiting:
            if is_claimed(execute, due_ns):
                heappush(self._requests, (execute.priority, next(self._order), execute, payload))
            else:
                self._unclaimed.append((due_ns, execute, payload))

    def has_work(self) -> bool:
        """Whether `run_one` would run something now."""
        if self._requests:
            return True
        now = self.engine.clock()
        if self._unclaimed and self._unclaimed[0][0] <= now:
            return True
        for handler in self._handlers:
            if handler.hand is not None or handler.inbox.items or (handler.retries and handler.retries[0][0] <= now):
                return True
        return False

    def due_ns(self) -> int | None:
        """When the next attempt of a failed message is due."""
        if not (self._handlers or self._unclaimed):
            return None
        dues = [due for handler in self._handlers if (due := handler.due_ns()) is not None]
        return min([*dues, *(due for due, _, _ in self._unclaimed[:1])], default=None)

    def run_one(self) -> bool:
        """Run one handler for one message or request; False if there is nothing to run, or another thread is at it."""
        if self._closing.is_set() or not self._running.acquire(blocking=False):
            return False
        try:
            self._claim_late()
            if self._requests:
                _, _, execute, payload = heappop(self._requests)
                self._answer(execute, payload)
                return True
            return any(self._retry(handler) or self._advance(handler) for handler in self._handlers)
        finally:
            self._running.release()

    def _claim_late(self) -> None:
        """Requests that waited in vain for a responder are answered, too: that there is none."""
        if self._unclaimed and self._unclaimed[0][0] <= self.engine.clock():
            now = self.engine.clock()
            with self.engine.lock:
                self._claim(lambda _, due_ns: due_ns <= now)

    def run_until(self, is_over: Callable[[], bool], timeout_s: float) -> bool:
        """Run handlers as they get work, until `is_over()`; False after the time.

        For `step` mode and for waiting requests.
        """
        engine = self.engine
        deadline_ns = engine.clock() + int(timeout_s * S)
        while not is_over():
            now = engine.clock()
            if now >= deadline_ns:
                return False
            until_ns = min(deadline_ns, self.due_ns() or deadline_ns)
            engine.until(lambda: is_over() or self.has_work(), max(0, until_ns - now) / S)
            if not is_over() and not self.run_one() and self.has_work():
                return is_over()  # a handler further up this very stack, or another thread, is at it
        return True

    # Messages.

    def _advance(self, handler: Handler) -> bool:
        job = self._take(handler)
        if job is None:
            return False
        if not self._attempt(handler, job):
            lane = job.message.lane
            handler.blocked[lane] = deque([job])
            self._try_again_later(handler, lane, job.message)
        if handler.hand is None:
            self.engine.push()
        return True

    def _take(self, handler: Handler) -> Job | None:
        """The next message that may run now; those of a blocked lane join its queue on the way."""
        while True:
            hand = handler.hand
            if hand is None:
                if not handler.inbox.items:
                    return None
                hand = handler.hand = Hand(handler.inbox.items.popleft(), self.engine.submit_later)
                handler.position = 0
            position, item = handler.position, hand.item
            handler.position += 1
            if handler.position >= len(hand.rows):
                handler.hand = None
            row, burst = hand.rows[position], item.burst
            job = Job(TriedMessage(burst, row, item.feed), hand, position)
            waiting = handler.blocked.get(job.message.lane)
            if burst.columns[2][row] == TOMBSTONE:
                hand.settle_one(position, Drop.LOST_AT_SOURCE)
            elif waiting is None:
                return job
            else:
                waiting.append(job)

    def _retry(self, handler: Handler) -> bool:
        if not handler.retries or handler.retries[0][0] > self.engine.clock():
            return False
        lane = heappop(handler.retries)[2]
        waiting = handler.blocked[lane]
        while waiting:
            if not self._attempt(handler, waiting[0]):
                self._try_again_later(handler, lane, waiting[0].message)
                break
            waiting.popleft()
        else:
            del handler.blocked[lane]
        self.engine.push()
        return True

    def _try_again_later(self, handler: Handler, lane: Lane, message: Message) -> None:
        due_ns = self.engine.clock() + RETRY_FIRST_NS * 2 ** (message.attempt - 2)
        heappush(handler.retries, (due_ns, next(self._order), lane))

    def _attempt(self, handler: Handler, job: Job) -> bool:
        return self._settle(handler, job, self._run_handler(handler.function, job.message)[1])

    def _run_handler(self, function: Callable[[Any], Any], argument: object) -> tuple[Any, BaseException | None]:
        """(result, None), or (None, what it raised)."""
        try:
            return function(argument), None
        except self._outcomes as error:  # round a user's handler: whatever it raises is its outcome
            return None, error

    def _settle(self, handler: Handler, job: Job, error: BaseException | None) -> bool:
        """Whether the message is settled: handled, or a dead letter. Otherwise it is to be tried again."""
        message, hand, position = job
        if error is None:
            hand.settle_one(position)
            return True
        reason = _reason_of(message)
        if reason is None and message.attempt < handler.attempts:
            message.attempt += 1
            return False
        detail = f"{type(error).__name__}: {error}"[:FAILURE_TEXT_MAX]
        self.engine.bury(message, reason or Drop.HANDLER_EXHAUSTED, detail)
        hand.settle_one(position, reason or Drop.HANDLER_EXHAUSTED)
        return True

    # Requests.

    def _answer(self, execute: events.ExecuteRequest, payload: memoryview | None) -> None:
        self._reply(execute, *self._run_handler(self._respond_to, (execute, payload)))

    def _respond_to(self, asked: tuple[events.ExecuteRequest, memoryview | None]) -> Any:  # noqa: ANN401 - the user's
        """Run the responder of a request."""
        execute, payload = asked
        function = self._responders.get(execute.method)
        if function is None:
            raise LookupError(f"no handler for {execute.method!r}")
        blob = payload if payload is not None else memoryview(execute.blob)
        return function(
            Request(execute.peer, execute.method, execute.kind, blob, execute.metadata, execute.deadline_ns)
        )

    def _reply(self, execute: events.ExecuteRequest, result: object, error: BaseException | None) -> None:
        """Send a result, or why there is none."""
        kind, inline, large = 0, b"", None
        if error is None:
            packed, error = self._run_handler(self._pack, result)
            if error is None:
                kind, inline, large = packed
        if error is not None:
            failure = [type(error).__name__, str(error)[:FAILURE_TEXT_MAX]]
            inline = msgpack.packb(failure, unicode_errors="replace")
        failed = error is not None
        reply = events.ReplyIssued(execute.peer, execute.incarnation, execute.request, failed, kind, inline, large)
        self.engine.submit(reply)

    def _pack(self, value: object) -> tuple[int, bytes, memoryview | None]:
        return pack_value(value, limit=self.engine.config.inboxes.payload_bytes_max)

    def close(self, timeout_s: float) -> None:
        """Begin no handler any more; wait for the one that runs."""
        self._closing.set()
        self.engine.on_progress()
        if self._thread is not None and not self.is_current:
            self._thread.join(timeout=timeout_s)


def _reason_of(message: Message) -> str | None:
    try:
        _ = message.value
    except PayloadError:
        return Drop.UNDECODABLE
    return None


def pack_value(value: object, *, limit: int) -> tuple[int, bytes, memoryview | None]:
    """(kind, blob, None), or for a large value (addressed kind, descriptor, its bytes). Raises `PayloadError`s."""
    planned = plan(value, limit=limit)
    if planned.size < INLINE_BYTES_MAX:
        return planned.kind, planned.tobytes(), None
    large = memoryview(planned.tobytes())
    return planned.kind | ADDRESSED, encode_descriptor(large.nbytes, checksum_of(large)), large
