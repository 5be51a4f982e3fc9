"""What only real shared memory does: seals, missing memory, sockets, descriptors, forks, and whoever dies."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import resource
import signal
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.arenas import SIZE, RealArenas, address, freed, published, until
from tests.harness.figures import soak
from transports.base import AddressError, TransportClosedError
from transports.handover import Reader
from transports.mappings import Mappings
from transports.segments import (
    Kind,
    Layout,
    MalformedSegmentError,
    Place,
    check_segment,
    create_segment,
    pack_greeting,
    pack_packet,
    slot_class,
    unpack_greeting,
    unpack_packet,
)

LAYOUT = Layout(1, SIZE, 4)


@pytest.fixture
def arenas() -> Iterator[RealArenas]:
    arenas = RealArenas()
    yield arenas
    arenas.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def of_arenas() -> set[str]:
    """The descriptors that arenas have open, by number and kind; other tests may have left some of the same kind."""
    links = {name: os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}
    return {f"{name} {link}" for name, link in links.items() if re.search("memfd|eventpoll|pidfd", link)}


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def in_a_fork(work: Callable[[], object]) -> int:
    """Its exit code: 0 if the work was done."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# Segments.


def test_a_segment_can_neither_shrink_nor_grow_nor_be_written_by_others() -> None:
    descriptor, memory = create_segment(LAYOUT)
    check_segment(descriptor, LAYOUT)
    memory[LAYOUT.start] = 7  # its writer's own mapping stays writable
    for refused in (
        lambda: os.ftruncate(descriptor, 0),
        lambda: os.ftruncate(descriptor, LAYOUT.size + 4096),
        lambda: os.write(descriptor, b"x"),
        lambda: mmap.mmap(descriptor, LAYOUT.size),
        lambda: fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
    ):
        with pytest.raises(OSError, match="not permitted"):
            refused()
    os.close(descriptor)


def test_what_is_no_segment_is_not_mapped(tmp_path: Path) -> None:
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, LAYOUT.size)
    sealed, _memory = create_segment(LAYOUT)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    reading, writing = os.pipe()
    for descriptor, layout in (
        (unsealed, LAYOUT), (sealed, Layout(1, SIZE, 5)), (file, LAYOUT), (reading, LAYOUT), (999, LAYOUT)
    ):  # fmt: skip
        with pytest.raises(MalformedSegmentError):
            check_segment(descriptor, layout)
    for descriptor in (unsealed, sealed, file, reading, writing):
        os.close(descriptor)


@pytest.mark.parametrize("size", [1, SIZE, SIZE + 1, 100_000, 1 << 20, (1 << 20) + 200, 3 << 20, (64 << 20) + 1])
def test_a_class_wastes_at_most_an_eighth(size: int) -> None:
    slot_bytes = slot_class(size)
    assert slot_bytes >= max(size, SIZE) and slot_bytes % mmap.PAGESIZE == 0
    assert slot_bytes == SIZE or slot_bytes <= size * 9 / 8 + mmap.PAGESIZE
    assert slot_class(slot_bytes) == slot_bytes


def test_packets_are_read_as_they_were_written() -> None:
    assert unpack_greeting(pack_greeting("räuber", 7)) == ("räuber", 7)
    assert unpack_packet(pack_packet(Kind.SEGMENT, LAYOUT)) == (Kind.SEGMENT, LAYOUT)
    with pytest.raises(ValueError, match="256 bytes"):
        pack_greeting("n" * 256, 1)


@pytest.mark.parametrize("cut", range(0, 40, 3))
def test_junk_is_malformed(cut: int) -> None:
    with pytest.raises(MalformedSegmentError):
        unpack_greeting(pack_greeting("a name that is long enough", 7)[:cut])
    packet = pack_packet(Kind.SEGMENT, LAYOUT)
    if cut < len(packet):
        with pytest.raises(MalformedSegmentError):
            unpack_packet(packet[:cut])
        with pytest.raises(MalformedSegmentError):
            unpack_packet(b"\xff" * len(packet))


# No memory.


def test_without_memory_there_is_no_slot_and_it_is_counted(arenas: RealArenas, monkeypatch: pytest.MonkeyPatch) -> None:
    arena = arenas.arena(address())
    place, _kept = published(arena, b"x" * SIZE)
    for code in (errno.ENOSPC, errno.ENOMEM):
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(code, "none")))  # noqa: B023
            assert arena.take(SIZE) is None
            assert arena.take(3 * SIZE) is None, "nor a segment for it"
    assert arena.statistics()["fallback_no_memory"] == 4
    assert arena.statistics()["bytes_in_use"] == SIZE
    slot = arena.take(SIZE)
    assert slot is not None and slot.place.segment == place.segment


def test_the_limit_of_the_system_is_no_signal() -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10 * SIZE, 10 * SIZE))
        arena = RealArenas().arena(address(), segment_bytes=4 * SIZE)
        assert arena.take(SIZE) is not None
        assert arena.take(20 * SIZE) is None
        assert arena.statistics()["fallback_no_memory"] == 1

    assert in_a_fork(work) == 0


# Sockets.


def greeted(at: str, packet: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(at)
    connection.send(packet)
    return connection


def test_an_address_is_not_taken_over(arenas: RealArenas, tmp_path: Path) -> None:
    at = address()
    arenas.arena(at)
    with pytest.raises(AddressError):
        arenas.arena(at)
    path = tmp_path / "arena"
    arena = arenas.arena(str(path))
    assert path.stat().st_mode & 0o777 == 0o600
    arena.close()
    assert not path.exists()


@pytest.mark.parametrize("junk", [b"", b"x", b"\xff" * 512, pack_packet(Kind.SEGMENT, LAYOUT), b"y" * 5000])
def test_readers_that_talk_junk_are_hung_up_on(arenas: RealArenas, junk: bytes) -> None:
    at = address()
    arena = arenas.arena(at)
    before = descriptors()
    first = greeted(at, junk or b"\x00")
    second = greeted(at, pack_greeting("b", 1))
    arena.poll()
    second.send(junk or pack_packet(Kind.DROP, LAYOUT))
    arena.poll()
    first.close()
    second.close()
    arena.poll()
    assert arena.statistics()["malformed"] >= 1
    assert descriptors() <= before + 1, "the pidfd of the one that greeted"


def test_descriptors_that_nobody_asked_for_are_closed(arenas: RealArenas) -> None:
    at = address()
    arena = arenas.arena(at)
    connection = greeted(at, pack_greeting("b", 1))
    arena.poll()
    before = descriptors()
    socket.send_fds(connection, [pack_packet(Kind.GONE, LAYOUT)], [0, 0, 0])
    arena.poll()
    assert descriptors() == before
    connection.close()


@pytest.mark.parametrize("count", [0, 2, 5, 20])
def test_writers_that_hand_over_something_else_get_nothing_mapped(arenas: RealArenas, count: int) -> None:
    at = address()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(at)
    listener.listen()
    mappings = arenas.mappings()
    assert mappings.connect("writer", at)
    connection, _ = listener.accept()
    assert unpack_greeting(connection.recv(1000)) == ("reader", 1)
    unsealed = os.memfd_create("unsealed")
    os.ftruncate(unsealed, LAYOUT.size)
    before = descriptors()
    socket.send_fds(connection, [pack_packet(Kind.SEGMENT, LAYOUT)], [unsealed] * count)
    socket.send_fds(connection, [pack_packet(Kind.SEGMENT, LAYOUT)], [unsealed])
    connection.send(b"junk")
    connection.send(b"j" * 5000)
    connection.send(pack_packet(Kind.DROP, LAYOUT))
    mappings.listen()
    assert mappings.statistics()["malformed_packets"] == 4
    assert descriptors() == before
    assert mappings.map("writer", Place(1, 0, 0), SIZE) is None
    for one in (connection, listener):
        one.close()
    os.close(unsealed)
    mappings.listen()


def test_another_user_is_sent_away(arenas: RealArenas, monkeypatch: pytest.MonkeyPatch) -> None:
    at = address()
    arena, mappings = arenas.arena(at), arenas.mappings()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not mappings.connect("writer", at)
    connection = greeted(at, pack_greeting("b", 1))
    arena.poll()
    assert arena.statistics()["refused_user"] == 2
    assert arena.statistics()["readers"] == 0
    connection.close()


def test_a_reader_that_does_not_listen_delays_nobody_and_catches_up(arenas: RealArenas) -> None:
    at = address()
    arena, mappings = arenas.arena(at, segment_bytes=SIZE, bytes_max=1000 * SIZE), arenas.mappings()
    assert mappings.connect("writer", at)
    arena.poll()
    values = [published(arena, bytes([n % 251]) * SIZE) for n in range(600)]
    assert arena.statistics()["behind"] > 0 and not arena.reads("reader")
    for _ in range(100):
        mappings.listen()
        arena.poll()
    assert arena.reads("reader")
    for place, kept in values:
        view = mappings.map("writer", place, SIZE)
        assert view is not None and view[0] == kept[0]


# Deaths and forks.


def look_until_killed(at: str, place: Any, ready: int) -> None:
    mappings = Mappings("other", os.getpid())
    assert mappings.connect("writer", at)
    view = None
    while view is None:
        view = mappings.map("writer", place, SIZE)
    os.write(ready, b"!")
    signal.pause()


def test_the_death_of_a_reader_is_told_once_and_leaves_nothing(arenas: RealArenas) -> None:
    at = address()
    arena = arenas.arena(at)
    place, kept = published(arena, b"x" * SIZE)
    before = descriptors()
    for _ in range(500 if soak() else 4):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            look_until_killed(at, place, writing)
        while not _is_readable(reading):
            arena.poll()
        assert arena.statistics()["readers"] == 1
        assert arena.poll() == []
        os.kill(pid, signal.SIGKILL)
        dead: list[Reader] = []
        until(lambda: dead.extend(arena.poll()) or dead)  # noqa: B023
        os.waitpid(pid, 0)
        assert dead == [Reader("other", pid, pid)]
        assert arena.poll() == []
        os.close(reading)
        os.close(writing)
    assert descriptors() == before
    assert arena.statistics()["readers"] == 0
    assert arena.statistics()["bytes_committed"] == LAYOUT.start + SIZE
    del kept
    freed(arena, place)
    assert arena.statistics()["bytes_in_use"] == 0


def _is_readable(descriptor: int) -> bool:
    import select

    return bool(select.select([descriptor], [], [], 0.002)[0])


def test_a_forked_child_is_refused_and_leaves_its_parent_alone(arenas: RealArenas) -> None:
    others, at = of_arenas(), address()
    arena, mappings = arenas.arena(at), arenas.mappings()
    assert mappings.connect("writer", at)
    arena.poll()
    place, kept = published(arena, b"x" * SIZE)
    view = mappings.map("writer", place, SIZE)

    def work() -> None:
        for call in (lambda: arena.take(1), arena.forgotten, arena.poll, lambda: mappings.connect("writer", at)):
            with pytest.raises(TransportClosedError):
                call()
        arena.abandon()
        mappings.abandon()
        arena.close()
        mappings.close()
        assert of_arenas() <= others

    assert in_a_fork(work) == 0
    assert view is not None and bytes(view) == bytes(kept)
    assert arena.poll() == [] and arena.reads("reader")
    later, _later = published(arena, b"y" * 3 * SIZE)
    assert mappings.map("writer", later, 3 * SIZE) is not None


def test_what_is_mapped_cannot_be_written(arenas: RealArenas) -> None:
    import ctypes

    at = address()
    arena, mappings = arenas.arena(at), arenas.mappings()
    assert mappings.connect("writer", at)
    arena.poll()
    place, _kept = published(arena, b"x" * SIZE)
    view = mappings.map("writer", place, SIZE)
    assert view is not None
    with pytest.raises(TypeError):
        view[0] = 1
    with pytest.raises(TypeError):
        ctypes.c_char.from_buffer(view)  # type: ignore[arg-type]
