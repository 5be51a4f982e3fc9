"""Our subscriptions: registering them with publishers, entering feeds, and their ends (RULES S1, S7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fabric.config import Delivery, Policy
from fabric.core.books import Books
from fabric.core.cursors import Cursor, Place
from fabric.core.endings import Endings
from fabric.core.events import (
    BeginFeed,
    Buffer,
    CursorCommitted,
    EndFeed,
    MessagesSettled,
    ReportGap,
    SubscriptionClosed,
    SubscriptionOpened,
)
from fabric.core.fetching import Fetching
from fabric.core.following import FollowedFeed, Following
from fabric.core.guards import Retry
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.rooms import Room
from fabric.core.sharing import SlotRead
from fabric.core.subscriptions import Key, Row, Subscription
from fabric.core.wire import Drop, Kind, feed_id
from fabric.errors import TopicError
from fabric.topics import check_topic, compile_pattern

__all__ = ["Subscribing"]

HELLO_REGISTRATIONS_MAX = 400
"""Subscriptions in one HELLO: with the longest patterns it stays below CONTROL_BYTES_MAX. The rest registers alone."""
FEEDS_PER_SUBSCRIPTION_MAX = 100_000
"""A member that names feeds without end is not followed beyond this: 64 members with 1,500 topics each."""
LATER_MAX = 4096
"""Feeds of one topic that wait for the one before; a publisher remembers as many lives."""
HELLO_POSITIONS_MAX = 4
REGISTER = Retry.beyond(50 * MS, 1000 * MS)


class Subscribing:
    """All subscriptions of this member."""

    def __init__(self, context: Context, members: Members, fetching: Fetching, books: Books) -> None:
        self._context, self._members, self._fetching, self._books = context, members, fetching, books
        self.following = Following(context, fetching, books.touched)
        self.subscriptions: dict[int, Subscription] = {}
        self._leaving: dict[tuple[str, int], tuple[Retry, bool]] = {}
        """Closed subscriptions of which a peer has to hear: when to tell it again, and whether they stay owed."""
        self.endings = Endings(context, members, fetching, self.following, self.subscriptions, self._retire)
        self._past: Counter[str] = Counter()
        """What became of the records of feeds that are over."""

    # The application.

    def open(self, event: SubscriptionOpened) -> None:
        """Register with every member that is there."""
        inboxes = self._context.config.inboxes
        room = Room(
            hand_max=inboxes.hand_bytes_max,
            hold_max=inboxes.hold_bytes_max,
            ranges_max=inboxes.ranges_max,
            payload_max=inboxes.assembly_bytes_max,
            payload_bytes_max=inboxes.payload_bytes_max,
        )
        subscription = self.subscriptions[event.subscription] = Subscription(event, room)
        for peer in self._members.by_name.values():
            if not peer.is_gone:  # one that has a place began before what this publisher may know
                self._register(subscription, peer, from_start=subscription.stands_at(peer.name))

    def close(self, event: SubscriptionClosed) -> None:
        """The application is done: nothing more is asked for. Publishers owe nothing more, but to one with a name."""
        number = event.subscription
        subscription = self.subscriptions.pop(number, None)
        if subscription is None:
            return
        rests = bool(subscription.name) and not event.forgotten
        for inbound in subscription.feeds.values():
            self._drop_inbound(inbound, by_us=True, rests=rests)
        self.following.acknowledge()
        for peer in self._members.by_name.values():
            if not peer.is_gone:
                self._leave(peer, number, rests=rests)

    def _leave(self, peer: Peer, number: int, *, rests: bool, retry: Retry = REGISTER) -> None:
        """Repeated until the publisher says that it does not know this subscription: it would owe it for ever."""
        again = retry.after(self._context.now, self._context.chance())
        self._leaving[peer.name, number] = again, rests
        self._context.wake_by(again.due_ns)
        self._context.send(peer.name, Kind.UNREGISTER, number, rests)

    def settle(self, event: MessagesSettled) -> None:
        """Messages were handled, or dropped by the application."""
        inbound = event.feed
        if inbound.subscription not in self.subscriptions:
            return
        inbound.counts["handled"] += event.handled
        rest = event.end - event.first - event.handled
        if rest:
            dropped = event.dropped or {}
            inbound.counts.update(dropped)
            inbound.counts[Drop.NOT_ASKED] += rest - sum(dropped.values())
        inbound.settle(event.first, event.end, event.size)
        self.following.settled(inbound, event.size)
        if inbound.fin is not None:
            self.endings.check(inbound)

    def commit(self, event: CursorCommitted) -> None:
        """The application saved a cursor: publishers hear of it."""
        subscription = self.subscriptions.get(event.subscription)
        if subscription is None:
            return
        for (source, _), feed, floor in subscription.commit(event.cursor):
            self._context.send(source, Kind.ACKNOWLEDGE, [(subscription.number, feed, floor)])
        for key in event.cursor:
            inbound = subscription.feeds.get(key)
            followed = self.following.find(inbound) if inbound is not None else None
            if inbound is not None and followed is not None:
                self.following.acknowledge_soon(followed, inbound)

    def cursor(self, number: int) -> Cursor:
        """Where a subscription stands."""
        subscription = self.subscriptions.get(number)
        return subscription.cursor() if subscription is not None else {}

    def has(self, name: str, pattern: str) -> bool:
        """Whether a subscription with this name and pattern is open."""
        return any(
            (subscription.name, subscription.pattern) == (name, pattern)
            for subscription in list(self.subscriptions.values())
        )

    def unconfirmed(self, number: int) -> list[str]:
        """The members that are there and have not confirmed a subscription."""
        subscription = self.subscriptions.get(number)
        if subscription is None:
            return []
        return [name for name in list(subscription.asked) if self._members.by_name[name].is_there]

    def unproven(self, number: int) -> bool:
        """Whether some feed of a subscription that is never repaired does not come over its push link yet."""
        subscription = self.subscriptions.get(number)
        for inbound in list(subscription.feeds.values()) if subscription else ():
            followed = self.following.find(inbound) if inbound.best_effort else None
            if followed is not None and not (followed.live or followed.peer.is_gone):
                return True
        return False

    def knows(self, name: str) -> bool:
        """Whether something of this member is not settled yet."""
        return any(source == name for subscription in self.subscriptions.values() for source, _ in subscription.feeds)

    # Registering.

    def registrations(self, peer: Peer) -> list[tuple[Any, ...]]:
        """All subscriptions, as HELLO carries them to a member that is new to us.

        It owes everything from its offset 0. Those whose places take more room register alone.
        """
        some = [subscription.fields(peer.name, from_start=True) for subscription in self.subscriptions.values()]
        return [fields for fields in some if len(fields[5]) <= HELLO_POSITIONS_MAX][:HELLO_REGISTRATIONS_MAX]

    def welcome(self, peer: Peer) -> None:
        """A member, or a new life of one, is known: its HELLO carries our subscriptions, and it has to confirm them."""
        for subscription in self.subscriptions.values():
            subscription.confirmed.pop(peer.name, None)
            soon = REGISTER.postponed(self._context.now)
            subscription.asked[peer.name] = soon, True
            self._context.wake_by(soon.due_ns)
            subscription.told.pop(peer.name, None)
        self.following.outlive(peer)
        self.endings.welcome(peer)
        self._forget_leaving(peer)

    def _miss(self, subscription: Subscription, key: Key) -> None:
        """Lives of a publisher are over before we came to them: what they published is an open gap.

        What is on disk is named again by the next.
        """
        for row in subscription.later.pop(key).values():
            if subscription.delivery is Delivery.RELIABLE and not (row.policy == Policy.LOSSY or row.outlives):
                self._past["open_gaps"] += 1
                self._books.miss(subscription.number, key, row.incarnation, row.feed, row.join)
                gap = ReportGap(subscription.number, *key, row.incarnation, row.first_available, None, Drop.GAP)
                self._context.emit(gap)

    def _forget_leaving(self, peer: Peer) -> None:
        """That life of it is over, and what it knew of us."""
        for key in [key for key in self._leaving if key[0] == peer.name]:
            del self._leaving[key]

    def _register(self, subscription: Subscription, peer: Peer, *, from_start: bool, retry: Retry = REGISTER) -> None:
        again = retry.after(self._context.now, self._context.chance())
        self._context.wake_by(again.due_ns)
        subscription.asked[peer.name] = again, from_start
        self._context.send(peer.name, Kind.REGISTER, *subscription.fields(peer.name, from_start=from_start))

    def on_registered(self, peer: Peer, number: int, total: int, feeds: list[list[Any]]) -> None:
        """A publisher names feeds that match, with their join offsets."""
        subscription = self.subscriptions.get(number)
        if subscription is None:
            _, rests = self._leaving.get((peer.name, number), (None, True))
            self._context.send(peer.name, Kind.UNREGISTER, number, rests)
            return
        told = subscription.told.setdefault(peer.name, set())
        for fields in feeds:
            row = Row(*fields)
            if not (self._is_sound(peer, row) and compile_pattern(subscription.pattern).matches(row.topic)):
                self._context.counts[Drop.SHAPE] += 1
            elif self._add_feed(subscription, peer, row) and len(told) < FEEDS_PER_SUBSCRIPTION_MAX:
                told.add(row.feed)
        if peer.name in subscription.asked and len(told) >= total:
            del subscription.asked[peer.name]
            subscription.confirmed[peer.name] = peer.incarnation

    def _is_sound(self, peer: Peer, row: Row) -> bool:
        try:
            check_topic(row.topic)
            Policy(row.policy)
        except (TopicError, ValueError):
            return False
        return bool(
            row.feed == feed_id(peer.name, row.incarnation, row.topic)
            and max(row.join, row.first_available) <= row.end < 2**63
            and row.before < row.incarnation <= peer.incarnation
            and row.ending <= 2
            and (row.ending == 0) == (row.incarnation == peer.incarnation)
        )

    def _add_feed(self, subscription: Subscription, peer: Peer, row: Row) -> bool:
        """Whether we know this feed now; one whose predecessor has not been named has to be told again."""
        key = peer.name, row.topic
        current = subscription.feeds.get(key)
        if current is None:
            self._check_place(subscription, key, row)
        if current is not None and row.incarnation == current.incarnation:
            self._learn(peer, current, row)
        elif row.incarnation <= subscription.passed(key):
            if row.feed not in subscription.uncommitted:
                self._context.send(peer.name, Kind.ACKNOWLEDGE, [(subscription.number, row.feed, row.end)])
        elif current is None and len(subscription.feeds) >= FEEDS_PER_SUBSCRIPTION_MAX:
            self._context.counts[Drop.NO_ROOM] += 1
        else:
            return self._add_new(subscription, peer, row, current)
        return True

    def _check_place(self, subscription: Subscription, key: Key, row: Row) -> None:
        """A cursor that is ahead of its publisher is of another job, or its publisher lost its state and its clock.

        What it says cannot be right, so nothing may be passed over because of it.
        """
        place = subscription.unfinished(key)
        if place is None or row.ending or place[:2] <= (row.incarnation, row.end):
            return
        subscription.disown(key)
        self._context.counts["cursors_disowned"] += 1
        self._past["open_gaps"] += 1
        feed = feed_id(key[0], place.incarnation, key[1])
        self._books.miss(subscription.number, key, place.incarnation, feed, place.floor)
        gap = ReportGap(subscription.number, *key, place.incarnation, place.floor, None, Drop.GAP)
        self._context.emit(gap)

    def _add_new(self, subscription: Subscription, peer: Peer, row: Row, current: InboundFeed | None) -> bool:
        """A feed that we have not begun: now, or after the one that we are at or come back to."""
        key = peer.name, row.topic
        place = subscription.unfinished(key)
        if current is None and place is not None and place.incarnation < row.incarnation:
            current = self._enter(subscription, peer, row, place, 0, place.floor)
        if current is not None:
            later = subscription.later.setdefault(key, {})
            if len(later) >= LATER_MAX and row.incarnation not in later:
                self._context.counts[Drop.NO_ROOM] += 1
                return True
            later[row.incarnation] = row
            if current.fin is None:
                self.endings.ask(current)
            self.endings.check(current)
            return row.before <= current.incarnation or row.before in later
        if row.before > subscription.passed(key):
            return False
        self._enter_row(subscription, peer, row)
        return True

    def _learn(self, peer: Peer, inbound: InboundFeed, row: Row) -> None:
        inbound.known = max(inbound.known, row.end)
        self.following.confirm(inbound)
        if row.ending and inbound.fin is None:
            self.endings.end_past(peer, inbound, row.first_available, row.end, exact=row.ending == 1)

    def _enter_row(self, subscription: Subscription, peer: Peer, row: Row) -> None:
        """Begin with this feed, at the place that we know in it or else where its publisher says."""
        key = peer.name, row.topic
        place = subscription.unfinished(key)
        if place is None or place.incarnation != row.incarnation:
            place = Place(row.incarnation, row.join)
        inbound = self._enter(subscription, peer, row, place, row.first_available, row.end)
        if row.ending:
            self.endings.end_past(peer, inbound, row.first_available, row.end, exact=row.ending == 1)
        elif row.incarnation < peer.incarnation:  # that life was over before we came to it: what is left of it?
            self.endings.ask(inbound)

    def _enter(
        self, subscription: Subscription, peer: Peer, row: Row, place: Place, first: int, end: int
    ) -> InboundFeed:
        """Follow a feed of this topic from a place on; what `row` says of its policy holds for all of them.

        Of this one its publisher has what lies from `first` to `end`.
        """
        inbound = InboundFeed(
            subscription=subscription.number,
            source=peer.name,
            topic=row.topic,
            incarnation=place.incarnation,
            join=place.floor,
            room=subscription.room,
            emit=self._context.emit,
            seeds=subscription.seeds,
            best_effort=subscription.delivery is Delivery.BEST_EFFORT or row.policy == Policy.LOSSY,
        )
        inbound.resume(place.settled)
        inbound.latest, inbound.durable = row.policy == Policy.LATEST, row.policy == Policy.DURABLE
        inbound.outlives = row.outlives
        if inbound.latest:
            inbound.name_losses(Drop.SUPERSEDED)
        if subscription.committed is not None:
            inbound.committed = place.floor
            subscription.committed.setdefault((peer.name, row.topic), place)  # it is owed all from where it began
        key = peer.name, row.topic
        subscription.feeds[key] = inbound
        subscription.between.discard(key)
        self._context.emit(BeginFeed(subscription.number, *key, place.incarnation, place.floor))
        inbound.learn(first, max(end, inbound.known))
        self.following.follow(inbound.feed, peer, inbound, inbound.known)
        return inbound

    def on_unknown(self, peer: Peer, number: int) -> None:
        """The publisher forgot us: say who we are and where we stand, with the next tick (P6)."""
        self._leaving.pop((peer.name, number), None)
        subscription = self.subscriptions.get(number)
        if subscription is not None:
            # From offset 0: what it opened since it forgot us is missed as much as the rest. Also if we ask already.
            retry, _ = subscription.asked.get(peer.name, (REGISTER.postponed(self._context.now), False))
            subscription.asked[peer.name] = retry, True
            self._context.wake_by(retry.due_ns)

    def on_heartbeat(self, peer: Peer, feeds: list[tuple[int, int]]) -> None:
        """Feeds that we have not acknowledged to their end; one that we do not know means that its naming was lost."""
        for feed, end in feeds:
            if not self.following.on_listed(feed, end):
                self._ask_again(peer, feed)

    def _ask_again(self, peer: Peer, feed: int) -> None:
        for subscription in self.subscriptions.values():
            known = feed in subscription.uncommitted or any(
                row.feed == feed for rows in subscription.later.values() for row in rows.values()
            )
            if peer.name not in subscription.asked and not known:
                subscription.asked[peer.name] = REGISTER._replace(due_ns=self._context.now), True
                self._context.wake_by(self._context.now)

    # Ends.

    def on_bye(self, peer: Peer, told: dict[int, tuple[int, bool]]) -> None:
        """A publisher closed after it drained. What it wrote down comes from its next life."""
        kept = {feed for feed, (_, is_kept) in told.items() if is_kept}
        for subscription in self.subscriptions.values():
            subscription.keep_rows(kept)
        self._lose(peer)
        self.endings.on_bye(peer, told)

    def on_death(self, peer: Peer) -> None:
        """A publisher is proven dead."""
        self._lose(peer)
        self.endings.on_death(peer)

    def _lose(self, peer: Peer) -> None:
        self._forget_leaving(peer)
        for subscription in list(self.subscriptions.values()):
            subscription.asked.pop(peer.name, None)
            for key in [key for key in subscription.between if key[0] == peer.name]:  # nothing of this life will follow
                subscription.between.discard(key)
                self._context.emit(EndFeed(subscription.number, *key))

    def _retire(self, subscription: Subscription, inbound: InboundFeed) -> None:
        subscription.end(inbound)
        self._drop_inbound(inbound, by_us=False)
        self._go_on(subscription, (inbound.source, inbound.topic), inbound)

    def _go_on(self, subscription: Subscription, key: Key, inbound: InboundFeed) -> None:
        """A feed is settled to its end: the next one begins, if there is one."""
        peer = self._members.by_name[inbound.source]
        if peer.is_gone and key in subscription.later:
            self._miss(subscription, key)
        row = subscription.next_row(key)
        if row is not None:
            self._enter_row(subscription, peer, row)
        elif inbound.durable and inbound.incarnation < peer.incarnation and not peer.is_gone:
            subscription.between.add(key)
        else:
            self._context.emit(EndFeed(inbound.subscription, *key))

    def _drop_inbound(self, inbound: InboundFeed, *, by_us: bool, rests: bool = False) -> None:
        self._books.close(inbound, by_us=by_us, rests=rests)
        self.endings.forget(inbound)
        self._past.update(inbound.counts)
        self.following.unfollow(inbound)

    def on_payload(self, feed: int, offset: int, payload: Buffer | None, reason: str) -> None:
        """An addressed value is here, or will not come."""
        self._look_at(self.following.on_payload(feed, offset, payload, reason))

    def on_read(self, event: SlotRead) -> None:
        """A slot in the arena of its publisher was looked at."""
        self._look_at(self.following.on_read(event))

    def on_available(
        self, peer: Peer, feed: int, token: int, first: int, end: int, lost: list[tuple[int, int]]
    ) -> None:
        """The publisher says what it still has."""
        self._look_at(self.following.on_available(peer, feed, token, first, end, lost))

    def _look_at(self, followed: FollowedFeed | None) -> None:
        for inbound in list(followed.inbounds) if followed else ():
            self.endings.check(inbound)

    # Time.

    def tick(self) -> None:
        """Repeat what was not answered."""
        now = self._context.now
        for subscription in self.subscriptions.values():
            self._ask_to_confirm(subscription)
        for (name, number), (retry, rests) in list(self._leaving.items()):
            if now >= retry.due_ns:
                self._leave(self._members.by_name[name], number, rests=rests, retry=retry)
        self.endings.tick()
        self.following.tick()

    def _ask_to_confirm(self, subscription: Subscription) -> None:
        for name, (retry, from_start) in list(subscription.asked.items()):
            peer = self._members.by_name[name]
            if self._context.now >= retry.due_ns and not peer.is_gone:
                self._register(subscription, peer, from_start=from_start, retry=retry)

    def next_deadline_ns(self) -> int | None:
        """When something has to be repeated or acknowledged."""
        asked = [retry for subscription in self.subscriptions.values() for retry, _ in subscription.asked.values()]
        dues = [retry.due_ns for retry in (*asked, *(retry for retry, _ in self._leaving.values()))]
        dues += self.endings.dues_ns()
        due_ns = self.following.next_deadline_ns()
        return min(dues if due_ns is None else [*dues, due_ns], default=None)

    # Looking.

    def totals(self) -> Counter[str]:
        """What became of the records of all feeds, by reason."""
        total = Counter(self._past)
        for subscription in self.subscriptions.values():
            for inbound in subscription.feeds.values():
                total.update(inbound.counts)
        return total

    def inbounds(self) -> Iterator[InboundFeed]:
        """What our subscriptions follow now."""
        for subscription in self.subscriptions.values():
            yield from subscription.feeds.values()

    def check_invariants(self) -> None:
        """Assert what must hold for every inbound feed and its room (I7)."""
        for subscription in self.subscriptions.values():
            room = subscription.room
            assert room.hand >= 0 and room.hold >= 0
            for inbound in subscription.feeds.values():
                inbound.check_invariants()
