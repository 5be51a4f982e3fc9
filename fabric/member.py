"""A member of a fabric: what both faces share. No protocol lives here, and nobody waits here."""

from __future__ import annotations

import itertools
import os
import threading
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from fabric.config import Delivery, Policy, Start, WhenFull, check_guard, check_policy
from fabric.core import events
from fabric.core.cursors import Cursor, parse_cursor, parse_redriven
from fabric.core.disk import RestWanted
from fabric.core.members import NAME_BYTES_MAX
from fabric.core.wire import feed_id
from fabric.engine.auditing import draw_up
from fabric.engine.inbox import Inbox
from fabric.engine.loop import Engine
from fabric.engine.steps import Steps, Wait
from fabric.errors import BrokenError, ClosedError, ConfigError, SubscribeTimeoutError, WaitTimeoutError, shortened
from fabric.message import Message
from fabric.observe.ledger import Ledger
from fabric.publisher import PublisherBase
from fabric.requests import Requests
from fabric.storage.home import states_home
from fabric.storage.orphans import Orphan, find_orphans
from fabric.subscription import Options
from fabric.topics import check_seed, check_topic, compile_pattern

if TYPE_CHECKING:
    from fabric.engine.process import Membership

__all__ = ["CloseReport", "Member", "PeerInfo", "check_handler", "check_subscription"]

S = 1_000_000_000
PROOF_S = 2.0
"""How long `subscribe` waits for push links that nobody repairs; their first marker takes milliseconds."""
REST_S = 2.0
"""How long a close waits for the disk to take what is still owed: 256 MiB, from memory to a slow disk."""
BOOKS_S = 0.5
"""How long a close waits for the books of readers that have acknowledged everything; their answer takes
milliseconds."""
P = TypeVar("P", bound=PublisherBase)


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
    """How a close went.

    `balanced`: all that was owed came to a known end, or to a gap that was reported; open gaps, and readers that died,
    are `ledger.known_unknowns`. Otherwise `ledger.unknown` names the ranges of which nothing is known, each with its
    reader and the reader's state, and `unacknowledged` has them by topic and reader. `ledger.kept` is in balance, too:
    a member with state has it on disk, and its next life serves it.
    """

    balanced: bool
    waited_s: float
    unacknowledged: Mapping[str, Mapping[str, tuple[int, int]]] = field(default_factory=dict)
    """{topic: {reader: (first offset not acknowledged, end)}}"""
    ledger: Ledger = field(default_factory=lambda: Ledger(""))
    """The last books; `ledger.explain()` says in words what is missing from them."""

    def __str__(self) -> str:
        return f"closed after {self.waited_s:.3f} s: {self.ledger.explain()}"


class Member(Generic[P]):
    """Who this member is, its publishers, its requests, and the steps of what waits."""

    def __init__(self, engine: Engine, membership: Membership) -> None:
        self._engine, self._membership = engine, membership
        self._lock = threading.Lock()
        self._publishers: dict[str, P] = {}
        self._numbers = itertools.count(1)
        self._requests = Requests(engine, self._numbers)
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

    def orphans(self, *, state_directory: str | os.PathLike[str] | None = None) -> list[Orphan]:
        """The states of members of this job that nobody has open, by name: of those that died, and of those that left.

        `adopt` serves what one of them owes. `state_directory` is that of the members in question: by default ours,
        or where `join(job=...)` puts it. Nothing is changed, and what cannot be read is left out with a warning.
        """
        return find_orphans(
            states_home(self._where(state_directory), self.job, base=self._engine.config.spill.directory)
        )

    def _where(self, state_directory: str | os.PathLike[str] | None) -> Path | None:
        return self._membership.state_directory if state_directory is None else Path(state_directory)

    def _others(self) -> list[int]:
        return [rank for rank in range(self.world_size) if rank != self.rank]

    # Publishing.

    def _publisher(self, topic: str, policy: str, when_full: str | None, sync: str, guard: str) -> P:
        if sync not in ("process", "power"):
            raise ConfigError(f"{sync!r} is neither process nor power", field="sync")
        chosen, full = check_policy(policy, when_full)
        watched = check_guard(guard)
        if chosen is Policy.DURABLE and self._engine.stateless:
            raise ConfigError(f"a durable topic outlives this process: {self._engine.stateless}", field="policy")
        publisher = self._publishers.get(topic)
        if publisher is None:
            publisher = self._make_publisher(check_topic(topic), chosen, full, sync)
            publisher.guard = watched
        if publisher.guard is not watched:
            raise ConfigError(f"{topic} is guarded {publisher.guard.value!r} already", field="guard")
        if publisher.durability is not None and publisher.durability.sync != sync:
            raise ConfigError(f"{topic} is synced by {publisher.durability.sync} already", field="sync")
        if publisher.policy is not chosen or publisher.when_full is not full:
            raise ConfigError(
                f"{topic} is {publisher.policy.value} / {publisher.when_full.value} already", field="policy"
            )
        return publisher

    def _default_publisher(self, topic: str) -> P:
        return self._make_publisher(check_topic(topic), Policy.RELIABLE, WhenFull.SPILL)

    def _make_publisher(self, topic: str, policy: Policy, when_full: WhenFull, sync: str = "") -> P:
        sync = sync if policy is Policy.DURABLE else ""
        engine = self._engine
        engine.require_open()
        with self._lock:
            if topic not in self._publishers:
                engine.submit(events.FeedOpened(topic, policy, when_full is WhenFull.SPILL, sync))
                feed = feed_id(self.name, engine.card.incarnation, topic)
                self._publishers[topic] = self._new_publisher(topic, policy, when_full, feed, sync)
            return self._publishers[topic]

    @abstractmethod
    def _new_publisher(self, topic: str, policy: Policy, when_full: WhenFull, feed: int, sync: str) -> P: ...

    # Subscribing.

    def _opening(
        self,
        pattern: str,
        start: str,
        delivery: str | None,
        seeds: frozenset[int] | None,
        name: str = "",
        cursor: Cursor | None = None,
    ) -> Steps[Inbox]:
        engine = self._engine
        engine.require_open()
        compile_pattern(pattern)
        delivery = delivery or ("reliable" if self.rank is not None else "best_effort")
        try:
            chosen = Start(start), Delivery(delivery)
        except ValueError as error:
            raise ConfigError(str(error), field="start or delivery") from None
        if chosen[1] is Delivery.BEST_EFFORT and (name or cursor is not None):
            raise ConfigError("a best-effort subscription is owed nothing: no name, no cursor", field="delivery")
        if name and engine.core.subscribing.has(name, pattern):
            raise ConfigError(f"{name} of {pattern} is open already", field="name")
        number = next(self._numbers)
        inbox = engine.inboxes[number] = Inbox(number)
        confirmed = False
        try:
            engine.submit(events.SubscriptionOpened(number, pattern, *chosen, seeds, name, cursor))
            subscribing, timeout_s = engine.core.subscribing, engine.config.subscribe_timeout_s
            confirmed = yield Wait(
                lambda: number in subscribing.subscriptions and not subscribing.unconfirmed(number), timeout_s
            )
            if not confirmed:
                missing = shortened(subscribing.unconfirmed(number))
                raise SubscribeTimeoutError(
                    f"{pattern} was not confirmed", waited_s=timeout_s, state=f"missing: {missing}"
                )
            # Nobody repairs what a best-effort subscription misses, so it begins when its links are proven, or soon.
            yield Wait(lambda: not subscribing.unproven(number), PROOF_S)
        finally:
            if not confirmed:
                engine.inboxes.pop(number, None)
                if not engine.closed:
                    engine.submit(events.SubscriptionClosed(number))
        return inbox

    # Looking.

    def _bury(self, message: Message, reason: str, detail: str) -> None:
        """A message became a dead letter."""

    def statistics(self) -> dict[str, int]:
        """Counters since the start: handled, dropped by each reason, repaired, resent, and moved by the transport."""
        engine = self._engine
        with engine.lock:
            counted = engine.core.statistics() + engine.counts
            moved = {} if engine.closed else engine.transport.statistics() | engine.sharing.statistics()
        return dict(sorted({**{str(name): count for name, count in counted.items()}, **moved}.items()))

    def ledger(self) -> Ledger:
        """The books of now: what became of every record that our subscriptions, and our readers, were owed.

        Readers tell theirs once in a second, so what we know of them may be so old. Raises nothing.
        """
        self._engine.push()
        with self._engine.lock:
            return draw_up(self._engine.core)

    # Ending.

    def _flushing(self, timeout_s: float) -> Steps[None]:
        deadline_ns = self._engine.clock() + int(timeout_s * S)
        for publisher in list(self._publishers.values()):
            yield from publisher._flushing(max(0.0, (deadline_ns - self._engine.clock()) / S))
        left_s = max(0.0, (deadline_ns - self._engine.clock()) / S)
        if not (yield Wait(self._is_past_settled, left_s)):
            raise WaitTimeoutError(
                "not everything was acknowledged", waited_s=timeout_s, state="feeds of earlier lives"
            )

    def _is_past_settled(self) -> bool:
        return not self._engine.core.publishing.owes_past()

    def _ending(self, timeout_s: float) -> Steps[CloseReport]:
        """All of a close but for what comes before, the handlers, and what comes after, leaving."""
        engine = self._engine
        began = engine.clock()
        try:
            for publisher in list(self._publishers.values()):  # a handler may begin one meanwhile
                publisher.shut()
            engine.submit(events.IntakeStopped())
            for number in list(engine.inboxes):  # what we have not taken is owed to nobody: our peers may close, too
                engine.submit(events.SubscriptionClosed(number))
            yield Wait(self._is_settled, timeout_s)
            if not engine.stateless:
                engine.submit(RestWanted())
                yield Wait(lambda: engine.core.publishing.keeping.is_over, REST_S)
            engine.submit(events.BooksWanted())
            left_s = max(0.0, timeout_s - (engine.clock() - began) / S)
            yield Wait(lambda: not engine.core.books.untold_by(), min(left_s, BOOKS_S))
            report = self._report_on(began)
            engine.submit(events.IntakeStopped(say_bye=True))
        except (BrokenError, ClosedError):
            report = self._report_on(began)
        return report

    def _report_on(self, began_ns: int) -> CloseReport:
        left = self._unacknowledged()
        with self._engine.lock:
            feeds = self._engine.core.publishing.feeds
            for topic in [topic for topic in left if topic in feeds and feeds[topic].is_written_down]:
                del left[topic]
            ledger = draw_up(self._engine.core, final=True)
        return CloseReport(not left and ledger.balanced, (self._engine.clock() - began_ns) / S, left, ledger)

    def _is_settled(self) -> bool:
        arrived = all(publisher._has_arrived for publisher in list(self._publishers.values()))
        return arrived and not self._unacknowledged() and self._is_past_settled()

    def _unacknowledged(self) -> dict[str, dict[str, tuple[int, int]]]:
        left: dict[str, dict[str, tuple[int, int]]] = {}
        gone = {name for name, state in list(self._engine.peer_states.items()) if state in ("left", "dead")}
        for publisher in list(self._publishers.values()):
            end = publisher.next
            behind = {
                name: (floor, end)
                for (name, _), floor in publisher._readers().items()
                if floor < end and name not in gone
            }
            if behind:
                left[publisher.topic] = behind
        return left

    def __repr__(self) -> str:
        return f"Fabric({self.name}, job={self.job!r}, world_size={self.world_size})"


def check_subscription(
    acknowledge: str, ownership: str, cursor: object, name: str | None, seeds: Iterable[int] | None
) -> Options:
    """The options of `subscribe`. Raises `ConfigError`, `SeedError`."""
    if name is not None and not 0 < len(name.encode()) <= NAME_BYTES_MAX:
        raise ConfigError(f"1 to {NAME_BYTES_MAX} bytes", field="name")
    if cursor is not None and not name:
        raise ConfigError("a cursor outlives this process, and so must the subscription: give it a name", field="name")
    manual = _choose("acknowledge", acknowledge, "auto", "manual")
    owning = _choose("ownership", ownership, "view", "own")
    chosen = None if seeds is None else frozenset(map(check_seed, seeds))
    if cursor is None:
        return Options(manual, owning, chosen, name or "", None, None)
    places = parse_cursor(cursor)
    return Options(manual, owning, chosen, name or "", places, parse_redriven(cast("Mapping[str, Any]", cursor)))


def check_handler(attempts: int, exhausted: str) -> bool:
    """Whether lanes park, of the options of `on`. Raises `ConfigError`."""
    if attempts < 1:
        raise ConfigError("at least one", field="attempts")
    return _choose("exhausted", exhausted, "skip", "park")


def _choose(field_name: str, value: str, no: str, yes: str) -> bool:
    if value not in (no, yes):
        raise ConfigError(f"{value!r} is neither {no} nor {yes}", field=field_name)
    return value == yes
