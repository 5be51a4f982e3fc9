"""The publisher's part: registrations, acknowledgements, repairs, markers and heartbeats (RULES P1 to P7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fabric.config import Policy
from fabric.core.ancestry import Ancestry
from fabric.core.answering import Answering
from fabric.core.disk import StateRecovered, WriteFailed, WriteFinished
from fabric.core.durable import DurableWrites
from fabric.core.events import Broadcast, BurstClosed, FeedOpened
from fabric.core.feeds import OutFeed, Reader, Retention
from fabric.core.keeping import Keeping
from fabric.core.leases import Leases
from fabric.core.members import MS, Context, Members, Peer, S
from fabric.core.registrations import Registration, Registrations
from fabric.core.saving import Saving
from fabric.core.spilling import Spilling
from fabric.core.wire import Drop, Kind, encode_marker, feed_id

__all__ = ["Publishing"]

FEEDS_PER_FRAME = 400
"""Feeds in one REGISTERED: with the longest topics it stays below CONTROL_BYTES_MAX."""
TICK_NS_MIN = 10 * MS
"""Between two looks at all feeds that are not acknowledged."""
MARKERS_PER_TICK_MAX = 256
MARKER_REST_NS = MS // 10
"""A marker costs about 30 us: with so much rest after each, thousands of feeds take a third of the time at most."""
HEARTBEAT_FEEDS_MAX = 1000
UNKNOWN_PER_FRAME_MAX = 64
"""Answers to one frame of acknowledgements; the rest is told with the next."""


class Publishing:
    """All feeds of this incarnation, and who reads them."""

    def __init__(self, context: Context, members: Members) -> None:
        self._context, self._members = context, members
        self.feeds: dict[str, OutFeed] = {}
        retention = context.config.retention
        self.retention = Retention(owed_bytes_max=retention.owed_bytes_max, kept_bytes_max=retention.kept_bytes_max)
        self.ancestry = Ancestry(self.retention)
        self.by_id = self.ancestry.by_id
        self.spilling = Spilling(context, self.retention)
        self.durable = DurableWrites(context, self.retention)
        self.registrations = Registrations(context)
        self._saving = Saving(context, self.registrations, self._position_of)
        self.keeping = Keeping(context, self.retention, self.spilling, self._saving)
        self.answering = Answering(context, self.by_id, self.spilling)
        self.leases = Leases(context, self.by_id)
        self._expired: dict[str, dict[int, None]] = {}
        """Subscriptions of members that were absent too long; should they come back, they are told."""
        self.on_left: Callable[[Registration, OutFeed, bool], None] = lambda registration, out, rests: None
        """Told of each feed that a reader is about to leave."""
        self._tick_due_ns, self.is_stopped = 0, False
        self._held_until_ns = 0
        """Who was owed what by earlier lives cannot be read: so long all of it is kept. 0: it could."""
        self._pending: dict[int, OutFeed] = {}
        """Feeds that some reader has not acknowledged to their end: they are marked and listed."""

    # The application.

    def open_feed(self, event: FeedOpened) -> None:
        """A feed begins; every registration that matches it is told and begins at offset 0."""
        identity = feed_id(self._context.name, self._context.incarnation, event.topic)
        out = OutFeed(
            identity, event.topic, event.policy, self._context.incarnation, spills=event.spills, sync=event.sync
        )
        self.feeds[event.topic] = out
        self.ancestry.add(out)
        if not out.is_named:
            self.durable.name(out)
        for registration in self.registrations:
            if registration.pattern.matches(event.topic):
                self._enrol(registration, out, 0)
        if out.is_named:
            self._tell_all(out)

    def close_burst(self, event: BurstClosed) -> None:
        """Retain, then send; of a durable feed, write, then send."""
        out = self.feeds[event.topic]
        if out.policy is Policy.DURABLE:
            self.durable.ask(out, event)
            return
        burst = self.retention.append(out, event.first, event.count, event.frame, event.payloads)
        if out.policy is Policy.LATEST:
            self.retention.supersede(out, burst, event.seeds)
        self._send(out, event)
        if out.spills:
            self.spilling.write()

    def _send(self, out: OutFeed, event: BurstClosed) -> None:
        out.last_data_ns = self._context.now
        if out.readers:
            self._pending[out.feed] = out
            self._look_soon()
        if out.readers or out.listeners:
            self._context.emit(Broadcast(event.frame))
        self._context.counts["bursts_published"] += 1

    # The disk.

    def recover(self, event: StateRecovered) -> None:
        """We have state: what earlier lives left is owed on, to whom it was owed (P3, P8)."""
        registrations = self.registrations
        registrations.persists = True
        if not registrations.restore(event.registrations):
            self._held_until_ns = self._context.now + int(self._context.config.retention.absent_s * S)
        for past in event.feeds:
            self.ancestry.restore(past)
        for registration in registrations:
            self._begin(registration, {})
        for out in self.ancestry.past():
            self._settle(out)
        self._saving.begin()

    def on_written(self, event: WriteFinished) -> None:
        """The disk is done with everything up to a number."""
        self.spilling.on_finished(event)
        for out in self.durable.named(event.number):
            self._tell_all(out)
        for out, burst in self.durable.finished(event.number):
            self._send(out, burst)
            if not out.readers:
                self._settle(out)
        for registration in self._saving.finished(event.number):
            self._tell(registration)
        self.keeping.finished(event.number)

    def on_refused(self, event: WriteFailed) -> None:
        """The disk refused. Who waits to be confirmed asks again."""
        self.spilling.on_failed(event)
        self.durable.on_failed(event)
        self._saving.on_failed(event)
        self.keeping.on_failed(event)

    def _position_of(self, registration: Registration, feed: int) -> int:
        return self.by_id[feed].readers.get(registration.reader, registration.joins[feed])

    def stop(self) -> list[tuple[int, int, bool]]:
        """No burst follows; returns the ends of all feeds for BYE, those of older ones for who has not heard them."""
        self.is_stopped = True
        for out in self.feeds.values():
            out.closed = True
        followed = [out for out in self.feeds.values() if out.readers or out.listeners]
        older = [(out.feed, out.end, True) for out in self.ancestry.past() if out.exact]
        return [*older, *((out.feed, out.end, out.is_written_down) for out in followed)]

    def keep_rest(self) -> None:
        """We close, and have state: the next life serves what is not acknowledged by now."""
        self.keeping.begin(list(self.feeds.values()))

    # Registrations.

    def register(self, peer: Peer, fields: Sequence[Any]) -> None:
        """A subscription of a peer (S1). The first registration of a session fixes where it begins in each feed."""
        if peer.is_gone:  # an old HELLO; nobody would ever acknowledge
            self._context.counts[Drop.STALE] += 1
            return
        self._expired.get(peer.name, {}).pop(fields[0], None)
        before = self.registrations.of(peer.name).get(fields[0])
        opened = self.registrations.opened(peer, list(fields))
        if opened is None:
            return
        registration, is_new, former = opened
        if before is not None and before is not registration:
            self._leave_feeds(before)  # the number of an earlier life's, or of a session that this one replaces
        self._rename(registration, former)
        if is_new:
            self._begin(registration, dict(fields[5]))
        if self._saving.is_due(registration):
            self._saving.save(registration)
        elif not registration.saved:
            self._tell(registration)

    def _begin(self, registration: Registration, stated: dict[int, int]) -> None:
        """Enrol a new session of a subscription in what it is owed."""
        lines = self.ancestry.matching(registration)
        if registration.name and self._held_until_ns:
            registration.since = registration.since or 1  # what it was owed cannot be read: better twice than never
        starts = [Ancestry.starts(registration, line, stated) for line in lines]
        registration.joins.clear()
        registration.unproven.clear()
        registration.since = self._context.incarnation
        for line, begins in zip(lines, starts, strict=True):
            for out in line:
                join = begins.get(out.feed, out.end)
                if out.feed in begins and not (out.exact and join >= out.end):
                    self._enrol(registration, out, join)
                elif out.readers.pop(registration.reader, None) is not None:  # it is done with that
                    self._settle(out)

    def _enrol(self, registration: Registration, out: OutFeed, join: int) -> None:
        join = min(join, out.end)
        registration.joins[out.feed] = join
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

    def _tell(self, registration: Registration, feeds: list[OutFeed] | None = None) -> None:
        """Name feeds to a subscriber, by default all that it is owed, oldest first of each topic."""
        if registration.absent_ns or registration.saved:
            return
        name, number = registration.reader
        owed = [out for feed in registration.joins if (out := self.by_id[feed]).is_named]
        if feeds is None:
            feeds = sorted(owed, key=lambda out: out.incarnation)
        feeds = [out for out in feeds if out.is_named]
        for begin in range(0, len(feeds) or 1, FEEDS_PER_FRAME):
            some = [self._row(registration, out) for out in feeds[begin : begin + FEEDS_PER_FRAME]]
            self._context.send(name, Kind.REGISTERED, number, len(owed), some)

    def _tell_all(self, out: OutFeed) -> None:
        """Everybody who is owed this feed hears of it."""
        for registration in self.registrations:
            if out.feed in registration.joins:
                self._tell(registration, [out])

    def _row(self, registration: Registration, out: OutFeed) -> tuple[Any, ...]:
        ending = 0 if out.exact is None else 1 if out.exact else 2
        before = self.ancestry.before(registration, out)
        join = registration.joins[out.feed]
        known = out.feed, out.topic, out.policy.value, join, out.end, out.first_available
        return *known, out.incarnation, before, ending

    def on_unregister(self, peer: Peer, number: int, rests: bool) -> None:
        """A peer has closed a subscription; it asks until it hears that we do not know its number any more."""
        self._expired.get(peer.name, {}).pop(number, None)
        registration = self.registrations.of(peer.name).get(number)
        if registration is not None and registration.name and rests:
            self._rest(registration)
        else:
            self.unregister(peer.name, number)
            if self.registrations.persists and self.registrations.changed:
                self._saving.save_positions()  # or the next life would owe it again
        self._context.send(peer.name, Kind.UNKNOWN, number)

    def unregister(self, name: str, number: int) -> None:
        """A subscription ended."""
        registration = self.registrations.drop(name, number)
        if registration is not None:
            self._leave_feeds(registration)

    def _leave_feeds(self, registration: Registration) -> None:
        for feed in registration.joins:
            out = self.by_id[feed]
            self.on_left(registration, out, False)
            out.readers.pop(registration.reader, None)
            out.listeners.discard(registration.reader)
            self._settle(out)

    def forget(self, name: str) -> None:
        """A member left, died or began a new life: what it subscribed to without a name ended with it."""
        for number, registration in list(self.registrations.of(name).items()):
            if not registration.name:
                self.unregister(name, number)
            elif not registration.absent_ns:
                self._rest(registration)
        self._expired.pop(name, None)

    def _rest(self, registration: Registration) -> None:
        """A subscription with a name: nobody has it open, and it stays owed."""
        former = registration.reader
        for feed in registration.joins:
            self.on_left(registration, self.by_id[feed], True)
        self.registrations.leave(registration)
        self._rename(registration, former)
        registration.joins.update({feed: self._position_of(registration, feed) for feed in registration.joins})

    def _rename(self, registration: Registration, former: Reader) -> None:
        for feed in registration.joins if registration.reader != former else ():
            readers = self.by_id[feed].readers
            if former in readers:
                readers[registration.reader] = readers.pop(former)

    def forget_before(self, peer: Peer) -> None:
        """We meet a member that an earlier life of ours may have known in an earlier life of its own."""
        for number, registration in list(self.registrations.of(peer.name).items()):
            if not registration.name and registration.incarnation < peer.incarnation:
                self.unregister(peer.name, number)

    def on_acknowledge(self, peer: Peer, entries: list[tuple[int, int, int]]) -> None:
        """Cumulative: positions are only raised (S2)."""
        registered = self.registrations.of(peer.name)
        for number in sorted({number for number, _, _ in entries} - registered.keys())[:UNKNOWN_PER_FRAME_MAX]:
            self._context.send(peer.name, Kind.UNKNOWN, number)
        for number, feed, floor in entries:
            if number in registered:
                registered[number].unproven.pop(feed, None)
            out = self.by_id.get(feed)
            if out is not None and out.is_past:
                self._end_past(out, (peer.name, number), floor)
            elif out is not None and out.readers.get((peer.name, number), floor) < floor <= out.end:
                out.readers[peer.name, number] = floor
                self._settle(out)

    def _end_past(self, out: OutFeed, reader: Reader, floor: int) -> None:
        """Of a feed of an earlier life, whose end may not be certain, a subscriber can have more than we."""
        if out.readers.get(reader, floor) < floor:
            out.readers[reader] = min(floor, out.end)
        if floor >= out.end and reader in out.readers:
            registration = self.registrations.of(reader[0])[reader[1]]
            self.on_left(registration, out, False)
            registration.forget(out.feed)
            del out.readers[reader]
        self._settle(out)

    def _settle(self, out: OutFeed) -> None:
        if not (self._held_until_ns and self._may_be_held(out)):
            self.retention.acknowledge(out)
        if self.retention.released:
            self.spilling.release()
        if out.is_acknowledged:
            self._pending.pop(out.feed, None)

    @staticmethod
    def _may_be_held(out: OutFeed) -> bool:
        """Whether somebody whom we forgot may be owed it."""
        return out.is_past or out.policy is Policy.DURABLE

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
        """Where an older feed of ours ended; if nothing is known of it, its end is not (P7)."""
        if incarnation >= self._context.incarnation:
            return
        current, past = self.feeds.get(topic), self.by_id.get(feed_id(self._context.name, incarnation, topic))
        ending = (past.first_available, past.end, bool(past.exact)) if past is not None else (0, 0, False)
        following = self._context.incarnation, current.feed if current else 0
        self._context.send(peer.name, Kind.FIN, topic, incarnation, *following, *ending)

    # Time.

    def tick(self) -> None:
        """Mark idle feeds, send heartbeats, expire who was absent too long."""
        liveness, now = self._context.config.liveness, self._context.now
        if now < self._tick_due_ns:
            return
        self._tick_due_ns = self._mark_idle(now + (liveness.marker_ms if self._pending else liveness.heartbeat_ms) * MS)
        for peer in list(self._members.by_name.values()):
            if not peer.is_gone and peer.state != "known":
                self._heartbeat(peer)
                if peer.name != self._context.name:
                    self._expire(peer)
        self._expire_absent()
        if self._held_until_ns and now >= self._held_until_ns:
            self._held_until_ns = 0
            for out in filter(self._may_be_held, self.by_id.values()):
                self._settle(out)
        self._saving.tick()

    def _mark_idle(self, next_ns: int) -> int:
        """Mark the feeds that are due; when to look again."""
        now, marked = self._context.now, 0
        for out in [out for out in self._pending.values() if not out.is_past]:  # nobody listens for those
            if now >= self._marker_due_ns(out) and marked < MARKERS_PER_TICK_MAX:
                self._mark(out, [])
                marked += 1
            next_ns = min(next_ns, self._marker_due_ns(out))
        if marked:  # a full pipe takes the first of many: it is another one each time
            first = next(iter(self._pending))
            self._pending[first] = self._pending.pop(first)
        return max(next_ns, now + TICK_NS_MIN + marked * MARKER_REST_NS)

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
            self._context.send(peer.name, Kind.HEARTBEAT, listed, peer.seen)
            for registration in self.registrations.of(peer.name).values():
                if registration.unproven:
                    self._tell(registration, [self.by_id[feed] for feed in registration.unproven])
            for number in list(self._expired.get(peer.name, ()))[:UNKNOWN_PER_FRAME_MAX]:
                self._context.send(peer.name, Kind.UNKNOWN, number)

    def _expire(self, peer: Peer) -> None:
        absent_ns = self._context.config.retention.absent_s * 1000 * MS
        mine = self.registrations.of(peer.name)
        if mine and self._context.now - peer.heard_ns > absent_ns:
            self._context.counts["registrations_expired"] += len(mine)
            expired = self._expired.get(peer.name, {}) | dict.fromkeys(mine)
            for number in list(mine):
                self.unregister(peer.name, number)
            self._expired[peer.name] = expired

    def _expire_absent(self) -> None:
        absent_ns = int(self._context.config.retention.absent_s * S)
        for registration in self.registrations.overdue(absent_ns):
            self._context.counts["registrations_expired"] += 1
            self.unregister(*registration.reader)

    def _look_soon(self) -> None:
        """Somebody owes an acknowledgement: markers may be due before the next heartbeat."""
        due_ns = self._context.now + self._context.config.liveness.idle_marker_ms * MS
        if due_ns < self._tick_due_ns:
            self._tick_due_ns = due_ns
            self._context.wake_by(due_ns)

    def next_deadline_ns(self) -> int:
        """When markers or heartbeats may be due."""
        return self._tick_due_ns

    # Looking. Who waits looks without the engine's lock, at copies that are made in one step.

    def owes_past(self, topic: str | None = None) -> bool:
        """Whether somebody who is here, and no part of us, lacks something of feeds of earlier lives, of one topic."""
        return any(
            floor < out.end and self._is_here(reader)
            for out in self.ancestry.past()
            if topic in (None, out.topic)
            for reader, floor in list(out.readers.items())
        )

    def _is_here(self, reader: Reader) -> bool:
        name, number = reader
        peer = self._members.by_name.get(name)
        if peer is None or peer.is_gone or name == self._context.name:
            return False
        registration = self.registrations.of(name).get(number)
        return registration is not None and not registration.absent_ns

    def readers_elsewhere(self, topic: str) -> dict[Reader, int]:
        """The owed subscriptions of other members on a topic, and what each acknowledged."""
        out = self.feeds.get(topic)
        readers = list(out.readers.items()) if out else []
        return {reader: floor for reader, floor in readers if reader[0] != self._context.name}

    def check_invariants(self) -> None:
        """Assert what must hold between feeds, retention and registrations."""
        self.retention.check_invariants(self.by_id.values())
        self.spilling.check_invariants()
        self.durable.check_invariants()
        self.leases.check_invariants()
        for registration in self.registrations:
            assert registration.unproven.keys() <= registration.joins.keys() <= self.by_id.keys()
        for out in self.by_id.values():
            for name, number in out.readers:
                assert out.feed in self.registrations.of(name)[number].joins, f"{out} is owed to nobody"
        for out in self.by_id.values():
            if out.policy is not Policy.LOSSY:
                assert out.is_acknowledged or out.feed in self._pending, f"{out} would never be marked"
