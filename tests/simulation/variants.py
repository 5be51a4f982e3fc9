"""The core, deliberately broken: what happens without each rule. Every variant has to be caught by some seed.

A variant is a set of patches on the real classes. Those of the rules that need a disk are not here: see
`spill_variants.py`, `restart_variants.py` and `letter_variants.py`; those of the books are in `book_variants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fabric.core import subscriptions
from fabric.core.events import Deliver, ReportGap
from fabric.core.feeds import OutFeed, Retention
from fabric.core.following import Following
from fabric.core.guards import Retry
from fabric.core.lanes import InboundFeed
from fabric.core.machine import FabricCore
from fabric.core.members import Members
from fabric.core.publishing import Publishing
from fabric.core.subscribing import Subscribing
from fabric.core.wire import Drop, Kind
from fabric.engine.inbox import Hand
from fabric.subscription import Subscription

Patch = tuple[type, str, Any]
Variant = Callable[[], list[Patch]]


def wrapped(owner: type, name: str, wrapper: Callable[..., Any]) -> Patch:
    """`wrapper(original, self, *arguments)` instead of a method."""
    original = getattr(owner, name)
    return owner, name, lambda self, *args, **kwargs: wrapper(original, self, *args, **kwargs)


# The publisher.


def no_markers() -> list[Patch]:
    def mark(original: Any, self: Any, out: Any, nonces: list[int]) -> None:
        out.marked_ns = self._context.now
        if nonces:
            original(self, out, nonces)

    def send(original: Any, self: Any, peer: str, kind: Kind, *fields: Any) -> None:
        original(self, peer, kind, *(([], fields[1]) if kind is Kind.HEARTBEAT else fields))

    return [wrapped(Publishing, "_mark", mark), wrapped(type_of_context(), "send", send)]


def heartbeat_on_change() -> list[Patch]:
    told: dict[tuple[int, object], int] = {}

    def mark(original: Any, self: Any, out: Any, nonces: list[int]) -> None:
        out.marked_ns = self._context.now
        if nonces or told.get((id(out), "mark")) != out.end:
            told[id(out), "mark"] = out.end
            original(self, out, nonces)

    def send(original: Any, self: Any, peer: str, kind: Kind, *fields: Any) -> None:
        if kind is Kind.HEARTBEAT:
            listed = [(feed, end) for feed, end in fields[0] if told.get((feed, (id(self), peer))) != end]
            told.update({(feed, (id(self), peer)): end for feed, end in listed})
            fields = (listed, fields[1])
        original(self, peer, kind, *fields)

    return [wrapped(Publishing, "_mark", mark), wrapped(type_of_context(), "send", send)]


def type_of_context() -> type:
    from fabric.core.members import Context

    return Context


def registered_once() -> list[Patch]:
    def enrol(original: Any, self: Any, registration: Any, out: Any, join: int) -> None:
        original(self, registration, out, join)
        registration.unproven.clear()

    return [wrapped(Publishing, "_enrol", enrol), (Subscribing, "_ask_again", lambda self, peer, feed: None)]


def unregistered_once() -> list[Patch]:
    def leave(original: Any, self: Any, peer: Any, number: int, *, rests: bool, retry: Any = None) -> None:
        if (peer.name, number) not in self._leaving:
            original(self, peer, number, rests=rests, retry=Retry(10**15, 10**15))

    return [wrapped(Subscribing, "_leave", leave)]


def expired_in_silence() -> list[Patch]:
    def expire(original: Any, self: Any, peer: Any) -> None:
        original(self, peer)
        self._expired.clear()

    return [wrapped(Publishing, "_expire", expire)]


def registrations_forgotten() -> list[Patch]:
    def tick(original: Any, self: Any) -> None:
        original(self)
        self.ticks = getattr(self, "ticks", 0) + 1
        if self.ticks % 40 == 0:
            for name in {one.reader[0] for one in self.registrations}:
                self.forget(name)

    return [wrapped(Publishing, "tick", tick)]


def released_by_fastest() -> list[Patch]:
    def acknowledge(original: Any, self: Any, out: Any) -> None:
        slowest, out.readers = out.readers, dict.fromkeys(out.readers, max(out.readers.values(), default=out.end))
        original(self, out)
        out.readers = slowest

    return [wrapped(Retention, "acknowledge", acknowledge)]


def credit_ignored() -> list[Patch]:
    return [wrapped(OutFeed, "select", lambda original, self, ranges, credit: original(self, ranges, 1 << 40))]


def answer_may_be_empty() -> list[Patch]:
    def select(original: Any, self: Any, ranges: Any, credit: int) -> Any:
        chosen, lost = original(self, ranges, credit)
        return ([] if len(chosen) == 1 and len(chosen[0].frame) > credit else chosen), lost

    return [wrapped(OutFeed, "select", select)]


def join_point_moves() -> list[Patch]:
    def register(original: Any, self: Any, peer: Any, fields: Any) -> None:
        original(self, peer, fields)
        registration = self.registrations.of(peer.name).get(fields[0])
        for feed in registration.joins if registration is not None else ():
            out = self.by_id[feed]
            if out.readers.get(registration.reader) == registration.joins[feed]:
                out.readers[registration.reader] = registration.joins[feed] = out.end
                self._settle(out)

    return [wrapped(Publishing, "register", register)]


def acknowledge_any_session() -> list[Patch]:
    def sender_of(original: Any, self: Any, message: Any, authenticated: str | None) -> Any:
        peer = self.by_id.get(message.source)
        if message.kind is Kind.ACKNOWLEDGE and peer is not None and message.incarnation < peer.incarnation:
            return peer
        return original(self, message, authenticated)

    return [wrapped(Members, "sender_of", sender_of)]


def not_fenced() -> list[Patch]:
    return [
        (Members, "on_fenced", lambda self, message: None),
        (Members, "_meet_ourselves", lambda self, card: None),
        (FabricCore, "_on_fenced", lambda self, message: None),
    ]


def history_not_owed() -> list[Patch]:
    return [(Retention, "owe_again", lambda self, out, offset: None)]


def first_available_stays() -> list[Patch]:
    return [(OutFeed, "first_available", property(lambda self: 0))]


def dropped_is_acknowledged() -> list[Patch]:
    is_acknowledged = property(lambda self: not self.readers or self.acknowledged >= self.end)
    return [(OutFeed, "is_acknowledged", is_acknowledged)]


def no_heartbeat_to_ourselves() -> list[Patch]:
    def heartbeat(original: Any, self: Any, peer: Any) -> None:
        if peer.name != self._context.name:
            original(self, peer)

    return [wrapped(Publishing, "_heartbeat", heartbeat)]


# The subscriber: order, gaps, incarnations.


def offset_order() -> list[Patch]:
    return [(InboundFeed, "_is_taken", lambda self, offset: offset + 1 <= self.next and not self.have)]


def order_ignored() -> list[Patch]:
    return [(InboundFeed, "_is_taken", lambda self, offset: True)]


def lane_begins_anywhere() -> list[Patch]:
    lanes: dict[object, set[int]] = {}

    def expect(original: Any, self: Any, offset: int, previous: int) -> None:
        seen = lanes.setdefault(self, set())
        burst = self.held[offset]
        seed = burst.columns[0][offset - burst.first]
        original(self, offset, previous if seed in seen else -1)
        seen.add(seed)

    return [wrapped(InboundFeed, "_expect", expect)]


def gap_before_floor() -> list[Patch]:
    def is_taken(original: Any, self: Any, offset: int) -> bool:
        return bool(original(self, offset) or offset in self.lost or offset < self.first_available)

    def learn(original: Any, self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        for offset in sorted(self.held):
            burst = self.held.get(offset)
            if burst is not None:
                self._expect(offset, burst.previous[offset - burst.first])
        self._hand_over()

    return [wrapped(InboundFeed, "_is_taken", is_taken), wrapped(InboundFeed, "learn", learn)]


def gap_silent() -> list[Patch]:
    def pass_gap(original: Any, self: Any) -> Any:
        emit = self._emit
        self._emit = lambda command: None if type(command) is ReportGap else emit(command)
        try:
            return original(self)
        finally:
            self._emit = emit

    return [wrapped(InboundFeed, "_pass_gap", pass_gap)]


def gap_by_timeout() -> list[Patch]:
    def pull(original: Any, self: Any, followed: Any) -> None:
        original(self, followed)
        if followed.token % 3 == 2:
            for inbound in followed.inbounds:
                for first, end in list(inbound.missing(followed.pushed, most=1)):
                    inbound.lost.add(first, end)

    return [wrapped(Following, "_pull", pull)]


def first_ignored() -> list[Patch]:
    return [wrapped(InboundFeed, "learn", lambda original, self, first, end, lost=(): original(self, 0, end, lost))]


def lost_ignored() -> list[Patch]:
    return [wrapped(InboundFeed, "learn", lambda original, self, first, end, lost=(): original(self, first, end))]


def jumps_to_newest() -> list[Patch]:
    def add_feed(original: Any, self: Any, subscription: Any, peer: Any, feed: Any) -> None:
        current = subscription.feeds.get((peer.name, feed[1]))
        if current is not None and current.incarnation < peer.incarnation:
            del subscription.feeds[peer.name, feed[1]]
            self._drop_inbound(current)
        original(self, subscription, peer, feed)

    return [wrapped(Subscribing, "_add_feed", add_feed)]


def enters_before_settled() -> list[Patch]:
    return [(InboundFeed, "is_finished", property(lambda self: self.fin is not None))]


def no_duplicate_check() -> list[Patch]:
    def receive(original: Any, self: Any, burst: Any) -> Any:
        if burst.end <= self.next and self._has_hand() and not burst.has_addressed:
            self._emit(Deliver(self.subscription, self, burst, None, 0))
        return original(self, burst)

    return [wrapped(InboundFeed, "receive", receive)]


def rejoin_skips() -> list[Patch]:
    def on_marker(original: Any, self: Any, feed: int, incarnation: int, end: int, nonces: Any) -> None:
        original(self, feed, incarnation, end, nonces)
        followed = self.feeds.get(feed)
        if followed is not None and followed.nonce in nonces:
            for inbound in followed.inbounds:
                if not inbound.held and inbound.next == inbound.floor < end and not inbound.have:
                    inbound.floor = inbound.next = end

    return [wrapped(Following, "on_marker", on_marker)]


def joins_at_first_seen() -> list[Patch]:
    def enter(original: Any, self: Any, subscription: Any, peer: Any, feed: Any) -> None:
        identity, topic, policy, _, end, first_available = feed
        original(self, subscription, peer, [identity, topic, policy, end, end, first_available])

    return [wrapped(Subscribing, "_enter", enter)]


def gone_begins_again() -> list[Patch]:
    from fabric.core.members import Peer

    def on_control(original: Any, self: Any, event: Any) -> None:
        with mock.patch.object(Peer, "is_gone", False):
            original(self, event)

    def passed(original: Any, self: Any, key: Any) -> int:
        return 0  # it would be recognised by this, too

    return [wrapped(FabricCore, "_on_control", on_control), wrapped(subscriptions.Subscription, "passed", passed)]


# The subscriber: bounds.


def hold_unbounded() -> list[Patch]:
    return [(InboundFeed, "_make_room", lambda self, offset, burst, size: True)]


def newcomer_gives_way() -> list[Patch]:
    return [(InboundFeed, "_make_room", lambda self, offset, burst, size: False)]


def ranges_full_at_floor() -> list[Patch]:
    return [(InboundFeed, "_fits", lambda self, offset: len(self.taken) < self.room.ranges_max)]


def ranges_unbounded() -> list[Patch]:
    return [(InboundFeed, "_fits", lambda self, offset: True)]


def room_is_not_shared() -> list[Patch]:
    def settle(original: Any, self: Any, first: int, end: int, size: int) -> None:
        self.room.queue.clear()
        original(self, first, end, size)

    return [wrapped(InboundFeed, "settle", settle)]


def starved_for_ever() -> list[Patch]:
    def settled(original: Any, self: Any, inbound: Any, size: int) -> None:
        self._starved.clear()
        original(self, inbound, size)

    return [wrapped(Following, "settled", settled), *no_heartbeat_to_ourselves()]


def holes_out_of_order() -> list[Patch]:
    return [(InboundFeed, "_held_before", lambda self, offset: -1)]


# The subscriber: acknowledgements.


def acknowledges_highest() -> list[Patch]:
    def acknowledge(original: Any, self: Any) -> None:
        floors = [(inbound, inbound.floor) for _, inbound in self._dirty.values()]
        for inbound, _ in floors:
            inbound.floor = max(inbound.taken.end, inbound.next)
        original(self)
        for inbound, floor in floors:
            inbound.floor = floor

    return [wrapped(Following, "acknowledge", acknowledge)]


def acknowledges_once() -> list[Patch]:
    told: dict[object, int] = {}

    def tell_floor(original: Any, self: Any, followed: Any, inbound: Any) -> None:
        if told.get(inbound) != inbound.floor:
            told[inbound] = inbound.floor
            original(self, followed, inbound)

    return [wrapped(Following, "_tell_floor", tell_floor)]


def known_forgotten() -> list[Patch]:
    return [(Following, "_learn_end", lambda self, followed, end: None)]


def acknowledges_out_of_lane_order() -> list[Patch]:
    def settle_message(self: Any, message: Any, reason: str | None) -> None:
        lane = self._unsettled.get((message._feed, message.seed), ())
        for entry in [entry for entry in lane if entry[0] == message.offset]:
            lane.remove(entry)
            entry[1].settle_one(entry[2], Drop.REJECTED if reason is not None else None)
        if reason is not None:
            self._engine.bury(message, Drop.REJECTED, reason)
        self._engine.push()

    return [(Subscription, "_settle_message", settle_message)]


def settles_twice() -> list[Patch]:
    def settle_until(original: Any, self: Any, position: int) -> None:
        original(self, position)
        if position >= len(self.rows):
            self._left = 1

    return [wrapped(Hand, "settle_until", settle_until)]


def heartbeat_without_grace() -> list[Patch]:
    return [(Following, "_target", lambda self, followed: followed.known)]


VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        no_markers,
        heartbeat_on_change,
        registered_once,
        unregistered_once,
        expired_in_silence,
        registrations_forgotten,
        released_by_fastest,
        credit_ignored,
        answer_may_be_empty,
        join_point_moves,
        acknowledge_any_session,
        not_fenced,
        history_not_owed,
        first_available_stays,
        dropped_is_acknowledged,
        no_heartbeat_to_ourselves,
        offset_order,
        order_ignored,
        lane_begins_anywhere,
        gap_before_floor,
        gap_silent,
        gap_by_timeout,
        first_ignored,
        lost_ignored,
        jumps_to_newest,
        enters_before_settled,
        no_duplicate_check,
        rejoin_skips,
        joins_at_first_seen,
        gone_begins_again,
        hold_unbounded,
        newcomer_gives_way,
        ranges_full_at_floor,
        ranges_unbounded,
        room_is_not_shared,
        starved_for_ever,
        holes_out_of_order,
        acknowledges_highest,
        acknowledges_once,
        known_forgotten,
        acknowledges_out_of_lane_order,
        settles_twice,
    )
}
"""Those that random worlds catch. `heartbeat_without_grace` needs a world of its own: see test_repairs.py."""


@contextmanager
def broken(variant: Variant) -> Iterator[None]:
    """The core without one of its rules."""
    patches = [mock.patch.object(owner, name, method, create=True) for owner, name, method in variant()]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()
