"""Our subscriptions: registering them with publishers, entering feeds, and their ends (RULES S1, S7)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fabric.config import Delivery, Policy
from fabric.core.books import Books
from fabric.core.events import BeginFeed, Buffer, EndFeed, MessagesSettled, ReportGap, SubscriptionOpened
from fabric.core.fetching import Fetching
from fabric.core.following import FollowedFeed, Following
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.rooms import Room
from fabric.core.wire import Drop, Kind, feed_id
from fabric.errors import TopicError
from fabric.topics import check_topic, compile_pattern

__all__ = ["Subscribing"]

HELLO_REGISTRATIONS_MAX = 400
"""Subscriptions in one HELLO: with the longest patterns it stays below CONTROL_BYTES_MAX. The rest registers alone."""
FEEDS_PER_SUBSCRIPTION_MAX = 100_000
"""A member that names feeds without end is not followed beyond this: 64 members with 1,500 topics each."""
REGISTER_FIRST_NS, REGISTER_MAX_NS = 50 * MS, 1000 * MS


class _Subscription:
    """One subscription of ours. `confirmed`: the peers whose registration is complete, in their current life."""

    __slots__ = ("asked", "confirmed", "delivery", "feeds", "later", "number", "pattern", "room", "seeds", "start")

    def __init__(self, event: SubscriptionOpened, room: Room) -> None:
        self.number, self.pattern, self.seeds, self.room = event.subscription, event.pattern, event.seeds, room
        self.start, self.delivery = event.start, event.delivery
        self.feeds: dict[tuple[str, str], InboundFeed] = {}
        """By source and topic: the incarnation that is being settled."""
        self.later: dict[tuple[str, str], tuple[list[Any], int]] = {}
        """Feeds of newer incarnations, with those, until the current one is settled (S7)."""
        self.confirmed: dict[str, int] = {}
        self.asked: dict[str, tuple[int, int, bool]] = {}
        """Peers that have not confirmed: when to ask again, the wait after that, whether to begin at offset 0."""


class Subscribing:
    """All subscriptions of this member."""

    def __init__(self, context: Context, members: Members, fetching: Fetching, books: Books) -> None:
        self._context, self._members, self._fetching, self._books = context, members, fetching, books
        self.following = Following(context, fetching, books.touched)
        self.subscriptions: dict[int, _Subscription] = {}
        self._leaving: dict[tuple[str, int], tuple[int, int]] = {}
        """Closed subscriptions of which a peer has to hear: when to tell it again, and the wait after that."""
        self._ended: list[InboundFeed] = []
        """Feeds whose end is not known: what follows their last record is an open gap."""
        self._ending: dict[InboundFeed, int] = {}
        """Feeds of lives that are over, and when to ask again where they ended."""
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
        subscription = self.subscriptions[event.subscription] = _Subscription(event, room)
        for peer in self._members.by_name.values():
            if not peer.is_gone:
                self._register(subscription, peer, from_start=False)

    def close(self, number: int) -> None:
        """The application is done: nothing more is asked for, and publishers owe nothing more."""
        subscription = self.subscriptions.pop(number, None)
        if subscription is None:
            return
        for inbound in subscription.feeds.values():
            self._drop_inbound(inbound, by_us=True)
        for peer in self._members.by_name.values():
            if not peer.is_gone:
                self._leave(peer, number)

    def _leave(self, peer: Peer, number: int, wait_ns: int = REGISTER_FIRST_NS) -> None:
        """Repeated until the publisher says that it does not know this subscription: it would owe it for ever."""
        self._leaving[peer.name, number] = (self._context.now + wait_ns, min(2 * wait_ns, REGISTER_MAX_NS))
        self._context.wake_by(self._context.now + wait_ns)
        self._context.send(peer.name, Kind.UNREGISTER, number)

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
            self._check_finished(inbound)

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

    def registrations(self) -> list[tuple[Any, ...]]:
        """All subscriptions, as HELLO carries them to a member that is new to us.

        It owes everything from its offset 0.
        """
        some = list(self.subscriptions.values())[:HELLO_REGISTRATIONS_MAX]
        return [self._fields(subscription, True, ()) for subscription in some]

    def welcome(self, peer: Peer) -> None:
        """A member, or a new life of one, is known: its HELLO carries our subscriptions, and it has to confirm them."""
        for subscription in self.subscriptions.values():
            subscription.confirmed.pop(peer.name, None)
            subscription.asked[peer.name] = (self._context.now + REGISTER_FIRST_NS, REGISTER_FIRST_NS, True)
            self._context.wake_by(self._context.now + REGISTER_FIRST_NS)
            for key in [key for key in subscription.later if key[0] == peer.name]:
                self._miss(subscription, key)
            for (source, _), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.incarnation < peer.incarnation and inbound.fin is None:
                    self._ask_about_end(inbound)
        self._forget_leaving(peer)

    def _miss(self, subscription: _Subscription, key: tuple[str, str]) -> None:
        """A life of a publisher is over before we came to it: what it published is an open gap."""
        feed, incarnation = subscription.later.pop(key)
        if subscription.delivery is Delivery.RELIABLE and feed[2] != Policy.LOSSY:
            self._past["open_gaps"] += 1
            self._books.miss(subscription.number, key[0], incarnation, feed)
            gap = ReportGap(subscription.number, *key, incarnation, feed[3], None, Drop.GAP)
            self._context.emit(gap)

    def _forget_leaving(self, peer: Peer) -> None:
        """That life of it is over, and what it knew of us."""
        for key in [key for key in self._leaving if key[0] == peer.name]:
            del self._leaving[key]

    @staticmethod
    def _fields(subscription: _Subscription, from_start: bool, positions: object) -> tuple[Any, ...]:
        return (
            subscription.number,
            subscription.pattern,
            subscription.start.value,
            subscription.delivery.value,
            from_start,
            positions,
        )

    def _register(
        self, subscription: _Subscription, peer: Peer, *, from_start: bool, wait_ns: int = REGISTER_FIRST_NS
    ) -> None:
        positions = [
            (feed_id(peer.name, peer.incarnation, topic), inbound.floor)
            for (source, topic), inbound in subscription.feeds.items()
            if source == peer.name and inbound.incarnation == peer.incarnation
        ]
        self._context.wake_by(self._context.now + wait_ns)
        subscription.asked[peer.name] = (self._context.now + wait_ns, min(2 * wait_ns, REGISTER_MAX_NS), from_start)
        self._context.send(peer.name, Kind.REGISTER, *self._fields(subscription, from_start, positions[:1000]))

    def on_registered(self, peer: Peer, number: int, total: int, feeds: list[list[Any]]) -> None:
        """A publisher names feeds that match, with their join offsets."""
        subscription = self.subscriptions.get(number)
        if subscription is None:
            self._context.send(peer.name, Kind.UNREGISTER, number)
            return
        for feed in feeds:
            if self._is_sound(peer, feed) and compile_pattern(subscription.pattern).matches(feed[1]):
                self._add_feed(subscription, peer, feed)
            else:
                self._context.counts[Drop.SHAPE] += 1
        if peer.name not in subscription.asked:
            return  # news of a feed that was opened since
        told = sum(
            1
            for (source, _), inbound in subscription.feeds.items()
            if source == peer.name and inbound.incarnation == peer.incarnation
        )
        told += sum(1 for source, _ in subscription.later if source == peer.name)
        if told >= total:
            subscription.asked.pop(peer.name, None)
            subscription.confirmed[peer.name] = peer.incarnation

    def _is_sound(self, peer: Peer, feed: list[Any]) -> bool:
        identity, topic, policy, join, end, first_available = feed
        try:
            check_topic(topic)
            Policy(policy)
        except (TopicError, ValueError):
            return False
        return bool(
            identity == feed_id(peer.name, peer.incarnation, topic) and max(join, first_available) <= end < 2**63
        )

    def _add_feed(self, subscription: _Subscription, peer: Peer, feed: list[Any]) -> None:
        key = peer.name, feed[1]
        current = subscription.feeds.get(key)
        if current is None and len(subscription.feeds) >= FEEDS_PER_SUBSCRIPTION_MAX:
            self._context.counts[Drop.NO_ROOM] += 1
        elif current is None:
            self._enter(subscription, peer, feed)
        elif current.incarnation < peer.incarnation:
            subscription.later[key] = feed, peer.incarnation
            if current.fin is None:
                self._ask_about_end(current)
            self._check_finished(current)
        else:
            current.known = max(current.known, feed[4])
            self.following.confirm(current)

    def _enter(self, subscription: _Subscription, peer: Peer, feed: list[Any]) -> None:
        identity, topic, policy, join, end, first_available = feed
        inbound = InboundFeed(
            subscription=subscription.number,
            source=peer.name,
            topic=topic,
            incarnation=peer.incarnation,
            join=join,
            room=subscription.room,
            emit=self._context.emit,
            seeds=subscription.seeds,
            best_effort=subscription.delivery is Delivery.BEST_EFFORT or policy == Policy.LOSSY,
        )
        inbound.latest = policy == Policy.LATEST
        if inbound.latest:
            inbound.name_losses(Drop.SUPERSEDED)
        subscription.feeds[peer.name, topic] = inbound
        self._context.emit(BeginFeed(subscription.number, peer.name, topic, peer.incarnation, join))
        inbound.learn(first_available, end)
        self.following.follow(identity, peer, inbound, end)

    def on_unknown(self, peer: Peer, number: int) -> None:
        """The publisher forgot us: say who we are and where we stand, with the next tick (P6)."""
        self._leaving.pop((peer.name, number), None)
        subscription = self.subscriptions.get(number)
        if subscription is not None:
            # From offset 0: what it opened since it forgot us is missed as much as the rest. Also if we ask already.
            soon = self._context.now + REGISTER_FIRST_NS, REGISTER_FIRST_NS, False
            due_ns, wait_ns, _ = subscription.asked.get(peer.name, soon)
            subscription.asked[peer.name] = due_ns, wait_ns, True
            self._context.wake_by(due_ns)

    def on_heartbeat(self, peer: Peer, feeds: list[tuple[int, int]]) -> None:
        """Feeds that we have not acknowledged to their end; one that we do not know means that its naming was lost."""
        for feed, end in feeds:
            if not self.following.on_listed(feed, end):
                self._ask_again(peer, feed)

    def _ask_again(self, peer: Peer, feed: int) -> None:
        for subscription in self.subscriptions.values():
            waiting = any(later[0][0] == feed for later in subscription.later.values())
            if peer.name not in subscription.asked and not waiting:
                subscription.asked[peer.name] = (self._context.now, REGISTER_FIRST_NS, True)
                self._context.wake_by(self._context.now)

    # Ends.

    def on_fin(self, peer: Peer, topic: str, incarnation: int, end: int, exact: bool) -> None:
        """Where an older feed ended (S7). What its publisher cannot name any more is an open gap."""
        for subscription in list(self.subscriptions.values()):
            inbound = subscription.feeds.get((peer.name, topic))
            if inbound is not None and inbound.incarnation == incarnation < peer.incarnation and inbound.fin is None:
                self._finish(inbound, end if exact else 0, exact=exact)

    def on_bye(self, peer: Peer, told: dict[int, int]) -> None:
        """A publisher closed after it drained. Its ends are exact; what did not come by now will not come."""
        self._forget_leaving(peer)
        for subscription in list(self.subscriptions.values()):
            subscription.asked.pop(peer.name, None)
            for (source, topic), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.fin is None:
                    end = told.get(feed_id(source, inbound.incarnation, topic))
                    inbound.known = max(inbound.known, end or 0)
                    self._finish(inbound, 0, exact=end is not None)  # 0: nobody is left to ask for what is missing

    def on_death(self, peer: Peer) -> None:
        """A publisher is proven dead: its memory is gone, and where it ended is not known."""
        self._forget_leaving(peer)
        for subscription in list(self.subscriptions.values()):
            subscription.asked.pop(peer.name, None)
            for (source, _), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.fin is None:
                    self._finish(inbound, 0, exact=False)

    def _finish(self, inbound: InboundFeed, end: int, *, exact: bool) -> None:
        for offset in list(inbound.awaiting):
            key = (inbound.feed, offset)
            self._fetching.end(key)
            inbound.payload_lost(offset, Drop.GAP)
        if not exact and not inbound.best_effort:
            inbound.counts["open_gaps"] += 1
            self._ended.append(inbound)
        inbound.finish(end)
        self._check_finished(inbound)

    def _check_finished(self, inbound: InboundFeed) -> None:
        subscription = self.subscriptions.get(inbound.subscription)
        if (
            not inbound.is_finished
            or subscription is None
            or subscription.feeds.get((inbound.source, inbound.topic)) is not inbound
        ):
            return
        key = inbound.source, inbound.topic
        if inbound in self._ended:
            self._ended.remove(inbound)
            self._context.emit(
                ReportGap(inbound.subscription, *key, inbound.incarnation, inbound.floor, None, Drop.GAP)
            )
        del subscription.feeds[key]
        self._drop_inbound(inbound, by_us=False)
        peer = self._members.by_name[inbound.source]
        if key in subscription.later and not peer.is_gone:
            self._enter(subscription, peer, subscription.later.pop(key)[0])
            return
        if key in subscription.later:
            self._miss(subscription, key)
        self._context.emit(EndFeed(inbound.subscription, *key))

    def _drop_inbound(self, inbound: InboundFeed, *, by_us: bool) -> None:
        self._books.close(inbound, by_us=by_us)
        self._past.update(inbound.counts)
        self.following.unfollow(inbound)

    def on_payload(self, feed: int, offset: int, payload: Buffer | None, reason: str) -> None:
        """An addressed value is here, or will not come."""
        self._look_at(self.following.on_payload(feed, offset, payload, reason))

    def on_available(
        self, peer: Peer, feed: int, token: int, first: int, end: int, lost: list[tuple[int, int]]
    ) -> None:
        """The publisher says what it still has."""
        self._look_at(self.following.on_available(peer, feed, token, first, end, lost))

    def _look_at(self, followed: FollowedFeed | None) -> None:
        for inbound in list(followed.inbounds) if followed else ():
            self._check_finished(inbound)

    # Time.

    def tick(self) -> None:
        """Repeat what was not answered."""
        now = self._context.now
        for subscription in self.subscriptions.values():
            for name, (due_ns, wait_ns, from_start) in list(subscription.asked.items()):
                peer = self._members.by_name[name]
                if now >= due_ns and not peer.is_gone:
                    self._register(subscription, peer, from_start=from_start, wait_ns=wait_ns)
        for (name, number), (due_ns, wait_ns) in list(self._leaving.items()):
            if now >= due_ns:
                self._leave(self._members.by_name[name], number, wait_ns)
        for inbound, due_ns in list(self._ending.items()):
            if now >= due_ns:
                self._ask_about_end(inbound)
        self.following.tick()

    def _ask_about_end(self, inbound: InboundFeed) -> None:
        """Its publisher lives a newer life; where did this one end? Asked until FIN, or another end, is told (S7)."""
        peer = self._members.by_name[inbound.source]
        followed = self.following.find(inbound)
        if inbound.fin is not None or peer.is_gone or followed is None:
            self._ending.pop(inbound, None)
            return
        self._ending[inbound] = self._context.now + REGISTER_FIRST_NS
        self._context.wake_by(self._ending[inbound])
        self._context.send(peer.name, Kind.STATUS, inbound.topic, inbound.incarnation)

    def next_deadline_ns(self) -> int | None:
        """When something has to be repeated or acknowledged."""
        dues = [due for subscription in self.subscriptions.values() for due, _, _ in subscription.asked.values()]
        dues += [due for due, _ in self._leaving.values()]
        dues += self._ending.values()
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
