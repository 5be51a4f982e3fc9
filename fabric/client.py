"""The synchronous face: `Fabric`, with its `Publisher`. No protocol lives here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from fabric.config import Policy, WhenFull
from fabric.engine.dispatch import Dispatcher
from fabric.engine.inbox import Inbox
from fabric.engine.loop import Engine
from fabric.engine.steps import Steps, Wait, run_steps
from fabric.errors import ClosedError, FabricError
from fabric.letters import DeadLetter, DeadLetters
from fabric.member import CloseReport, Member, PeerInfo, check_handler, check_subscription
from fabric.message import Reply
from fabric.publisher import Publisher
from fabric.requests import Question
from fabric.subscription import Subscription

if TYPE_CHECKING:
    from fabric.engine.process import Membership

__all__ = ["CloseReport", "Fabric", "PeerInfo", "Publisher"]

S = 1_000_000_000
Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


class Fabric(Member[Publisher]):
    """A member of a fabric: what `join` and `observe` return. Thread-safe, but for the subscriptions that it makes."""

    publisher_class: ClassVar[type[Publisher]] = Publisher
    subscription_class: ClassVar[type[Subscription]] = Subscription

    def __init__(self, engine: Engine, dispatcher: Dispatcher, membership: Membership) -> None:
        super().__init__(engine, membership)
        self._dispatcher = dispatcher
        self._report: CloseReport | None = None

    def _run(self, steps: Steps[T]) -> T:
        return run_steps(steps, self._until)

    def _until(self, wait: Wait) -> bool:
        engine = self._engine
        if not wait.serving or self._dispatcher.threaded:
            return engine.until(wait.is_over, wait.timeout_s)
        deadline_ns = engine.clock() + int(wait.timeout_s * S)
        if self._dispatcher.run_until(wait.is_over, wait.timeout_s):
            return True
        return engine.until(wait.is_over, max(0.0, (deadline_ns - engine.clock()) / S))

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
        return self._publisher(topic, policy, when_full, sync, guard)

    def _new_publisher(self, topic: str, policy: Policy, when_full: WhenFull, feed: int, sync: str) -> Publisher:
        return self.publisher_class(self._engine, self._engine.budget, topic, policy, when_full, feed, sync)

    def publish(self, topic: str, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None) -> int:
        """Publish a snapshot of `value` on a topic; returns its sequence in the lane of `seed`.

        The topic's publisher is made with the defaults on first use. Raises as `Publisher.publish`, and `TopicError`.
        """
        publisher = self._publishers.get(topic) or self._default_publisher(topic)
        return publisher.publish(value, seed=seed, metadata=metadata)

    # Subscribing.

    def subscribe(
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
        inbox = self._open(pattern, start, delivery, options.seeds, options.name, options.cursor)
        return self.subscription_class(self._engine, inbox, pattern, options, idle_timeout_s=idle_timeout_s)

    def _open(self, *wanted: Any) -> Inbox:  # noqa: ANN401 - the arguments of `_opening`
        return self._run(self._opening(*wanted))

    # Handlers.

    def on(
        self, pattern: str, *, attempts: int = 5, exhausted: str = "skip", start: str = "live"
    ) -> Callable[[Function], Function]:
        """Decorate a function of one `Message` to be run for each that matches.

        A handler that raises is run again, `attempts` times in all, within 0.1 s, then within twice as long each time,
        but at most 10 s; after that the record is a dead letter. `exhausted`: its lane goes on (`skip`), or waits for
        it (`park`): what comes later in the lane joins it among the dead letters, and comes again in order once it is
        redriven or given up. Handlers run on a thread of the fabric, or in `step` and `serve`. Raises as `subscribe`.
        """
        parks = check_handler(attempts, exhausted)

        def decorate(function: Function) -> Function:
            inbox = self._open(pattern, start, "reliable", None)
            name = self._engine.letters.claim(pattern)
            self._dispatcher.add(function, inbox, name, attempts, parks=parks)
            return function

        return decorate

    def respond(self, method: str) -> Callable[[Function], Function]:
        """Decorate a function of one `Request` whose result is the reply to requests of this method."""

        def decorate(function: Function) -> Function:
            self._engine.require_open()
            self._dispatcher.respond(method, function)
            return function

        return decorate

    @property
    def dead_letters(self) -> DeadLetters[DeadLetter]:
        """What was not handled, with its reasons, oldest first; to be redriven or given up."""
        return DeadLetters(self._engine, self._run)

    def step(self, n: int) -> None:
        """Mark training step `n`.

        What is published leaves, step handlers that have work run, and background work keeps out of the way from now
        on.
        """
        engine = self._engine
        engine.require_open()
        self._membership.mark_training(n)
        engine.flush()
        if not self._dispatcher.threaded:
            while self._dispatcher.run_one():
                pass

    def serve(self, timeout_s: float) -> None:
        """Run step handlers on this thread for so long, or until the fabric is closed."""
        if self._engine.forked_in:
            self._engine.require_open()
        try:
            if self._dispatcher.threaded:  # handlers run by themselves; there is only the time to wait out
                self._engine.until(lambda: self._engine.closed, timeout_s)
            else:
                self._dispatcher.run_until(lambda: self._engine.closed, timeout_s)
        except ClosedError:
            return

    # Requests.

    def request(
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

        While it waits, step handlers of this member run. Raises `RemoteFailureError`, `RequestTimeoutError` (its
        `accepted` says whether the responder is known to have it), `RequestError` if the responder is gone,
        `UnknownPeerError`, `PayloadError`.
        """
        return self._run(self._requests.asking(Question(method, value, timeout_s, priority, metadata), to))

    def request_all(
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
        ranks = self._others() if to is None else list(to)
        return self._run(self._requests.asking_all(Question(method, value, timeout_s, priority, metadata), ranks))

    # Ending.

    def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published, in earlier lives too, is acknowledged by owed subscriptions of other members.

        Raises `WaitTimeoutError`.
        """
        self._run(self._flushing(timeout_s))

    def close(self, timeout_s: float = 5.0) -> CloseReport:
        """Stop publishing, let what is owed be fetched, say goodbye, and release everything.

        The second call gives the same report. Returns within about `timeout_s` whatever the peers do; with
        state the disk has up to 2 s more, to take what is still owed.
        """
        if self._engine.forked_in:
            self._engine.require_open()
        with self._lock:
            if self._report is None:
                began_ns = self._engine.clock()
                self._dispatcher.close(min(1.0, timeout_s))
                left_s = timeout_s - (self._engine.clock() - began_ns) / S
                self._report = self._run(self._ending(max(0.0, left_s)))
                self._membership.close()
            return self._report

    def __enter__(self) -> Fabric:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if not self._engine.forked_in:  # a forked child leaves the block: there is nothing of its own to close
            self.close() if kind is None else self.close(timeout_s=1.0)
