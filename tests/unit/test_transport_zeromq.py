"""What only the ZeroMQ transport has: raw peers, bounds of sockets, forks, interrupts, zero-copy."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.harness.waiting import until
from transports import sockets, zeromq
from transports.base import (
    AddressError,
    Endpoints,
    Inbound,
    Link,
    SendBlockedError,
    SocketLimits,
    TransportClosedError,
    TransportError,
)
from transports.zeromq import ZeroMQTransport

Open = Callable[..., ZeroMQTransport]


@pytest.fixture(scope="module", autouse=True)
def zero_copy_thread() -> None:
    """Pyzmq keeps a thread and its descriptors from the first zero-copy frame on; they are no leak of a test."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://warm")
        other.connect("inproc://warm")
        one.send(bytes(100_000), copy=False)
        other.recv()


@pytest.fixture
def open_transport(runtime_directory: Path) -> Iterator[Open]:
    opened: list[ZeroMQTransport] = []

    def open_one(name: str = "t", listen: str = "ipc", **limits: Any) -> ZeroMQTransport:
        directory = runtime_directory / "sockets" if listen == "ipc" else None
        opened.append(ZeroMQTransport(listen=listen, directory=directory, name=name, limits=SocketLimits(**limits)))
        return opened[-1]

    yield open_one
    for transport in opened:
        transport.close(0)


@pytest.fixture
def raw() -> Iterator[Callable[[int], zmq.Socket[bytes]]]:
    """Sockets of a peer that keeps to no rules."""
    context: zmq.Context[Any] = zmq.Context()
    made: list[zmq.Socket[bytes]] = []

    def make(kind: int) -> zmq.Socket[bytes]:
        made.append(context.socket(kind))
        return made[-1]

    yield make
    for one in made:
        one.close(linger=0)
    context.term()


def pair(open_transport: Open, **limits: Any) -> tuple[ZeroMQTransport, ZeroMQTransport]:
    a, b = open_transport("a", **limits), open_transport("b", **limits)
    a.connect("b", b.endpoints)
    send(a, Link.CONTROL, [b"meet"])
    send(a, Link.BULK, [b"meet"])
    receive(b, 2)
    return a, b


def send(source: ZeroMQTransport, link: Link, frames: list[Any]) -> None:
    def attempt() -> bool:
        with suppress(SendBlockedError):
            source.send("b", link, frames)
            return True
        return False

    until(attempt, what="a send")


def receive(target: ZeroMQTransport, count: int = 1) -> list[Inbound]:
    got: list[Inbound] = []
    until(lambda: got.extend(target.receive(64)) or len(got) >= count, what=f"{count} messages")
    assert len(got) == count
    return got


@pytest.mark.parametrize(
    ("link", "wrong", "right"),
    [
        ("control", [[b"a", b"b"], [b"", b"request"], [b"x"] * 50], [b"fine"]),
        ("bulk", [[b"h", b"c", b"d"], [b"h"] * 50, [bytes(64 * 1024 + 1)], [bytes(64 * 1024 + 1), b"c"]], [b"h", b"c"]),
    ],
)
def test_a_message_with_the_wrong_parts_is_dropped_and_counted_and_the_next_is_fine(
    open_transport: Open,
    raw: Callable[[int], zmq.Socket[bytes]],
    link: str,
    wrong: list[list[bytes]],
    right: list[bytes],
) -> None:
    t = open_transport()
    dealer = raw(zmq.DEALER)
    dealer.connect(getattr(t.endpoints, link))
    for frames in wrong:
        dealer.send_multipart(frames)
    dealer.send_multipart(right)
    (message,) = receive(t)
    assert [bytes(frame) for frame in message.frames] == right
    assert t.statistics()["dropped_malformed"] == len(wrong)
    assert t.statistics()[f"{link}_received_messages"] == 1


def test_a_multipart_publication_is_dropped_and_counted(
    open_transport: Open, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    t, other = open_transport(), open_transport("other")
    publisher = raw(zmq.XPUB)
    publisher.bind("tcp://127.0.0.1:0")
    address = publisher.get(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
    t.subscribe(b"t")
    t.connect("raw", Endpoints(address, other.endpoints.control, other.endpoints.bulk))
    assert publisher.recv() == b"\x01t"
    for frames in ([b"t", b"two"], [b"t1"], [b"t"] * 9, [b"t2"]):
        publisher.send_multipart(frames)
    assert [message.frames for message in receive(t, 2)] == [[b"t1"], [b"t2"]]
    assert t.statistics()["dropped_malformed"] == 2


def test_a_frame_over_the_limit_from_outside_never_arrives_and_the_link_survives(
    open_transport: Open, raw: Callable[[int], zmq.Socket[bytes]]
) -> None:
    t = open_transport()
    for size in (256 * 1024 + 1, 256 * 1024):
        dealer = raw(zmq.DEALER)
        dealer.connect(t.endpoints.control)
        dealer.send(bytes(size))
    assert [len(message.frames[0]) for message in receive(t)] == [256 * 1024]


def test_no_socket_is_left_to_the_defaults_of_libzmq(open_transport: Open) -> None:
    t = open_transport()
    t.connect("self", t.endpoints)
    known = t._peers["self"]
    expected = {
        t._publisher: (1000, 128 * 1024, -1),
        t._data[0].socket: (1000, 128 * 1024, -1),
        t._control.socket: (4096, 256 * 1024, 1000),
        known.control.socket: (4096, 256 * 1024, 1000),
        t._bulk.socket: (32, 4 * 1024 * 1024, -1),
        known.bulk.socket: (32, 4 * 1024 * 1024, -1),
    }
    for one, (frames, largest, heartbeat) in expected.items():
        assert one.get(zmq.SNDHWM) == one.get(zmq.RCVHWM) == frames
        assert one.get(zmq.MAXMSGSIZE) == largest
        assert (one.get(zmq.HEARTBEAT_IVL) or -1) == heartbeat
        assert one.get(zmq.LINGER) == 0
        assert one.get(zmq.HANDSHAKE_IVL) == 5000
        assert one.get(zmq.BACKLOG) == 128
        assert (one.get(zmq.RECONNECT_IVL), one.get(zmq.RECONNECT_IVL_MAX)) == (20, 1000)
        assert one.get(zmq.TCP_KEEPALIVE) == 1
    assert known.control.socket.get(zmq.IMMEDIATE) == known.bulk.socket.get(zmq.IMMEDIATE) == 1
    assert t._context.get(zmq.MAX_SOCKETS) == 1024


def test_f64_a_port_is_that_of_control_and_taken_only_once(open_transport: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(AddressError, match="in use"):
            open_transport(listen=taken)
    t = open_transport(listen=taken)
    assert t.endpoints.control == taken
    assert len({t.endpoints.data, t.endpoints.control, t.endpoints.bulk}) == 3


def test_a_wildcard_is_bound_only_if_allowed(open_transport: Open) -> None:
    with pytest.raises(AddressError):
        open_transport(listen="tcp://0.0.0.0")
    assert open_transport(listen="tcp://0.0.0.0", wildcard=True).endpoints.data.startswith("tcp://0.0.0.0:")


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="the kernel has no IPv6")
def test_a_literal_v6_address_works(open_transport: Open) -> None:
    a, b = open_transport("a", listen="tcp://[::1]"), open_transport("b", listen="tcp://[::1]")
    a.connect("b", b.endpoints)
    send(a, Link.CONTROL, [b"six"])
    assert receive(b)[0].frames == [b"six"]


def test_two_peers_at_one_data_address_share_it_until_both_are_gone(open_transport: Open) -> None:
    a, b = pair(open_transport)
    b.connect("a", a.endpoints)
    b.connect("alias", a.endpoints)
    b.subscribe(b"")
    b.disconnect("alias")

    def heard() -> bool:
        a.flush_subscriptions()
        a.broadcast(b"x")
        return bool(b.receive(64))

    until(heard)
    b.disconnect("a")
    assert b._feeds == {}


def test_connecting_is_refused_and_counted_when_descriptors_run_out(
    open_transport: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = open_transport("a"), open_transport("b")
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (20, 20))
    with pytest.raises(SendBlockedError, match="RLIMIT_NOFILE"):
        a.connect("b", b.endpoints)
    assert a.statistics()["refused_descriptors"] == 1
    monkeypatch.undo()
    a.connect("b", b.endpoints)
    send(a, Link.CONTROL, [b"x"])


def test_too_many_sockets_are_refused_and_leave_nothing_half_connected(open_transport: Open) -> None:
    a = open_transport("a", sockets=5)
    b = open_transport("b")
    with pytest.raises(SendBlockedError):
        a.connect("b", b.endpoints)
    assert a._peers == {} and a._feeds == {}


def test_too_many_prefixes_are_refused(open_transport: Open) -> None:
    t = open_transport(prefixes=2)
    t.subscribe(b"a")
    t.subscribe(b"b")
    with pytest.raises(ValueError, match="prefixes"):
        t.subscribe(b"c")
    t.unsubscribe(b"a")
    t.subscribe(b"c")


def test_a_large_chunk_is_borrowed_until_it_is_on_its_way(open_transport: Open) -> None:
    a, b = pair(open_transport, bulk_frames=64)
    chunk = bytearray(b"x" * (4 * 1024 * 1024))
    receipts = [a.send("b", Link.BULK, [b"h", chunk]) for _ in range(8)]
    assert not receipts[-1].done
    assert a.statistics()["zero_copy"] == 8
    assert {bytes(message.frames[1][:2]) for message in receive(b, 8)} == {b"xx"}
    until(lambda: all(receipt.done for receipt in receipts), what="the receipts")


def test_closing_gives_borrowed_chunks_back(open_transport: Open) -> None:
    a, _ = pair(open_transport, bulk_frames=64)
    receipts = [a.send("b", Link.BULK, [b"h", bytearray(4 * 1024 * 1024)]) for _ in range(8)]
    a.close(0)
    until(lambda: all(receipt.done for receipt in receipts), what="the receipts")
    assert a.statistics()["close_overran"] == 0


def test_over_the_cap_chunks_are_copied_and_counted(open_transport: Open) -> None:
    a, b = pair(open_transport, bulk_frames=64, zero_copy_frames=0)
    chunk = bytearray(b"x" * 100_000)
    assert a.send("b", Link.BULK, [b"h", chunk]).done
    chunk[:] = bytes(100_000)
    assert receive(b)[0].frames[1] == b"x" * 100_000
    assert (a.statistics()["zero_copy"], a.statistics()["copied_over_cap"]) == (0, 1)


def test_nothing_is_borrowed_while_the_interpreter_exits(open_transport: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(open_transport)
    monkeypatch.setitem(sockets._process, "exiting", True)
    assert a.send("b", Link.BULK, [b"h", bytearray(100_000)]).done
    receive(b)


def test_an_interrupt_between_header_and_chunk_leaves_no_half_message(open_transport: Open) -> None:
    a, b = pair(open_transport)
    pipe = a._peers["b"].bulk
    whole = pipe.send

    def interrupted(frame: bytes, flags: int, **how: Any) -> None:
        if not flags & zmq.SNDMORE:
            raise KeyboardInterrupt
        whole(frame, flags, **how)

    pipe.send = interrupted
    with pytest.raises(KeyboardInterrupt):
        a.send("b", Link.BULK, [b"torn", b"chunk"])
    assert a.statistics()["dropped_interrupted"] == 1
    send(a, Link.BULK, [b"h", b"whole"])
    assert [bytes(frame) for frame in receive(b)[0].frames] == [b"h", b"whole"]


def test_an_interrupt_in_receive_loses_one_message_at_most_and_says_so(open_transport: Open) -> None:
    a, b = pair(open_transport)
    for n in range(5):
        a.send("b", Link.CONTROL, [b"%d" % n])
    until(b.is_ready)
    inlet, calls = b._control, iter(range(100))
    whole = inlet.recv

    def interrupted(*how: Any, **more: Any) -> Any:
        frame = whole(*how, **more)
        if next(calls) == 2:  # the identity of the second message has just been taken
            raise KeyboardInterrupt
        return frame

    inlet.recv = interrupted
    got: list[bytes] = []
    with pytest.raises(KeyboardInterrupt):
        until(lambda: got.extend(bytes(m.frames[0]) for m in b.receive(64)))
    assert b.is_ready()
    until(lambda: got.extend(bytes(m.frames[0]) for m in b.receive(64)) or len(got) >= 4)
    assert got == [b"0", b"2", b"3", b"4"]
    assert b.statistics()["dropped_interrupted"] == 1


class Flooded:
    """An inlet that always has more."""

    hot = True

    def __init__(self, link: Link) -> None:
        self.link = link

    def take(self, arrived: list[Inbound], cap: int) -> None:
        arrived += [Inbound(self.link, None, [b""]) for _ in range(cap - len(arrived))]


def test_when_all_links_are_flooded_each_has_its_share(open_transport: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    t = open_transport()
    control, data, bulk = Flooded(Link.CONTROL), Flooded(Link.DATA), Flooded(Link.BULK)
    monkeypatch.setattr(t, "_control", control)
    monkeypatch.setattr(t, "_data", [data])
    monkeypatch.setattr(t, "_bulk", bulk)
    assert [m.link for m in t.receive(8)] == [Link.CONTROL] * 4 + [Link.DATA] * 2 + [Link.BULK] * 2
    bulk.hot = data.hot = False
    monkeypatch.setattr(bulk, "take", None)
    assert [m.link for m in t.receive(8)] == [Link.CONTROL] * 8, "room that others leave is used"


def test_what_was_stashed_by_an_interrupt_keeps_to_the_limit(open_transport: Open) -> None:
    t = open_transport()
    t._stash = [Inbound(Link.CONTROL, None, [b"%d" % n]) for n in range(3)]
    assert [len(t.receive(2)), len(t.receive(2)), len(t.receive(2))] == [2, 1, 0]


def test_an_error_of_libzmq_is_translated_and_chained(open_transport: Open) -> None:
    t = open_transport()

    def fail(*_how: Any) -> None:
        raise zmq.ZMQError(zmq.EFAULT)

    t._send_data = fail
    with pytest.raises(TransportError, match="broadcasting") as raised:
        t.broadcast(b"x")
    assert type(raised.value) is TransportError
    assert isinstance(raised.value.__cause__, zmq.ZMQError)
    t._control.recv, t._control.hot = fail, True
    with pytest.raises(TransportError, match="receiving"):
        t.receive(1)


def test_a_close_that_libzmq_holds_up_returns_and_is_counted(
    open_transport: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = open_transport()
    straggler = t._context.socket(zmq.PAIR)  # a context ends only with its last socket
    monkeypatch.setattr(zeromq, "_TERM_GRACE_S", 0.05)
    t.close(0)
    assert t.statistics()["close_overran"] == 1
    straggler.close()


@pytest.mark.multiprocess
def test_a_forked_child_can_use_nothing_and_disturbs_nothing(open_transport: Open) -> None:
    a, b = pair(open_transport)
    b.connect("a", a.endpoints)
    assert a.abandon() is None, "in its own process it does nothing"
    report = in_child(lambda: check_child(a, b))
    assert report == b"refused; abandoned; refused"
    a.send("b", Link.CONTROL, [b"still here"])
    assert receive(b)[0].frames == [b"still here"]


def check_child(a: ZeroMQTransport, b: ZeroMQTransport) -> bytes:
    ours = {getattr(t.endpoints, kind).removeprefix("ipc://") for t in (a, b) for kind in ("data", "control", "bulk")}
    said = [refusal(a)]
    assert inherited_sockets(ours)
    a.abandon()
    b.abandon()
    a.abandon()
    said += ["left" if inherited_sockets(ours) else "abandoned", refusal(b)]
    a.close(1)
    return "; ".join(said).encode()


def refusal(t: ZeroMQTransport) -> str:
    try:
        t.broadcast(b"from the child")
    except TransportClosedError:
        return "refused"
    return "sent"


def inherited_sockets(paths: set[str]) -> list[str]:
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            one = socket.socket(fileno=os.dup(int(name)))
            with one:
                names = {one.getsockname()}
                with suppress(OSError):
                    names.add(one.getpeername())
                found += [str(each) for each in names if each in paths]
    return found


def in_child(work: Callable[[], bytes]) -> bytes:
    """What `work` returns in a forked child; nothing if it fails."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    answer = b""
    while part := os.read(read, 4096):
        answer += part
    os.close(read)
    os.waitpid(child, 0)
    return answer
