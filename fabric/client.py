"""The synchronous face: `Fabric` and `Publisher`. No protocol lives here."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgpack

from fabric.config import Delivery, Policy, Start, WhenFull, check_policy
from fabric.core import events
from fabric.core.wire import feed_id
from fabric.engine.dispatch import DeadLetter, Dispatcher, pack_value
from fabric.engine.inbox import Inbox
from fabric.engine.loop import Engine
from fabric.engine.outbox import Outbox, pack_metadata
from fabric.errors import (
    BrokenError,
    ClosedError,
    ConfigError,
    FabricError,
    RemoteFailureError,
    RequestError,
    RequestTimeoutError,
    SubscribeTimeoutError,
    UnknownPeerError,
    WaitTimeoutError,
    shortened,
)
from fabric.message import Message, Reply
from fabric.subscription import Subscription
from fabric.topics import check_seed, check_topic, compile_pattern

if TYPE_CHECKING:
    from fabric.engine.process import Membership

__all__ = ["CloseReport", "Fabric", "PeerInfo", "Publisher"]

S = 1_000_000_000
PRIORITIES = {"high": 0, "normal": 1, "low": 2}
DEAD_LETTERS_KEPT_MAX = 1000
Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class PeerInfo:
    """Another member, as seen from here."""

    name: str
    rank: int | None
    state: str
    """`known`, `joined`, `up`, `suspect`, `down`, `left` or `dead`."""
    host: str
    incarnation: int
    lag: int
    """Records of ours that it subscribes to and has not acknowledged."""
    silent_s: float
    """Since it was last heard."""


@dataclass(frozen=True, slots=True)
class CloseReport:
    """How a close went. `balanced`: everything owed was acknowledged; else `unacknowledged` says what was not, by topic and reader."""

    balanced: bool
    waited_s: float
    unacknowledged: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    """{topic: {reader: (first offset not acknowledged, end)}}"""


class Publisher(Outbox):
    """One topic of this member. Thread-safe."""

    def wait_for_subscribers(self, n: int, *, timeout_s: float = 60.0) -> None:
        """Until `n` owed subscriptions of other members are registered: each receives the record published next.

        Raises `WaitTimeoutError`.
        """
        if not self.engine.until(lambda: len(self._readers()) >= n, timeout_s):
            state = f"{len(self._readers())} of {n}: {shortened(sorted(name for name, _ in self._readers()))}"
            raise WaitTimeoutError(f"{self.topic} has not enough subscribers", waited_s=timeout_s, state=state)

    def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published is acknowledged by the owed subscriptions of other members. Raises `WaitTimeoutError`."""
        self.close_burst()
        end = self.next
        if not self.engine.until(lambda: self.has_left and all(floor >= end for floor in self._readers().values()), timeout_s):
            behind = [f"{name} at {floor}" for (name, _), floor in self._readers().items() if floor < end]
            raise WaitTimeoutError(f"{self.topic} is not acknowledged to {end}", waited_s=timeout_s, state=shortened(behind))

    def handled_by(self, offset: int) -> dict[str, bool]:
        """Whether each owed subscriber of another member has handled the record at this offset."""
        done: dict[str, bool] = {}
        for (name, _), floor in self._readers().items():
            done[name] = done.get(name, True) and floor > offset
        return done

    def _readers(self) -> dict[tuple[str, int], int]:
        out = self.engine.core.publishing.feeds.get(self.topic)
        return {reader: floor for reader, floor in list(out.readers.items()) if reader[0] != self.engine.card.name} if out else {}

    def __repr__(self) -> str:
        return f"Publisher({self.topic!r}, {self.policy.value}, next={self.next})"


class _Waiting:
    """A request of ours that somebody waits for."""

    __slots__ = ("outcome", "payload")

    def __init__(self) -> None:
        self.outcome: events.CompleteRequest | None = None
        self.payload: memoryview | None = None


class Fabric:
    """A member of a fabric: what `join` and `observe` return. Thread-safe, but for the subscriptions that it makes."""

    publisher_class: ClassVar[type[Publisher]] = Publisher
    subscription_class: ClassVar[type[Subscription]] = Subscription

    def __init__(self, engine: Engine, dispatcher: Dispatcher, membership: Membership) -> None:
        self._engine, self._dispatcher, self._membership = engine, dispatcher, membership
        self._lock = threading.Lock()
        self._publishers: dict[str, Publisher] = {}
        self._waiting: dict[int, _Waiting] = {}
        self._numbers = itertools.count(1)
        self._letters: deque[DeadLetter] = deque(maxlen=DEAD_LETTERS_KEPT_MAX)
        self._report: CloseReport | None = None
        engine.on_complete = self._complete
        engine.bury = self._bury

    # Who is here.

    @property
    def rank(self) -> int | None:
        """Our rank; None for an observer."""
        return self._engine.card.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._engine.card.world_size

    @property
    def name(self) -> str:
        """Our name, `rank-3` for a rank."""
        return self._engine.card.name

    @property
    def job(self) -> str:
        """The job that all members belong to."""
        return self._engine.card.job

    @property
    def peers(self) -> dict[str, PeerInfo]:
        """The other members, by name."""
        engine = self._engine
        with engine.lock:
            now, core = engine.clock(), engine.core
            lags: dict[str, int] = {}
            for out in core.publishing.feeds.values():
                for (name, _), floor in out.readers.items():
                    lags[name] = lags.get(name, 0) + out.end - floor
            return {
                peer.name: PeerInfo(
                    peer.name,
                    peer.card.rank,
                    peer.state,
                    peer.card.host,
                    peer.incarnation,
                    lags.get(peer.name, 0),
                    max(0, now - peer.heard_ns) / S,
                )
                for peer in core.members.others()
            }

    # Publishing.

    def publisher(self, topic: str, *, policy: str = "reliable", when_full: str | None = None, sync: str = "process") -> Publisher:
        """The publisher of a topic; the same one each time.

        `policy`: `reliable`, `latest` (the newest of each seed wins) or `lossy` (every drop is counted). `when_full`, for `reliable`:
        `block` (default; waits at most `publish_timeout_s`), `drop_oldest`, `fail`. `sync` is for `durable` topics, which do not exist
        yet. Raises `TopicError`, `ConfigError`.
        """
        if sync not in ("process", "power"):
            raise ConfigError(f"{sync!r} is neither process nor power", field="sync")
        chosen, full = check_policy(policy, when_full)
        publisher = self._publishers.get(topic)
        if publisher is None:
            publisher = self._make_publisher(check_topic(topic), chosen, full)
        if publisher.policy is not chosen or publisher.when_full is not full:
            raise ConfigError(f"{topic} is {publisher.policy.value} / {publisher.when_full.value} already", field="policy")
        return publisher

    def _make_publisher(self, topic: str, policy: Policy, when_full: WhenFull) -> Publisher:
        engine = self._engine
        engine.require_open()
        with self._lock:
            if topic not in self._publishers:
                engine.submit(events.FeedOpened(topic, policy))
                feed = feed_id(self.name, engine.card.incarnation, topic)
                self._publishers[topic] = self.publisher_class(engine, engine.budget, topic, policy, when_full, feed)
            return self._publishers[topic]

    def publish(self, topic: str, value: object, *, seed: int = 0, metadata: Mapping[str, object] | None = None) -> int:
        """Publish a snapshot of `value` on a topic; returns its sequence in the lane of `seed`.

        The topic's publisher is made with the defaults on first use. Raises as `Publisher.publish`, and `TopicError`.
        """
        publisher = self._publishers.get(topic)
        if publisher is None:
            publisher = self._make_publisher(check_topic(topic), Policy.RELIABLE, WhenFull.BLOCK)
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

        `start`: `live`, `retained` (what is kept, too) or `last` (the last record of each feed, too). `seeds`: only these.
        `ownership`: `view` into received memory, or `own` memory. `acknowledge`: `auto` or `manual`. `delivery`: `reliable`, or
        `best_effort` (never owed, waited for or repaired; the default of observers). `idle_timeout_s` ends iteration. `cursor` and
        `name` are for durable subscriptions, which do not exist yet.

        Raises `TopicError`, `SeedError`, `ConfigError`, and `SubscribeTimeoutError` if a live member does not confirm.
        """
        if cursor is not None or name is not None:
            raise ConfigError("durable subscriptions need the spill log, which does not exist yet", field="name" if name else "cursor")
        manual, owning = _choose("acknowledge", acknowledge, "auto", "manual"), _choose("ownership", ownership, "view", "own")
        inbox = self._open(pattern, start, delivery, None if seeds is None else frozenset(map(check_seed, seeds)))
        return self.subscription_class(self._engine, inbox, pattern, manual=manual, owning=owning, idle_timeout_s=idle_timeout_s)

    def _open(self, pattern: str, start: str, delivery: str | None, seeds: frozenset[int] | None) -> Inbox:
        engine = self._engine
        engine.require_open()
        compile_pattern(pattern)
        delivery = delivery or ("reliable" if self.rank is not None else "best_effort")
        try:
            chosen = Start(start), Delivery(delivery)
        except ValueError as error:
            raise ConfigError(str(error), field="start or delivery") from None
        number = next(self._numbers)
        inbox = engine.inboxes[number] = Inbox(number)
        engine.submit(events.SubscriptionOpened(number, pattern, *chosen, seeds))
        subscribing, timeout_s = engine.core.subscribing, engine.config.subscribe_timeout_s
        if not engine.until(lambda: number in subscribing.subscriptions and not subscribing.unconfirmed(number), timeout_s):
            missing = shortened(subscribing.unconfirmed(number))
            engine.inboxes.pop(number, None)
            engine.submit(events.SubscriptionClosed(number))
            raise SubscribeTimeoutError(f"{pattern} was not confirmed", waited_s=timeout_s, state=f"missing: {missing}")
        return inbox

    # Handlers.

    def on(self, pattern: str, *, attempts: int = 5, exhausted: str = "skip", start: str = "live") -> Callable[[Function], Function]:
        """Decorate a function of one `Message` to be run for each that matches.

        A handler that raises is run again, `attempts` times in all, 0.1 s later and then twice as long each time; after that the
        record is a dead letter and its lane goes on. Handlers run on a thread of the fabric, or in `step` and `serve`. Raises as
        `subscribe`.
        """
        if exhausted != "skip":
            raise ConfigError('"park" needs the dead-letter store, which does not exist yet; use "skip"', field="exhausted")
        if attempts < 1:
            raise ConfigError("at least one", field="attempts")

        def decorate(function: Function) -> Function:
            inbox = self._open(pattern, start, "reliable", None)
            self._dispatcher.add(function, inbox, attempts)
            return function

        return decorate

    def respond(self, method: str) -> Callable[[Function], Function]:
        """Decorate a function of one `Request` whose result is the reply to requests of this method."""

        def decorate(function: Function) -> Function:
            self._engine.require_open()
            self._dispatcher.respond(method, function)
            return function

        return decorate

    def step(self, n: int) -> None:
        """Mark training step `n`: what is published leaves, step handlers that have work run, and background work keeps out of
        the way from now on."""
        engine = self._engine
        engine.require_open()
        self._membership.mark_training(n)
        engine.flush()
        if not self._dispatcher.threaded:
            while self._dispatcher.run_one():
                pass

    def serve(self, timeout_s: float) -> None:
        """Run step handlers on this thread for so long, or until the fabric is closed."""
        try:
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

        While it waits, step handlers of this member run. Raises `RemoteFailureError`, `RequestTimeoutError` (its `accepted` says
        whether the responder is known to have it), `RequestError` if the responder is gone, `UnknownPeerError`, `PayloadError`.
        """
        deadline_ns = self._engine.clock() + int(timeout_s * S)
        number, waiting = self._issue(method, value, to, deadline_ns, priority, metadata)
        self._await_requests([waiting], deadline_ns)
        return self._result(number, waiting, self._name_of(to), method, timeout_s)

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
        """Ask several ranks at once (default: all others); each entry is a reply, or the error that `request` would have raised."""
        ranks = [rank for rank in range(self.world_size) if rank != self.rank] if to is None else list(to)
        deadline_ns = self._engine.clock() + int(timeout_s * S)
        results: dict[int, Reply | FabricError] = {}
        issued: dict[int, tuple[int, _Waiting]] = {}
        for rank in ranks:
            try:
                issued[rank] = self._issue(method, value, rank, deadline_ns, priority, metadata)
            except UnknownPeerError as error:
                results[rank] = error
        self._await_requests([waiting for _, waiting in issued.values()], deadline_ns)
        for rank, (number, waiting) in issued.items():
            try:
                results[rank] = self._result(number, waiting, self._name_of(rank), method, timeout_s)
            except (RequestError, RemoteFailureError) as error:
                results[rank] = error
        return {rank: results[rank] for rank in ranks}

    def _issue(
        self, method: str, value: object, to: int | str, deadline_ns: int, priority: str, metadata: Mapping[str, object] | None
    ) -> tuple[int, _Waiting]:
        engine = self._engine
        engine.require_open()
        if priority not in PRIORITIES:
            raise ConfigError(f"{priority!r} is none of {', '.join(PRIORITIES)}", field="priority")
        if len(self._waiting) >= engine.config.requests.pending_max:
            raise ConfigError(f"{len(self._waiting)} requests wait already", field="requests.pending_max")
        name = self._name_of(to)
        kind, blob, payload = pack_value(value, limit=engine.config.inboxes.payload_bytes_max)
        packed = pack_metadata(metadata) if metadata else b""
        number = next(self._numbers)
        waiting = self._waiting[number] = _Waiting()
        issued = events.RequestIssued(number, name, method, PRIORITIES[priority], deadline_ns, kind, packed, blob, payload)
        engine.submit(issued)
        return number, waiting

    def _name_of(self, to: int | str) -> str:
        name = to if isinstance(to, str) else f"rank-{to}"
        known = self._engine.core.members.by_name
        if name not in known:
            raise UnknownPeerError(peer=to, known=shortened(sorted(known)))
        return name

    def _await_requests(self, waiting: list[_Waiting], deadline_ns: int) -> None:
        engine, dispatcher = self._engine, self._dispatcher
        left_s = max(0.0, (deadline_ns - engine.clock()) / S) + 0.05

        def is_over() -> bool:
            return all(one.outcome is not None for one in waiting)

        if not dispatcher.threaded:
            dispatcher.run_until(is_over, left_s)
        engine.until(is_over, max(0.0, (deadline_ns - engine.clock()) / S) + 0.05)

    def _complete(self, complete: events.CompleteRequest, payload: memoryview | None) -> None:
        waiting = self._waiting.get(complete.request)
        if waiting is not None:
            waiting.payload, waiting.outcome = payload, complete

    def _result(self, number: int, waiting: _Waiting, name: str, method: str, timeout_s: float) -> Reply:
        self._waiting.pop(number, None)
        outcome = waiting.outcome
        if outcome is None or outcome.outcome == "timeout":
            if outcome is None:
                self._engine.submit(events.RequestAbandoned(number))
            accepted = outcome is not None and outcome.accepted
            state = f"{name} {'had accepted it' if accepted else 'is not known to have accepted it'}"
            raise RequestTimeoutError(f"no reply to {method}", waited_s=timeout_s, state=state, accepted=accepted)
        if outcome.outcome == "gone":
            raise RequestError(f"{name} left or died before it replied to {method}")
        blob = waiting.payload if waiting.payload is not None else memoryview(outcome.blob)
        if outcome.outcome == "failure":
            kind, text = _failure(blob)
            raise RemoteFailureError(text, peer=name, kind=kind)
        return Reply(name, outcome.kind, blob)

    # Looking.

    @property
    def dead_letters(self) -> tuple[DeadLetter, ...]:
        """The latest records that will not be delivered, with their reasons; at most 1,000, in memory."""
        return tuple(self._letters)

    def _bury(self, message: Message, reason: str, detail: str) -> None:
        lane = (message.source, message.topic, message.incarnation, message.seed, message.sequence, message.offset)
        self._engine.counts["dead_letters"] += 1
        self._letters.append(DeadLetter(*lane, reason, detail, message.attempt))

    def statistics(self) -> dict[str, int]:
        """Counters since the start: what was handled, dropped by each reason, repaired, resent, and moved by the transport."""
        engine = self._engine
        with engine.lock:
            counted = engine.core.statistics() + engine.counts
            moved = {} if engine.closed else engine.transport.statistics()
        return dict(sorted({**{str(name): count for name, count in counted.items()}, **moved}.items()))

    # Ending.

    def flush(self, *, timeout_s: float = 5.0) -> None:
        """Until all that was published is acknowledged by the owed subscriptions of other members. Raises `WaitTimeoutError`."""
        deadline_ns = self._engine.clock() + int(timeout_s * S)
        for publisher in list(self._publishers.values()):
            publisher.flush(timeout_s=max(0.0, (deadline_ns - self._engine.clock()) / S))

    def close(self, timeout_s: float = 5.0) -> CloseReport:
        """Stop publishing, let what is owed be fetched, say goodbye, and release everything. The second call gives the same report.

        Returns within about `timeout_s` whatever the peers do.
        """
        with self._lock:
            if self._report is None:
                self._report = self._close(timeout_s)
            return self._report

    def _close(self, timeout_s: float) -> CloseReport:
        engine = self._engine
        began = engine.clock()
        self._dispatcher.close(min(1.0, timeout_s))
        try:
            for publisher in self._publishers.values():
                publisher.shut()
            engine.submit(events.IntakeStopped())
            engine.until(self._is_settled, timeout_s)
            left = self._unacknowledged()
            engine.submit(events.IntakeStopped(say_bye=True))
        except (BrokenError, ClosedError):
            left = self._unacknowledged()
        self._membership.close()
        return CloseReport(not left, (engine.clock() - began) / S, left)

    def _is_settled(self) -> bool:
        return all(publisher.has_left for publisher in self._publishers.values()) and not self._unacknowledged()

    def _unacknowledged(self) -> dict[str, dict[str, tuple[int, int]]]:
        left: dict[str, dict[str, tuple[int, int]]] = {}
        gone = {name for name, state in list(self._engine.peer_states.items()) if state in ("left", "dead")}
        for publisher in self._publishers.values():
            readers = publisher._readers()
            behind = {name: (floor, publisher.next) for (name, _), floor in readers.items() if floor < publisher.next and name not in gone}
            if behind:
                left[publisher.topic] = behind
        return left

    def __enter__(self) -> Fabric:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self.close() if kind is None else self.close(timeout_s=1.0)

    def __repr__(self) -> str:
        return f"Fabric({self.name}, job={self.job!r}, world_size={self.world_size})"


def _choose(field_name: str, value: str, no: str, yes: str) -> bool:
    if value not in (no, yes):
        raise ConfigError(f"{value!r} is neither {no} nor {yes}", field=field_name)
    return value == yes


def _failure(blob: memoryview) -> tuple[str, str]:
    try:
        kind, text = msgpack.unpackb(blob, raw=False)
        return str(kind), str(text)
    except (ValueError, TypeError):
        return "unknown", "its report cannot be read"


