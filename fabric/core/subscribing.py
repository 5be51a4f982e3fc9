"""The subscriber's part of the protocol: registering, following, pulling, acknowledging (RULES S1 to S8).

A *followed feed* is a feed of some member that one or more of our subscriptions want: its data comes once, each subscription has
an `InboundFeed` of its own, and what any of them misses is pulled once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from fabric.config import Delivery, Policy
from fabric.core.events import BeginFeed, Buffer, EndFeed, FollowFeed, MessagesSettled, ReportGap, SubscriptionOpened, UnfollowFeed
from fabric.core.fetching import Fetching
from fabric.core.lanes import InboundFeed, Room
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.ranges import RangeSet
from fabric.core.wire import Burst, Drop, Kind, decode_descriptor, feed_id
from fabric.errors import TopicError, WireFormatError
from fabric.topics import check_topic

__all__ = ["FollowedFeed", "Subscribing"]

PULL_RANGES_MAX = 64
"""Ranges in one pull (reliability notes, section 4.7)."""
ACKNOWLEDGEMENTS_PER_FRAME = 4000
JOIN_FIRST_NS, JOIN_MAX_NS = 20 * MS, 1000 * MS
REGISTER_FIRST_NS, REGISTER_MAX_NS = 50 * MS, 1000 * MS


class _Subscription:
    """One subscription of ours. `confirmed`: the peers whose registration is complete, in their current life."""

    __slots__ = ("asked", "confirmed", "delivery", "feeds", "later", "number", "pattern", "room", "seeds", "start")

    def __init__(self, event: SubscriptionOpened, room: Room) -> None:
        self.number, self.pattern, self.seeds, self.room = event.subscription, event.pattern, event.seeds, room
        self.start, self.delivery = event.start, event.delivery
        self.feeds: dict[tuple[str, str], InboundFeed] = {}
        """By source and topic: the incarnation that is being settled."""
        self.later: dict[tuple[str, str], list[Any]] = {}
        """Feeds of newer incarnations, until the current one is settled (S7)."""
        self.confirmed: dict[str, int] = {}
        self.asked: dict[str, tuple[int, int, bool]] = {}
        """Peers that have not confirmed: when to ask again, the wait after that, whether to begin at offset 0."""


class FollowedFeed:
    """A feed of some member as it reaches us."""

    __slots__ = (
        "asked_end",
        "far",
        "feed",
        "inbounds",
        "incarnation",
        "join_due_ns",
        "join_wait_ns",
        "known",
        "live",
        "nonce",
        "peer",
        "pull_due_ns",
        "pull_wait_ns",
        "pushed",
        "token",
        "topic",
    )

    def __init__(self, feed: int, peer: Peer, topic: str, known: int, first_wait_ns: int) -> None:
        self.feed, self.peer, self.topic, self.incarnation, self.known = feed, peer, topic, peer.incarnation, known
        self.inbounds: list[InboundFeed] = []
        self.pushed = 0
        """What came over the push link, or was marked there, ends here: what is absent below it is lost."""
        self.live = self.far = False
        self.nonce = self.token = self.join_due_ns = self.pull_due_ns = self.asked_end = 0
        self.join_wait_ns, self.pull_wait_ns = JOIN_FIRST_NS, first_wait_ns


class Subscribing:
    """All subscriptions of this member."""

    def __init__(self, context: Context, members: Members, fetching: Fetching) -> None:
        self._context, self._members, self._fetching = context, members, fetching
        self.subscriptions: dict[int, _Subscription] = {}
        self.followed: dict[int, FollowedFeed] = {}
        self._dirty: dict[tuple[int, int], tuple[Peer, InboundFeed]] = {}
        self._dirty_bytes = self._acknowledge_due_ns = self._nonce = 0
        self._ended: list[InboundFeed] = []
        self._restless: dict[int, FollowedFeed] = {}
        """Followed feeds that wait for a marker or for the answer to a pull; only these need the clock."""

    # The application.

    def open(self, event: SubscriptionOpened) -> None:
        """Register with every member that is there."""
        inboxes = self._context.config.inboxes
        room = Room(hand_max=inboxes.hand_bytes_max, hold_max=inboxes.hold_bytes_max, ranges_max=inboxes.ranges_max)
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
            self._drop_inbound(inbound)
        for peer in self._members.by_name.values():
            if not peer.is_gone:
                self._context.send(peer.name, Kind.UNREGISTER, number)

    def settle(self, event: MessagesSettled) -> None:
        """Messages were handled, or dropped by the application."""
        inbound = event.feed
        if inbound.subscription not in self.subscriptions:
            return
        inbound.counts["handled"] += event.handled
        if event.dropped:
            inbound.counts.update(event.dropped)
        inbound.counts[Drop.NOT_ASKED] += event.end - event.first - event.handled - sum((event.dropped or {}).values())
        inbound.settle(event.first, event.end, event.size)
        self._dirty_bytes += event.size
        self._acknowledge_soon(inbound)
        self._check_finished(inbound)
        if self._dirty_bytes >= self._context.config.liveness.acknowledge_bytes:
            self.acknowledge()
        followed = self._followed_of(inbound)
        if followed is not None and (followed.far or not followed.live):
            self._pull(followed)

    def unconfirmed(self, number: int) -> list[str]:
        """The members that are there and have not confirmed a subscription."""
        subscription = self.subscriptions.get(number)
        if subscription is None:
            return []
        return [name for name in list(subscription.asked) if self._members.by_name[name].is_there]

    # Registering.

    def registrations(self) -> list[tuple[Any, ...]]:
        """All subscriptions, as HELLO carries them to a member that is new to us: it owes everything from its offset 0."""
        return [self._fields(subscription, True, ()) for subscription in self.subscriptions.values()]

    def welcome(self, peer: Peer) -> None:
        """A member, or a new life of one, is known: its HELLO carries our subscriptions, and it has to confirm them."""
        for subscription in self.subscriptions.values():
            subscription.confirmed.pop(peer.name, None)
            subscription.asked[peer.name] = (self._context.now + REGISTER_FIRST_NS, REGISTER_FIRST_NS, True)
            for (source, topic), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.incarnation < peer.incarnation and inbound.fin is None:
                    self._context.send(peer.name, Kind.STATUS, topic, inbound.incarnation)

    @staticmethod
    def _fields(subscription: _Subscription, from_start: bool, positions: Any) -> tuple[Any, ...]:
        return subscription.number, subscription.pattern, subscription.start.value, subscription.delivery.value, from_start, positions

    def _register(self, subscription: _Subscription, peer: Peer, *, from_start: bool, wait_ns: int = REGISTER_FIRST_NS) -> None:
        positions = [
            (feed_id(peer.name, peer.incarnation, topic), inbound.floor)
            for (source, topic), inbound in subscription.feeds.items()
            if source == peer.name and inbound.incarnation == peer.incarnation
        ]
        subscription.asked[peer.name] = (self._context.now + wait_ns, min(2 * wait_ns, REGISTER_MAX_NS), from_start)
        self._context.send(peer.name, Kind.REGISTER, *self._fields(subscription, from_start, positions[:1000]))

    def on_registered(self, peer: Peer, number: int, total: int, feeds: list[list[Any]]) -> None:
        """A publisher names feeds that match, with their join offsets."""
        subscription = self.subscriptions.get(number)
        if subscription is None:
            self._context.send(peer.name, Kind.UNREGISTER, number)
            return
        for feed in feeds:
            if self._is_sound(peer, feed):
                self._add_feed(subscription, peer, feed)
            else:
                self._context.counts[Drop.SHAPE] += 1
        told = sum(1 for (source, _), inbound in subscription.feeds.items() if source == peer.name and inbound.incarnation == peer.incarnation)
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
        return bool(identity == feed_id(peer.name, peer.incarnation, topic) and max(join, first_available) <= end < 2**63)

    def _add_feed(self, subscription: _Subscription, peer: Peer, feed: list[Any]) -> None:
        key = peer.name, feed[1]
        current = subscription.feeds.get(key)
        if current is None:
            self._enter(subscription, peer, feed)
        elif current.incarnation < peer.incarnation:
            subscription.later[key] = feed
            if current.fin is None:
                self._context.send(peer.name, Kind.STATUS, feed[1], current.incarnation)
            self._check_finished(current)
        else:
            current.known = max(current.known, feed[4])

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
        followed = self.followed.get(identity)
        if followed is None:
            first_wait_ns = self._context.config.repair.retry_ms_first * MS
            followed = self.followed[identity] = FollowedFeed(identity, peer, topic, end, first_wait_ns)
            self._context.emit(FollowFeed(identity))
            self._join(followed)
        followed.inbounds.append(inbound)
        followed.known = max(followed.known, end)
        inbound.learn(first_available, end)
        self._acknowledge_soon(inbound)

    def on_unknown(self, peer: Peer, number: int) -> None:
        """The publisher forgot us: say who we are and where we stand, with the next tick (P6)."""
        subscription = self.subscriptions.get(number)
        if subscription is not None and peer.name not in subscription.asked:
            subscription.asked[peer.name] = (self._context.now + REGISTER_FIRST_NS, REGISTER_FIRST_NS, False)

    # Receiving.

    def on_burst(self, burst: Burst) -> None:
        """A burst over the push link."""
        followed = self.followed.get(burst.feed)
        if followed is None or burst.incarnation != followed.incarnation:
            self._context.counts[Drop.STRANGER] += 1
            return
        followed.peer.data_heard_ns = followed.peer.heard_ns = self._context.now
        followed.pushed = max(followed.pushed, burst.end)
        followed.known = max(followed.known, burst.end)
        self._receive(followed, burst)
        if followed.inbounds and any(inbound.have for inbound in followed.inbounds):
            self._pull(followed)

    def _receive(self, followed: FollowedFeed, burst: Burst) -> None:
        burst.check()
        for inbound in followed.inbounds:
            for offset in inbound.receive(burst):
                self._fetch(followed, inbound, burst, offset)
            if inbound.turned_away:
                inbound.turned_away = False
                self._leave_push(followed)

    def _fetch(self, followed: FollowedFeed, inbound: InboundFeed, burst: Burst, offset: int) -> None:
        try:
            size, checksum = decode_descriptor(burst.body(offset - burst.first))
        except WireFormatError:
            inbound.payload_lost(offset, Drop.UNDECODABLE)
            return
        if size > self._context.config.inboxes.payload_bytes_max:
            inbound.payload_lost(offset, Drop.TOO_LARGE)
            return
        self._fetching.begin((followed.feed, offset), followed.peer.name, size, checksum)

    def on_payload(self, feed: int, offset: int, payload: Buffer | None, reason: str = Drop.CORRUPT_AT_SOURCE) -> None:
        """An addressed value is here, or will not come."""
        followed = self.followed.get(feed)
        for inbound in followed.inbounds if followed else ():
            if payload is not None:
                inbound.payload_arrived(offset, payload)
            else:
                inbound.payload_lost(offset, reason)
            self._check_finished(inbound)

    def on_marker(self, feed: int, incarnation: int, end: int, nonces: tuple[int, ...]) -> None:
        """What is below a marker and absent is lost: repair at once."""
        followed = self.followed.get(feed)
        if followed is None or incarnation != followed.incarnation:
            return
        followed.peer.data_heard_ns = followed.peer.heard_ns = self._context.now
        followed.pushed = max(followed.pushed, end)
        self._learn_end(followed, end)
        if followed.nonce in nonces and not followed.far:
            followed.live = True
        self._pull(followed)
        self._note(followed)

    def on_heartbeat(self, peer: Peer, feeds: list[tuple[int, int]]) -> None:
        """Feeds that we have not acknowledged to their end; one that we do not know means that its naming was lost."""
        for feed, end in feeds:
            followed = self.followed.get(feed)
            if followed is not None:
                self._learn_end(followed, end)
                self._pull(followed)
            else:
                self._ask_again(peer, feed)

    def _ask_again(self, peer: Peer, feed: int) -> None:
        for subscription in self.subscriptions.values():
            waiting = any(later[0] == feed for later in subscription.later.values())
            if peer.name not in subscription.asked and not waiting:
                subscription.asked[peer.name] = (self._context.now, REGISTER_FIRST_NS, False)

    def _learn_end(self, followed: FollowedFeed, end: int) -> None:
        """We are listed, so our position was not heard: it is told again."""
        followed.known = max(followed.known, end)
        for inbound in followed.inbounds:
            inbound.learn(inbound.first_available, followed.known)
            self._acknowledge_soon(inbound)

    # Pulling.

    def on_repair(self, peer: Peer, feed: int, token: int, burst: Burst) -> None:
        """A burst that we asked for."""
        followed = self.followed.get(feed)
        if followed is None or burst.feed != feed or followed.peer is not peer or burst.incarnation != followed.incarnation:
            self._context.counts[Drop.STRANGER] += 1
            return
        self._context.counts["bytes_repaired"] += burst.size
        followed.known = max(followed.known, burst.end)
        if token == followed.token:
            followed.pull_due_ns = self._context.now + followed.pull_wait_ns
        self._receive(followed, burst)

    def on_available(self, peer: Peer, feed: int, token: int, first: int, end: int, lost: list[tuple[int, int]]) -> None:
        """The pull is answered: this is what can be had, and what is lost in between."""
        followed = self.followed.get(feed)
        if followed is None or followed.peer is not peer or first > end or end >= 2**63:
            return
        followed.known = max(followed.known, end)
        for inbound in followed.inbounds:
            inbound.learn(first, end, lost)
            self._check_finished(inbound)
        if token == followed.token:
            followed.pull_due_ns = 0
            followed.pull_wait_ns = self._context.config.repair.retry_ms_first * MS
            if not any(inbound.missing(followed.asked_end, most=1) for inbound in followed.inbounds):
                self._come_back(followed)
            self._pull(followed)
            self._note(followed)

    def _target(self, followed: FollowedFeed) -> int:
        """Below this offset, what is absent is lost. On a live link only the link itself tells, or its silence."""
        silent_ns = self._context.now - followed.peer.data_heard_ns
        if followed.live and silent_ns < 2 * self._context.config.liveness.marker_ms * MS:
            return followed.pushed
        return followed.known

    def _pull(self, followed: FollowedFeed) -> None:
        now = self._context.now
        if now < followed.pull_due_ns or followed.peer.is_gone:
            return
        target, wanted = self._target(followed), RangeSet()
        for inbound in followed.inbounds:
            for first, end in inbound.missing(target, most=PULL_RANGES_MAX):
                wanted.add(first, end)
        if not wanted:
            followed.pull_due_ns = 0
            self._come_back(followed)
            self._note(followed)
            return
        left = max(inbound.room.left for inbound in followed.inbounds)
        if left <= 0 and not any(inbound.held for inbound in followed.inbounds):
            return
        followed.token += 1
        followed.asked_end = wanted.end
        followed.pull_due_ns = now + followed.pull_wait_ns
        followed.pull_wait_ns = min(2 * followed.pull_wait_ns, self._context.config.repair.retry_ms_max * MS)
        credit = max(1, min(left, self._context.config.repair.window_bytes))
        self._context.counts["pulls"] += 1
        self._context.send(followed.peer.name, Kind.PULL, followed.feed, followed.token, credit, list(wanted)[:PULL_RANGES_MAX])
        self._note(followed)

    def _note(self, followed: FollowedFeed) -> None:
        if followed.pull_due_ns or not (followed.live or followed.far):
            self._restless[followed.feed] = followed
        else:
            self._restless.pop(followed.feed, None)

    # The push link.

    def _join(self, followed: FollowedFeed) -> None:
        self._nonce += 1
        followed.nonce = (self._context.id + self._nonce) % 2**64
        followed.join_due_ns = self._context.now + followed.join_wait_ns
        followed.join_wait_ns = min(2 * followed.join_wait_ns, JOIN_MAX_NS)
        self._context.send(followed.peer.name, Kind.JOIN, [(followed.feed, followed.nonce)])
        self._note(followed)

    def _leave_push(self, followed: FollowedFeed) -> None:
        """Far behind: leave the live feed and only pull (S8)."""
        if followed.far or any(inbound.best_effort for inbound in followed.inbounds):
            return
        followed.far, followed.live = True, False
        self._context.counts["demoted"] += 1
        self._context.emit(UnfollowFeed(followed.feed))
        self._note(followed)

    def _come_back(self, followed: FollowedFeed) -> None:
        """Near again: listen, and be live once a marker came back over the push link."""
        if followed.far and all(inbound.room.hand * 2 <= inbound.room.hand_max for inbound in followed.inbounds):
            followed.far = False
            followed.join_wait_ns = JOIN_FIRST_NS
            self._context.counts["rejoined"] += 1
            self._context.emit(FollowFeed(followed.feed))
            self._join(followed)

    # Ends.

    def on_fin(self, peer: Peer, topic: str, incarnation: int, end: int, exact: bool) -> None:
        """Where an older feed ended (S7). What its publisher cannot name any more is an open gap."""
        for subscription in list(self.subscriptions.values()):
            inbound = subscription.feeds.get((peer.name, topic))
            if inbound is not None and inbound.incarnation == incarnation < peer.incarnation and inbound.fin is None:
                self._finish(inbound, end if exact else 0, exact=exact)

    def on_bye(self, peer: Peer, ends: list[tuple[int, int]]) -> None:
        """A publisher closed after it drained. Its ends are exact; what did not come by now will not come."""
        told = dict(ends)
        for subscription in list(self.subscriptions.values()):
            subscription.asked.pop(peer.name, None)
            for (source, topic), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.fin is None:
                    end = told.get(feed_id(source, inbound.incarnation, topic))
                    inbound.known = max(inbound.known, end or 0)
                    self._finish(inbound, end or 0, exact=end is not None)

    def on_death(self, peer: Peer) -> None:
        """A publisher is proven dead: its memory is gone, and where it ended is not known."""
        for subscription in list(self.subscriptions.values()):
            subscription.asked.pop(peer.name, None)
            for (source, _), inbound in list(subscription.feeds.items()):
                if source == peer.name and inbound.fin is None:
                    self._finish(inbound, 0, exact=False)

    def _finish(self, inbound: InboundFeed, end: int, *, exact: bool) -> None:
        for offset in list(inbound.awaiting):
            key = (feed_id(inbound.source, inbound.incarnation, inbound.topic), offset)
            self._fetching.end(key)
            inbound.payload_lost(offset, Drop.GAP)
        if not exact and not inbound.best_effort:
            inbound.counts["open_gaps"] += 1
            self._ended.append(inbound)
        inbound.finish(end)
        self._check_finished(inbound)

    def _check_finished(self, inbound: InboundFeed) -> None:
        subscription = self.subscriptions.get(inbound.subscription)
        if not inbound.is_finished or subscription is None or subscription.feeds.get((inbound.source, inbound.topic)) is not inbound:
            return
        key = inbound.source, inbound.topic
        if inbound in self._ended:
            self._ended.remove(inbound)
            self._context.emit(ReportGap(inbound.subscription, *key, inbound.incarnation, inbound.floor, None, Drop.GAP))
        del subscription.feeds[key]
        self._drop_inbound(inbound)
        later = subscription.later.pop(key, None)
        peer = self._members.by_name[inbound.source]
        if later is not None and not peer.is_gone:
            self._enter(subscription, peer, later)
        else:
            self._context.emit(EndFeed(inbound.subscription, *key))

    def _drop_inbound(self, inbound: InboundFeed) -> None:
        followed = self._followed_of(inbound)
        if followed is None:
            return
        followed.inbounds.remove(inbound)
        if not followed.inbounds:
            del self.followed[followed.feed]
            self._restless.pop(followed.feed, None)
            for offset in inbound.awaiting:
                self._fetching.end((followed.feed, offset))
            self._context.emit(UnfollowFeed(followed.feed))

    def _followed_of(self, inbound: InboundFeed) -> FollowedFeed | None:
        followed = self.followed.get(feed_id(inbound.source, inbound.incarnation, inbound.topic))
        return followed if followed is not None and inbound in followed.inbounds else None

    # Acknowledging and time.

    def _acknowledge_soon(self, inbound: InboundFeed) -> None:
        peer = self._members.by_name[inbound.source]
        if inbound.best_effort or peer.incarnation != inbound.incarnation or peer.is_gone:
            return
        if not self._dirty:
            self._acknowledge_due_ns = self._context.now + self._context.config.liveness.acknowledge_ms * MS
        feed = feed_id(inbound.source, inbound.incarnation, inbound.topic)
        self._dirty[inbound.subscription, feed] = (peer, inbound)

    def acknowledge(self) -> None:
        """Tell each publisher how far we are."""
        by_peer: dict[str, list[tuple[int, int, int]]] = {}
        for (number, feed), (peer, inbound) in self._dirty.items():
            by_peer.setdefault(peer.name, []).append((number, feed, inbound.floor))
        self._dirty.clear()
        self._dirty_bytes = 0
        for name, entries in by_peer.items():
            for begin in range(0, len(entries), ACKNOWLEDGEMENTS_PER_FRAME):
                self._context.send(name, Kind.ACKNOWLEDGE, entries[begin : begin + ACKNOWLEDGEMENTS_PER_FRAME])

    def tick(self) -> None:
        """Repeat what was not answered."""
        now = self._context.now
        for subscription in self.subscriptions.values():
            for name, (due_ns, wait_ns, from_start) in list(subscription.asked.items()):
                peer = self._members.by_name[name]
                if now >= due_ns and not peer.is_gone:
                    self._register(subscription, peer, from_start=from_start, wait_ns=wait_ns)
            self._ask_about_ends(subscription)
        for followed in list(self._restless.values()):
            if followed.peer.is_gone:
                del self._restless[followed.feed]
                continue
            if not followed.live and not followed.far and now >= followed.join_due_ns:
                self._join(followed)
            self._pull(followed)
        if self._dirty and now >= self._acknowledge_due_ns:
            self.acknowledge()

    def _ask_about_ends(self, subscription: _Subscription) -> None:
        for (name, topic), inbound in subscription.feeds.items():
            peer = self._members.by_name[name]
            if inbound.incarnation < peer.incarnation and inbound.fin is None and not peer.is_gone:
                self._context.send(name, Kind.STATUS, topic, inbound.incarnation)

    def next_deadline_ns(self) -> int | None:
        """When something has to be repeated or acknowledged."""
        dues = [due for subscription in self.subscriptions.values() for due, _, _ in subscription.asked.values()]
        if self._dirty:
            dues.append(self._acknowledge_due_ns)
        dues += [followed.join_due_ns for followed in self._restless.values() if not followed.live and not followed.far]
        dues += [followed.pull_due_ns for followed in self._restless.values() if followed.pull_due_ns]
        return min(dues, default=None)

    # Looking.

    def totals(self) -> Counter[str]:
        """What became of the records of all feeds that are followed now."""
        total: Counter[str] = Counter()
        for subscription in self.subscriptions.values():
            for inbound in subscription.feeds.values():
                total.update(inbound.counts)
        return total

    def check_invariants(self) -> None:
        """Assert what must hold for every inbound feed and its room (I7)."""
        for subscription in self.subscriptions.values():
            room = subscription.room
            assert room.hand >= 0 and room.hold >= 0
            for inbound in subscription.feeds.values():
                inbound.check_invariants()


