"""Who is there: cards, greetings, incarnations, liveness, fencing (RULES P9, S7 as far as they concern members)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from fabric.config import FabricConfig
from fabric.core.events import Card, ConnectPeer, DisconnectPeer, ProbePeer, ReportFenced, ReportPeer, SendControl
from fabric.core.guards import Retry, chance_of
from fabric.core.wire import VERSION, Control, Drop, Kind, encode_control, member_id

__all__ = ["Context", "Members", "Peer", "card_fields", "card_of"]

MS, S = 1_000_000, 1_000_000_000
GOODBYE_NS = 500 * MS
"""So long the last words of a process may be on their way when it has ended."""
HELLO_FIRST_NS, HELLO_MAX_NS = 20 * MS, 1 * S

MEMBERS_MAX = 1024
"""Members that are remembered, ourselves and the gone included: sixteen times the largest job of this form."""
NAME_BYTES_MAX = 255
ZOMBIES_MAX = 16
"""Connections to older lives of members; the oldest gives way."""
LIVES_REMEMBERED_MAX = 16
"""Earlier lives of one member whose cards are remembered."""


class Context:
    """What the parts of the core share.

    Who we are, the time of the event in hand, and the commands that it leads to.
    """

    def __init__(self, card: Card, config: FabricConfig) -> None:
        self.card, self.config = card, config
        self.name, self.incarnation, self.id = card.name, card.incarnation, member_id(card.name)
        self.now = 0
        self.due_ns = 0
        """When `TimePassed` is due at the latest. Whoever creates a deadline calls `wake_by`; a tick looks at all of
        them anew."""
        self.commands: list[Any] = []
        self.emit = self.commands.append
        self.counts: Counter[str] = Counter()
        """Events that have a counter and no other trace: drops by reason, demotions, repairs, resends."""
        self._writes = self._drawn = 0

    def next_write(self) -> int:
        """The number of the next thing that the disk is asked to write."""
        self._writes += 1
        return self._writes

    def chance(self) -> float:
        """A number from 0 to 1 for a wait: another one for each life of each member, so that they do not keep step."""
        self._drawn += 1
        return chance_of(self.id ^ self.incarnation, self._drawn)

    def wake_by(self, due_ns: int) -> None:
        """Something is due then."""
        if due_ns < self.due_ns:
            self.due_ns = due_ns

    def send(self, peer: str, kind: Kind, *fields: object) -> None:
        """Send one message on CONTROL."""
        self.emit(SendControl(peer, encode_control(kind, self.id, self.incarnation, *fields)))


class Peer:
    """A member that we know of, ourselves included."""

    __slots__ = (
        "before",
        "bulk_heard_ns",
        "card",
        "data_heard_ns",
        "ended_ns",
        "greeted_us",
        "heard_ns",
        "hello",
        "id",
        "name",
        "probed_ns",
        "sees_us",
        "state",
        "told_ns",
    )

    def __init__(self, card: Card, now: int) -> None:
        self.card, self.name, self.id = card, card.name, member_id(card.name)
        self.before: tuple[Card, ...] = ()
        """Its latest earlier lives: one that still sends is a zombie, and this is where it can be told."""
        self.state = "known"
        self.sees_us = False
        """Whether it has told us that it heard the HELLO of this incarnation of us."""
        self.greeted_us = False
        """Whether we heard its HELLO, and so know what it subscribes to."""
        self.heard_ns = self.data_heard_ns = now
        self.bulk_heard_ns = 0
        self.told_ns = self.probed_ns = self.ended_ns = 0
        self.hello = Retry.beyond(HELLO_FIRST_NS, HELLO_MAX_NS, now)

    @property
    def incarnation(self) -> int:
        """Of its current life."""
        return self.card.incarnation

    @property
    def seen(self) -> int:
        """The incarnation that has greeted us; 0 if it has not."""
        return self.incarnation if self.greeted_us else 0

    @property
    def has_met(self) -> bool:
        """Whether we know each other, and what the other subscribes to."""
        return self.sees_us and self.greeted_us

    @property
    def is_there(self) -> bool:
        """Whether it answers, as far as we know; nobody waits for others."""
        return self.state in ("joined", "up", "suspect")

    @property
    def is_gone(self) -> bool:
        """Whether it said goodbye or is proven dead."""
        return self.state in ("left", "dead")

    def __repr__(self) -> str:
        return f"Peer({self.name}, {self.state}, incarnation={self.incarnation})"


class Members:
    """The roster of this member."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.by_name: dict[str, Peer] = {}
        self.by_id: dict[int, Peer] = {}
        self.fenced_by = 0
        self.in_use: Callable[[str], bool] = lambda name: False
        """Whether something still refers to a member that is gone."""
        self._zombies: deque[str] = deque()
        ourselves = Peer(context.card, 0)
        ourselves.state, ourselves.sees_us, ourselves.greeted_us = "up", True, True
        self._add(ourselves)

    def _add(self, peer: Peer) -> None:
        self.by_name[peer.name] = self.by_id[peer.id] = peer

    def others(self) -> list[Peer]:
        """All members but us."""
        return [peer for peer in self.by_name.values() if peer.name != self._context.name]

    def meet(self, card: Card) -> Peer | None:
        """A card is known now. Returns the peer if this is news: a new member, or a new life of a known one."""
        context = self._context
        if card.job != context.card.job:
            context.counts[Drop.STRANGER] += 1
            return None
        if card.version != VERSION:
            context.emit(ReportPeer(card.name, "version", str(card.version)))
            return None
        if card.name == context.name:
            self._meet_ourselves(card)
            return None
        known = self.by_name.get(card.name)
        if known is not None and card.incarnation <= known.incarnation:
            if card.incarnation < known.incarnation:
                self._fence(card, known.incarnation)
            return None
        if known is None and not self._make_room(card.name):
            context.counts[Drop.NO_ROOM] += 1
            return None
        peer = Peer(card, context.now)
        if known is not None:
            peer.before = (known.card, *known.before)[:LIVES_REMEMBERED_MAX]
        self._add(peer)
        context.emit(ConnectPeer(peer.name, card))
        context.wake_by(context.now)
        return peer

    def _make_room(self, name: str) -> bool:
        """A flood of names ends here.

        Of the members that are gone, the one known longest is forgotten for a new one.
        """
        if not 0 < len(name.encode()) <= NAME_BYTES_MAX:
            return False
        if len(self.by_name) < MEMBERS_MAX:
            return True
        for peer in self.by_name.values():
            if peer.is_gone and not self.in_use(peer.name):
                del self.by_name[peer.name], self.by_id[peer.id]
                return True
        return False

    def _meet_ourselves(self, card: Card) -> None:
        if card.incarnation > self._context.incarnation and card.incarnation > self.fenced_by:
            self.fenced_by = card.incarnation
            self._context.emit(ReportFenced(card.incarnation))

    def _fence(self, zombie: Card, newest: int) -> None:
        """A live older incarnation is told, over connections of its own: its name leads to the newer one."""
        key = f"{zombie.name}@{zombie.incarnation}"
        self._context.counts["zombies_told"] += 1
        if key not in self._zombies:
            self._zombies.append(key)
            self._context.emit(ConnectPeer(key, zombie))
        if len(self._zombies) > ZOMBIES_MAX:
            self._context.emit(DisconnectPeer(self._zombies.popleft()))
        self._context.send(key, Kind.FENCED, newest)

    def on_fenced(self, message: Control) -> None:
        """Somebody saw a newer life of us: stop publishing (P9)."""
        newest = message.fields[0]
        if newest > self._context.incarnation and not self.fenced_by:
            self.fenced_by = newest
            self._context.emit(ReportFenced(newest))

    def sender_of(self, message: Control, authenticated: str | None) -> Peer | None:
        """The peer that sent this, if it is one we know in its current life; counted otherwise."""
        peer = self.by_id.get(message.source)
        if peer is None or message.incarnation != peer.incarnation:
            self._context.counts[Drop.STRANGER if peer is None else Drop.STALE] += 1
            if peer is not None:
                self._tell_zombie(peer, message.incarnation)
            return None
        if authenticated is not None and authenticated != peer.name:
            self._context.counts[Drop.IMPOSTOR] += 1
            return None
        self._heard(peer)
        return peer

    def _tell_zombie(self, peer: Peer, incarnation: int) -> None:
        for zombie in peer.before:
            if zombie.incarnation == incarnation:
                self._fence(zombie, peer.incarnation)

    def _heard(self, peer: Peer) -> None:
        peer.heard_ns = self._context.now
        if peer.state in ("suspect", "down"):
            self._change(peer, "up")

    def on_greeted(self, peer: Peer) -> None:
        """We heard its HELLO: it is there."""
        peer.greeted_us = True
        if peer.state == "known":
            self._change(peer, "joined")

    def on_seen(self, peer: Peer, seen: int) -> None:
        """A HELLO or heartbeat told which incarnation of us the peer has heard a HELLO of."""
        if seen == self._context.incarnation and not peer.sees_us:
            peer.sees_us = True
            if not peer.greeted_us:
                self._change(peer, "joined")

    def on_ended(self, name: str, incarnation: int) -> None:
        """The process of this life has ended. What it sent before may still arrive; then it is found dead."""
        peer = self.by_name.get(name)
        if peer is not None and peer.incarnation == incarnation and not peer.is_gone:
            peer.ended_ns = self._context.now
            self._context.wake_by(peer.ended_ns + GOODBYE_NS)

    def leave(self, peer: Peer, state: str) -> None:
        """The peer said goodbye ("left") or is proven dead ("dead")."""
        if not peer.is_gone:
            self._change(peer, state)

    def _change(self, peer: Peer, state: str) -> None:
        peer.state = state
        self._context.emit(ReportPeer(peer.name, state))

    def tick(self) -> list[Peer]:
        """Judge silence; returns the peers that are due a HELLO."""
        due = []
        for peer in self.others():
            if peer.is_gone:
                continue
            self._judge(peer)
            if not peer.has_met and self._context.now >= peer.hello.due_ns:
                peer.hello = peer.hello.after(self._context.now, self._context.chance())
                due.append(peer)
        return due

    def _judge(self, peer: Peer) -> None:
        liveness, now = self._context.config.liveness, self._context.now
        silence = now - peer.heard_ns
        if silence > liveness.down_s * S and peer.state in ("joined", "up", "suspect"):
            self._change(peer, "down")
        elif silence > liveness.suspect_s * S and peer.state in ("joined", "up"):
            self._change(peer, "suspect")
        # One that is known and never greeted us may have died, too, and its feeds may have been named to us before.
        silent = silence > liveness.suspect_s * S or peer.state in ("suspect", "down")
        silent = silent or bool(peer.ended_ns and now - peer.ended_ns >= GOODBYE_NS)
        if silent and peer.card.host == self._context.card.host and now - peer.probed_ns > S:
            peer.probed_ns = now
            self._context.emit(ProbePeer(peer.card))

    def next_deadline_ns(self) -> int | None:
        """When a HELLO is due next."""
        living = [peer for peer in self.others() if not peer.is_gone]
        dues = [peer.hello.due_ns for peer in living if not peer.has_met]
        dues += [max(peer.ended_ns + GOODBYE_NS, peer.probed_ns + S + 1) for peer in living if peer.ended_ns]
        return min(dues, default=None)


def card_fields(card: Card) -> tuple[Any, ...]:
    """A card as it travels, its incarnation apart: that stands in the frame's header."""
    rank = 0 if card.rank is None else card.rank + 1
    return (card.name, rank, card.world_size, card.job, card.host, card.pid, card.version, *card.endpoints)


def card_of(fields: Sequence[Any], incarnation: int) -> Card:
    """The card in the first ten fields of a message."""
    name, rank, world_size, job, host, pid, version, data, control, bulk = fields[:10]
    return Card(
        name=name,
        rank=rank - 1 if rank else None,
        world_size=world_size,
        job=job,
        host=host,
        pid=pid,
        version=version,
        incarnation=incarnation,
        endpoints=(data, control, bulk),
    )
