"""The contract of every transport: three links, four errors, and calls that never block.

The topology is simplex. A member binds one address a link. For each peer it connects one subscription to the peer's
DATA address, and one outgoing pipe each to its CONTROL and BULK addresses. It sends on what it connected, broadcasts on
its own DATA address, and receives on what it bound and on its subscriptions; a reply travels over the replier's own
pipe.

One thread uses a transport at a time, not always the same one; a full memory fence lies between two of them.
"""

from __future__ import annotations

import enum
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeAlias

__all__ = [
    "DONE",
    "AddressError",
    "Buffer",
    "Endpoints",
    "Inbound",
    "Link",
    "OneProcess",
    "PeerUnreachableError",
    "Pending",
    "Receipt",
    "SendBlockedError",
    "SocketLimits",
    "Transport",
    "TransportClosedError",
    "TransportError",
    "blank_statistics",
    "check_broadcast",
    "check_frames",
    "size_of",
]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes."""


class TransportError(Exception):
    """The root of all errors of the transports."""


class AddressError(TransportError, ValueError):
    """An address is malformed, not allowed, or cannot be bound."""


class PeerUnreachableError(TransportError):
    """The peer was never connected, or was disconnected, by this side."""


class SendBlockedError(TransportError):
    """Nothing was taken: the pipe is full or not connected yet, or descriptors run out. Try again later."""


class TransportClosedError(TransportError):
    """The transport was closed, or belongs to the parent of this forked process."""


class Link(enum.IntEnum):
    """The three ways between two members, each with its own bounds."""

    DATA = 0
    """Broadcast of bursts to whoever subscribed; may drop."""

    CONTROL = 1
    """Small frames to one peer."""

    BULK = 2
    """A header and at most one chunk to one peer."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The addresses of one member, as others connect to them."""

    data: str
    control: str
    bulk: str


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """Every bound of a transport. Frames are counted per pipe, that is per sender, receiver and link."""

    data_frame_bytes: int = 128 * 1024
    """Largest DATA frame: a burst of 64 KiB and as much again for its header and one oversize record."""

    control_frame_bytes: int = 256 * 1024
    """Largest CONTROL frame."""

    bulk_header_bytes: int = 64 * 1024
    """Largest header of a BULK message."""

    bulk_chunk_bytes: int = 4 * 1024 * 1024
    """Largest chunk of a BULK message."""

    data_frames: int = 1000
    """DATA frames that wait for one subscriber, at each end, before more are dropped."""

    control_frames: int = 4096
    """CONTROL frames that wait for one peer, at each end, before `SendBlockedError`."""

    bulk_frames: int = 32
    """BULK messages that wait for one peer, at each end, before `SendBlockedError`."""

    zero_copy_bytes: int = 64 * 1024
    """Chunks from this size on are sent from the caller's memory; a zero-copy frame costs 5-15 us by itself."""

    zero_copy_frames: int = 1000
    """Frames of this process in flight without a copy. libzmq stalls at 2,000 freed while the GIL is held."""

    handshake_ms: int = 5000
    """A connection that has not shaken hands by then is dropped."""

    heartbeat_ms: int = 1000
    """Period of heartbeats, on CONTROL only: on a link with long frames they would cut the connection mid-frame."""

    heartbeat_timeout_ms: int = 3000
    """Silence after which a CONTROL connection is taken for dead."""

    connect_ms: int = 5000
    """A tcp connection attempt is given up after this time, and tried again."""

    reconnect_ms: int = 20
    """First wait before a broken connection is tried again; it doubles up to `reconnect_max_ms`."""

    reconnect_max_ms: int = 1000
    """Longest wait before a broken connection is tried again."""

    backlog: int = 128
    """Connections that wait to be accepted."""

    sockets: int = 1024
    """Sockets of this transport: four, and two a peer."""

    prefixes: int = 4096
    """Subscribed prefixes. They travel as messages, so that very many could be dropped at a reconnect."""

    descriptors_share: float = 0.8
    """Share of RLIMIT_NOFILE from which `connect` refuses: libzmq aborts when an ipc accept finds none left."""

    wildcard: bool = False
    """Whether an address that means every interface may be bound."""


class Inbound:
    """One received message.

    `peer` is the authenticated name of the sender, None without authentication. `frames` is one `bytes` on DATA and
    CONTROL; on BULK a `bytes` header and, if there is one, a read-only memoryview of the chunk.
    """

    __slots__ = ("frames", "link", "peer")

    def __init__(self, link: Link, peer: str | None, frames: list[Buffer]) -> None:
        self.link = link
        self.peer = peer
        self.frames = frames

    def __repr__(self) -> str:
        sizes = [size_of(frame) for frame in self.frames]
        return f"Inbound({self.link.name}, peer={self.peer!r}, bytes={sizes})"


class Pending(Protocol):
    """Anything that knows whether it still needs a buffer."""

    @property
    def done(self) -> bool:
        """Whether the buffer is no longer needed."""
        ...


class Receipt:
    """What `send` hands back: when the buffers may be used again. It says nothing about delivery."""

    __slots__ = ("_pending",)

    def __init__(self, pending: Sequence[Pending] = ()) -> None:
        self._pending = tuple(pending)

    @property
    def done(self) -> bool:
        """Whether all buffers handed over may be changed or freed."""
        pending = self._pending
        if pending and all(part.done for part in pending):
            self._pending = pending = ()
        return not pending


DONE = Receipt()
"""The receipt of frames that were copied."""


class Transport(Protocol):
    """Buffers between members. No call blocks except `close`, which is bounded."""

    @property
    def endpoints(self) -> Endpoints:
        """What was bound, with the ports resolved."""
        ...

    def connect(self, peer: str, endpoints: Endpoints) -> None:
        """Connect to a peer, in the background. The same endpoints again do nothing, others replace the connections.

        Raises AddressError, and SendBlockedError when descriptors or sockets run out.
        """
        ...

    def disconnect(self, peer: str) -> None:
        """Drop the connections to a peer and what waits on them. An unknown peer is no error."""
        ...

    def subscribe(self, prefix: bytes) -> None:
        """Ask every connected publisher for the DATA frames that start with these bytes. Twice is once."""
        ...

    def unsubscribe(self, prefix: bytes) -> None:
        """Take back `subscribe`. An unknown prefix is no error."""
        ...

    def flush_subscriptions(self) -> None:
        """Take in the subscriptions that have arrived, so that the next broadcast reaches them."""
        ...

    def broadcast(self, frame: bytes) -> None:
        """Send a DATA frame to every peer that subscribed to a prefix of it; dropped for a peer whose pipe is full.

        Raises ValueError for a frame over `data_frame_bytes`.
        """
        ...

    def send(self, peer: str, link: Link, frames: Sequence[Buffer]) -> Receipt:
        """Send one CONTROL frame, or a BULK header with at most one chunk. All or nothing.

        The buffers stay unchanged until `receipt.done`. Raises SendBlockedError, PeerUnreachableError, and ValueError
        for frames that are too many or too large.
        """
        ...

    def receive(self, limit: int) -> list[Inbound]:
        """At most `limit` messages that are here: CONTROL first, then DATA, then BULK.

        From a limit of four on, no link starves another: while others wait, CONTROL takes at most half, DATA half of
        the rest.
        """
        ...

    def descriptors(self) -> list[int]:
        """File descriptors that become readable when something may have happened; the same ones for life."""
        ...

    def is_ready(self) -> bool:
        """Whether there is work: messages to receive, or peers in `unblocked`.

        Must be asked before sleeping on `descriptors`, because it re-arms them: what comes after it returned False
        makes one readable.
        """
        ...

    def unblocked(self) -> list[tuple[str, Link]]:
        """Pipes that refused a frame and can take one again, each told once."""
        ...

    def next_due_ns(self) -> int | None:
        """When the next delayed message arrives, on the transport's clock; None if that cannot be known."""
        ...

    def statistics(self) -> dict[str, int]:
        """Counters since the start: messages and bytes by link and direction, drops and refusals by reason."""
        ...

    def abandon(self) -> None:
        """In a forked child: let go of what was inherited, without a word to any peer."""
        ...

    def close(self, linger_s: float = 0.0) -> None:
        """Send what waits for at most `linger_s` seconds, then release everything. Again does nothing.

        Everything else raises TransportClosedError afterwards, except `endpoints` and `statistics`.
        """
        ...


class OneProcess:
    """What may be used from `_begin` until it is closed, and only in the process that opened it."""

    _usable = False
    _closed = False

    def _begin(self) -> None:
        self._usable = True
        _alive.add(self)

    def _check(self) -> None:
        if not self._usable:
            self._refuse()

    def _refuse(self) -> NoReturn:
        if self._is_inherited() and not self._closed:
            raise TransportClosedError("the transport belongs to the parent of this forked process")
        raise TransportClosedError("the transport is closed")

    def _is_inherited(self) -> bool:
        return any(self is one for one in _inherited)


_alive: weakref.WeakSet[OneProcess] = weakref.WeakSet()
_inherited: list[OneProcess] = []


def _after_fork() -> None:
    # A flag, because getpid in every call costs 0.15 us. The list keeps what was inherited alive for good: if pyzmq's
    # sockets were collected in the child, they would warn about being open.
    _inherited.extend(_alive)
    for one in _inherited:
        one._usable = False


os.register_at_fork(after_in_child=_after_fork)


def size_of(buffer: Buffer) -> int:
    """Bytes of a buffer, whatever its items are."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


def check_frames(limits: SocketLimits, link: Link, frames: Sequence[Buffer]) -> int:
    """Total bytes of a message that is fit to send.

    Raises ValueError if the link takes no such message: wrong number of frames, or one over its limit.
    """
    count = len(frames)
    if link == Link.CONTROL and count == 1:
        return _within(frames[0], limits.control_frame_bytes, "CONTROL frame")
    if link == Link.BULK and 1 <= count <= 2:
        size = _within(frames[0], limits.bulk_header_bytes, "BULK header")
        return size if count == 1 else size + _within(frames[1], limits.bulk_chunk_bytes, "BULK chunk")
    raise ValueError(f"{count} frames cannot be sent on {Link(link).name}")


def _within(frame: Buffer, limit: int, what: str) -> int:
    size = size_of(frame)
    if size > limit:
        raise ValueError(f"a {what} of {size} bytes is over the limit of {limit}")
    return size


def check_broadcast(limits: SocketLimits, size: int) -> None:
    """Raise ValueError if a DATA frame of `size` bytes is over its limit."""
    if size > limits.data_frame_bytes:
        raise ValueError(f"a DATA frame of {size} bytes is over the limit of {limits.data_frame_bytes}")


def blank_statistics(*reasons: str) -> dict[str, int]:
    """The counters that every transport has, at zero, and those of its own `reasons`."""
    counters = {
        f"{link.name.lower()}_{way}_{unit}": 0
        for link in Link
        for way in ("sent", "received")
        for unit in ("messages", "bytes")
    }
    counters.update(dict.fromkeys(("refused_blocked", "refused_unreachable", "dropped_malformed", *reasons), 0))
    return counters
