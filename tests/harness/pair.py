"""Cores joined by a link that the test cranks by hand: the main instrument for the protocol.

Commands of one core become events of another, but only when the test says so: until then they lie in `wire`, a
plain list that a test may drop from, reorder or repeat. Nothing here has a clock or chance of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fabric.config import Delivery, FabricConfig, Policy, Start
from fabric.core import events
from fabric.core.events import Card
from fabric.core.lanes import InboundFeed
from fabric.core.machine import FabricCore
from fabric.core.wire import VERSION, Burst, Kind, checksum_of, decode_control, decode_data, feed_id
from tests.harness.bursts import Numbering

MS = 1_000_000
CRANKS_MAX = 20_000
"""A conversation that is longer than this is a loop."""


def card(name: str, incarnation: int = 1, **changed: Any) -> Card:
    """The card of a member; any field may be given."""
    fields: dict[str, Any] = {
        "name": name,
        "rank": None,
        "world_size": 2,
        "job": "training",
        "host": f"host-of-{name}",
        "pid": 1,
        "version": VERSION,
        "incarnation": incarnation,
        "endpoints": (f"{name}-data", f"{name}-control", f"{name}-bulk"),
    }
    return Card(**(fields | changed))


@dataclass(eq=False)
class Flight:
    """A frame on its way."""

    source: str
    to: Member
    event: Any

    @property
    def kind(self) -> Kind | None:
        """Its kind on CONTROL or BULK; None on DATA."""
        if isinstance(self.event, events.DataReceived):
            return None
        frame = self.event.frame if isinstance(self.event, events.ControlReceived) else self.event.header
        return decode_control(frame).kind

    @property
    def fields(self) -> Sequence[Any]:
        """The fields of its message."""
        frame = self.event.frame if isinstance(self.event, events.ControlReceived) else self.event.header
        return decode_control(frame).fields


@dataclass(eq=False)
class Member:
    """A core and what its engine would know."""

    core: FabricCore
    settles: bool = True
    """Whether the application settles what it is handed when the crank turns."""
    follows: set[int] = field(default_factory=set)
    routes: dict[str, tuple[str, int]] = field(default_factory=dict)
    delivered: list[tuple[int, str, str, int, int, int, int, bytes]] = field(default_factory=list)
    """(subscription, source, topic, incarnation, offset, seed, sequence, value)."""
    in_hand: list[events.Deliver] = field(default_factory=list)
    reported: list[Any] = field(default_factory=list)
    """All commands that concern the application or the rim."""
    payloads: dict[tuple[int, int], bytearray] = field(default_factory=dict)
    complete: dict[tuple[int, int], bytes] = field(default_factory=dict)
    numbering: dict[str, Numbering] = field(default_factory=dict)
    stopped: bool = False

    @property
    def name(self) -> str:
        return self.core.context.name

    @property
    def counts(self) -> dict[str, int]:
        return self.core.statistics()

    def values(self, topic: str, subscription: int = 1) -> list[bytes]:
        """What was delivered of a topic, in the order of delivery."""
        return [row[7] for row in self.delivered if row[0] == subscription and row[2] == topic]

    def offsets(self, topic: str, subscription: int = 1) -> list[int]:
        """The offsets that were delivered, in the order of delivery."""
        return [row[4] for row in self.delivered if row[0] == subscription and row[2] == topic]

    def of(self, kind: type[Any]) -> list[Any]:
        """The reported commands of one type."""
        return [command for command in self.reported if type(command) is kind]


class Link:
    """Several members and the frames between them."""

    def __init__(self, *names: str, config: FabricConfig | None = None, meet: bool = True) -> None:
        self.now = 1_000 * MS
        self.members: dict[str, Member] = {}
        self.zombies: list[Member] = []
        self.wire: list[Flight] = []
        self.unreachable: list[tuple[str, str]] = []
        for name in names:
            self.start(name, config=config)
        if meet:
            self.introduce()

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    # Members.

    def start(self, name: str, incarnation: int = 1, *, config: FabricConfig | None = None, **changed: Any) -> Member:
        """Begin a member, or a new life of one; the old one is still there, among `zombies`."""
        if name in self.members:
            self.zombies.append(self.members[name])
        member = Member(FabricCore(card(name, incarnation, **changed), config or FabricConfig()))
        self.members[name] = member
        return member

    def introduce(self) -> None:
        """Everybody hears of everybody, and all of them greet."""
        for member in list(self.members.values()):
            for other in self.members.values():
                if other is not member:
                    self.do(member, events.PeerAnnounced(other.core.context.card))
        self.pass_time(25)
        self.crank()

    # Driving.

    def do(self, who: str | Member, event: object) -> list[Any]:
        """One event for one core; its commands are executed."""
        member = self.members[who] if isinstance(who, str) else who
        commands = member.core.handle(event, self.now)
        member.core.check_invariants()
        for command in commands:
            self._execute(member, command)
        return commands

    def crank(self, *, until: Callable[[], bool] | None = None) -> int:
        """Deliver all frames in order, and what they lead to; returns how many. What is handed over is settled."""
        turns = 0
        while self.wire and not (until and until()):
            turns += 1
            assert turns < CRANKS_MAX, f"the members talk without end: {[flight.kind for flight in self.wire[:5]]}"
            self.deliver(self.wire[0])
        return turns

    def deliver(self, flight: Flight) -> None:
        """Deliver one frame now."""
        self.wire.remove(flight)
        if not flight.to.stopped:
            self.do(flight.to, flight.event)
        for member in self.members.values():
            if member.settles:
                self.settle(member)

    def pass_time(self, ms: float, *, step_ms: float = 20) -> None:
        """Let time pass, tick by tick, without delivering anything."""
        end = self.now + int(ms * MS)
        while self.now < end:
            self.now = min(end, self.now + int(step_ms * MS))
            for member in self._alive():
                self.do(member, events.TimePassed())

    def run(self, ms: float = 3_000, *, step_ms: float = 20) -> None:
        """Time passes and everything arrives."""
        end = self.now + int(ms * MS)
        self.crank()
        while self.now < end:
            self.pass_time(step_ms, step_ms=step_ms)
            self.crank()

    def settle(self, who: str | Member, most: int | None = None) -> None:
        """The application is done with what is in its hand."""
        member = self.members[who] if isinstance(who, str) else who
        taken, member.in_hand = member.in_hand[:most], member.in_hand[len(member.in_hand[:most]) :]
        for deliver in taken:
            for event in settled(deliver):
                self.do(member, event)

    def _alive(self) -> list[Member]:
        return [member for member in [*self.members.values(), *self.zombies] if not member.stopped]

    # Faults.

    def drop(self, chosen: Callable[[Flight], bool] = lambda _: True) -> list[Flight]:
        """Lose frames; returns them."""
        lost = [flight for flight in self.wire if chosen(flight)]
        self.wire = [flight for flight in self.wire if flight not in lost]
        return lost

    def drop_kind(self, *kinds: Kind | None) -> list[Flight]:
        """Lose all frames of some kinds; None stands for DATA."""
        return self.drop(lambda flight: flight.kind in kinds)

    def repeat(self) -> None:
        """Everything on its way arrives twice."""
        self.wire = [
            flight for flight in self.wire for flight in (flight, Flight(flight.source, flight.to, flight.event))
        ]

    def waiting(self, *kinds: Kind | None) -> list[Flight]:
        """The frames of some kinds on their way."""
        return [flight for flight in self.wire if flight.kind in kinds]

    # The application.

    def publish(
        self,
        name: str,
        topic: str,
        seeds: Sequence[int] = (0,),
        *,
        policy: Policy = Policy.RELIABLE,
        bodies: Sequence[bytes] | None = None,
        payloads: dict[int, bytes] | None = None,
        spills: bool = False,
    ) -> None:
        """One burst; the feed is opened if it is new."""
        member = self.members[name]
        context = member.core.context
        if topic not in member.numbering:
            identity = feed_id(name, context.incarnation, topic)
            member.numbering[topic] = Numbering(identity, context.incarnation)
            self.do(member, events.FeedOpened(topic, policy, spills))
        numbering = member.numbering[topic]
        first = numbering.end
        frame = numbering.frame(seeds, bodies, payloads=payloads)
        values = {first + row: payload for row, payload in (payloads or {}).items()}
        self.do(member, events.BurstClosed(topic, first, len(seeds), frame, values or None, tuple(seeds)))

    def subscribe(
        self,
        name: str,
        pattern: str = "**",
        *,
        subscription: int = 1,
        start: Start = Start.LIVE,
        delivery: Delivery = Delivery.RELIABLE,
        seeds: frozenset[int] | None = None,
    ) -> None:
        self.do(name, events.SubscriptionOpened(subscription, pattern, start, delivery, seeds))

    # Executing.

    def _execute(self, member: Member, command: Any) -> None:
        executor = self._EXECUTORS.get(type(command))
        if executor is None:
            member.reported.append(command)
        else:
            executor(self, member, command)

    def _send(self, member: Member, peer: str, event: object) -> None:
        name, incarnation = member.routes.get(peer, (member.name, member.core.context.incarnation))
        if peer != member.name and peer not in member.routes:
            self.unreachable.append((member.name, peer))
            return
        for target in self._alive():
            if (target.name, target.core.context.incarnation) == (name, incarnation):
                self.wire.append(Flight(member.name, target, event))
                return
        self.unreachable.append((member.name, peer))

    def _send_control(self, member: Member, command: events.SendControl) -> None:
        self._send(member, command.peer, events.ControlReceived(command.frame))

    def _send_bulk(self, member: Member, command: events.SendBulk) -> None:
        self._send(member, command.peer, events.BulkReceived(command.header, command.chunk))

    def _broadcast(self, member: Member, command: events.Broadcast) -> None:
        burst, _ = decode_data(command.frame)
        for target in self._alive():
            if burst.feed in target.follows:
                self.wire.append(Flight(member.name, target, events.DataReceived(command.frame)))

    def _follow(self, member: Member, command: events.FollowFeed) -> None:
        member.follows.add(command.feed)

    def _unfollow(self, member: Member, command: events.UnfollowFeed) -> None:
        member.follows.discard(command.feed)

    def _connect(self, member: Member, command: events.ConnectPeer) -> None:
        member.routes[command.key] = (command.card.name, command.card.incarnation)
        member.reported.append(command)

    def _disconnect(self, member: Member, command: events.DisconnectPeer) -> None:
        member.routes.pop(command.key, None)
        member.reported.append(command)

    def _hand_over(self, member: Member, command: events.Deliver) -> None:
        feed, burst = command.feed, command.burst
        for row in command.rows if command.rows is not None else range(burst.count):
            offset = burst.first + row
            value = burst.payloads[offset] if burst.payloads and offset in burst.payloads else burst.body(row)
            seed, sequence = burst.columns[0][row], burst.columns[1][row]
            where = command.subscription, feed.source, feed.topic, feed.incarnation
            member.delivered.append((*where, offset, seed, sequence, bytes(value)))
        member.in_hand.append(command)

    def _begin_payload(self, member: Member, command: events.BeginPayload) -> None:
        member.payloads[command.space, command.number] = bytearray(command.size)

    def _place_chunk(self, member: Member, command: events.PlaceChunk) -> None:
        chunk = bytes(command.chunk)
        member.payloads[command.space, command.number][command.position : command.position + len(chunk)] = chunk

    def _finish_payload(self, member: Member, command: events.FinishPayload) -> None:
        payload = bytes(member.payloads[command.space, command.number])
        intact = checksum_of(payload) == command.checksum
        if intact:
            del member.payloads[command.space, command.number]
            member.complete[command.space, command.number] = payload
        self.do(member, events.PayloadChecked(command.space, command.number, payload if intact else None))

    def _drop_payload(self, member: Member, command: events.DropPayload) -> None:
        del member.payloads[command.space, command.number]

    _EXECUTORS: ClassVar[dict[type[Any], Callable[[Link, Member, Any], None]]] = {
        events.SendControl: _send_control,
        events.SendBulk: _send_bulk,
        events.Broadcast: _broadcast,
        events.FollowFeed: _follow,
        events.UnfollowFeed: _unfollow,
        events.ConnectPeer: _connect,
        events.DisconnectPeer: _disconnect,
        events.Deliver: _hand_over,
        events.BeginPayload: _begin_payload,
        events.PlaceChunk: _place_chunk,
        events.FinishPayload: _finish_payload,
        events.DropPayload: _drop_payload,
    }


def settled(deliver: events.Deliver) -> list[events.MessagesSettled]:
    """What the application reports when it is done with all that one command handed over."""
    feed, burst = deliver.feed, deliver.burst
    if deliver.covers is not None:
        first, end = deliver.covers
        handled = burst.count if deliver.rows is None else len(deliver.rows)
        return [events.MessagesSettled(feed, first, end, handled, deliver.size)]
    assert deliver.rows is not None
    runs = runs_of([burst.first + row for row in deliver.rows])
    sizes = [deliver.size] + [0] * (len(runs) - 1)
    return [events.MessagesSettled(feed, a, b, b - a, size) for (a, b), size in zip(runs, sizes, strict=True)]


def runs_of(offsets: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending offsets as ranges."""
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], offset + 1)
        else:
            runs.append((offset, offset + 1))
    return runs


def inbound_of(member: Member, topic: str, subscription: int = 1) -> InboundFeed:
    """What a subscription knows of a topic; there is one source of it."""
    feeds = member.core.subscribing.subscriptions[subscription].feeds
    (found,) = [inbound for (_, name), inbound in feeds.items() if name == topic]
    return found


__all__ = ["MS", "Burst", "Flight", "Link", "Member", "card", "inbound_of", "runs_of", "settled"]
