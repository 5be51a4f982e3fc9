"""The transport over ZeroMQ: unix sockets on one host, tcp between hosts.

Four sockets are bound or shared (PUB and SUB for DATA, a ROUTER each for CONTROL and BULK), two connected for each peer
(a DEALER each for CONTROL and BULK). No heartbeats on DATA and BULK: a timeout would cut a long frame (libzmq issue
2709).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from transports.addresses import Site, check_endpoint, close_if_connected, is_v6
from transports.base import (
    DONE,
    Buffer,
    Endpoints,
    Inbound,
    Link,
    OneProcess,
    PeerUnreachableError,
    Receipt,
    SendBlockedError,
    SocketLimits,
    blank_statistics,
    check_broadcast,
    check_frames,
    size_of,
)
from transports.heap import keep_freed_memory
from transports.inlets import BulkInlet, ControlInlet, DataInlet, Inlet
from transports.sockets import Pipe, bind, failure, make_socket, sender, translated, zero_copy_frames

__all__ = ["ZeroMQTransport"]

_NOW = int(zmq.DONTWAIT)
_NOW_AND_MORE = int(zmq.DONTWAIT | zmq.SNDMORE)
_EVENTS, _OUT = int(zmq.EVENTS), int(zmq.POLLOUT)
_DATA, _CONTROL, _BULK = Link.DATA, Link.CONTROL, Link.BULK

_DESCRIPTORS_A_PEER = 8
"""Two mailboxes and three connections of ours, three connections of the peer's."""

_TERM_GRACE_S = 1.0
"""What `close` waits for libzmq beyond the linger time."""


class _Peer:
    """What was connected for one peer."""

    __slots__ = ("bulk", "control", "endpoints")

    def __init__(self, endpoints: Endpoints, control: Pipe, bulk: Pipe) -> None:
        self.endpoints, self.control, self.bulk = endpoints, control, bulk


class ZeroMQTransport(OneProcess):
    """A member's sockets.

    `listen` is `"ipc"` (unix sockets in `directory`, which must be this user's alone; None makes one and removes it at
    the end), `"tcp://ADDRESS"`, or `"tcp://ADDRESS:PORT"`, where the port is that of CONTROL. `name` only salts file
    names. Raises AddressError if it cannot listen there.
    """

    def __init__(
        self,
        *,
        listen: str = "ipc",
        directory: Path | None = None,
        name: str = "",
        limits: SocketLimits | None = None,
    ) -> None:
        self._limits = limits = limits or SocketLimits()
        self._site = Site.choose(listen, directory, name, wildcard=limits.wildcard)
        keep_freed_memory()
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, limits.sockets)
        self._peers: dict[str, _Peer] = {}
        self._feeds: dict[str, int] = {}  # DATA endpoint -> peers that publish there
        self._prefixes: set[bytes] = set()
        self._counts = blank_statistics("zero_copy", "copied_over_cap", "refused_descriptors", "dropped_interrupted")
        self._stash: list[Inbound] = []
        self._blocked: dict[int, Pipe] = {}
        self._unblocked: list[tuple[str, Link]] = []
        self._broadcasts = self._broadcast_bytes = 0
        self._epoll = select.epoll()
        try:
            with translated(f"listening on {listen!r}"):
                self._open()
        except BaseException:
            self._context.destroy(linger=0)
            self._epoll.close()
            self._site.clear()
            raise
        self._poll: Any = self._epoll.poll
        self._begin()

    # Opening.

    def _open(self) -> None:
        limits, where = self._limits, self._site.addresses
        self._publisher = self._make(zmq.PUB, _DATA)
        subscriber = self._make(zmq.SUB, _DATA)
        control = self._make(zmq.ROUTER, _CONTROL)
        bulk = self._make(zmq.ROUTER, _BULK)
        self._control, self._bulk = (
            ControlInlet(control, _CONTROL),
            BulkInlet(bulk, _BULK, None, limits.bulk_header_bytes),
        )
        self._data = [DataInlet(subscriber, _DATA)]
        self._inlets: dict[int, Inlet] = {
            int(inlet.socket.get(zmq.FD)): inlet for inlet in (self._control, *self._data, self._bulk)
        }
        for descriptor in self._inlets:
            self._epoll.register(descriptor, select.EPOLLIN)
        self._send_data: Any = sender(self._publisher)
        self._endpoints = Endpoints(
            bind(self._publisher, where.data), bind(control, where.control), bind(bulk, where.bulk)
        )

    def _make(self, kind: int, link: Link) -> zmq.Socket[bytes]:
        return make_socket(self._context, kind, link, self._limits)

    # Peers.

    @property
    def endpoints(self) -> Endpoints:
        """What was bound, with the ports resolved. For a wildcard address the host is the wildcard."""
        return self._endpoints

    def connect(self, peer: str, endpoints: Endpoints) -> None:
        """Connect to a peer, in the background. Raises AddressError, SendBlockedError when descriptors run out."""
        self._check()
        known = self._peers.get(peer)
        if known is not None and known.endpoints == endpoints:
            return
        for address in (endpoints.data, endpoints.control, endpoints.bulk):
            check_endpoint(address)
        self._check_descriptors()
        made: list[Pipe] = []
        try:
            with translated(f"connecting to {peer!r}"):
                made.append(self._pipe(peer, _CONTROL, endpoints.control))
                made.append(self._pipe(peer, _BULK, endpoints.bulk))
                self._follow(endpoints.data)
        except BaseException:
            for pipe in made:
                pipe.socket.close(linger=0)
            raise
        if known is not None:
            self._drop(known)
        self._peers[peer] = _Peer(endpoints, *made)

    def disconnect(self, peer: str) -> None:
        """Drop the connections to a peer and what waits on them."""
        self._check()
        known = self._peers.pop(peer, None)
        if known is not None:
            self._drop(known)

    def _pipe(self, peer: str, link: Link, endpoint: str) -> Pipe:
        socket = self._make(zmq.DEALER, link)
        try:
            socket.set(zmq.IPV6, int(is_v6(endpoint)))
            socket.connect(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return Pipe(socket, link, peer, endpoint)

    def _drop(self, known: _Peer) -> None:
        for pipe in (known.control, known.bulk):
            self._clear_block(pipe)
            pipe.socket.close(linger=0)
        self._unfollow(known.endpoints.data)

    def _follow(self, endpoint: str) -> None:
        inlet = self._data[0]
        if endpoint not in self._feeds:  # SUB ignores a second connect, but one disconnect would end both
            inlet.socket.set(zmq.IPV6, int(is_v6(endpoint)))
            inlet.socket.connect(endpoint)
            inlet.hot = True
        self._feeds[endpoint] = self._feeds.get(endpoint, 0) + 1

    def _unfollow(self, endpoint: str) -> None:
        self._feeds[endpoint] -= 1
        if not self._feeds[endpoint]:
            del self._feeds[endpoint]
            inlet = self._data[0]
            inlet.hot = True
            with contextlib.suppress(zmq.ZMQError):
                inlet.socket.disconnect(endpoint)

    def _check_descriptors(self) -> None:
        ceiling = resource.getrlimit(resource.RLIMIT_NOFILE)[0] * self._limits.descriptors_share
        if len(os.listdir("/proc/self/fd")) + _DESCRIPTORS_A_PEER > ceiling:
            self._counts["refused_descriptors"] += 1
            raise SendBlockedError(
                f"another peer would take the process over {ceiling:.0f} descriptors; raise RLIMIT_NOFILE"
            )

    # Subscriptions.

    def subscribe(self, prefix: bytes) -> None:
        """Ask every publisher for frames that start with these bytes. Raises ValueError over `limits.prefixes`."""
        self._check()
        if prefix in self._prefixes:
            return
        if len(self._prefixes) >= self._limits.prefixes:
            raise ValueError(f"more than {self._limits.prefixes} prefixes")
        self._prefixes.add(prefix)
        self._filter(zmq.SUBSCRIBE, prefix)

    def unsubscribe(self, prefix: bytes) -> None:
        """Take back `subscribe`."""
        self._check()
        if prefix in self._prefixes:
            self._prefixes.discard(prefix)
            self._filter(zmq.UNSUBSCRIBE, prefix)

    def _filter(self, option: int, prefix: bytes) -> None:
        for inlet in self._data:
            inlet.socket.set(option, prefix)
            inlet.hot = True

    def flush_subscriptions(self) -> None:
        """Take in the subscriptions that have arrived, and what readers have taken from their queues.

        Unasked, libzmq does so with every broadcast, but only about once a millisecond.
        """
        self._check()
        self._publisher.get(_EVENTS)

    # Sending.

    def broadcast(self, frame: bytes) -> None:
        """Send a DATA frame to who subscribed to a prefix of it. Raises ValueError over `data_frame_bytes`."""
        if not self._usable:
            self._refuse()
        size = len(frame)
        if size > self._limits.data_frame_bytes:
            check_broadcast(self._limits, size)
        try:
            self._send_data(frame, _NOW)
        except zmq.ZMQError as error:
            raise failure(error, "broadcasting") from error
        self._broadcasts += 1
        self._broadcast_bytes += size

    def send(self, peer: str, link: Link, frames: Sequence[Buffer]) -> Receipt:
        """Send one CONTROL frame, or a BULK header with at most one chunk; see `Transport.send`."""
        if not self._usable:
            self._refuse()
        size = check_frames(self._limits, link, frames)
        known = self._peers.get(peer)
        if known is None:
            self._counts["refused_unreachable"] += 1
            raise PeerUnreachableError(f"{peer!r} is not connected")
        pipe = known.control if link == 1 else known.bulk
        try:
            if len(frames) == 1:
                pipe.send(frames[0], _NOW)
                receipt = DONE
            else:
                receipt = self._send_two(known, pipe, frames)
        except zmq.ZMQError as error:
            self._note_block(pipe, error)
            raise failure(error, f"sending to {peer!r}") from error
        name = "control" if link == 1 else "bulk"
        self._counts[f"{name}_sent_messages"] += 1
        self._counts[f"{name}_sent_bytes"] += size
        return receipt

    def _send_two(self, known: _Peer, pipe: Pipe, frames: Sequence[Buffer]) -> Receipt:
        # libzmq counts messages, not frames, against the high-water mark: if it takes the header, it takes the chunk,
        # unless the connection ends in between; then it takes the header back and the refusal is of both.
        header, chunk = frames
        try:
            pipe.send(header, _NOW_AND_MORE)
            if not self._is_zero_copy(chunk):
                pipe.send(chunk, _NOW)
                return DONE
            tracker = pipe.send(chunk, _NOW, copy=False, track=True)
        except zmq.ZMQError:
            raise
        except BaseException:
            # A signal handler raised between the frames: the next message would become part of this one.
            self._counts["dropped_interrupted"] += 1
            self._reset(known, pipe)
            raise
        self._counts["zero_copy"] += 1
        return Receipt((tracker,))

    def _is_zero_copy(self, chunk: Buffer) -> bool:
        if size_of(chunk) < max(self._limits.zero_copy_bytes, zmq.COPY_THRESHOLD):
            return False
        if (in_flight := zero_copy_frames()) is None or in_flight >= self._limits.zero_copy_frames:
            self._counts["copied_over_cap"] += 1
            return False
        return True

    def _reset(self, known: _Peer, pipe: Pipe) -> None:
        self._clear_block(pipe)
        pipe.socket.close(linger=0)
        fresh = self._pipe(pipe.peer, pipe.link, pipe.endpoint)
        if pipe is known.control:
            known.control = fresh
        else:
            known.bulk = fresh

    def _note_block(self, pipe: Pipe, error: zmq.ZMQError) -> None:
        if error.errno == errno.EAGAIN:
            self._counts["refused_blocked"] += 1
            if not pipe.blocked:
                pipe.blocked = True
                self._blocked[pipe.fd] = pipe
                self._epoll.register(pipe.fd, select.EPOLLIN)

    def _clear_block(self, pipe: Pipe) -> None:
        if pipe.blocked:
            pipe.blocked = False
            del self._blocked[pipe.fd]
            self._epoll.unregister(pipe.fd)

    # Receiving.

    def receive(self, limit: int) -> list[Inbound]:
        """At most `limit` messages that are here; see `Transport.receive`."""
        if not self._usable:
            self._refuse()
        self._heat()
        arrived: list[Inbound] = []
        if self._stash:
            arrived, self._stash = self._stash[:limit], self._stash[limit:]
        try:
            self._take_all(arrived, limit)
        except zmq.ZMQError as error:
            raise failure(error, "receiving") from error
        except BaseException:
            self._stash = arrived + self._stash  # a signal handler raised: what was taken comes with the next call
            raise
        return arrived

    def _take_all(self, arrived: list[Inbound], limit: int) -> None:
        control, bulk = self._control, self._bulk
        if control.hot:
            control.take(arrived, limit - limit // 2)
        for inlet in self._data:
            if inlet.hot:
                inlet.take(arrived, limit - limit // 4)
        if bulk.hot:
            bulk.take(arrived, limit)
        if arrived and len(arrived) < limit:
            self._take_more(arrived, limit)

    def _take_more(self, arrived: list[Inbound], limit: int) -> None:
        """Give the room that the others left to who was cut short."""
        for inlet in (self._control, *self._data):
            if inlet.hot:
                inlet.take(arrived, limit)

    def _heat(self) -> None:
        for descriptor, _ in self._poll(0):
            inlet = self._inlets.get(descriptor)
            if inlet is not None:
                inlet.hot = True

    def descriptors(self) -> list[int]:
        """One descriptor, of an epoll over the inbound sockets and the pipes that are blocked."""
        self._check()
        return [self._epoll.fileno()]

    def is_ready(self) -> bool:
        """Whether there is something to receive, or a pipe that can be written again."""
        if not self._usable:
            self._refuse()
        if self._stash or self._unblocked:
            return True
        self._heat()
        ready = False
        for inlet in self._inlets.values():
            if inlet.hot and inlet.readable():
                ready = True
        if self._blocked:
            self._look_for_room()
        return ready or bool(self._unblocked)

    def _look_for_room(self) -> None:
        for pipe in list(self._blocked.values()):
            if int(pipe.socket.get(_EVENTS)) & _OUT:
                self._clear_block(pipe)
                self._unblocked.append((pipe.peer, pipe.link))

    def unblocked(self) -> list[tuple[str, Link]]:
        """Pipes that refused a frame and can take one again, each told once."""
        self._check()
        if self._blocked:
            self._look_for_room()
        told, self._unblocked = self._unblocked, []
        return told

    def next_due_ns(self) -> int | None:
        """None: nobody knows when the next frame arrives."""
        self._check()
        return None

    # The end.

    def statistics(self) -> dict[str, int]:
        """Counters since the start."""
        counts = dict(self._counts)
        counts["data_sent_messages"], counts["data_sent_bytes"] = self._broadcasts, self._broadcast_bytes
        for inlet in self._inlets.values():
            name = inlet.link.name.lower()
            counts[f"{name}_received_messages"] += inlet.messages
            counts[f"{name}_received_bytes"] += inlet.bytes
            counts["dropped_malformed"] += inlet.malformed
            counts["dropped_interrupted"] += inlet.interrupted
        return counts

    def close(self, linger_s: float = 0.0) -> None:
        """Send what waits for at most `linger_s`, then release everything; returns within a second more."""
        if self._closed or not self._usable:
            return
        self._usable, self._closed = False, True
        linger_ms = max(0, int(linger_s * 1000))
        for inlet in self._inlets.values():
            inlet.socket.close(linger=0)
        for known in self._peers.values():
            known.control.socket.close(linger=linger_ms)
            known.bulk.socket.close(linger=linger_ms)
        self._publisher.close(linger=linger_ms)
        self._epoll.close()
        # A thread, because libzmq's term has no deadline of its own.
        end = threading.Thread(target=self._context.term, name="fabric-transport-close", daemon=True)
        end.start()
        end.join(linger_ms / 1000 + _TERM_GRACE_S)
        self._counts["close_overran"] = int(end.is_alive())
        self._stash.clear()
        self._site.clear()

    def abandon(self) -> None:
        """In a forked child: close the inherited connections, so that peers see the parent's end as an end.

        Nothing is sent and no zmq call is made. In the process that opened the transport it does nothing.
        """
        if self._closed or not self._is_inherited():
            return
        self._closed = True
        ours = {self._endpoints.data, self._endpoints.control, self._endpoints.bulk}
        for known in self._peers.values():
            ours |= {known.endpoints.data, known.endpoints.control, known.endpoints.bulk}
        self._epoll.close()
        for entry in os.listdir("/proc/self/fd"):
            close_if_connected(int(entry), ours)
