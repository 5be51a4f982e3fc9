"""The core: `FabricCore.handle(event, now_ns)` takes what happened and returns what to do. It is the only mutator.

It composes five parts, each with its own state: members (who is there), publishing and subscribing (the two sides of
feeds), fetching (addressed payloads), exchange (requests). Dispatch is by type for events and by kind for messages.
Any bytes from the world give commands or a counted drop, never an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from fabric.config import FabricConfig
from fabric.core import events, sharing
from fabric.core.books import Books, Reckoning
from fabric.core.disk import RestWanted
from fabric.core.events import Buffer, Card, DisconnectPeer, SendBulk
from fabric.core.exchange import Exchange
from fabric.core.fetching import Fetching
from fabric.core.members import Context, Members, Peer, card_fields, card_of
from fabric.core.publishing import Publishing
from fabric.core.spilling import Question
from fabric.core.subscribing import FEEDS_PER_SUBSCRIPTION_MAX, Subscribing
from fabric.core.wire import Control, Drop, Kind, checksum_of, decode_control, decode_data, encode_control, member_id
from fabric.errors import WireFormatError

__all__ = ["FabricCore"]

ENDS_PER_FRAME = 4000
"""Feeds in one BYE."""
CARDS_PER_FRAME = 200
"""Cards in one ROSTER, of 1 KiB each at most: a name, a host and three addresses."""
FETCH_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of a payload that one FETCH is answered with; the rest is asked for again."""


class FabricCore:
    """The protocol of one member, without IO."""

    def __init__(self, card: Card, config: FabricConfig) -> None:
        self.context = Context(card, config)
        self.members = Members(self.context)
        self.fetching = Fetching(self.context)
        self.publishing = Publishing(self.context, self.members)
        self.books = Books(self.context, self.members, self.publishing)
        self.subscribing = Subscribing(self.context, self.members, self.fetching, self.books)
        self.following = self.subscribing.following
        self.exchange = Exchange(self.context, self.members, self.fetching)
        self.members.in_use = self.subscribing.knows
        self._farewells: dict[str, dict[int, tuple[int, bool]]] = {}
        """Ends of feeds from peers whose goodbye is not complete."""
        self._handlers = self._by_event()
        self._messages = self._by_kind()
        self._unbound: dict[Kind, Callable[[Control], None]] = {
            Kind.HELLO: self._on_hello,
            Kind.FENCED: self.members.on_fenced,
            Kind.ROSTER_ASK: self._on_roster_ask,
            Kind.ROSTER: self._on_roster,
        }

    def _by_event(self) -> dict[type, Callable[[Any], None]]:
        return {
            events.BurstClosed: self.publishing.close_burst,
            events.DataReceived: self._on_data,
            events.ControlReceived: self._on_control,
            events.BulkReceived: self._on_bulk,
            events.MessagesSettled: self.subscribing.settle,
            events.TimePassed: self._on_time,
            events.FeedOpened: self.publishing.open_feed,
            events.RoomNeeded: self._on_room_needed,
            events.SubscriptionOpened: self.subscribing.open,
            events.SubscriptionClosed: self.subscribing.close,
            events.CursorCommitted: self.subscribing.commit,
            events.RequestIssued: self.exchange.issue,
            events.RequestAbandoned: lambda event: self.exchange.abandon(event.request),
            events.ReplyIssued: self.exchange.reply,
            events.PayloadChecked: self._on_payload_checked,
            events.PayloadStarved: lambda event: self.fetching.starve((event.space, event.number)),
            events.PeerAnnounced: self._on_peer_announced,
            events.PeerDied: self._on_peer_died,
            events.RosterAsked: self._on_roster_asked,
            events.IntakeStopped: self._on_intake_stopped,
            events.StateRecovered: self.publishing.recover,
            events.WriteFinished: self.publishing.on_written,
            events.WriteFailed: self.publishing.on_refused,
            RestWanted: lambda event: self.publishing.keep_rest(),
            events.BooksWanted: lambda event: self.books.ask(),
            events.RecordsLoaded: self._on_records_loaded,
            events.RecordsExpired: self._on_records_expired,
            sharing.ArenaReached: self.following.holding.on_reached,
            sharing.SlotRead: self.subscribing.on_read,
            sharing.SlotsReleased: self.following.holding.on_released,
            sharing.SlotsForgotten: self.publishing.leases.on_forgotten,
            sharing.ReaderGone: self._on_reader_gone,
            sharing.SlotsWanted: lambda event: self.publishing.retention.evict(event.size),
        }

    def _by_kind(self) -> dict[Kind, Callable[[Peer, Sequence[Any]], None]]:
        return {
            Kind.REGISTER: self.publishing.register,
            Kind.REGISTERED: lambda peer, f: self.subscribing.on_registered(peer, *f),
            Kind.UNREGISTER: lambda peer, f: self.publishing.on_unregister(peer, *f),
            Kind.ACKNOWLEDGE: lambda peer, f: self.publishing.on_acknowledge(peer, *f),
            Kind.PULL: lambda peer, f: self.publishing.answering.on_pull(peer, *f),
            Kind.JOIN: lambda peer, f: self.publishing.on_join(*f),
            Kind.HEARTBEAT: self._on_heartbeat,
            Kind.UNKNOWN: lambda peer, f: self.subscribing.on_unknown(peer, *f),
            Kind.STATUS: lambda peer, f: self.publishing.on_status(peer, *f),
            Kind.FIN: self._on_fin,
            Kind.BYE: self._on_bye,
            Kind.BOOKS: lambda peer, f: self.books.on_books(peer, *f),
            Kind.BOOKED: lambda peer, f: self.books.on_booked(peer, *f),
            Kind.REQUEST: self.exchange.on_request,
            Kind.ACCEPTED: lambda peer, f: self.exchange.on_accepted(*f),
            Kind.REPLY: lambda peer, f: self.exchange.on_reply(peer, *f),
            Kind.FETCH: self._on_fetch,
            Kind.HOLDS: lambda peer, f: self.publishing.leases.on_holds(peer, *f),
            Kind.LEASED: lambda peer, f: self.following.holding.on_leased(*f),
            Kind.RECALL: lambda peer, f: self.following.holding.on_recall(peer.name, *f),
        }

    def handle(self, event: object, now_ns: int) -> list[Any]:
        """Take one event at a monotonic time in nanoseconds; returns the commands to execute, in order."""
        context = self.context
        context.now = max(context.now, now_ns)
        self._handlers[type(event)](event)
        if self.following.joining:
            self.following.send_joins()
        if not context.commands:
            return []
        commands = context.commands.copy()
        context.commands.clear()  # the same list for ever: inbound feeds hold on to its append
        return commands

    def next_deadline_ns(self) -> int:
        """When `TimePassed` is due at the latest."""
        return self.context.due_ns

    def _earliest(self) -> int:
        dues = [
            self.members.next_deadline_ns(),
            self.publishing.next_deadline_ns(),
            self.publishing.spilling.next_deadline_ns(),
            self.publishing.leases.next_deadline_ns(),
            self.subscribing.next_deadline_ns(),
            self.fetching.next_deadline_ns(),
            self.exchange.next_deadline_ns(),
            self.books.next_deadline_ns(),
        ]
        return min(due for due in dues if due is not None)

    def _count(self, what: str) -> None:
        self.context.counts[what] += 1

    def _on_time(self, event: events.TimePassed) -> None:
        for peer in self.members.tick():
            self._hello(peer)
        self.publishing.tick()
        self.publishing.spilling.tick(self._ask_again)
        self.publishing.leases.tick()
        self.subscribing.tick()
        self.fetching.tick()
        self.exchange.tick()
        self.books.tick()
        self.context.due_ns = self._earliest()

    # Frames.

    def _on_data(self, event: events.DataReceived) -> None:
        try:
            burst, nonces = decode_data(event.frame)
            if nonces is None:
                self.following.on_burst(burst)
            else:
                self.following.on_marker(burst.feed, burst.incarnation, burst.first, nonces)
        except WireFormatError as error:
            self._count(error.fields["reason"])

    def _on_control(self, event: events.ControlReceived) -> None:
        try:
            message = decode_control(event.frame)
        except WireFormatError as error:
            self._count(error.fields["reason"])
            return
        if event.peer is not None and message.source != member_id(event.peer):
            self._count(Drop.IMPOSTOR)
            return
        unbound = self._unbound.get(message.kind)
        if unbound is not None:
            unbound(message)
            return
        handler = self._messages.get(message.kind)
        if handler is None:
            self._count(Drop.KIND)
            return
        peer = self.members.sender_of(message, event.peer)  # which counts whom it refuses
        if peer is None:
            return
        if peer.is_gone:  # overtaken by its goodbye: what is over must not begin again
            self._count(Drop.STALE)
            return
        handler(peer, message.fields)

    def _on_bulk(self, event: events.BulkReceived) -> None:
        try:
            message = decode_control(event.header)
            peer = self.members.sender_of(message, event.peer)
            if peer is not None:
                self._take_bulk(peer, message, event.chunk)
        except WireFormatError as error:
            self._count(error.fields["reason"])

    def _take_bulk(self, peer: Peer, message: Control, chunk: Buffer | None) -> None:
        fields = message.fields
        if message.kind is Kind.CHUNK and chunk is not None:
            space, number, position, _, checksum = fields
            self.fetching.on_chunk(peer.name, (space, number), position, chunk, checksum)
        elif message.kind is Kind.REPAIR and chunk is not None:
            burst, nonces = decode_data(bytes(chunk))
            if nonces is None:
                self.following.on_repair(peer, fields[0], fields[1], burst)
        elif message.kind is Kind.AVAILABLE:
            self.subscribing.on_available(peer, *fields)
        elif message.kind is Kind.MISSING:
            space, number, _ = fields
            if (space, number) in self.fetching:
                self.fetching.end((space, number))
                self._give_payload(space, number, None, Drop.GAP)
        else:
            self._count(Drop.KIND)

    # Members.

    def _on_peer_announced(self, event: events.PeerAnnounced) -> None:
        self._meet(event.card)

    def _meet(self, card: Card) -> Peer | None:
        before = self.members.by_name.get(card.name)
        peer = self.members.meet(card)
        if peer is not None:
            if before is not None:
                self.publishing.forget(peer.name)
                self.publishing.leases.replace(before, peer)
                self.exchange.forget(peer.name)
                self._lose_fetches(peer.name)
            self.publishing.forget_before(peer)
            self.subscribing.welcome(peer)
        return peer

    def _hello(self, peer: Peer) -> None:
        context = self.context
        context.send(peer.name, Kind.HELLO, *card_fields(context.card), peer.seen, self.subscribing.registrations(peer))

    def _on_hello(self, message: Control) -> None:
        card = card_of(message.fields, message.incarnation)
        new = self._meet(card)
        peer = self.members.by_name.get(card.name)
        if (
            peer is None
            or peer.incarnation != card.incarnation
            or peer.id != message.source
            or card.name == self.context.name
        ):
            return
        if peer.is_gone:  # overtaken by its goodbye: it does not come back in this life
            self._count(Drop.STALE)
            return
        self.members.sender_of(message, None)
        self.members.on_greeted(peer)
        if new is not None:
            peer.hello = peer.hello.postponed(self.context.now)
        for registration in message.fields[11]:
            self.publishing.register(peer, registration)
        if new is not None or message.fields[10] != self.context.incarnation:
            self._hello(peer)
        else:  # it has heard ours, and a heartbeat that says that of its own is not answered
            self.context.send(peer.name, Kind.HEARTBEAT, [], peer.seen)
        self.members.on_seen(peer, message.fields[10])

    def _on_heartbeat(self, peer: Peer, fields: Sequence[Any]) -> None:
        feeds, seen = fields
        self.members.on_seen(peer, seen)
        if seen != self.context.incarnation:
            self._hello(peer)
        self.subscribing.on_heartbeat(peer, feeds)

    def _on_fin(self, peer: Peer, fields: Sequence[Any]) -> None:
        topic, incarnation, _, _, first, end, exact = fields
        self.subscribing.endings.on_fin(peer, topic, incarnation, first, end, exact)

    def _on_bye(self, peer: Peer, fields: Sequence[Any]) -> None:
        """The last of them ends it: many feeds take several frames."""
        ends, is_last = fields
        told = self._farewells.setdefault(peer.name, {})
        if len(told) < FEEDS_PER_SUBSCRIPTION_MAX:
            told.update({feed: (end, kept) for feed, end, kept in ends})
        if is_last:
            self.members.leave(peer, "left")
            self.subscribing.on_bye(peer, self._farewells.pop(peer.name))
            self._part_from(peer)

    def _say_bye(self, peer: Peer, ends: list[tuple[int, int, bool]]) -> None:
        for begin in range(0, len(ends) or 1, ENDS_PER_FRAME):
            is_last = begin + ENDS_PER_FRAME >= len(ends)
            self.context.send(peer.name, Kind.BYE, ends[begin : begin + ENDS_PER_FRAME], is_last)

    def _on_peer_died(self, event: events.PeerDied) -> None:
        peer = self.members.by_name.get(event.name)
        if peer is not None and peer.incarnation == event.incarnation and not peer.is_gone:
            self.members.leave(peer, "dead")
            self.publishing.leases.on_gone(sharing.ReaderGone(peer.name, peer.incarnation))
            self.subscribing.on_death(peer)
            self._part_from(peer)

    def _on_reader_gone(self, event: sharing.ReaderGone) -> None:
        """Its slots are free. It need not be suspected first, but its goodbye may still be on its way."""
        self.publishing.leases.on_gone(event)
        self.members.on_ended(event.name, event.incarnation)

    def _part_from(self, peer: Peer) -> None:
        self.publishing.forget(peer.name)
        self.publishing.leases.leave(peer)
        self.exchange.forget(peer.name)
        self._lose_fetches(peer.name)
        self.context.emit(DisconnectPeer(peer.name))

    def _lose_fetches(self, name: str) -> None:
        for space, number in self.fetching.forget(name):
            if not self.following.keeps(space):
                self._give_payload(space, number, None, Drop.GAP)

    def _on_roster_asked(self, event: events.RosterAsked) -> None:
        self.context.send(event.peer, Kind.ROSTER_ASK, *card_fields(self.context.card), self.context.incarnation)

    def _on_roster_ask(self, message: Control) -> None:
        card = card_of(message.fields, message.incarnation)
        if card.job != self.context.card.job:
            self._count(Drop.STRANGER)
            return
        if self._meet(card) is None and card.name not in self.members.by_name:
            return
        cards = [
            (*card_fields(peer.card), peer.incarnation) for peer in self.members.by_name.values() if not peer.is_gone
        ]
        for begin in range(0, len(cards), CARDS_PER_FRAME):
            self.context.send(card.name, Kind.ROSTER, cards[begin : begin + CARDS_PER_FRAME])

    def _on_roster(self, message: Control) -> None:
        for fields in message.fields[0]:
            self._meet(card_of(fields, fields[10]))
        self._count("rosters_heard")

    def _on_intake_stopped(self, event: events.IntakeStopped) -> None:
        ends = self.publishing.stop()
        self.following.acknowledge()
        self.books.tell_all()
        if event.say_bye:
            self.following.holding.end_all()
            for peer in self.members.others():
                if not peer.is_gone and peer.state != "known":
                    self._say_bye(peer, ends)

    # Payloads.

    def _on_fetch(self, peer: Peer, fields: Sequence[Any]) -> None:
        space, number, position, length, token, summed = fields
        if self.publishing.answering.waits_for_disk(space, number, (peer, Kind.FETCH, fields)):
            return
        payload = self.publishing.answering.payload_of(space, number)
        payload = payload if payload is not None else self.exchange.payload_of(peer, space, number)
        context = self.context
        if payload is None:
            header = encode_control(Kind.MISSING, context.id, context.incarnation, space, number, token)
            context.emit(SendBulk(peer.name, header, None, (Kind.MISSING, space, number)))
            return
        view = memoryview(payload)
        size, step = view.nbytes, context.config.repair.chunk_bytes
        end = min(position + length, position + FETCH_BYTES_MAX, size)
        for begin in range(position, end, step):
            chunk = view[begin : min(begin + step, end)]
            place = space, number, begin, token, checksum_of(chunk) if summed else 0
            header = encode_control(Kind.CHUNK, context.id, context.incarnation, *place)
            context.emit(SendBulk(peer.name, header, chunk, (Kind.CHUNK, space, number, begin, len(chunk), summed)))

    def _on_records_loaded(self, event: events.RecordsLoaded) -> None:
        spilling = self.publishing.spilling
        spilling.on_loaded(self.publishing.by_id[event.feed], event.bursts)
        spilling.ask_again(self._ask_again)

    def _on_records_expired(self, event: events.RecordsExpired) -> None:
        self.publishing.spilling.on_expired(self.publishing.by_id[event.feed], event.first, event.end)

    def _ask_again(self, question: Question) -> None:
        """On behalf of who still waits for the answer."""
        peer, kind, fields = question
        if self.members.by_name.get(peer.name) is peer and not peer.is_gone:
            self._messages[kind](peer, fields)

    def _on_payload_checked(self, event: events.PayloadChecked) -> None:
        outcome = self.fetching.on_checked((event.space, event.number), event.payload is not None)
        if outcome is not None:
            self._give_payload(event.space, event.number, event.payload, Drop.CORRUPT_AT_SOURCE)

    def _give_payload(self, space: int, number: int, payload: Buffer | None, reason: str) -> None:
        if not self.exchange.on_payload((space, number), payload):
            self.subscribing.on_payload(space, number, payload, reason)

    def _on_room_needed(self, event: events.RoomNeeded) -> None:
        out = self.publishing.feeds[event.topic]
        if out.spills:
            self.publishing.spilling.make_room(event.size)
            return
        self.context.counts["dropped_oldest"] += self.publishing.retention.drop_oldest(out, event.size)

    # Looking.

    def reckon(self) -> list[Reckoning]:
        """The books of all feeds: of those that we read, and of our readers as far as they have told."""
        return self.books.reckon(self.subscribing.inbounds())

    def statistics(self) -> Counter[str]:
        """All counters, and the sums over the feeds that are followed now."""
        return self.context.counts + self.subscribing.totals()

    def check_invariants(self) -> None:
        """Assert what must hold between events; the simulation calls it after each."""
        self.publishing.check_invariants()
        self.subscribing.check_invariants()
        self.fetching.check_invariants()
        self.exchange.check_invariants()
        self.books.check_invariants()

    def __repr__(self) -> str:
        context = self.context
        feeds, follows = len(self.publishing.feeds), len(self.following.feeds)
        return f"FabricCore({context.name}@{context.incarnation}, feeds={feeds}, follows={follows})"
