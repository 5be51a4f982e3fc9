"""Sockets of ZeroMQ with every bound set, the outgoing pipe, and what libzmq's errors mean here."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Any

import zmq
from zmq.utils.garbage import gc as zero_copy

from transports.addresses import is_v6
from transports.base import (
    AddressError,
    Link,
    PeerUnreachableError,
    SendBlockedError,
    SocketLimits,
    TransportClosedError,
    TransportError,
)

__all__ = ["Pipe", "bind", "failure", "make_socket", "sender", "translated", "zero_copy_frames"]

_KEEPALIVE: dict[int, int] = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
"""DATA and BULK have no heartbeats; the kernel finds a vanished host within 60 s and harms no long frame."""

_MEANING: dict[int, type[TransportError]] = {
    errno.EAGAIN: SendBlockedError,
    errno.EMFILE: SendBlockedError,
    errno.ENFILE: SendBlockedError,
    errno.EHOSTUNREACH: PeerUnreachableError,
    errno.ENOTSOCK: TransportClosedError,
    int(zmq.ETERM): TransportClosedError,
    errno.EINVAL: AddressError,
    errno.EACCES: AddressError,
    errno.ENOENT: AddressError,
    errno.ENODEV: AddressError,
    errno.EADDRINUSE: AddressError,
    errno.EADDRNOTAVAIL: AddressError,
    errno.ENAMETOOLONG: AddressError,
    errno.EPROTONOSUPPORT: AddressError,
    int(zmq.ENOCOMPATPROTO): AddressError,
}
"""What each error of libzmq means here; any other is a TransportError."""

_process = {"exiting": False}


@atexit.register
def _note_exit() -> None:
    # From here on pyzmq no longer keeps zero-copy buffers alive.
    _process["exiting"] = True


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise what libzmq's errors mean, with what was being done."""
    try:
        yield
    except zmq.ZMQError as error:
        raise failure(error, what) from error


def failure(error: zmq.ZMQError, what: str) -> TransportError:
    """The error to raise for one of libzmq's."""
    return _MEANING.get(error.errno or 0, TransportError)(f"{what}: {error.strerror}")


def zero_copy_frames() -> int | None:
    """Frames of this process that libzmq reads from their owners' memory; None if no more may be added.

    That is so while the interpreter exits, when pyzmq no longer keeps buffers alive.
    """
    return None if _process["exiting"] else len(zero_copy.refs)


def sender(socket: zmq.Socket[bytes]) -> Any:  # noqa: ANN401 - a method of a compiled class
    """`socket.send` without pyzmq's wrapper, which only looks for options of draft sockets and takes 0.2 us."""
    return super(zmq.Socket, socket).send


class Pipe:
    """One outgoing connection to a peer."""

    __slots__ = ("blocked", "endpoint", "fd", "link", "peer", "send", "socket")

    def __init__(self, socket: zmq.Socket[bytes], link: Link, peer: str, endpoint: str) -> None:
        self.socket, self.link, self.peer, self.endpoint = socket, link, peer, endpoint
        self.send = sender(socket)
        self.fd = int(socket.get(zmq.FD))
        self.blocked = False


def make_socket(context: zmq.Context[Any], kind: int, link: Link, limits: SocketLimits) -> zmq.Socket[bytes]:
    """A socket with every bound set; nothing is left to libzmq's defaults, most of which are none."""
    frames = (limits.data_frames, limits.control_frames, limits.bulk_frames)[link]
    largest = (
        limits.data_frame_bytes,
        limits.control_frame_bytes,
        max(limits.bulk_header_bytes, limits.bulk_chunk_bytes),
    )[link]
    options: dict[int, int] = {
        zmq.SNDHWM: frames,
        zmq.RCVHWM: frames,
        zmq.MAXMSGSIZE: largest,
        zmq.LINGER: 0,
        zmq.HANDSHAKE_IVL: limits.handshake_ms,
        zmq.CONNECT_TIMEOUT: limits.connect_ms,
        zmq.RECONNECT_IVL: limits.reconnect_ms,
        zmq.RECONNECT_IVL_MAX: limits.reconnect_max_ms,
        zmq.BACKLOG: limits.backlog,
        **_KEEPALIVE,
    }
    if link is Link.CONTROL:
        options[zmq.HEARTBEAT_IVL] = limits.heartbeat_ms
        options[zmq.HEARTBEAT_TIMEOUT] = options[zmq.HEARTBEAT_TTL] = limits.heartbeat_timeout_ms
    if kind == zmq.DEALER:
        options[zmq.IMMEDIATE] = 1  # a send to a peer that is not there fails instead of waiting for it
    if kind == zmq.ROUTER:
        options[zmq.ROUTER_MANDATORY] = 1  # nothing is sent here; if it ever is, not into the void
    socket: zmq.Socket[bytes] = context.socket(kind)
    for option, value in options.items():
        socket.set(option, value)
    return socket


def bind(socket: zmq.Socket[bytes], address: str) -> str:
    """Bind, and say where: the address with its port. The kernel refuses other users on ipc."""
    if address.startswith("ipc://"):
        socket.set(zmq.IPC_FILTER_UID, os.geteuid())
    else:
        socket.set(zmq.IPV6, int(is_v6(address)))
    socket.bind(address)
    resolved = socket.get(zmq.LAST_ENDPOINT)
    return bytes(resolved).rstrip(b"\0").decode()
