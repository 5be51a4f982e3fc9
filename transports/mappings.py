"""What one process reads of the arenas of others: segments that were handed over, and what is still looked at."""

from __future__ import annotations

import os
import socket
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import numpy as np

from transports.arena import Arena
from transports.base import OneProcess
from transports.segments import (
    PACKET_BYTES_MAX,
    Kind,
    MalformedSegmentError,
    Place,
    Segment,
    check_segment,
    is_of_this_user,
    is_within_share,
    map_segment,
    pack_greeting,
    pack_packet,
    unpack_packet,
)

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Mappings", "Writer"]

Room = np.ndarray[Any, Any]

DESCRIPTORS_A_PACKET_MAX: Final = 8
"""Descriptors of one packet that are taken in, to be closed: one is all that belongs there."""
PACKETS_A_TURN: Final = 64
"""Packets of one writer that are read before the others have their turn."""
_BYTE: Final = np.dtype(np.uint8)


class _Reference(weakref.ref[Room]):
    """Tells that the last view of a slot died. Its callback is `deque.append` itself: no lock, no Python."""

    __slots__ = ("peer", "place", "segment")

    peer: str
    place: Place
    segment: Segment


class Connection(Protocol):
    """To the arena of a peer: a socket, or what a simulated world has instead."""

    def send(self, packet: bytes, /) -> int: ...
    def close(self) -> None: ...


class Writer:
    """One peer whose arena is mapped."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.segments: dict[int, Segment] = {}


class Mappings(OneProcess):
    """The arenas that this process reads; `own` is read without a socket under the name `name`."""

    def __init__(self, name: str, incarnation: int, *, own: Arena | None = None, own_key: str = "") -> None:
        self._name, self._incarnation, self._own, self._own_key = name, incarnation, own, own_key
        self._writers: dict[str, Writer] = {}
        self._returned: deque[_Reference] = deque()  # bounded by the views
        self._alive: dict[int, _Reference] = {}
        self._counts = dict.fromkeys(
            ("mapped", "unknown_segment", "out_of_bounds", "stale", "malformed_packets", "no_memory"), 0
        )
        self._begin()

    def connect(self, peer: str, address: str) -> bool:
        """Connect to the arena at `address`; False if there is none that is ours to read."""
        self._check()
        self.disconnect(peer)
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        except OSError:
            return False
        try:
            if not is_within_share(connection.fileno()):
                raise OSError("too few descriptors are left")
            connection.connect(address)
            if not is_of_this_user(connection):
                raise OSError("it belongs to another user")
            connection.send(pack_greeting(self._name, self._incarnation))
        except OSError:
            connection.close()
            return False
        self._writers[peer] = Writer(connection)
        return True

    def disconnect(self, peer: str) -> None:
        """Hear no more from it; views live on."""
        writer = self._writers.pop(peer, None)
        if writer is not None:
            writer.connection.close()

    def map(self, peer: str, place: Place, size: int) -> memoryview | None:
        """A read-only view of `size` bytes in a slot; None, counted by reason, if it does not lie there."""
        segment = self._find(peer, place.segment)
        if segment is None:
            self._counts["unknown_segment"] += 1
            return None
        if place.slot >= segment.slots or not 0 < size <= segment.slot_bytes:
            self._counts["out_of_bounds"] += 1
            return None
        if segment.table[place.slot] != place.generation:
            self._counts["stale"] += 1
            return None
        begin = segment.start + place.slot * segment.slot_bytes
        # An owner of its own, and not a slice of another array: numpy lets views of a slice refer to that array.
        owner: Room = np.frombuffer(segment.readable[begin : begin + size], _BYTE)
        reference = _Reference(owner, self._returned.append)
        reference.peer, reference.place, reference.segment = peer, place, segment
        self._alive[id(reference)] = reference
        segment.views += 1
        self._counts["mapped"] += 1
        return memoryview(cast("Buffer", owner))

    def _find(self, peer: str, number: int) -> Segment | None:
        if self._own is not None and peer == self._own_key:
            return self._own.segments.get(number)
        writer = self._writers.get(peer)
        if writer is None:
            return None
        if number not in writer.segments:
            self._hear(writer)
        return writer.segments.get(number)

    def released(self) -> list[tuple[str, Place]]:
        """The views whose last look is over, once for each `map`."""
        if not self._returned:
            return []
        told = []
        while self._returned:
            reference = self._returned.popleft()
            del self._alive[id(reference)]
            reference.segment.views -= 1
            told.append((reference.peer, reference.place))
        return told

    def listen(self) -> None:
        """Take in what writers sent: new segments, and ends of old ones. Never waits."""
        for writer in self._writers.values():
            self._hear(writer)
            for segment in [segment for segment in writer.segments.values() if segment.dropped and not segment.views]:
                try:
                    writer.connection.send(pack_packet(Kind.GONE, segment.layout))
                except BlockingIOError:
                    break  # told with the next `listen`
                except OSError:
                    pass  # nobody is there to be told
                del writer.segments[segment.number]

    def _hear(self, writer: Writer) -> None:
        for _ in range(PACKETS_A_TURN):
            connection = writer.connection
            assert isinstance(connection, socket.socket)
            try:
                packet, descriptors, flags, _ = socket.recv_fds(
                    connection, PACKET_BYTES_MAX, DESCRIPTORS_A_PACKET_MAX, socket.MSG_CMSG_CLOEXEC
                )
            except OSError:
                return
            if not packet:
                return
            try:
                self._take(writer, packet, descriptors, flags)
            except MalformedSegmentError:
                self._counts["malformed_packets"] += 1
            except OSError:
                self._counts["no_memory"] += 1
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _take(self, writer: Writer, packet: bytes, descriptors: list[int], flags: int) -> None:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise MalformedSegmentError("a packet that was cut")
        kind, layout = unpack_packet(packet)
        if kind == Kind.DROP and layout.number in writer.segments:
            writer.segments[layout.number].dropped = True
        elif kind == Kind.SEGMENT and len(descriptors) == 1 and layout.number not in writer.segments:
            check_segment(descriptors[0], layout)
            memory = map_segment(descriptors[0], layout.size, writable=False)
            writer.segments[layout.number] = Segment(layout, memory)
        elif kind != Kind.DROP:
            raise MalformedSegmentError("a packet that does not belong there")

    def statistics(self) -> dict[str, int]:
        """Counters: what was mapped, and what was not, by reason; and what is looked at now."""
        return {**self._counts, "views": len(self._alive), "writers": len(self._writers)}

    def abandon(self) -> None:
        """In a forked child: let go of what was inherited."""
        for writer in self._writers.values():
            writer.connection.close()
        self._writers.clear()

    def close(self) -> None:
        """Hear nothing more; views live on."""
        if self._usable:
            self._usable, self._closed = False, True
            self.abandon()
