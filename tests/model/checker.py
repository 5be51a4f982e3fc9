"""Knows the whole truth and judges what publisher and subscribers do. The numbers are those of the invariants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.model.words import NONE, Key, Options, Record, Violation, count_ranges, size

if TYPE_CHECKING:
    from tests.model.application import Application
    from tests.model.network import Address
    from tests.model.publisher import Feed, Publisher
    from tests.model.subscriber import Subscriber
    from tests.model.world import ModelWorld


class Checker:
    """What was published, what became of it in retention, and what subscribers were promised."""

    def __init__(self, world: ModelWorld, options: Options) -> None:
        self.world, self.options = world, options
        self.truth: dict[Key, Record] = {}
        self.causes: dict[Key, tuple[str, frozenset[tuple[str, int]]]] = {}
        """Why a record is not there any more, and which sessions of which subscriptions were owed it then."""
        self.promised: dict[str, tuple[int, Key]] = {}
        """From where on each subscription is owed everything, and in which session it was told."""
        self.inexact: set[int] = set()
        """Lives of which nobody knows where they ended."""
        self.relinquished: set[int] = set()
        """Lives that took with them what was missing, as far as their subscribers know."""
        self.stands: dict[str, Key] = {}
        """Where the publisher knows each subscription to stand."""
        self.begun: dict[tuple[str, int], int] = {}
        """Where a subscription without any place began in the feed of a life, whatever older life it met later."""
        self.forfeited: set[str] = set()
        """Whose registration expired: what it had not heard of then, it is not told either."""
        self.given_up: set[tuple[str, int]] = set()

    def require(self, condition: object, kind: str, *detail: object) -> None:
        if not condition:
            raise Violation(kind, *detail)

    # The publisher.

    def published(self, record: Record) -> None:
        self.require(record.key not in self.truth, "INTEGRITY", "number used twice", record)
        self.truth[record.key] = record

    def removed(self, key: Key, cause: str, publisher: Publisher | None = None) -> None:
        """I6: nothing is released that a registered subscriber would need if it restarted now."""
        owed = frozenset((one, session) for one, (session, begin) in self.promised.items() if key >= begin)
        self.causes[key] = cause, owed
        if cause == "acknowledged" and publisher is self.world.publisher:
            for subscriber in self.world.subscribers:
                needed = any(one == subscriber.name for one, _ in owed) and self.is_needed(subscriber, key)
                self.require(not needed, "ACK SAFETY", subscriber.name, key)

    def is_needed(self, subscriber: Application, key: Key) -> bool:
        if not subscriber.wants(self.truth[key].lane) or (subscriber.name, key[0]) in self.given_up:
            return False
        if subscriber.saved:
            return not subscriber.saved.cursor.covers(key)
        is_here = subscriber.up and self.promised[subscriber.name][0] == subscriber.life
        if is_here and subscriber.incarnation:
            return not subscriber.cursor().covers(key)
        return is_here or subscriber.profile.name

    def stopped(self, feed: Feed, how: str, is_kept: bool) -> None:
        level = self.options.level
        if (level == "memory" and how != "clean") or (level == "process" and how == "power"):
            self.inexact.add(feed.incarnation)
        if level == "memory" and not is_kept:
            self.relinquished.add(feed.incarnation)

    def registered(self, publisher: Publisher, name: str, session: int, stated: Key | None, is_known: bool) -> None:
        if publisher is not self.world.publisher:
            return
        before = self.stands.get(name)
        now = self.note(publisher, name)
        if stated is None and is_known and before is not None:
            self.require(now >= before, "BEGINS AGAIN", name, now, before)
        begin = self.promised.get(name, (0, (0, 0)))[1]
        is_promised = is_known and name in self.promised
        if stated is not None and (stated[0] in publisher.feeds or not is_promised):
            begin = stated
        elif not is_promised:
            begin = publisher.life, publisher.registrations[name].positions[publisher.life]
            if stated is None:
                self.begun[name, publisher.life] = begin[1]
        self.promised[name] = session, begin

    def acknowledged(self, publisher: Publisher, source: Address, position: Key) -> None:
        name, session = source
        if publisher is self.world.publisher and self.promised.get(name, (0, (0, 0)))[0] == session:
            self.promised[name] = session, max(position, self.promised[name][1])
            self.note(publisher, name)

    def note(self, publisher: Publisher, name: str) -> Key:
        """What was acknowledged counts from now on, as far as this life knows."""
        self.stands[name] = min(publisher.registrations[name].positions.items(), default=(publisher.life, 0))
        return self.stands[name]

    def restarted(self, publisher: Publisher) -> None:
        """What was acknowledged and not saved counts again (P3)."""
        for name in publisher.registrations:
            self.note(publisher, name)

    def replaced(self, publisher: Publisher) -> None:
        """The state of an identity is lost."""
        self.promised.clear()
        self.stands.clear()
        self.inexact.update(publisher.feeds)

    def expired(self, publisher: Publisher, name: str) -> None:
        self.world.counts["registrations expired"] += 1
        if publisher is self.world.publisher:
            self.promised.pop(name, None)
            self.stands.pop(name, None)
        self.forfeited.add(name)

    def answered(self, records: list[Record], credit: int) -> None:
        self.require(len(records) <= 1 or size(records) <= credit, "BOUND", "answer over credit")

    def retention(self, publisher: Publisher) -> None:
        self.require(publisher.in_memory() <= self.options.memory or self.options.level != "memory", "BOUND", "memory")
        self.require(publisher.on_disk() <= self.options.disk, "BOUND", "disk")

    # The subscriber.

    def joined(self, subscriber: Subscriber, start: Key) -> None:
        """`subscribe` is exact: what is published after the registration belongs to the subscriber, over all lives."""
        session, begin = self.promised.get(subscriber.name, (0, start))
        if session != subscriber.life:
            return
        for key, record in self.truth.items():
            if begin <= key < start and subscriber.wants(record.lane) and key[0] not in self.inexact:
                raise Violation("JOIN", subscriber.name, start, begin, key)

    def asked(self, s: Subscriber, credit: int, crowded_window: int | None) -> None:
        """A pull asks within the room, and for less after an answer of which some was turned away."""
        room = max(0, self.options.window - len(s.hand)) + max(0, self.options.room - size(s.hold.values()))
        self.require(credit <= max(1, room), "BOUND", "credit beyond the room", s.name)
        if crowded_window is not None:
            self.require(credit <= max(1, crowded_window // 2), "BOUND", "credit after a crowded answer")

    def handed(self, subscriber: Application, record: Record) -> None:
        """I2 and I3 in one session: each record once, each lane in order."""
        last = subscriber.handed.get(record.lane, (0, NONE))
        self.require(last != record.key, "DUPLICATE", subscriber.name, record)
        self.require(last < record.key, "ORDER", subscriber.name, record, last)
        subscriber.handed[record.lane] = record.key

    def gap(self, subscriber: Subscriber, key: Key) -> None:
        """I5 and I11: every gap is true and has a cause that policy and level allow."""
        self.require(key in self.truth, "FALSE GAP", "never published", subscriber.name, key)
        if (subscriber.name, key[0]) in self.given_up or key[0] in self.relinquished:
            return
        feed = self.world.publisher.feeds.get(key[0])
        if feed is None:
            self.require(key[0] in self.inexact, "FALSE GAP", "feed forgotten", key)
            return
        self.require(key[1] not in feed.records, "FALSE GAP", subscriber.name, key)
        cause, owed = self.causes.get(key, ("nothing", frozenset()))
        mine = [session for name, session in owed if name == subscriber.name]
        was_owed = mine and (subscriber.profile.name or subscriber.life in mine)
        level, policy = self.options.level, self.options.when_full
        allowed = {
            "acknowledged": not was_owed,
            "drop_oldest": policy == "drop_oldest",
            "corrupt": True,
            "kill": level == "memory",
            "power": level != "power",
        }
        self.require(allowed.get(cause, False), "LOST BY " + cause.upper(), subscriber.name, key)

    def open_gap(self, subscriber: Subscriber, incarnation: int) -> None:
        """Where a feed ended is not known; or what it had belongs to nobody any more."""
        _, begin = self.promised.get(subscriber.name, (0, (incarnation + 1, 0)))
        lost = incarnation in self.inexact or incarnation in self.relinquished or begin[0] > incarnation
        self.require(lost or (subscriber.name, incarnation) in self.given_up, "FALSE OPEN GAP", incarnation)

    def state(self, s: Subscriber) -> None:
        """I7 bounds, I8 isolation, and I14: what is settled above the floor is closed."""
        options = self.options
        self.require(size(s.hold.values()) <= options.room, "BOUND", "hold")
        self.require(len(s.hand) <= options.window, "BOUND", "hand")
        self.require(count_ranges(s.above) <= options.ranges + options.window, "BOUND", "ranges")
        for record in s.hold.values():
            self.require(s.ready(record) or not s.is_settled(record.previous), "ISOLATION", s.name, record)
        for offset in s.above:
            found = self.truth.get((s.incarnation, offset))
            if found is None:
                raise Violation("INTEGRITY", "settled what was never published", s.name, offset)
            self.require(s.is_settled(found.previous) or not s.wants(found.lane), "CLOSURE", s.name, found)

    # At the end.

    def history(self, s: Application) -> None:
        """I1 conservation, I2 order, I3 duplicates, I4 integrity, over all that the application kept."""
        self.require(len(s.letters) <= self.options.letters, "BOUND", "letters")
        gaps, buried = set(s.gaps), set(s.waiting())
        delivered = self.deliveries(s)
        self.require(len(gaps) == len(s.gaps), "TWO ENDS", "gap reported twice")
        for key, record in self.truth.items():
            if s.start is None or key < s.start or not s.wants(record.lane):
                continue
            if key in s.before or key[1] < self.begun.get((s.name, key[0]), 0):
                continue
            ends = (key in delivered) + (key in buried) + (key in gaps)
            self.require(ends or self.in_open_gap(s, key) or self.is_unheard(s, key), "SILENT LOSS", s.name, record)
            self.require(ends <= 1, "TWO ENDS", s.name, record)

    def deliveries(self, s: Application) -> set[Key]:
        delivered: set[Key] = set()
        last: dict[int, Key] = {}
        for record, redelivered in s.delivered:
            key = record.key
            self.require(self.truth.get(key) == record, "INTEGRITY", s.name, record)
            self.require(key not in delivered, "DUPLICATE", s.name, record)
            had_after_all = self.may_come_after_all(s, key)
            self.require(redelivered or had_after_all or not self.in_open_gap(s, key), "TWO ENDS", s.name, record)
            delivered.add(key)
            if self.options.on_failure == "park" or not redelivered:
                self.require(last.get(record.lane, (0, NONE)) < key, "ORDER", s.name, record)
                last[record.lane] = key
        return delivered

    def may_come_after_all(self, s: Subscriber, key: Key) -> bool:
        """Given up for good reason, and had by a later session: from a zombie, or from a life that came too late."""
        given_up = key[0] in self.relinquished or (s.name, key[0]) in self.given_up
        return given_up or (key[0] in self.inexact and s.life > 1)

    def in_open_gap(self, s: Subscriber, key: Key) -> bool:
        return any(begin <= key < end for begin, end in s.open_gaps)

    def is_unheard(self, s: Subscriber, key: Key) -> bool:
        """A life that came and went, with all that it knew, before this subscriber heard of its feed."""
        is_lost = key[0] in self.inexact or key[0] in self.relinquished or s.name in self.forfeited
        self.world.counts["of lives that nobody heard of"] += is_lost and key[0] not in s.heard_of
        return is_lost and key[0] not in s.heard_of

    def is_fenced(self) -> bool:
        """I10: of two live processes of one identity exactly one goes on publishing to subscribers."""
        return all(zombie.fenced or not zombie.listeners or not zombie.make_room() for zombie in self.world.zombies)
