"""The inbound sockets of the ZeroMQ transport: frames into messages, as cheaply as pyzmq allows.

Two facts of libzmq shape the code. A socket's descriptor tells of news once, until somebody asks `EVENTS`; so an inlet
that was seen empty is left alone until its descriptor fires (`Inlet.hot`). And asking an empty socket for a frame costs
2.7 us, asking `EVENTS` 1.2 us, asking one epoll about all descriptors 0.3 us.
"""

from __future__ import annotations

from typing import Any

import zmq

from transports.base import Buffer, Inbound, Link

__all__ = ["BulkInlet", "ControlInlet", "DataInlet", "Inlet"]

# Plain integers: the enums of pyzmq and our own IntEnum cost 0.1 us a look-up on the hot path.
_NOW = int(zmq.DONTWAIT)
_EVENTS, _MORE, _IN = int(zmq.EVENTS), int(zmq.RCVMORE), int(zmq.POLLIN)
_DATA, _CONTROL, _BULK = Link.DATA, Link.CONTROL, Link.BULK


class Inlet:
    """One inbound socket. `hot` means that it may have something; it is set when in doubt."""

    __slots__ = (
        "bytes",
        "get",
        "header_limit",
        "hot",
        "interrupted",
        "link",
        "malformed",
        "messages",
        "peer",
        "recv",
        "socket",
        "torn",
    )

    def __init__(self, socket: zmq.Socket[bytes], link: Link, peer: str | None = None, header_limit: int = 0) -> None:
        self.socket, self.link, self.peer, self.header_limit = socket, link, peer, header_limit
        self.recv: Any = socket.recv
        self.get: Any = socket.get
        self.hot = True
        self.torn = False
        self.messages = self.bytes = self.malformed = self.interrupted = 0

    def readable(self) -> bool:
        """Ask the socket; also re-arms its descriptor."""
        self.hot = bool(self.get(_EVENTS) & _IN)
        return self.hot

    def take(self, arrived: list[Inbound], cap: int) -> None:
        """Append messages until the socket is empty or `arrived` has `cap` of them."""
        if self.torn:
            self.interrupted += bool(self.get(_MORE))
            self._skip_rest()
        room = cap - len(arrived)
        try:
            # One message is the usual case, and then EVENTS is cheaper than being told by an exception.
            if room > 0:
                self._take_one(arrived)
                if room > 1 and self.readable():
                    for _ in range(room - 1):
                        self._take_one(arrived)
        except zmq.Again:
            self.hot = False
        except zmq.ZMQError:
            raise
        except BaseException:
            self.torn = True  # a signal handler raised between two frames of a message
            raise

    def _take_one(self, arrived: list[Inbound]) -> None:
        raise NotImplementedError

    def _malformed(self) -> None:
        self.malformed += 1
        self._skip_rest()

    def _skip_rest(self) -> None:
        # Finite: libzmq shows a message only when all of its parts are here.
        while self.get(_MORE):
            self.recv(_NOW, copy=False)
        self.torn = False


class DataInlet(Inlet):
    """The subscriptions. With authentication there is one of these for each publisher, with its name in `peer`."""

    __slots__ = ()

    def _take_one(self, arrived: list[Inbound]) -> None:
        frame = self.recv(_NOW)
        if self.get(_MORE):
            self._malformed()
            return
        self.messages += 1
        self.bytes += len(frame)
        arrived.append(Inbound(_DATA, self.peer, [frame]))


class ControlInlet(Inlet):
    """The ROUTER for CONTROL: the connection's identity, which says nothing, then one frame."""

    __slots__ = ()

    def _take_one(self, arrived: list[Inbound]) -> None:
        recv = self.recv
        recv(_NOW)
        frame = recv(_NOW)
        if self.get(_MORE):
            self._malformed()
            return
        self.messages += 1
        self.bytes += len(frame)
        arrived.append(Inbound(_CONTROL, self.peer, [frame]))


class BulkInlet(Inlet):
    """The ROUTER for BULK: identity, header, perhaps a chunk, which is not copied."""

    __slots__ = ()

    def _take_one(self, arrived: list[Inbound]) -> None:
        recv = self.recv
        recv(_NOW)
        header = recv(_NOW)
        frames: list[Buffer] = [header]
        self.bytes += len(header)
        if self.get(_MORE):
            chunk = recv(_NOW, copy=False)
            if chunk.more:
                self._malformed()
                return
            # Read-only, because libzmq's own frames are writable and another view may exist.
            frames.append(memoryview(chunk.buffer).toreadonly())
            self.bytes += frames[1].nbytes  # type: ignore[union-attr]
        if len(header) > self.header_limit:
            self.malformed += 1
            return
        self.messages += 1
        arrived.append(Inbound(_BULK, self.peer, frames))
