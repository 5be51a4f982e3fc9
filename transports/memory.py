"""Members in one process: the same contract as over sockets, with a virtual clock and seeded faults.

Without threads, the same calls with the same seed give the same deliveries.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from urllib.parse import quote, unquote

from transports.base import (
    DONE,
    AddressError,
    Buffer,
    Endpoints,
    Inbound,
    Link,
    PeerUnreachableError,
    Receipt,
    SendBlockedError,
    check_broadcast,
    check_frames,
)
from transports.hub import FaultPlan, Feed, Loan, Mailbox, MemoryHub, Pipe

__all__ = ["FaultPlan", "MemoryHub", "MemoryTransport"]

_DATA, _CONTROL, _BULK = Link.DATA, Link.CONTROL, Link.BULK
_ADDRESS = re.compile(r"memory://([^/]+)/([0-9]+)/(data|control|bulk)")


class _Route:
    """What one member connected for a peer: whom (a name and a generation of it), and the pipes there."""

    __slots__ = ("bulk", "control", "endpoints", "feed", "generation", "target")

    def __init__(self, endpoints: Endpoints, target: str, generation: int, control: Pipe, bulk: Pipe) -> None:
        self.endpoints, self.target, self.generation = endpoints, target, generation
        self.control, self.bulk = control, bulk
        self.feed: Feed | None = None


class MemoryTransport(Mailbox):
    """A member on a hub. Opening a name again is a new life of that member, with new addresses.

    The old life goes on until it is closed: a zombie, for whoever still has its addresses.

    What is sent to an earlier life is lost without an error, as in the time before a broken connection is noticed.
    `descriptors` has an eventfd that is written whenever a message is queued, also one that is due only later: whoever
    sleeps on it asks `is_ready` and `next_due_ns` again.

    A chunk of `limits.zero_copy_bytes` or more that is not `bytes` is read when it is received, not when it is sent:
    whoever changes it before `receipt.done` sends the changed bytes, as over a socket.
    """

    def __init__(self, hub: MemoryHub, name: str) -> None:
        super().__init__(name)
        self._hub = hub
        self._lock = hub._lock
        self._limits = hub.limits
        self._routes: dict[str, _Route] = {}
        self._prefixes: dict[bytes, None] = {}
        self._sent, self._sent_bytes = [0, 0, 0], [0, 0, 0]
        with self._lock:
            self._generation = hub._enter(self)
            base = f"memory://{quote(name, safe='')}/{self._generation}"
            self._endpoints = Endpoints(f"{base}/data", f"{base}/control", f"{base}/bulk")
            self._begin()
            for member in hub._members.values():
                if isinstance(member, MemoryTransport):
                    member._attach_waiting(self)

    @property
    def endpoints(self) -> Endpoints:
        """`memory://NAME/GENERATION/LINK`, where the generation counts the lives of this name."""
        return self._endpoints

    # Peers.

    def connect(self, peer: str, endpoints: Endpoints) -> None:
        """Connect to a peer, which need not be open yet. Raises AddressError."""
        self._check()
        target, generation = _parse(endpoints)
        with self._lock:
            known = self._routes.get(peer)
            if known is not None:
                if known.endpoints == endpoints:
                    return
                self._detach(known)
            plan = self._hub.plan
            control = Pipe(self, None, _CONTROL, peer, plan.control_frames)
            bulk = Pipe(self, None, _BULK, peer, plan.bulk_frames)
            route = self._routes[peer] = _Route(endpoints, target, generation, control, bulk)
            member = self._hub._members.get((target, generation))
            if member is not None:
                self._attach(route, member)

    def disconnect(self, peer: str) -> None:
        """Drop the connections to a peer and what waits on them."""
        self._check()
        with self._lock:
            known = self._routes.pop(peer, None)
            if known is not None:
                self._detach(known)

    def _attach_waiting(self, member: Mailbox) -> None:
        for route in self._routes.values():
            if (route.target, route.generation) == (member.name, member._generation):
                self._attach(route, member)

    def _attach(self, route: _Route, member: Mailbox) -> None:
        route.control.reader = route.bulk.reader = member
        for pipe in (route.control, route.bulk):
            self._unblock(pipe)
        if self not in member._readers:
            member._readers[self] = Feed(Pipe(member, self, _DATA, self.name, self._hub.plan.data_frames))
        route.feed = member._readers[self]
        for prefix in self._prefixes:
            self._tell(route.feed, True, prefix)

    def _detach(self, route: _Route) -> None:
        if route.feed is not None:
            shared = any(other.feed is route.feed for other in self._routes.values() if other is not route)
            if not shared:
                route.feed.pipe.writer._readers.pop(self, None)
        for pipe in (route.control, route.bulk):
            if pipe.reader is not None:
                pipe.reader._forget(pipe)

    # Subscriptions.

    def subscribe(self, prefix: bytes) -> None:
        """Ask every publisher for frames that start with these bytes. Raises ValueError over `limits.prefixes`."""
        self._check()
        with self._lock:
            if prefix not in self._prefixes:
                if len(self._prefixes) >= self._limits.prefixes:
                    raise ValueError(f"more than {self._limits.prefixes} prefixes")
                self._prefixes[prefix] = None
                self._tell_all(True, prefix)

    def unsubscribe(self, prefix: bytes) -> None:
        """Take back `subscribe`."""
        self._check()
        with self._lock:
            if prefix in self._prefixes:
                del self._prefixes[prefix]
                self._tell_all(False, prefix)

    def _tell_all(self, wanted: bool, prefix: bytes) -> None:
        for feed in {id(route.feed): route.feed for route in self._routes.values()}.values():
            if feed is not None:
                self._tell(feed, wanted, prefix)

    def _tell(self, feed: Feed, wanted: bool, prefix: bytes) -> None:
        hub = self._hub
        due = hub.clock() + (hub._delay(self) if _DATA in hub._harmed else 0)
        feed.coming.append((due, wanted, prefix))
        self._hear(feed)

    def _hear(self, feed: Feed) -> None:
        """Let the subscriptions arrive that are due and not cut off; none overtakes an earlier one."""
        publisher, subscriber = feed.pipe.writer, feed.pipe.reader
        assert subscriber is not None
        if (subscriber.name, publisher.name) in self._hub._cuts:
            return
        now = self._hub.clock()
        while feed.coming and feed.coming[0][0] <= now:
            feed.apply(*feed.coming.popleft()[1:])

    def flush_subscriptions(self) -> None:
        """Take in the subscriptions that have arrived."""
        self._check()
        with self._lock:
            for feed in self._readers.values():
                if feed.coming:
                    self._hear(feed)

    # Sending.

    def broadcast(self, frame: bytes) -> None:
        """Send a DATA frame to who subscribed to a prefix of it. Raises ValueError over `data_frame_bytes`."""
        if not self._usable:
            self._refuse()
        check_broadcast(self._limits, len(frame))
        frame = bytes(frame)
        with self._lock:
            self._sent[_DATA] += 1
            self._sent_bytes[_DATA] += len(frame)
            for feed in self._readers.values():
                if feed.coming:
                    self._hear(feed)
                if feed.wants(frame):
                    if feed.pipe.queued < feed.pipe.cap:
                        self._hub._transfer(feed.pipe, (frame,), None)
                    else:
                        self._hub._count(self, "dropped_full")

    def send(self, peer: str, link: Link, frames: Sequence[Buffer]) -> Receipt:
        """Send one CONTROL frame, or a BULK header with at most one chunk; see `Transport.send`."""
        if not self._usable:
            self._refuse()
        size = check_frames(self._limits, link, frames)
        with self._lock:
            route = self._routes.get(peer)
            if route is None:
                self._counts["refused_unreachable"] += 1
                raise PeerUnreachableError(f"{peer!r} is not connected")
            pipe = route.control if link == _CONTROL else route.bulk
            reader = pipe.reader
            if self._is_blocked(route, pipe):
                pipe.blocked = True
                self._counts["refused_blocked"] += 1
                raise SendBlockedError(f"sending to {peer!r}: {'full' if reader else 'not connected yet'}")
            self._sent[link] += 1
            self._sent_bytes[link] += size
            if reader is None or not reader._usable:
                self._hub._count(self, "dropped_dead")
                return DONE
            taken, loan = _take_over(frames, self._limits.zero_copy_bytes)
            self._hub._transfer(pipe, taken, loan)
            return DONE if loan is None else Receipt((loan,))

    def _is_blocked(self, route: _Route, pipe: Pipe) -> bool:
        if pipe.reader is None:
            # An earlier life of the peer takes everything, into the void; one that has not begun takes nothing.
            return self._hub._generations.get(route.target, 0) < route.generation
        return pipe.queued >= pipe.cap and pipe.reader._usable

    # Receiving.

    def receive(self, limit: int) -> list[Inbound]:
        """At most `limit` messages that are due; see `Transport.receive`."""
        if not self._usable:
            self._refuse()
        arrived: list[Inbound] = []
        data, control, bulk = self._inboxes
        if not data and not control and not bulk:
            return arrived
        with self._lock:
            now = self._hub.clock()
            self._take(control, now, arrived, limit - limit // 2)
            self._take(data, now, arrived, limit - limit // 4)
            self._take(bulk, now, arrived, limit)
            self._take(control, now, arrived, limit)
            self._take(data, now, arrived, limit)
        return arrived

    def descriptors(self) -> list[int]:
        """One eventfd, made on first use: a simulation needs none."""
        self._check()
        with self._lock:
            if self._eventfd < 0:
                self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._wake()
            return [self._eventfd]

    def is_ready(self) -> bool:
        """Whether a message is due, or a pipe can be written again."""
        self._check()
        with self._lock:
            now = self._hub.clock()
            data, control, bulk = self._inboxes
            if (data and data[0][0] <= now) or (control and control[0][0] <= now) or (bulk and bulk[0][0] <= now):
                return True
            if self._unblocked:
                return True
            if self._signalled:
                os.eventfd_read(self._eventfd)
                self._signalled = False
            return False

    def unblocked(self) -> list[tuple[str, Link]]:
        """Pipes that refused a frame and can take one again, each told once."""
        self._check()
        with self._lock:
            told, self._unblocked = self._unblocked, []
            return told

    def next_due_ns(self) -> int | None:
        """When the earliest message of this inbox is due, on the hub's clock; it may be past."""
        self._check()
        with self._lock:
            return min((inbox[0][0] for inbox in self._inboxes if inbox), default=None)

    # The end.

    def statistics(self) -> dict[str, int]:
        """Counters since the start. Faults are counted at the sender."""
        with self._lock:
            counts = dict(self._counts)
            for link in Link:
                name = link.name.lower()
                counts[f"{name}_sent_messages"] = self._sent[link]
                counts[f"{name}_sent_bytes"] = self._sent_bytes[link]
                counts[f"{name}_received_messages"] = self._received[link]
                counts[f"{name}_received_bytes"] = self._received_bytes[link]
            return counts

    def close(self, linger_s: float = 0.0) -> None:
        """Leave the hub. What was sent is under way already; what was not received is lost."""
        if self._closed or not self._usable:
            return
        with self._lock:
            self._usable, self._closed = False, True
            self._hub._members.pop((self.name, self._generation), None)
            for route in self._routes.values():
                if route.feed is not None:
                    route.feed.pipe.writer._readers.pop(self, None)
            for inbox in self._inboxes:
                for pipe in {id(entry[3]): entry[3] for entry in inbox}.values():
                    self._forget(pipe)
                    self._unblock(pipe)
            self._routes.clear()
            self._readers.clear()
            if self._eventfd >= 0:
                os.close(self._eventfd)
                self._eventfd = -1

    def abandon(self) -> None:
        """In a forked child: close the eventfd. In the process that opened the transport it does nothing."""
        if self._closed or not self._is_inherited():
            return
        self._closed = True
        if self._eventfd >= 0:
            os.close(self._eventfd)
            self._eventfd = -1


def _parse(endpoints: Endpoints) -> tuple[str, int]:
    """Name and generation. Raises AddressError."""
    found = []
    for address, link in zip(
        (endpoints.data, endpoints.control, endpoints.bulk), ("data", "control", "bulk"), strict=True
    ):
        match = _ADDRESS.fullmatch(address)
        if match is None or match.group(3) != link:
            raise AddressError(f"{address[:80]!r} is no {link} address of a member in memory")
        found.append((unquote(match.group(1)), int(match.group(2))))
    if len(set(found)) != 1:
        raise AddressError("the three addresses are of different members")
    return found[0]


def _take_over(frames: Sequence[Buffer], zero_copy_bytes: int) -> tuple[tuple[Buffer, ...], Loan | None]:
    """The message as it waits in an inbox, and a loan if a chunk in it still belongs to the sender."""
    first = bytes(frames[0])
    if len(frames) == 1:
        return (first,), None
    chunk = frames[1]
    if isinstance(chunk, bytes):
        return (first, memoryview(chunk)), None
    view = memoryview(chunk)
    if view.nbytes < zero_copy_bytes:
        return (first, memoryview(bytes(view))), None
    return (first, view.toreadonly()), Loan()
