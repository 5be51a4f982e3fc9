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
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from fabric.config import Handlers
from fabric.core import events
from fabric.core.guards import Breaker, BreakerState, chance_of
from fabric.core.wire import ADDRESSED, TOMBSTONE, Drop, checksum_of, encode_descriptor
from fabric.engine.handler import Handler, Job
from fabric.engine.inbox import Inbox
from fabric.engine.letter_forms import Burial
from fabric.errors import FabricError, PayloadError
from fabric.message import Message, RedrivenFeed, Request, TriedMessage
from fabric.payloads import plan
from fabric.storage.hand_page import key_of
from fabric.storage.letter_rows import LetterKey

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["Dispatcher", "pack_value"]

log = logging.getLogger("fabric.handlers")

MS, S = 1_000_000, 1_000_000_000
GRACE_NS = 2_000 * MS
"""A request may be sooner than the responder of a member that has just joined; it waits so long for it."""
FAILURE_TEXT_MAX = 2048
INLINE_BYTES_MAX = 64 * 1024
"""Values of requests and replies below this size travel in their frame."""


class Buried(NamedTuple):
    """A message whose letter is written. `leads`: its lane waits for that."""

    handler: Handler
    job: Job
    why: Burial
    leads: bool


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
        self._buried: deque[Buried] = deque()
        """Messages whose letters are written: the storage thread adds, handlers' threads settle."""
        self._order = itertools.count()  # not an integer: the driver and the handlers count at once
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        with engine.lock:  # requests are handed over under it; those that came with the first greetings wait
            engine.on_request = self._take_request
            while engine.early:
                self._take_request(*engine.early.pop(0))

    def add(
        self, function: Callable[[Message], object], inbox: Inbox, name: str, attempts: int, *, parks: bool
    ) -> None:
        """Run a function for each message of an inbox. `name`: as `Letters.claim` gave it."""
        limits = self.engine.config.letters
        breaker = Breaker(limits.same_reason_max, int(limits.pause_s * S))
        self.engine.letters.bind(name, inbox)
        self._handlers.append(Handler(function, inbox, name, attempts, parks=parks, breaker=breaker))
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
        if self._requests or self._buried:
            return True
        if not (self._handlers or self._unclaimed):
            return False
        now = self.engine.clock()
        if self._unclaimed and self._unclaimed[0][0] <= now:
            return True
        letters = self.engine.letters
        room = letters.room(parked=True)
        return letters.is_ready and any(handler.has_work(now, room) for handler in self._handlers)

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
            return self._run_next()
        finally:
            self._running.release()

    def _run_next(self) -> bool:
        if self._buried:
            self._settle_buried()
        if self._unclaimed:
            self._claim_late()
        if self._requests:
            _, _, execute, payload = heappop(self._requests)
            self._answer(execute, payload)
            return True
        if not self.engine.letters.is_ready:
            return False
        now = self.engine.clock()
        for handler in self._handlers:
            if now >= handler.breaker.due_ns:
                self._go_on(handler, now)
                if self._retry(handler) or self._advance(handler):
                    return True
        return False

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
        engine, has_work = self.engine, self.has_work
        deadline_ns = engine.clock() + int(timeout_s * S)
        while not is_over():
            now = engine.clock()
            if now >= deadline_ns:
                return False
            until_ns = min(deadline_ns, self.due_ns() or deadline_ns)
            engine.until(lambda: is_over() or has_work(), max(0, until_ns - now) / S)
            if not is_over() and not self.run_one() and self.has_work():
                return is_over()  # a handler further up this very stack, or another thread, is at it
        return True

    # Messages.

    def _advance(self, handler: Handler) -> bool:
        job = self._take(handler)
        if job is None:
            return False
        if not self._attempt(handler, job):
            handler.blocked[job.message.lane] = deque([job])
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
                hand = handler.hand = self.engine.hand_of(handler.inbox.items.popleft())
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
                break
            waiting.popleft()
        else:
            del handler.blocked[lane]
        self.engine.push()
        return True

    def _try_again_later(self, handler: Handler, message: TriedMessage) -> None:
        message.attempt += 1
        order, context = next(self._order), self.engine.core.context
        message.retry = message.retry.after(self.engine.clock(), chance_of(context.id ^ context.incarnation, order))
        heappush(handler.retries, (message.retry.due_ns, order, message.lane))

    def _attempt(self, handler: Handler, job: Job) -> bool:
        """Whether the lane goes on: the message is settled, or will be whatever the lane does. Else it waits."""
        admitted = self._admit(handler, job)
        if admitted is not None:
            return admitted
        return self._settle(handler, job, self._run_handler(handler.function, job.message)[1])

    def _run_handler(self, function: Callable[[Any], Any], argument: object) -> tuple[Any, BaseException | None]:
        """(result, None), or (None, what it raised)."""
        try:
            return function(argument), None
        except self._outcomes as error:  # round a user's handler: whatever it raises is its outcome
            return None, error

    def _admit(self, handler: Handler, job: Job) -> bool | None:
        """None if the handler is to run now; else whether the lane goes on without that."""
        breaker = handler.breaker
        ticket: int | None = breaker.ticket
        if breaker.due_ns:  # fast path: a closed breaker needs no clock
            breaker, ticket = breaker.admit(self.engine.clock())
        if ticket is None:
            handler.crowded.append(job.message.lane)
            return False
        admitted = None if self.engine.letters.is_idle else self._look_up(handler, job)
        if admitted is None:
            handler.breaker, job.message.ticket = breaker, ticket
        return admitted

    def _look_up(self, handler: Handler, job: Job) -> bool | None:
        """As `_admit`, after what is known of letters."""
        message, letters = job.message, self.engine.letters
        key = _key(handler, message)
        if type(message._feed) is not RedrivenFeed:
            is_known, reason = letters.known.drop_of(key)
            if is_known:  # a record that is, or was, a letter is not handled again
                self.engine.counts["letters_known"] += 1
                self._forget(handler, message)
                job.hand.settle_one(job.position, reason)
                return True
            is_parked = handler.parks and letters.is_parked(handler.name, message.lane[:3])
            if letters.room(parked=is_parked) <= 0:
                handler.crowded.append(message.lane)
                return False
            if is_parked:
                self._bury(handler, job, Burial(Drop.PARKED, "it waits for those before it", 0, True), leads=False)
                return True
        page = letters.page
        if page is not None:
            deaths = page.begin(key_of(key))
            message.attempt = max(message.attempt, deaths + 1)
            if deaths >= handler.attempts:
                detail = f"its process died {deaths} times with this message in hand"
                return self._give_up(handler, job, Burial(Drop.HANDLER_EXHAUSTED, detail, deaths, handler.parks))
            page.note(key_of(key), message.attempt)
        return None

    def _settle(self, handler: Handler, job: Job, error: BaseException | None) -> bool:
        """Whether the message is settled, after its handler ran. Otherwise it is tried again, or becomes a letter."""
        message, hand, position = job
        if error is None:
            if handler.breaker.failures or handler.breaker.due_ns:
                self._note_outcome(handler, handler.breaker.succeed(message.ticket, self.engine.clock()))
            if type(message._feed) is not RedrivenFeed:  # of those the page has to know until the store does
                self._forget(handler, message)
            hand.settle_one(position)
            return True
        reason = _reason_of(message)
        if reason is None and message.attempt < handler.attempts:
            handler.breaker = handler.breaker.give_up(message.ticket, self.engine.clock())
            self._try_again_later(handler, message)
            return False
        reason, kind = reason or Drop.HANDLER_EXHAUSTED, type(error).__name__
        failed = handler.breaker.fail(message.ticket, self.engine.clock(), f"{reason}: {kind}")
        self._note_outcome(handler, failed)
        why = Burial(reason, f"{kind}: {error}"[:FAILURE_TEXT_MAX], message.attempt, handler.parks)
        return self._give_up(handler, job, why)

    def _note_outcome(self, handler: Handler, breaker: Breaker) -> None:
        """The breaker after an outcome; it says so when it opens or closes."""
        before, handler.breaker = handler.breaker.state, breaker
        if breaker.state is before:
            return
        if breaker.state is BreakerState.OPEN:
            self.engine.counts["handlers_paused"] += 1
            pause_s = self.engine.config.letters.pause_s
            log.error("all messages of %s die, %s: it pauses for %g s", handler.name, breaker.reason, pause_s)
        else:
            log.warning("a message of %s was handled: it goes on", handler.name)

    def _give_up(self, handler: Handler, job: Job, why: Burial) -> bool:
        """It is a letter from now on, or still one; whether that is written already."""
        feed: Any = job.message._feed
        if type(feed) is not RedrivenFeed:
            self._bury(handler, job, why, leads=True)
            return False
        self._forget(handler, job.message)
        self.engine.letters.died_again(feed, why)
        job.hand.settle_one(job.position, why.reason)
        return True

    def _bury(self, handler: Handler, job: Job, why: Burial, *, leads: bool) -> None:
        """Have a letter written; it settles when that is done (D1)."""
        buried = Buried(handler, job, why, leads)

        def then() -> None:
            self._buried.append(buried)
            self.engine.on_progress()

        self.engine.letters.bury(job.message, handler.name, why, then)

    def _settle_buried(self) -> None:
        """The letters of these are written: their lanes go on."""
        while self._buried:
            handler, job, why, leads = self._buried.popleft()
            message = job.message
            self._forget(handler, message)
            self.engine.bury(message, why.reason, why.detail)
            job.hand.settle_one(job.position, why.reason)
            if leads:
                handler.blocked[message.lane].popleft()
                heappush(handler.retries, (self.engine.clock(), next(self._order), message.lane))
            if not self._buried:
                self.engine.push()

    def _go_on(self, handler: Handler, now: int) -> None:
        """As many lanes try again as there is room for letters."""
        room = self.engine.letters.room(parked=True)
        for _ in range(min(room, len(handler.crowded))):
            heappush(handler.retries, (now, next(self._order), handler.crowded.popleft()))

    def _forget(self, handler: Handler, message: Message) -> None:
        """It is out of the hand."""
        page = self.engine.letters.page
        if page is not None:
            page.forget(key_of(_key(handler, message)))

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


def _key(handler: Handler, message: Message) -> LetterKey:
    return handler.name, message.source, message.incarnation, message.topic, message.offset


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
