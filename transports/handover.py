"""The writer's side of handing segments over: a socket for readers, what each was given, and proof of their death.

A reader connects and greets; it is given every segment, and each new one before anybody hears of a slot in it. A
connection that ends says nothing about the reader: a forked child may hold it, and it may have left while it still
looks at something. A pidfd that becomes readable is proof.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, Protocol

from transports.base import AddressError
from transports.segments import (
    PACKET_BYTES_MAX,
    Kind,
    Layout,
    MalformedSegmentError,
    is_of_this_user,
    is_within_share,
    pack_packet,
    unpack_greeting,
    unpack_packet,
)

__all__ = ["Handover", "Offer", "Reader", "SocketHandover"]

BACKLOG: Final = 128
"""Readers that wait to be accepted."""

PACKETS_A_TURN: Final = 64
"""Packets that are read from one reader before the others have their turn."""

_PEERPIDFD: Final = 77
"""SO_PEERPIDFD (asm-generic/socket.h, from 6.5 on): the process itself, where a number may be another's by now."""


_COUNTS: Final = (
    "malformed",
    "refused_user",
    "refused_readers",
    "refused_descriptors",
    "refused_unseen",
    "behind",
    "forgotten_readers",
)


class Reader(NamedTuple):
    """One life of a reader."""

    name: str
    incarnation: int
    pid: int


class Offer(Protocol):
    """A segment that readers are given."""

    layout: Layout
    descriptor: int


class Handover(Protocol):
    """Whoever gives segments to readers. The caller lets nobody else in meanwhile."""

    counts: dict[str, int]

    def give(self, segment: Offer) -> None:
        """Give a new segment to every reader. Never waits."""

    def drop(self, segment: Offer) -> None:
        """Tell every reader that a segment is closed."""

    def holds(self, number: int) -> bool:
        """Whether a reader may still have a mapping of this segment."""

    def refuse(self, name: str) -> None:
        """Give a reader nothing any more."""

    def admit(self, name: str) -> None:
        """Let a reader have what it has not got, with the next `catch_up`."""

    def catch_up(self, segments: Iterable[Offer]) -> None:
        """Give whoever is behind what it has not got."""

    def reads(self, name: str) -> bool:
        """Whether a reader of this name has been given every segment."""

    def poll(self) -> list[Reader]:
        """Accept and listen. The readers that are proven dead, each told once."""

    def readers(self) -> int:
        """How many are connected, or may still look at something."""

    def descriptors(self) -> list[int]:
        """One descriptor, readable when `poll` has something to do."""

    def close(self, *, unlink: bool) -> None:
        """Close every descriptor; in a forked child without `unlink`."""


class _Life:
    """A process that has greeted under one name."""

    __slots__ = ("connection", "pidfd", "reader")

    def __init__(self, reader: Reader, pidfd: int) -> None:
        self.reader, self.pidfd = reader, pidfd
        self.connection: _Connection | None = None


class _Connection:
    """What a reader was given over one connection."""

    __slots__ = ("behind", "drops", "holds", "life", "pid", "pidfd", "socket")

    def __init__(self, connection: socket.socket, pid: int, pidfd: int) -> None:
        self.socket, self.pid, self.pidfd = connection, pid, pidfd
        self.life: _Life | None = None
        self.holds: set[int] = set()
        self.drops: deque[Layout] = deque()
        self.behind = False

    def send(self, packet: bytes, descriptors: list[int]) -> int:
        """0 if it went, or why not."""
        try:
            if descriptors:
                socket.send_fds(self.socket, [packet], descriptors, socket.MSG_NOSIGNAL)
            else:
                self.socket.send(packet, socket.MSG_NOSIGNAL)
        except OSError as error:
            return error.errno or errno.EIO
        return 0


class SocketHandover:
    """Over a Unix socket of mode 0600, to processes of this user.

    Raises AddressError if the path cannot be bound; an existing file is never taken over.
    """

    def __init__(self, address: str, readers_max: int) -> None:
        self._address, self._readers_max = address, readers_max
        self._listener = _listen(address)
        self._epoll = select.epoll()
        # Edge-triggered: a connection that cannot be accepted for want of descriptors must not keep us awake.
        self._epoll.register(self._listener, select.EPOLLIN | select.EPOLLET)
        self._connections: dict[int, _Connection] = {}
        self._lives: dict[int, _Life] = {}  # by pidfd
        self._known: dict[Reader, _Life] = {}
        self._refused: set[str] = set()  # bounded by the members that the engine knows
        self._dead: list[Reader] = []
        self.counts = dict.fromkeys(_COUNTS, 0)

    # What readers are given.

    def give(self, segment: Offer) -> None:
        """Give a new segment to every reader that is neither refused nor behind. Never waits."""
        for connection in self._connections.values():
            if not connection.behind and self._is_admitted(connection):
                self._give_to(connection, segment)

    def _give_to(self, connection: _Connection, segment: Offer) -> None:
        reason = connection.send(pack_packet(Kind.SEGMENT, segment.layout), [segment.descriptor])
        if reason:
            self._fall_behind(connection, reason)
        else:
            connection.holds.add(segment.layout.number)

    def _fall_behind(self, connection: _Connection, reason: int) -> None:
        """Nobody waits for a reader that does not drain its socket; it catches up when it does.

        For any other reason (ETOOMANYREFS: too many descriptors under way; or it is gone) the next `poll` tries again.
        """
        connection.behind = True
        self.counts["behind"] += 1
        if reason == errno.EAGAIN:
            self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)

    def drop(self, segment: Offer) -> None:
        """Tell whoever was given a segment that it is closed."""
        for connection in self._connections.values():
            if segment.layout.number in connection.holds:
                connection.drops.append(segment.layout)
                if not connection.behind:
                    self._tell_drops(connection)

    def _tell_drops(self, connection: _Connection) -> None:
        while connection.drops:
            reason = connection.send(pack_packet(Kind.DROP, connection.drops[0]), [])
            if reason:
                self._fall_behind(connection, reason)
                return
            connection.drops.popleft()

    def holds(self, number: int) -> bool:
        """Whether a reader may still have a mapping of this segment, or finds it in its socket."""
        return any(number in connection.holds for connection in self._connections.values())

    def refuse(self, name: str) -> None:
        """Give the reader of this name nothing any more."""
        self._refused.add(name)

    def admit(self, name: str) -> None:
        """Let it have what it has not got, with the next `catch_up`."""
        self._refused.discard(name)
        for connection in self._of(name):
            connection.behind = True

    def reads(self, name: str) -> bool:
        """Whether a reader of this name is connected and has been given every segment."""
        return name not in self._refused and any(not connection.behind for connection in self._of(name))

    def readers(self) -> int:
        """How many are connected, or have left and may still look at something."""
        return len(self._known)

    def _of(self, name: str) -> Iterator[_Connection]:
        for connection in self._connections.values():
            if connection.life is not None and connection.life.reader.name == name:
                yield connection

    def _is_admitted(self, connection: _Connection) -> bool:
        return connection.life is not None and connection.life.reader.name not in self._refused

    def catch_up(self, segments: Iterable[Offer]) -> None:
        """Tell and give whoever is behind what it has not got."""
        for connection in self._connections.values():
            if connection.behind:
                self._bring_up(connection, segments)

    def _bring_up(self, connection: _Connection, segments: Iterable[Offer]) -> None:
        connection.behind = False
        self._epoll.modify(connection.socket, select.EPOLLIN)
        self._tell_drops(connection)
        for segment in segments:
            if connection.behind or not self._is_admitted(connection):
                return
            if segment.layout.number not in connection.holds:
                self._give_to(connection, segment)

    # What readers do.

    def poll(self) -> list[Reader]:
        """Accept and listen. The readers that are proven dead, each told once."""
        for descriptor, _ in self._epoll.poll(0):
            if descriptor == self._listener.fileno():
                self._accept()
            elif descriptor in self._connections:
                self._hear(self._connections[descriptor])
            elif descriptor in self._lives and _has_ended(descriptor):
                self._bury(self._lives[descriptor])
        dead, self._dead = self._dead, []
        return dead

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                self.counts["refused_descriptors"] += 1  # EMFILE and ENFILE; whoever waits is accepted with the next
                return
            if not self._take_in(connection):
                connection.close()

    def _take_in(self, connection: socket.socket) -> bool:
        if not is_of_this_user(connection):
            return self._turn_away("refused_user")
        if len(self._connections) >= self._readers_max:
            return self._turn_away("refused_readers")
        try:
            pid, pidfd = _process_of(connection)
        except OSError:
            return self._turn_away("refused_unseen")
        if not is_within_share(max(connection.fileno(), pidfd)):
            if pidfd >= 0:
                os.close(pidfd)
            return self._turn_away("refused_descriptors")
        connection.setblocking(False)
        self._connections[connection.fileno()] = taken = _Connection(connection, pid, pidfd)
        self._epoll.register(connection, select.EPOLLIN)
        self._hear(taken)  # its greeting is there already
        return True

    def _turn_away(self, reason: str) -> bool:
        self.counts[reason] += 1
        return False

    def _hear(self, connection: _Connection) -> None:
        for _ in range(PACKETS_A_TURN):
            try:
                packet = connection.socket.recv(PACKET_BYTES_MAX)  # descriptors that came with it are not let in
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            try:
                if not packet:
                    self._hang_up(connection)
                    return
                self._understand(connection, packet)
            except MalformedSegmentError:
                self.counts["malformed"] += 1
                self._hang_up(connection)
                return

    def _understand(self, connection: _Connection, packet: bytes) -> None:
        if connection.life is None:
            name, incarnation = unpack_greeting(packet)
            self._welcome(connection, Reader(name, incarnation, connection.pid))
            return
        kind, layout = unpack_packet(packet)
        if kind != Kind.GONE:
            raise MalformedSegmentError("readers have no segments")
        connection.holds.discard(layout.number)

    def _welcome(self, connection: _Connection, reader: Reader) -> None:
        pidfd, connection.pidfd = connection.pidfd, -1
        life = self._known.get(reader)
        if life is None:
            life = self._known[reader] = _Life(reader, pidfd)
            if pidfd >= 0:
                self._lives[pidfd] = life
                self._epoll.register(pidfd, select.EPOLLIN)
        elif pidfd >= 0:
            os.close(pidfd)
        if life.connection is not None:
            self._hang_up(life.connection)
        life.connection, connection.life = connection, life
        connection.behind = True  # `poll` gives it everything
        if life.pidfd < 0:
            self._bury(life)
        self._forget_the_oldest()

    def _hang_up(self, connection: _Connection) -> None:
        """Close a connection; a reader that greeted on it is watched on."""
        self._epoll.unregister(connection.socket)
        del self._connections[connection.socket.fileno()]
        connection.socket.close()
        if connection.pidfd >= 0:
            os.close(connection.pidfd)
        if connection.life is not None:
            connection.life.connection = None
            connection.life = None

    def _forget_the_oldest(self) -> None:
        """Stop watching who left first, if more are watched than may connect: a process may join often."""
        gone = [life for life in self._known.values() if life.connection is None]
        if len(gone) > self._readers_max:
            self.counts["forgotten_readers"] += 1
            self._unwatch(gone[0])

    def _bury(self, life: _Life) -> None:
        self._dead.append(life.reader)
        if life.connection is not None:
            self._hang_up(life.connection)
        self._unwatch(life)
        if not any(reader.name == life.reader.name for reader in self._known):
            self._refused.discard(life.reader.name)

    def _unwatch(self, life: _Life) -> None:
        del self._known[life.reader]
        if life.pidfd >= 0:
            del self._lives[life.pidfd]
            self._epoll.unregister(life.pidfd)
            os.close(life.pidfd)

    def descriptors(self) -> list[int]:
        """The epoll descriptor over all of it."""
        return [self._epoll.fileno()]

    def close(self, *, unlink: bool) -> None:
        """Close every descriptor. In a forked child nothing is unregistered: the parent has the same epoll."""
        for connection in self._connections.values():
            connection.socket.close()
            if connection.pidfd >= 0:
                os.close(connection.pidfd)
        for pidfd in self._lives:
            os.close(pidfd)
        self._connections.clear()
        self._lives.clear()
        self._known.clear()
        self._epoll.close()
        self._listener.close()
        if unlink and not self._address.startswith("\0"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._address)


def _listen(address: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        # The mode of the file before it has a name: in between another user could connect.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
        if not address.startswith("\0"):  # an abstract address has no file; who connects is looked at anyway
            os.chmod(address, 0o600)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressError(f"cannot listen at {address[:80]!r}: {error.strerror or error}") from error
    return listener


def _process_of(connection: socket.socket) -> tuple[int, int]:
    """Process id and pidfd of whoever connected; pidfd -1 for one that has ended.

    Raises OSError for a process that cannot be watched, such as one of another pid namespace on an old kernel: its
    death could never be proven.
    """
    pid: int = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        return pid, connection.getsockopt(socket.SOL_SOCKET, _PEERPIDFD)
    except OSError as error:
        if error.errno in _ENDED and pid > 0:
            return pid, -1
        if error.errno != errno.ENOPROTOOPT:
            raise
    try:
        return pid, os.pidfd_open(pid)
    except ProcessLookupError:
        return pid, -1


_ENDED: Final = (errno.ESRCH, errno.EINVAL)
"""What SO_PEERPIDFD says of a process that has been reaped; which of them depends on the kernel."""


def _has_ended(pidfd: int) -> bool:
    """Asked again, because the number of a descriptor that was closed a moment ago may be another's now."""
    asked = select.poll()
    asked.register(pidfd, select.POLLIN)
    return bool(asked.poll(0))
