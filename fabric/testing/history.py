"""What happened in a world: who lived, what was published, received, lost and buried.

Facts only; `Checker` judges them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fabric.core import events
from fabric.core.events import Card
from fabric.core.lanes import InboundFeed
from fabric.core.wire import Kind, checksum_of, decode_control
from fabric.engine.loop import Engine
from fabric.errors import PayloadError
from fabric.message import Message
from fabric.payloads import plan
from fabric.testing.stores import WorldStore
from fabric.topics import compile_pattern

__all__ = [
    "FeedBook",
    "FeedKey",
    "History",
    "Life",
    "Lost",
    "Published",
    "Reading",
    "Received",
    "SubscriptionBook",
    "digest_of",
]

DIGESTED_BYTES_MAX = 1 << 40
UNDECODABLE = -1
"""The digest of a value that cannot be decoded."""


class FeedKey(NamedTuple):
    """A feed: what one life of a member publishes on one topic."""

    source: str
    incarnation: int
    topic: str


class Published(NamedTuple):
    """A record as its publisher gave it away; its offset is its place in the feed's book."""

    seed: int
    sequence: int
    digest: int
    at_ns: int


class Received(NamedTuple):
    """A record as the application got it."""

    offset: int
    seed: int
    sequence: int
    digest: int
    at_ns: int


class Lost(NamedTuple):
    """Offsets `first <= offset < end` that were reported as a gap; `end` is None for an open one.

    `lived`: its publisher did.
    """

    first: int
    end: int | None
    reason: str
    lived: bool
    still_there: tuple[int, ...]
    """Offsets of it that the publisher could still have given."""
    at_ns: int


class Removed(NamedTuple):
    """Why a publisher retains an offset no more, and the positions of those who read it then and read on.

    A reader is (name, incarnation, subscription number).
    """

    cause: str
    readers: dict[tuple[str, int, int], int]


@dataclass(slots=True, eq=False)
class Life:
    """One life of a member."""

    name: str
    incarnation: int
    host: str
    began_ns: int
    ended_ns: int | None = None
    killed: bool = False
    engine: Engine | None = None
    """While it lives."""

    @property
    def key(self) -> tuple[str, int]:
        """Name and incarnation."""
        return self.name, self.incarnation


@dataclass(slots=True, eq=False)
class FeedBook:
    """All that one life published on one topic."""

    key: FeedKey
    policy: str
    when_full: str
    records: list[Published] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)
    """By offset, that of the record before it in its lane; -1 for the first."""
    newest: dict[int, int] = field(default_factory=dict)
    """By seed, the offset of its latest record."""
    removed: dict[int, Removed] = field(default_factory=dict)
    damaged: set[int] = field(default_factory=set)
    """Offsets that the publisher's disk lost."""
    first_available: int = 0
    readers: dict[tuple[str, int, int], int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class Reading:
    """One feed as one subscription reads it."""

    feed: FeedKey
    join: int
    began_ns: int
    inbound: InboundFeed | None
    order: int
    received: list[Received] = field(default_factory=list)
    failed: dict[int, int] = field(default_factory=dict)
    """How often a handler raised, by offset."""
    letters: dict[int, str] = field(default_factory=dict)
    """Dead letters: reason by offset."""
    known: frozenset[int] = frozenset()
    """What was a letter of an earlier life of a member with state: it counts as what became of that (D1)."""
    lost: list[Lost] = field(default_factory=list)
    ended: bool = False
    floors: tuple[int, int, int] = (0, 0, 0)
    """Floor, next and known, as they were seen last."""


@dataclass(slots=True, eq=False)
class SubscriptionBook:
    """One subscription of one life of a member."""

    owner: Life
    number: int
    pattern: str
    start: str
    delivery: str
    seeds: frozenset[int] | None
    opened_ns: int
    promised: dict[tuple[str, int], dict[str, int]] = field(default_factory=dict)
    """When `subscribe` returned: the lives that had confirmed it, and how much each had published by topic."""
    readings: dict[FeedKey, Reading] = field(default_factory=dict)
    by_handler: bool = False
    is_ready: bool = False
    closed: bool = False
    unannounced: list[Received] = field(default_factory=list)
    """Messages of a feed that was never begun."""
    missed: list[FeedKey] = field(default_factory=list)
    """Feeds of a life that was over before this subscription came to it: reported as an open gap, never begun."""

    @property
    def lives(self) -> bool:
        """Whether its member does, and it was not closed."""
        return self.owner.engine is not None and not self.closed


class History:
    """The book of a world.

    Written by the world's own kinds of `Fabric`, `Publisher` and `Subscription`, and by its engines.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.lives: dict[tuple[str, int], Life] = {}
        self.feeds: dict[FeedKey, FeedBook] = {}
        self.subscriptions: dict[tuple[str, int, int], SubscriptionBook] = {}
        """By member's name, its incarnation, and subscription number."""
        self.executed: dict[tuple[str, int, str, int, int], int] = {}
        """How often a request ran: (responder, its incarnation, requester, its incarnation, request)."""
        self._written: dict[tuple[int, int], tuple[FeedBook, int]] = {}
        """By feed and first offset, the feed and end of each burst that was ever to be written to a disk."""
        self.findings: list[tuple[str, str]] = []
        """What was wrong the moment it was seen: (invariant, detail)."""
        self.events = 0

    # Members.

    def begin(self, engine: Engine) -> None:
        """A life begins."""
        card = engine.card
        self.lives[card.name, card.incarnation] = Life(
            card.name, card.incarnation, card.host, self._clock(), engine=engine
        )

    def end(self, card: Card, *, killed: bool) -> None:
        """A life ends."""
        life = self.lives[card.name, card.incarnation]
        if life.engine is not None:
            life.ended_ns, life.killed, life.engine = self._clock(), killed, None

    def life_of(self, engine: Engine) -> Life:
        """The life that this engine drives."""
        return self.lives[engine.card.name, engine.card.incarnation]

    # What publishers say.

    def opened(self, engine: Engine, topic: str, policy: str, when_full: str) -> FeedBook:
        """A publisher exists."""
        key = FeedKey(engine.card.name, engine.card.incarnation, topic)
        return self.feeds.setdefault(key, FeedBook(key, policy, when_full))

    def published(self, book: FeedBook, offset: int, seed: int, sequence: int, value: object) -> None:
        """A publisher took a record."""
        if offset < len(book.records):
            return  # by `publish`, on behalf of `publish_many`
        if offset > len(book.records):
            self.findings.append(("I4", f"{book.key}: offset {offset} follows {len(book.records) - 1}"))
        book.previous.append(book.newest.get(seed, -1))
        book.newest[seed] = offset
        book.records.append(Published(seed, sequence, digest_of(value), self._clock()))

    # What subscribers say.

    def _note_subscription(self, engine: Engine, event: events.SubscriptionOpened) -> None:
        life, seeds = self.life_of(engine), event.seeds
        self.subscriptions[(*life.key, event.subscription)] = SubscriptionBook(
            life, event.subscription, event.pattern, event.start.value, event.delivery.value, seeds, self._clock()
        )

    def confirmed(self, book: SubscriptionBook) -> None:
        """`subscribe` returned: whatever is published from now on by who is there belongs to it."""
        book.is_ready = True
        assert book.owner.engine is not None
        core = book.owner.engine.core
        # Members that came back after the wait was over, while others went on waiting further down this stack.
        late = core.subscribing.unconfirmed(book.number)
        for peer in core.members.by_name.values():
            if peer.is_there and peer.name not in late and (peer.name, peer.incarnation) in self.lives:
                book.promised[peer.name, peer.incarnation] = {
                    key.topic: len(feed.records)
                    for key, feed in self.feeds.items()
                    if key[:2] == (peer.name, peer.incarnation)
                }

    def received(self, book: SubscriptionBook, message: Message) -> None:
        """The application has a message."""
        entry = Received(message.offset, message.seed, message.sequence, _digest_of_message(message), self._clock())
        reading = book.readings.get(_feed_of(message))
        if reading is None:
            book.unannounced.append(entry)
        else:
            reading.received.append(entry)

    def failed(self, book: SubscriptionBook, message: Message) -> None:
        """A handler raised."""
        reading = book.readings[_feed_of(message)]
        reading.failed[message.offset] = reading.failed.get(message.offset, 0) + 1

    def buried(self, engine: Engine, message: Message, reason: str) -> None:
        """A record became a dead letter."""
        book = self.subscriptions[(*self.life_of(engine).key, message._feed.subscription)]
        book.readings[_feed_of(message)].letters[message.offset] = reason

    # What engines say.

    def note(self, engine: Engine, event: object, commands: list[Any]) -> None:
        """An engine handled an event and executed what the core commanded."""
        self.events += 1
        if type(event) is events.SubscriptionOpened:
            self._note_subscription(engine, event)
        for command in commands:
            note = _NOTES.get(type(command))
            if note is not None:
                note(self, engine, command)
        if type(event) is events.SubscriptionClosed:
            book = self.subscriptions.get((engine.card.name, engine.card.incarnation, event.subscription))
            if book is not None:
                book.closed = True
        if type(event) is events.ControlReceived:
            self._note_answer(engine, event, commands)
        if type(event) is events.RecordsLoaded:
            self._note_damage(engine, event)
        self._note_retention(engine, event)
        self._note_progress(engine, event)

    def _note_answer(self, engine: Engine, event: events.ControlReceived, commands: list[Any]) -> None:
        sizes = [len(c.chunk) for c in commands if type(c) is events.SendBulk and c.chunk is not None]
        if len(sizes) > 1:
            message = decode_control(event.frame)
            if message.kind is Kind.PULL and sum(sizes) > message.fields[2]:
                self.findings.append(
                    (
                        "I7",
                        f"{engine.card.name} answered with {sum(sizes)} bytes within a credit of {message.fields[2]}",
                    )
                )

    def _note_writing(self, engine: Engine, command: events.AppendRecords) -> None:
        if not command.count:
            return  # it names a feed
        key = FeedKey(engine.card.name, engine.card.incarnation, command.topic)
        self._written[command.feed, command.first] = self.feeds[key], command.first + command.count

    def _note_damage(self, engine: Engine, event: events.RecordsLoaded) -> None:
        store = engine.store
        for first, frame, _, _ in event.bursts:
            if frame is None and isinstance(store, WorldStore) and store.is_harmed:
                book, end = self._written[event.feed, first]
                book.damaged.update(range(first, end))

    def _note_retention(self, engine: Engine, event: object) -> None:
        for out in engine.core.publishing.feeds.values():
            book = self.feeds.get(FeedKey(engine.card.name, engine.card.incarnation, out.topic))
            first = out.first_available
            if book is None:
                continue
            members, before = engine.core.members.by_name, book.readers
            book.readers = {
                (name, members[name].incarnation, number): floor
                for (name, number), floor in out.readers.items()
                if name in members  # others are of an earlier life of ours
            }
            if first == book.first_available:
                continue
            if first < book.first_available:
                self.findings.append(
                    ("I13", f"{book.key}: first available fell from {book.first_available} to {first}")
                )
            cause = "drop_oldest" if type(event) is events.RoomNeeded else "evicted"
            removed = Removed(cause, {reader: floor for reader, floor in book.readers.items() if reader in before})
            book.removed.update(dict.fromkeys(range(book.first_available, first), removed))
            book.first_available = first

    def _note_progress(self, engine: Engine, event: object) -> None:
        inbound = event.feed if type(event) is events.MessagesSettled else None
        if inbound is None:
            return
        key = (engine.card.name, engine.card.incarnation, inbound.subscription)
        book = self.subscriptions.get(key)
        reading = book.readings.get(FeedKey(inbound.source, inbound.incarnation, inbound.topic)) if book else None
        if reading is not None:
            now = inbound.floor, inbound.next, inbound.known
            if any(new < old for new, old in zip(now, reading.floors, strict=True)):
                self.findings.append(("I13", f"{key} {reading.feed}: {reading.floors} became {now}"))
            reading.floors = now

    def _note_begin(self, engine: Engine, command: events.BeginFeed) -> None:
        book = self.subscriptions[(engine.card.name, engine.card.incarnation, command.subscription)]
        key = FeedKey(command.source, command.incarnation, command.topic)
        if key in book.readings:
            self.findings.append(("I3", f"{book.owner.key} {key}: begun twice"))
        for other in book.readings.values():
            if (other.feed.source, other.feed.topic) == (key.source, key.topic):
                other.ended = True  # a life begins when all of the one before is settled
        subscription = engine.core.subscribing.subscriptions.get(command.subscription)
        inbound = subscription.feeds.get((command.source, command.topic)) if subscription else None
        inbound = inbound if inbound is not None and inbound.incarnation == command.incarnation else None
        book.readings[key] = Reading(key, command.join, self._clock(), inbound, len(book.readings))
        book.readings[key].known = self._known(book, key, stateless=bool(engine.stateless))

    def _known(self, book: SubscriptionBook, key: FeedKey, *, stateless: bool) -> frozenset[int]:
        """Of which records there are letters, or were, of one that had this name before: in an earlier life, or closed.

        Without a directory a life knows its own letters only.
        """
        earlier = [
            other.readings[key]
            for other in self.subscriptions.values()
            if (other.owner.name, other.pattern) == (book.owner.name, book.pattern)
            and (other.closed if other.owner is book.owner else not stateless)
            and key in other.readings
        ]
        return frozenset().union(*(reading.known.union(reading.letters) for reading in earlier))

    def _note_gap(self, engine: Engine, command: events.ReportGap) -> None:
        book = self.subscriptions[(engine.card.name, engine.card.incarnation, command.subscription)]
        key = FeedKey(command.source, command.incarnation, command.topic)
        reading = book.readings.get(key)
        if reading is None:
            book.missed.append(key)
            return
        publisher = self.lives[command.source, command.incarnation].engine
        if any(name == command.source and incarnation > command.incarnation for name, incarnation in self.lives):
            publisher = None  # it may live, but as a zombie, and nobody listens to it any more
        there: tuple[int, ...] = ()
        if publisher is not None and command.end is not None:
            out = publisher.core.publishing.feeds[command.topic]
            there = tuple(offset for offset in range(command.first, command.end) if out.find(offset) is not None)
        lived = publisher is not None
        reading.lost.append(Lost(command.first, command.end, command.reason, lived, there, self._clock()))

    def _note_execution(self, engine: Engine, command: events.ExecuteRequest) -> None:
        key = (engine.card.name, engine.card.incarnation, command.peer, command.incarnation, command.request)
        self.executed[key] = self.executed.get(key, 0) + 1

    def _note_end(self, engine: Engine, command: events.EndFeed) -> None:
        book = self.subscriptions[(engine.card.name, engine.card.incarnation, command.subscription)]
        for key, reading in book.readings.items():
            if (key.source, key.topic) == (command.source, command.topic):
                reading.ended = True

    # Looking.

    def matching(self, book: SubscriptionBook) -> list[FeedBook]:
        """The feeds that a subscription's pattern matches."""
        pattern = compile_pattern(book.pattern)
        return [feed for key, feed in self.feeds.items() if pattern.matches(key.topic)]

    def digest(self) -> int:
        """A number that two histories share only if they are the same (I15)."""
        told: list[object] = [[life.key, life.began_ns, life.ended_ns, life.killed] for life in self.lives.values()]
        told += [[feed.key, feed.records] for feed in self.feeds.values()]
        for name, book in self.subscriptions.items():
            readings = [
                (r.feed, r.join, r.began_ns, r.received, r.letters, r.lost, r.ended) for r in book.readings.values()
            ]
            told.append([name, book.opened_ns, readings])
        told.append([self.events, sorted(self.executed.items())])
        return checksum_of(repr(told).encode())


_NOTES: dict[type, Callable[[History, Engine, Any], None]] = {
    events.BeginFeed: History._note_begin,
    events.ReportGap: History._note_gap,
    events.EndFeed: History._note_end,
    events.ExecuteRequest: History._note_execution,
    events.AppendRecords: History._note_writing,
}


def digest_of(value: object) -> int:
    """XXH3-64 of a value's kind and bytes."""
    if type(value) is bytes:
        return checksum_of(value)
    planned = plan(value, limit=DIGESTED_BYTES_MAX)
    return checksum_of(planned.tobytes(), seed=planned.kind)


def _digest_of_message(message: Message) -> int:
    try:
        return digest_of(message.value)
    except PayloadError:
        return UNDECODABLE


def _feed_of(message: Message) -> FeedKey:
    return FeedKey(message.source, message.incarnation, message.topic)
