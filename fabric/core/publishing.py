"""The publisher's part: registrations, acknowledgements, repairs, markers and heartbeats (RULES P1 to P7)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fabric.config import Policy, Start
from fabric.core.events import Broadcast, Buffer, BurstClosed, FeedOpened, SendBulk
from fabric.core.feeds import OutFeed, Reader, Retention
from fabric.core.members import MS, Context, Members, Peer
from fabric.core.ranges import RangeSet
from fabric.core.spilling import Question, Spilling
from fabric.core.wire import Drop, Kind, encode_control, encode_marker, feed_id
from fabric.errors import TopicError
from fabric.topics import Pattern, compile_pattern

__all__ = ["Publishing"]

FEEDS_PER_FRAME = 400
"""Feeds in one REGISTERED: with the longest topics it stays below CONTROL_BYTES_MAX."""
TICK_NS_MIN = 10 * MS
"""Between two looks at all feeds that are not acknowledged."""
MARKERS_PER_TICK_MAX = 256
MARKER_REST_NS = MS // 10
"""A marker costs about 30 us: with so much rest after each, thousands of feeds take a third of the time at most."""
HEARTBEAT_FEEDS_MAX = 1000
PULL_RANGES_MAX = 64
"""Ranges of a pull that are answered; the same as a subscriber asks for at once."""
UNKNOWN_PER_FRAME_MAX = 64
"""Answers to one frame of acknowledgements; the rest is told with the next."""
REGISTRATIONS_PER_PEER_MAX = 4096
"""Subscriptions that one peer may hold here."""


class _Registration:
    """A subscription of a member.

    `joins`: where it began in each feed that it matches; a repeated HELLO gets the same answer. `unproven`: those of
    which the subscriber has not said that it knows; they are told again.
    """

    __slots__ = ("best_effort", "from_start", "incarnation", "joins", "pattern", "reader", "start", "unproven")

    def __init__(self, reader: Reader, pattern: Pattern, start: str, best_effort: bool, from_start: bool) -> None:
        self.reader, self.pattern, self.start = reader, pattern, start
        self.best_effort, self.from_start = best_effort, from_start
        self.joins: dict[int, int] = {}
        self.unproven: dict[int, None] = {}
        self.incarnation = 0


class Publishing:
    """All feeds of this incarnation, and who reads them."""

    def __init__(self, context: Context, members: Members) -> None:
        self._context, self._members = context, members
        self.feeds: dict[str, OutFeed] = {}
        self.by_id: dict[int, OutFeed] = {}
        retention = context.config.retention
        self.retention = Retention(owed_bytes_max=retention.owed_bytes_max, kept_bytes_max=retention.kept_bytes_max)
        self.spilling = Spilling(context, self.retention)
        self._registrations: dict[str, dict[int, _Registration]] = {}
        self._expired: dict[str, dict[int, None]] = {}
        """Subscriptions of members that were absent too long; should they come back, they are told."""
        self.on_left: Callable[[_Registration, OutFeed], None] = lambda registration, out: None
        """Told of each feed that a reader is about to leave."""
        self._tick_due_ns, self.is_stopped = 0, False
        self._pending: dict[int, OutFeed] = {}
        """Feeds that some reader has not acknowledged to their end: they are marked and listed."""

    # The application.

    def open_feed(self, event: FeedOpened) -> None:
        """A feed begins; every registration that matches it is told and begins at offset 0."""
        identity = feed_id(self._context.name, self._context.incarnation, event.topic)
        out = OutFeed(identity, event.topic, event.policy, self._context.incarnation, spills=event.spills)
        self.feeds[event.topic] = self.by_id[identity] = out
        for registrations in self._registrations.values():
            for registration in registrations.values():
                if registration.pattern.matches(event.topic):
                    self._enrol(registration, out, 0)
                    self._tell(registration, [out])

    def close_burst(self, event: BurstClosed) -> None:
        """Retain, then send."""
        out = self.feeds[event.topic]
        burst = self.retention.append(out, event.first, event.count, event.frame, event.payloads)
        if out.policy is Policy.LATEST:
            self.retention.supersede(out, burst, event.seeds)
        out.last_data_ns = self._context.now
        if out.readers:
            self._pending[out.feed] = out
            self._look_soon()
        if out.readers or out.listeners:
            self._context.emit(Broadcast(event.frame))
        self._context.counts["bursts_published"] += 1
        if out.spills:
            self.spilling.write()

    def stop(self) -> list[tuple[int, int]]:
        """No burst follows; returns the ends of all feeds for BYE."""
        self.is_stopped = True
        for out in self.feeds.values():
            out.closed = True
        return [(out.feed, out.end) for out in self.feeds.values() if out.readers or out.listeners]

    # Registrations.

    def register(self, peer: Peer, fields: Sequence[Any]) -> None:
        """A subscription of a peer (S1). Its first registration fixes its join offsets."""
        number, text, start, delivery, from_start, positions = fields
        if peer.is_gone:  # an old HELLO; nobody would ever acknowledge
            self._context.counts[Drop.STALE] += 1
            return
        mine = self._registrations.setdefault(peer.name, {})
        self._expired.get(peer.name, {}).pop(number, None)
        registration = mine.get(number)
        if registration is None:
            if len(mine) >= REGISTRATIONS_PER_PEER_MAX:
                self._context.counts[Drop.NO_ROOM] += 1
                return
            try:
                pattern, start = compile_pattern(text), Start(start)
            except (TopicError, ValueError):
                self._context.counts[Drop.SHAPE] += 1
                return
            registration = mine[number] = _Registration(
                (peer.name, number), pattern, start, delivery == "best_effort", bool(from_start)
            )
            registration.incarnation = peer.incarnation
            stated = dict(positions)
            for out in self.feeds.values():
                if pattern.matches(out.topic):
                    self._enrol(registration, out, stated.get(out.feed, 0 if from_start else out.join_offset(start)))
        self._tell(registration, [self.by_id[feed] for feed in registration.joins])

    def _enrol(self, registration: _Registration, out: OutFeed, join: int) -> None:
        join = registration.joins[out.feed] = min(join, out.end)
        registration.unproven[out.feed] = None
        if registration.best_effort or out.policy is Policy.LOSSY:
            out.listeners.add(registration.reader)
            return
        if join < out.end:
            self.retention.owe_again(out, join)
        elif not out.readers:
            out.acknowledged = out.end
        out.readers[registration.reader] = join
        if join < out.end:
            self._pending[out.feed] = out
            self._look_soon()

    def _tell(self, registration: _Registration, feeds: list[OutFeed]) -> None:
        name, number = registration.reader
        joins = registration.joins
        for begin in range(0, len(feeds) or 1, FEEDS_PER_FRAME):
            some = [
                (out.feed, out.topic, out.policy.value, joins[out.feed], out.end, out.first_available)
                for out in feeds[begin : begin + FEEDS_PER_FRAME]
            ]
            self._context.send(name, Kind.REGISTERED, number, len(joins), some)

    def on_unregister(self, peer: Peer, number: int) -> None:
        """A peer is done with a subscription; it asks until it hears that we do not know it any more."""
        self._expired.get(peer.name, {}).pop(number, None)
        self.unregister(peer.name, number)
        self._context.send(peer.name, Kind.UNKNOWN, number)

    def unregister(self, name: str, number: int) -> None:
        """A subscription ended."""
        registration = self._registrations.get(name, {}).pop(number, None)
        if registration is None:
            return
        for feed in registration.joins:
            out = self.by_id[feed]
            self.on_left(registration, out)
            out.readers.pop(registration.reader, None)
            out.listeners.discard(registration.reader)
            self._settle(out)

    def forget(self, name: str) -> None:
        """A member left, died or began a new life: what it subscribed to ended with it."""
        for number in list(self._registrations.get(name, ())):
            self.unregister(name, number)
        self._expired.pop(name, None)

    def registrations_of(self, name: str) -> int:
        """How many subscriptions of a member are registered here."""
        return len(self._registrations.get(name, ()))

    def registration(self, name: str, number: int) -> _Registration | None:
        """The subscription of a member with this number, if it is registered."""
        return self._registrations.get(name, {}).get(number)

    def registrations(self) -> Iterator[_Registration]:
        """All subscriptions that are registered."""
        for registrations in self._registrations.values():
            yield from registrations.values()

    def on_acknowledge(self, peer: Peer, entries: list[tuple[int, int, int]]) -> None:
        """Cumulative: positions are only raised (S2)."""
        registered = self._registrations.get(peer.name, {})
        for number in sorted({number for number, _, _ in entries} - registered.keys())[:UNKNOWN_PER_FRAME_MAX]:
            self._context.send(peer.name, Kind.UNKNOWN, number)
        for number, feed, floor in entries:
            if number in registered:
                registered[number].unproven.pop(feed, None)
            out = self.by_id.get(feed)
            if out is not None and out.readers.get((peer.name, number), floor) < floor <= out.end:
                out.readers[peer.name, number] = floor
                self._settle(out)

    def _settle(self, out: OutFeed) -> None:
        self.retention.acknowledge(out)
        if self.retention.released:
            self.spilling.release()
        if out.is_acknowledged:
            self._pending.pop(out.feed, None)

    # Answers on BULK.

    def on_pull(self, peer: Peer, feed: int, token: int, credit: int, ranges: list[tuple[int, int]]) -> None:
        """Data within the credit, then what is available (P5)."""
        out = self.by_id.get(feed)
        if out is None:
            self._context.counts[Drop.STRANGER] += 1
            return
        wanted = list(RangeSet(ranges))[:PULL_RANGES_MAX]  # merged: a range named twice is sent once
        bursts, lost = out.select(wanted, min(credit, self._context.config.repair.window_bytes))
        if self.spilling.park(out, bursts, (peer, Kind.PULL, (feed, token, credit, ranges))):
            return
        for burst in bursts:
            self._bulk(peer, Kind.REPAIR, feed, token, chunk=burst.frame)
            self._context.counts["repaired_bytes"] += burst.frame_size
        self._bulk(peer, Kind.AVAILABLE, feed, token, out.first_available, out.end, lost)

    def payload_of(self, feed: int, offset: int) -> Buffer | None:
        """The value of an addressed record, while it is retained."""
        out = self.by_id.get(feed)
        burst = out.find(offset) if out else None
        return burst.payloads.get(offset) if burst and burst.payloads else None

    def waits_for_disk(self, feed: int, offset: int, question: Question) -> bool:
        """Whether the record that is asked for has to be loaded first; then the question is kept until it is."""
        out = self.by_id.get(feed)
        burst = out.find(offset) if out else None
        return out is not None and burst is not None and self.spilling.park(out, [burst], question)

    def _bulk(self, peer: Peer, kind: Kind, *fields: object, chunk: Buffer | None = None) -> None:
        header = encode_control(kind, self._context.id, self._context.incarnation, *fields)
        self._context.emit(SendBulk(peer.name, header, chunk))

    def on_join(self, feeds: list[tuple[int, int]]) -> None:
        """A marker over the push link proves it to those who asked (S8)."""
        nonces: dict[int, list[int]] = {}
        for feed, nonce in feeds:
            nonces.setdefault(feed, []).append(nonce)
        for feed, echoed in nonces.items():
            out = self.by_id.get(feed)
            if out is not None:
                self._mark(out, echoed[:1000])

    def _mark(self, out: OutFeed, nonces: list[int]) -> None:
        out.marked_ns = self._context.now
        frame = encode_marker(out.feed, out.incarnation, out.end, 0, nonces)
        self._context.emit(Broadcast(frame, marker=True))

    def on_status(self, peer: Peer, topic: str, incarnation: int) -> None:
        """Where an older feed of ours ended: nothing is left of it, so its end is not known (P7)."""
        if incarnation < self._context.incarnation:
            out = self.feeds.get(topic)
            self._context.send(
                peer.name, Kind.FIN, topic, incarnation, self._context.incarnation, out.feed if out else 0, 0, 0, False
            )

    # Time.

    def tick(self) -> None:
        """Mark idle feeds, send heartbeats, expire who was absent too long."""
        liveness, now = self._context.config.liveness, self._context.now
        if now < self._tick_due_ns:
            return
        next_ns = now + (liveness.marker_ms if self._pending else liveness.heartbeat_ms) * MS
        marked = 0
        for out in list(self._pending.values()):
            if now >= self._marker_due_ns(out) and marked < MARKERS_PER_TICK_MAX:
                self._mark(out, [])
                marked += 1
            next_ns = min(next_ns, self._marker_due_ns(out))
        if marked:  # a full pipe takes the first of many: it is another one each time
            first = next(iter(self._pending))
            self._pending[first] = self._pending.pop(first)
        self._tick_due_ns = max(next_ns, now + TICK_NS_MIN + marked * MARKER_REST_NS)
        for peer in list(self._members.by_name.values()):
            if not peer.is_gone and peer.state != "known":
                self._heartbeat(peer)
                if peer.name != self._context.name:
                    self._expire(peer)

    def _marker_due_ns(self, out: OutFeed) -> int:
        liveness = self._context.config.liveness
        idle_ns = out.last_data_ns + liveness.idle_marker_ms * MS
        return idle_ns if out.marked_ns < out.last_data_ns else max(idle_ns, out.marked_ns + liveness.marker_ms * MS)

    def _heartbeat(self, peer: Peer) -> None:
        liveness, now = self._context.config.liveness, self._context.now
        if now - peer.told_ns < liveness.marker_ms * MS:
            return
        listed = [
            (out.feed, out.end)
            for out in self._pending.values()
            if any(name == peer.name and position < out.end for (name, _), position in out.readers.items())
        ][:HEARTBEAT_FEEDS_MAX]
        idle = now - peer.told_ns >= liveness.heartbeat_ms * MS and peer.name != self._context.name
        if listed or idle:
            peer.told_ns = now
            self._context.send(peer.name, Kind.HEARTBEAT, listed, peer.incarnation)
            for registration in self._registrations.get(peer.name, {}).values():
                if registration.unproven:
                    self._tell(registration, [self.by_id[feed] for feed in registration.unproven])
            for number in list(self._expired.get(peer.name, ()))[:UNKNOWN_PER_FRAME_MAX]:
                self._context.send(peer.name, Kind.UNKNOWN, number)

    def _expire(self, peer: Peer) -> None:
        absent_ns = self._context.config.retention.absent_s * 1000 * MS
        if self._registrations.get(peer.name) and self._context.now - peer.heard_ns > absent_ns:
            self._context.counts["registrations_expired"] += len(self._registrations[peer.name])
            expired = self._expired.get(peer.name, {}) | dict.fromkeys(self._registrations[peer.name])
            self.forget(peer.name)
            self._expired[peer.name] = expired

    def _look_soon(self) -> None:
        """Somebody owes an acknowledgement: markers may be due before the next heartbeat."""
        due_ns = self._context.now + self._context.config.liveness.idle_marker_ms * MS
        if due_ns < self._tick_due_ns:
            self._tick_due_ns = due_ns
            self._context.wake_by(due_ns)

    def next_deadline_ns(self) -> int:
        """When markers or heartbeats may be due."""
        return self._tick_due_ns

    # Looking.

    def readers_elsewhere(self, topic: str) -> dict[Reader, int]:
        """The owed subscriptions of other members on a topic, and what each acknowledged."""
        out = self.feeds.get(topic)
        return (
            {reader: floor for reader, floor in out.readers.items() if reader[0] != self._context.name} if out else {}
        )

    def check_invariants(self) -> None:
        """Assert what must hold between feeds, retention and registrations."""
        self.retention.check_invariants(self.feeds.values())
        self.spilling.check_invariants()
        for out in self.feeds.values():
            if out.policy is not Policy.LOSSY:
                assert out.is_acknowledged or out.feed in self._pending, f"{out} would never be marked"
