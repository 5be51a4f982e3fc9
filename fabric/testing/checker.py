"""Judges a history: does everything that the fabric promises hold? It shares no code with what it judges.

The invariants are those of the protocol's rules: I1 conservation, I2 order, I3 no duplicate, I4 integrity, I5 truth of
gaps, I6 safety of acknowledgements, I7 bounds, I8 isolation, I9 liveness, I10 fencing, I13 monotone positions, I14
closure. (I8 is asserted by the core itself after every event of a checked world; I15 is `History.digest`.)
"""

from __future__ import annotations

from collections.abc import Iterator

from fabric.core.feeds import OutFeed
from fabric.core.lanes import InboundFeed
from fabric.core.wire import Drop
from fabric.engine.loop import Engine
from fabric.testing.audit import disagreements, imbalances
from fabric.testing.history import FeedBook, History, Life, Lost, Reading, SubscriptionBook

__all__ = ["Checker", "Violation"]

BOOKED = (
    "handled",
    Drop.NOT_ASKED,
    Drop.GAP,
    Drop.SUPERSEDED,
    Drop.BEST_EFFORT,
    Drop.LOST_AT_SOURCE,
    Drop.UNDECODABLE,
    Drop.HANDLER_EXHAUSTED,
    Drop.CORRUPT_AT_SOURCE,
    Drop.TOO_LARGE,
    Drop.EXPIRED,
    Drop.REJECTED,
)
"""The ends of a record in the books of a subscription."""
SLACK_BYTES = 100
"""What is next in a feed comes in even into a full hold: it is bounded by two bursts of each feed, and this."""
_Finding = tuple[str, str]


class Violation(AssertionError):
    """A promise was broken. `invariant` is its number, I1 to I15."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"{invariant}: {detail}")
        self.invariant, self.detail = invariant, detail


class Checker:
    """The judge of one history."""

    def __init__(self, history: History) -> None:
        self._history = history

    def judge(self, *, at_rest: bool = True) -> None:
        """Raise `Violation` unless everything holds.

        `at_rest`: the faults are over and everything that can be delivered was; then nothing may be missing without a
        reason.
        """
        for invariant, detail in self.findings(at_rest=at_rest):
            raise Violation(invariant, detail)

    def findings(self, *, at_rest: bool = True) -> Iterator[tuple[str, str]]:
        """Everything that does not hold: (invariant, detail)."""
        yield from self._history.findings
        for feed in self._history.feeds.values():
            yield from _numbers(feed)
        for book in self._history.subscriptions.values():
            yield from self._subscription(book, at_rest)
        for run, times in self._history.executed.items():
            if times > 1:
                yield "I3", f"request {run} was executed {times} times"
        if at_rest:
            yield from (("I9", detail) for detail in self.unsettled())

    # One subscription.

    def _subscription(self, book: SubscriptionBook, at_rest: bool) -> Iterator[_Finding]:
        who = f"{book.owner.name}#{book.number}"
        for entry in book.unannounced:
            yield "I1", f"{who}: {entry} of a feed that never began"
        yield from self._joins(who, book)
        yield from _lives_in_order(who, book)
        for reading in book.readings.values():
            feed = self._history.feeds.get(reading.feed)
            if feed is None:
                yield "I4", f"{who}: {reading.feed} does not exist"
                continue
            where = f"{who} {reading.feed}"
            yield from _received(where, book, reading, feed)
            yield from self._gaps(where, book, reading, feed)
            yield from self._conserved(where, book, reading, feed, at_rest)

    def _joins(self, who: str, book: SubscriptionBook) -> Iterator[_Finding]:
        """What is published once `subscribe` returned belongs to the subscription, and so does all of a later life."""
        for key, reading in book.readings.items():
            life = self._history.lives[key[:2]]
            promised = book.promised.get(key[:2])
            if promised is not None and reading.join > promised.get(key.topic, 0):
                yield "I1", f"{who} {key}: joined at {reading.join}, {promised.get(key.topic, 0)} was promised"
            if book.is_ready and life.began_ns > book.opened_ns and reading.join > 0:
                yield "I1", f"{who} {key}: a later life was joined at {reading.join}"

    def _gaps(self, where: str, book: SubscriptionBook, reading: Reading, feed: FeedBook) -> Iterator[_Finding]:
        received = {entry.offset for entry in reading.received}
        seen: set[int] = set()
        for lost in reading.lost:
            if lost.end is None:
                if lost.lived and self._newest(reading.feed.source).incarnation == reading.feed.incarnation:
                    yield "I5", f"{where}: an open gap at {lost.first}, and its publisher lives"
                continue
            offsets = set(range(lost.first, lost.end))
            if lost.first < reading.join or lost.end > len(feed.records):
                yield "I5", f"{where}: {lost} outside of {reading.join}..{len(feed.records)}"
            if offsets & seen:
                yield "I5", f"{where}: {lost} was reported before"
            if offsets & received:
                yield "I5", f"{where}: {sorted(offsets & received)} were received and lost"
            seen |= offsets
            yield from _causes(where, book, lost, feed)

    def _conserved(
        self, where: str, book: SubscriptionBook, reading: Reading, feed: FeedBook, at_rest: bool
    ) -> Iterator[_Finding]:
        inbound = reading.inbound
        if inbound is None or not book.lives or self._newest(book.owner.name) is not book.owner:
            return
        end = self._owed_until(reading, feed, inbound, at_rest)
        if not inbound.best_effort:
            done = {entry.offset for entry in reading.received} | reading.letters.keys() | reading.known
            done |= {offset for lost in reading.lost if lost.end is not None for offset in range(lost.first, lost.end)}
            newest = {record.seed: offset for offset, record in enumerate(feed.records)} if inbound.latest else {}
            for offset in range(reading.join, end):
                seed = feed.records[offset].seed
                if (
                    offset in done
                    or (book.seeds is not None and seed not in book.seeds)
                    or newest.get(seed, offset) > offset
                ):
                    continue
                yield "I1", f"{where}: {offset} was lost without a word"
        if at_rest and not (inbound.settled or inbound.taken) and inbound.next == inbound.floor:
            yield from _balanced(where, reading, inbound)

    def _owed_until(self, reading: Reading, feed: FeedBook, inbound: InboundFeed, at_rest: bool) -> int:
        life = self._history.lives[reading.feed[:2]]
        waits = not reading.ended and (life.engine is None or self._newest(life.name) is not life)
        if any(lost.end is None for lost in reading.lost) or waits or not at_rest:
            return min(inbound.floor, len(feed.records))
        return len(feed.records)

    # Everything.

    def unsettled(self) -> list[str]:
        """What is still on its way among those who live; empty once the fabric is at rest."""
        left: list[str] = []
        for book in self._history.subscriptions.values():
            if book.lives and book.is_ready:
                left += self._unread(book)
        for life in self._history.lives.values():
            if life.engine is not None and self._newest(life.name) is life:
                left += self._owed_in_vain(life.name, life.engine)
            if self._has_to_know(life):
                left.append(f"{life.key} is a zombie and does not know it (I10)")
        return left

    def unheard(self) -> list[str]:
        """Where a publisher has not heard its reader's books as they are: nowhere, a second after all rests."""
        return list(disagreements(self._history))

    def _owed_in_vain(self, name: str, engine: Engine) -> Iterator[str]:
        """What is kept for subscriptions that their owners have closed: nobody will ever acknowledge it."""
        for out in engine.core.publishing.feeds.values():
            for reader, number in out.readers:
                book = self._history.subscriptions.get((*self._newest(reader).key, number))
                if book is not None and book.closed and book.owner.engine is not None:
                    yield f"{name} owes {out.topic} to {reader}#{number}, which is closed"

    def _unread(self, book: SubscriptionBook) -> Iterator[str]:
        who = f"{book.owner.name}#{book.number}"
        if self._newest(book.owner.name) is not book.owner:
            return  # nobody owes a zombie anything
        for feed in self._history.matching(book):
            life, reading = self._history.lives[feed.key[:2]], book.readings.get(feed.key)
            if reading is None:
                if life.engine is not None and self._newest(life.name) is life:
                    yield f"{who} has not begun {feed.key}"
            elif not reading.ended and not any(lost.end is None for lost in reading.lost):
                yield from self._behind(who, book, reading, feed, life)

    def _behind(self, who: str, book: SubscriptionBook, reading: Reading, feed: FeedBook, life: Life) -> Iterator[str]:
        inbound = reading.inbound
        if inbound is None:
            return
        if life.engine is None:
            if life.host != book.owner.host and self._newest(life.name).engine is None:
                return  # nobody can prove that it is dead
            if inbound.floor < len(feed.records) or self._was_to_hear_its_end(inbound, life):
                yield f"{who} waits for the end of {reading.feed}: {inbound}"
            return
        if self._newest(life.name) is life:
            yield from self._behind_the_living(who, book, reading, feed, life)

    def _was_to_hear_its_end(self, inbound: InboundFeed, life: Life) -> bool:
        """Whether the next life of its publisher is there to say where the feed ended, and this reader is not there.

        A reader that is there rests between two lives of a durable topic until this one publishes on it, too.
        """
        is_at_its_end = inbound.fin is not None and inbound.floor >= inbound.fin
        return self._newest(life.name).engine is not None and not is_at_its_end

    @staticmethod
    def _behind_the_living(
        who: str, book: SubscriptionBook, reading: Reading, feed: FeedBook, life: Life
    ) -> Iterator[str]:
        inbound = reading.inbound
        assert inbound is not None and life.engine is not None
        if inbound.best_effort:  # nothing has to come, but what came has to be handled
            if inbound.held or inbound.taken or inbound.floor < inbound.next:
                yield f"{who} still has some of {inbound}"
            return
        if inbound.floor < len(feed.records):
            yield f"{who} is at {inbound} of {len(feed.records)}"
            return
        out = life.engine.core.publishing.feeds[feed.key.topic]
        position = out.readers.get((book.owner.name, book.number), -1)
        if position < out.end:
            yield f"{feed.key} has not heard that {who} is at {inbound.floor}: {position}"

    def _has_to_know(self, life: Life) -> bool:
        """Whether this is a zombie that is not fenced, though somebody hears from it who knows better."""
        if life.engine is None or life.engine.fenced_by or self._newest(life.name) is life:
            return False
        for peer in life.engine.core.members.by_name.values():
            other = self._history.lives.get((peer.name, peer.incarnation))
            if other is not None and other.engine is not None and other is not life and peer.sees_us:
                seen = other.engine.core.members.by_name.get(life.name)
                if seen is not None and seen.incarnation > life.incarnation and not peer.is_gone:
                    return True
        return False

    def _newest(self, name: str) -> Life:
        return max(
            (life for life in self._history.lives.values() if life.name == name), key=lambda life: life.incarnation
        )

    # States.

    def inspect(self) -> None:
        """Look at all who live, now: books (I1), acknowledgements (I6), bounds (I7), closure (I14).

        Raises `Violation`.
        """
        for wrong in imbalances(self._history):
            raise Violation("I1", wrong)
        for life in self._history.lives.values():
            if life.engine is not None:
                self._inspect_retention(life.engine)
        for book in self._history.subscriptions.values():
            if book.lives:
                self._inspect_room(book)
                for reading in book.readings.values():
                    if reading.inbound is not None and not reading.ended:
                        self._inspect_reading(book, reading, reading.inbound)

    @staticmethod
    def _inspect_retention(engine: Engine) -> None:
        retention, limits = engine.core.publishing.retention, engine.config.retention
        bursts = [burst.size for out in engine.core.publishing.feeds.values() for burst in (*out.owed, *out.kept)]
        room = limits.owed_bytes_max + limits.kept_bytes_max + max(bursts, default=0)
        if retention.owed_bytes > room or retention.kept_bytes > limits.kept_bytes_max:
            raise Violation(
                "I7", f"{engine.card.name} owes {retention.owed_bytes} and keeps {retention.kept_bytes} bytes"
            )

    @staticmethod
    def _inspect_room(book: SubscriptionBook) -> None:
        assert book.owner.engine is not None
        subscription = book.owner.engine.core.subscribing.subscriptions.get(book.number)
        if subscription is None:
            return
        room = subscription.room
        feeds = subscription.feeds.values()
        spare = sum(2 * max((burst.size for burst in inbound.held.values()), default=0) for inbound in feeds)
        if room.hold > room.hold_max + spare + SLACK_BYTES:
            raise Violation("I7", f"{book.owner.name}#{book.number} holds {room.hold} of {room.hold_max} bytes")
        for inbound in subscription.feeds.values():
            if len(inbound.taken) > room.ranges_max:
                raise Violation("I7", f"{book.owner.name}#{book.number}: {len(inbound.taken)} ranges in {inbound}")

    def _inspect_reading(self, book: SubscriptionBook, reading: Reading, inbound: InboundFeed) -> None:
        feed, life = self._history.feeds.get(reading.feed), self._history.lives[reading.feed[:2]]
        if feed is None:
            return
        if not inbound.best_effort:
            _inspect_closure(book, inbound, feed)
        if life.engine is None or book.owner.engine is None:
            return
        peer = life.engine.core.members.by_name.get(book.owner.name)
        out: OutFeed = life.engine.core.publishing.feeds[reading.feed.topic]
        position = out.readers.get((book.owner.name, book.number), 0)
        if (
            peer is not None
            and peer.incarnation == book.owner.incarnation
            and position > max(inbound.floor, inbound.join)
        ):
            raise Violation(
                "I6", f"{reading.feed} believes {book.owner.name}#{book.number} at {position}, it is at {inbound.floor}"
            )


def _inspect_closure(book: SubscriptionBook, inbound: InboundFeed, feed: FeedBook) -> None:
    looked_at = [("taken", inbound.taken, inbound.next)]
    if not inbound.latest:  # there a superseded record is settled at once, whatever is in hand
        looked_at.append(("settled", inbound.settled, inbound.floor))
    for what, ranges, floor in looked_at:
        for first, end in ranges:
            for offset in range(first, min(end, len(feed.records))):
                previous = feed.previous[offset]
                wanted = book.seeds is None or feed.records[offset].seed in book.seeds
                if wanted and previous >= floor and previous not in ranges:
                    raise Violation("I14", f"{inbound}: {offset} was {what} before {previous} of its lane")


def _numbers(feed: FeedBook) -> Iterator[_Finding]:
    lanes: dict[int, int] = {}
    for offset, record in enumerate(feed.records):
        due = lanes.get(record.seed, 0)
        if record.sequence != due:
            yield "I4", f"{feed.key} {offset}: sequence {record.sequence} of seed {record.seed}, {due} was due"
        lanes[record.seed] = record.sequence + 1


def _lives_in_order(who: str, book: SubscriptionBook) -> Iterator[_Finding]:
    """All of the old life of a publisher comes before the new one."""
    before: dict[tuple[str, str], Reading] = {}
    for reading in sorted(book.readings.values(), key=lambda reading: reading.order):
        feed = reading.feed
        old = before.get((feed.source, feed.topic))
        if old is not None and old.feed.incarnation >= feed.incarnation:
            yield "I2", f"{who}: {feed} began after {old.feed}"
        if old is not None and old.received and old.received[-1].at_ns > reading.began_ns:
            yield "I2", f"{who}: {old.received[-1]} of {old.feed} came after {feed} began"
        before[feed.source, feed.topic] = reading


def _received(where: str, book: SubscriptionBook, reading: Reading, feed: FeedBook) -> Iterator[_Finding]:
    lanes: dict[int, int] = {}
    for entry in reading.received:
        offset, seed = entry.offset, entry.seed
        if offset >= len(feed.records) or feed.records[offset][:3] != entry[1:4]:
            truth = feed.records[offset] if offset < len(feed.records) else "nothing"
            yield "I4", f"{where}: received {entry}, published was {truth}"
        if offset < reading.join:
            yield "I1", f"{where}: received {offset}, joined at {reading.join}"
        if book.seeds is not None and seed not in book.seeds:
            yield "I1", f"{where}: received {offset} of seed {seed}, which was not asked for"
        if lanes.get(seed, -1) == offset:
            yield "I3", f"{where}: received {offset} twice"
        elif lanes.get(seed, -1) > offset:
            yield "I2", f"{where}: received {offset} of seed {seed} after {lanes[seed]}"
        lanes[seed] = offset


def _causes(where: str, book: SubscriptionBook, lost: Lost, feed: FeedBook) -> Iterator[_Finding]:
    """A gap of a publisher that lives has a cause that its policy allows."""
    if lost.still_there:
        yield "I5", f"{where}: {lost}, and its publisher still has it"
    reader = (*book.owner.key, book.number)
    for offset in range(lost.first, lost.end or lost.first) if lost.lived else ():
        if offset in feed.damaged:
            continue
        removed = feed.removed.get(offset)
        if removed is None and feed.policy == "latest":
            continue  # an addressed value that was superseded before it was fetched
        if removed is None:
            yield "I5", f"{where}: {offset} in {lost} was never given up"
        elif removed.cause == "drop_oldest" and feed.when_full != "drop_oldest":
            yield "I5", f"{where}: {offset} was dropped under {feed.when_full}"
        elif (
            removed.cause == "evicted" and feed.policy != "latest" and removed.readers.get(reader, offset + 1) <= offset
        ):
            yield "I6", f"{where}: {offset} was given up while this reader was owed it"


def _balanced(where: str, reading: Reading, inbound: InboundFeed) -> Iterator[_Finding]:
    booked = sum(inbound.counts[reason] for reason in BOOKED)
    if booked != inbound.floor - inbound.join:
        counts = {str(reason): inbound.counts[reason] for reason in BOOKED if inbound.counts[reason]}
        yield "I1", f"{where}: {booked} in the books, {inbound.floor - inbound.join} went by: {counts}"
    handled = sum(1 for entry in reading.received if entry.offset not in reading.letters)
    if not handled <= inbound.counts["handled"] <= handled + len(reading.known):
        yield "I1", f"{where}: {inbound.counts['handled']} handled in the books, {handled} were received"
