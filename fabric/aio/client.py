"""The asynchronous face: `Fabric`. No protocol lives here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from fabric.aio.driving import LoopDriver
from fabric.aio.handlers import TaskDispatcher
from fabric.aio.letters import DeadLetters
from fabric.aio.publisher import LoopOutbox, Publisher
from fabric.aio.subscription import Subscription
from fabric.config import Policy, WhenFull
from fabric.engine.inbox import Inbox
from fabric.engine.loop import Engine
from fabric.engine.sleeping import ThreadedWaits
from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import ClosedError, FabricError
from fabric.member import CloseReport, Member, check_handler, check_subscription
from fabric.message import Reply
from fabric.requests import Question

if TYPE_CHECKING:
    from fabric.engine.process import Membership

__all__ = ["Fabric", "in_thread"]

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


class Fabric(Member[LoopOutbox]):
    """A member of a fabric: what `join` and `observe` return. It belongs to the event loop that it was made on."""

    def __init__(self, engine: Engine, waits: ThreadedWaits, membership: Membership) -> None:
        super().__init__(engine, membership)
        self._driver = LoopDriver(engine, waits)
        self._dispatcher = TaskDispatcher(self._driver)
        self._faces: dict[str, Publisher] = {}
        self._opened: list[asyncio.Task[None]] = []
        """Handlers whose subscriptions are not confirmed yet."""
        self._ended: asyncio.Task[CloseReport] | None = None

    async def _run(self, steps: Steps[T]) -> T:
        if self._opened:
            await self._confirm()
        return await self._driver.run(steps)

    async def _serve(self, steps: Steps[T]) -> T:
        with self._dispatcher.serving():
            return await self._run(steps)

    # Publishing.

    def publisher(
        self,
        topic: str,
        *,
        policy: str = "reliable",
        when_full: str | None = None,
        sync: str = "process",
        guard: str = "off",
    ) -> Publisher:
        """The publisher of a topic; the same one each time.

        `policy`: `reliable`, `durable` (on disk before it is sent), `latest` (the newest of each seed wins) or `lossy`
        (every drop is counted). `when_full`, for `reliable`: `spill` (default), `block` (waits at most
        `publish_timeout_s`), `drop_oldest`, `fail`; for `durable`: `block` (default), `fail`. `sync`, for `durable`:
        `process` survives the death of this process, `power` a loss of power. A durable topic needs a member with
        state (see `join`).

        `guard` finds large values that change after they were published, and names the line that published them.
        `sample` sums 64 KiB of each, spread over it, when it is published and when the last view of it here is given
        up, and compares it with its source once it is copied: that finds a buffer that is written anew, hardly a single
        element, and costs a fixed time for each value. `strict` sums all of it: it finds everything, and reads each
        value four more times. What is found at once is a warning, or `MutationError` under `strict`; what is found
        later is an error in the log; all of it is counted as `mutations_found`. Values that travel in bursts, come from
        a device or are `durable` are not watched: nobody else has their memory.

        Raises `TopicError`, `ConfigError`.
        """
        return self._face(self._publisher(topic, policy, when_full, sync, guard))

    def _face(self, outbox: LoopOutbox) -> Publisher:
        face = self._faces.get(outbox.topic)
        if face is None:
            face = self._faces[outbox.topic] = Publisher(self._driver, outbox)
        return face

    def _new_publisher(self, topic: str, policy: Policy, when_full: WhenFull, feed: int, sync: str) -> LoopOutbox:
        return LoopOutbox(self._engine, self._engine.budget, topic, policy, when_full, feed, sync)

    async def publish(
        self, topic: str, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None
    ) -> int:
        """Publish a snapshot of `value` on a topic; returns its sequence in the lane of `seed`.

        The topic's publisher is made with the defaults on first use. Raises as `Publisher.publish`, and `TopicError`.
        """
        if self._opened:
            await self._confirm()
        publisher = self._faces.get(topic) or self._face(self._default_publisher(topic))
        return await publisher.publish(value, seed=seed, metadata=metadata)

    # Subscribing.

    async def subscribe(
        self,
        pattern: str,
        *,
        start: str = "live",
        seeds: Iterable[int] | None = None,
        ownership: str = "view",
        acknowledge: str = "auto",
        delivery: str | None = None,
        cursor: object = None,
        name: str | None = None,
        idle_timeout_s: float = 60.0,
    ) -> Subscription:
        """Receive what matches `pattern`. When this returns, nothing published later is missed.

        `start`: `live`, `retained` (what is kept, too) or `last` (the last record of each feed, too). `seeds`: only
        these. `ownership`: `view` into received memory, or `own` memory. `acknowledge`: `auto` or `manual`.
        `delivery`: `reliable`, or `best_effort` (never owed, waited for or repaired; the default of observers).
        `idle_timeout_s` ends iteration.

        With a `name` the subscription outlives this process: what it misses meanwhile stays owed to it, for
        `retention.absent_s`, and it goes on where it stood. `cursor` is what `Subscription.cursor` gave when the
        application saved its state, `{}` the first time: it goes on from there, and publishers keep everything until
        `Subscription.commit` says that a later cursor is saved.

        Raises `TopicError`, `SeedError`, `ConfigError`, and `SubscribeTimeoutError` if a live member does not confirm.
        """
        options = check_subscription(acknowledge, ownership, cursor, name, seeds)
        opening = self._opening(pattern, start, delivery, options.seeds, options.name, options.cursor)
        return Subscription(self._driver, await self._run(opening), pattern, options, idle_timeout_s=idle_timeout_s)

    # Handlers.

    def on(
        self, pattern: str, *, attempts: int = 5, exhausted: str = "skip", start: str = "live"
    ) -> Callable[[Function], Function]:
        """Decorate a function, or a coroutine function, of one `Message` to be run for each that matches.

        A coroutine function runs as a task, those of different lanes side by side; a plain function runs on the loop
        and must be short. One that raises is run again, `attempts` times in all, within 0.1 s, then within twice as
        long each time, but at most 10 s; after that the record is a dead letter. `exhausted`: its lane goes on
        (`skip`), or waits for it (`park`): what comes later in the lane joins it among the dead letters, and comes
        again in order once it is redriven or given up. Handlers run at any time, or in `step`, `serve` and `request`.

        The next awaited call of this fabric waits until live members have confirmed. It raises what `subscribe` would.
        """
        parks = check_handler(attempts, exhausted)

        def decorate(function: Function) -> Function:
            self._driver.check()
            self._engine.require_open()
            steps, name = self._opening(pattern, start, "reliable", None), self._engine.letters.claim(pattern)
            self._opened.append(self._driver.loop.create_task(self._add(steps, function, name, attempts, parks)))
            return function

        return decorate

    async def _add(
        self, steps: Steps[Inbox], function: Callable[..., Any], name: str, attempts: int, parks: bool
    ) -> None:
        try:
            inbox = await self._driver.run(steps)
        except BaseException:
            self._engine.letters.release(name)
            raise
        self._dispatcher.add(function, inbox, name, attempts, parks=parks)

    async def _confirm(self) -> None:
        """What `on` began is done."""
        while self._opened:
            await asyncio.wait(self._opened)
            done = [task for task in self._opened if task.done()]
            self._opened = [task for task in self._opened if not task.done()]
            for task in done:
                task.result()

    def respond(self, method: str) -> Callable[[Function], Function]:
        """Decorate a function, or a coroutine function, of one `Request`.

        Its result is the reply to requests of this method.
        """

        def decorate(function: Function) -> Function:
            self._driver.check()
            self._engine.require_open()
            self._dispatcher.respond(method, function)
            return function

        return decorate

    @property
    def dead_letters(self) -> DeadLetters:
        """What was not handled, with its reasons, oldest first; to be redriven or given up."""
        return DeadLetters(self._engine, self._run)

    async def step(self, n: int) -> None:
        """Mark training step `n`.

        What is published leaves, step handlers that have work run, and background work keeps out of the way from now
        on.
        """
        self._driver.check()
        self._engine.require_open()
        if self._opened:
            await self._confirm()
        self._membership.mark_training(n)
        self._engine.flush()
        if not self._dispatcher.threaded:
            await self._dispatcher.settle_down()

    async def serve(self, timeout_s: float) -> None:
        """Run step handlers on this loop for so long, or until the fabric is closed."""
        with contextlib.suppress(ClosedError):
            await self._serve(self._serving(timeout_s))

    def _serving(self, timeout_s: float) -> Steps[None]:
        yield Wait(lambda: self._engine.closed, timeout_s)

    # Requests.

    async def request(
        self,
        method: str,
        value: object = None,
        *,
        to: int | str,
        timeout_s: float = 10.0,
        priority: str = "normal",
        metadata: Mapping[str, object] | None = None,
    ) -> Reply:
        """Ask the member `to`, a rank or a name, and wait for its reply. It is executed at most once.

        While it waits, step handlers of this member run. A cancelled request is abandoned; it may have been executed.
        Raises `RemoteFailureError`, `RequestTimeoutError` (its `accepted` says whether the responder is known to have
        it), `RequestError` if the responder is gone, `UnknownPeerError`, `PayloadError`.
        """
        self._driver.check()
        return await self._serve(self._requests.asking(Question(method, value, timeout_s, priority, metadata), to))

    async def request_all(
        self,
        method: str,
        value: object = None,
        *,
        to: Sequence[int] | None = None,
        timeout_s: float = 10.0,
        priority: str = "normal",
        metadata: Mapping[str, object] | None = None,
    ) -> dict[int, Reply | FabricError]:
        """Ask several ranks at once, by default all others.

        Each entry is a reply, or the error that `request` would have raised.
        """
        self._driver.check()
        ranks = self._others() if to is None else list(to)
        return await self._serve(
            self._requests.asking_all(Question(method, value, timeout_s, priority, metadata), ranks)
        )

    # Ending.

    async def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published, in earlier lives too, is acknowledged by owed subscriptions of other members.

        Raises `WaitTimeoutError`.
        """
        await self._run(self._flushing(timeout_s))

    async def close(self, timeout_s: float = 5.0) -> CloseReport:
        """Stop publishing, let what is owed be fetched, say goodbye, and release everything.

        The second call gives the same report. Returns within about `timeout_s` whatever the peers do; with
        state the disk has up to 2 s more, to take what is still owed. It goes on when
        it is cancelled.
        """
        self._driver.check()
        if self._engine.forked_in:
            self._engine.require_open()
        if self._ended is None:
            self._ended = self._driver.loop.create_task(self._end(timeout_s, asyncio.current_task()))
        return await asyncio.shield(self._ended)

    async def _end(self, timeout_s: float, caller: asyncio.Task[Any] | None) -> CloseReport:
        began_ns = self._engine.clock()
        await self._dispatcher.shut(min(1.0, timeout_s), caller)
        left_s = timeout_s - (self._engine.clock() - began_ns) / 1e9
        report = await self._driver.run(self._ending(max(0.0, left_s)))
        for task in self._opened:
            task.cancel()
        await in_thread(self._membership.close)  # it waits for a thread, and for the sockets
        self._driver.finish()
        return report

    def close_at_exit(self) -> None:
        """Leave without the loop: the process ends."""
        run_steps(self._ending(1.0), lambda wait: self._engine.until(wait.is_over, wait.timeout_s))
        self._membership.close()
        self._driver.finish()

    async def __aenter__(self) -> Fabric:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if not self._engine.forked_in:  # a forked child leaves the block: there is nothing of its own to close
            await (self.close() if kind is None else self.close(timeout_s=1.0))


async def in_thread(function: Callable[[], T], undo: Callable[[T], object] | None = None) -> T:
    """Run a function that blocks on a thread of its own. If we are cancelled meanwhile, `undo` gets what comes of it.

    Not on the executor of the loop: it has few threads, and members of one process may wait for each other.
    """
    executor = ThreadPoolExecutor(1, thread_name_prefix="fabric-blocking")
    work = executor.submit(function)
    executor.shutdown(wait=False)  # the thread ends with its work
    try:
        return await asyncio.wrap_future(work)
    except asyncio.CancelledError:
        if undo is not None:
            work.add_done_callback(lambda done: None if done.cancelled() or done.exception() else undo(done.result()))
        raise
