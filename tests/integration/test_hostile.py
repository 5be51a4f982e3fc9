"""Garbage on every real socket: a counted drop by its reason, and the members' traffic goes on."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
from zmq.utils import monitor

from fabric import Fabric, join
from fabric.core.wire import Kind, checksum_of, encode_control, encode_marker, feed_id, feed_prefix, member_id
from fabric.errors import VersionMismatchError
from fabric.rendezvous import Card, find, open_rendezvous, this_host
from tests.harness.bursts import Numbering, resealed
from tests.harness.cards import a_card
from tests.harness.waiting import until

JOB = "besieged"
TOPIC = "words.health"
RANDOM = random.Random(20)
HELLO_FIELDS = ("stranger", 0, 2, "another", "host", 1, 1, "ipc://a", "ipc://b", "ipc://c", 0, [])


class Stranger:
    """A process without manners: raw sockets at the doors of a member."""

    def __init__(self, card: Card) -> None:
        self._context = zmq.Context()
        self.control, self.bulk = (self._door(endpoint) for endpoint in card.endpoints[1:])

    def _door(self, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        self._context.destroy(linger=0)


class Besieged:
    """Two members of this process, one of which receives what the other publishes; and a stranger at its doors."""

    def __init__(self, spec: str) -> None:
        self.members: dict[int, Fabric] = {}
        threads = [threading.Thread(target=self._join, args=(spec, rank)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        self.victim, self.peer = self.members[0], self.members[1]
        self.inbox = self.victim.subscribe("words.**")
        self.sent = 0
        self.card = next(card for card in find(JOB) if card.rank == 0)
        self.peer_card = next(card for card in find(JOB) if card.rank == 1)
        self.stranger = Stranger(self.card)

    def _join(self, spec: str, rank: int) -> None:
        self.members[rank] = join(rank=rank, world_size=2, rendezvous=spec, job=JOB)

    def count(self, reason: str) -> int:
        return self.victim.statistics().get(reason, 0)

    def expect(self, reason: str, more: int, act: Callable[[], object]) -> None:
        """`act` leads to exactly so many drops of this reason, and the members still talk."""
        before = self.count(reason)
        act()
        until(lambda: self.count(reason) >= before + more, what=f"{more} x {reason}")
        self.talk()
        assert self.count(reason) == before + more

    def talk(self) -> None:
        """A record, a large one, and a request pass between the members."""
        for value in (b"small", bytes(100_000)):
            self.peer.publish(TOPIC, value)
            message = self.inbox.receive(timeout_s=10)
            assert (message.value, message.offset) == (value, self.sent)
            self.sent += 1
        assert self.inbox.gaps == ()

    def close(self) -> None:
        self.stranger.close()
        for rank in (0, 1):  # the reader first: nobody waits for who has left
            self.members[rank].close(timeout_s=1)


@pytest.fixture(scope="module", autouse=True)
def zero_copy_thread() -> None:
    """Pyzmq keeps a thread and its descriptors from the first zero-copy frame on; they are no leak of a test."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        one.bind("inproc://warm")
        other.connect("inproc://warm")
        one.send(bytes(100_000), copy=False)
        other.recv()


@pytest.fixture
def besieged(tmp_path: Path) -> Iterator[Besieged]:
    scene = Besieged(f"memory://{tmp_path}")
    scene.victim.respond("ping")(lambda request: "pong")
    try:
        scene.talk()
        yield scene
        assert scene.peer.request("ping", to=0).value == "pong", "requests are served, too"
    finally:
        scene.close()


def control_garbage() -> dict[str, list[bytes]]:
    """Frames for a CONTROL socket, by the reason that counts them."""
    good = encode_control(Kind.HEARTBEAT, 1, 1, [], 0)
    nonsense = [b"", b"\xc1", b"\x91\xc4", b"\xdd\xff\xff\xff\xff", b"\x90", b"\x93\x01\x02\x03", b"\x91" * 5000]
    shaped = [resealed(good[:24] + packed + bytes(8)) for packed in nonsense]
    return {
        "truncated": [b"", b"T", good[:10], good[:31]],
        "magic": [resealed(b"XY" + good[2:]), b"GET / HTTP/1.1\r\nHost: example\r\n\r\n" + bytes(8)],
        "version": [resealed(good[:2] + bytes([version]) + good[3:]) for version in (0, 2, 255)],
        "checksum": [
            good[:-1] + bytes([good[-1] ^ 1]),
            good[:24] + bytes([good[24] ^ 0xFF]) + good[25:],
            good + b"more",
        ],
        "kind": [resealed(good[:3] + bytes([kind]) + good[4:]) for kind in (0, 63, 200, 255)],
        "shape": shaped,
        "stranger": [good, encode_control(Kind.HELLO, 1, 1, *HELLO_FIELDS)],
    }


@pytest.mark.parametrize("reason", list(control_garbage()))
def test_garbage_on_control_is_counted_by_its_reason(besieged: Besieged, reason: str) -> None:
    frames = control_garbage()[reason]
    besieged.expect(reason, len(frames), lambda: [besieged.stranger.control.send(frame) for frame in frames])


@pytest.mark.parametrize("reason", list(control_garbage()))
def test_garbage_on_bulk_is_counted_by_its_reason(besieged: Besieged, reason: str) -> None:
    frames = control_garbage()[reason][:1] if reason == "stranger" else control_garbage()[reason]
    besieged.expect(
        reason, len(frames), lambda: [besieged.stranger.bulk.send_multipart([frame, b"chunk"]) for frame in frames]
    )


def test_random_bytes_of_every_length_are_dropped(besieged: Besieged) -> None:
    lengths = [*range(64), *(RANDOM.randrange(64, 65536) for _ in range(200))]
    frames = [RANDOM.randbytes(length) for length in lengths]

    def counted() -> int:
        told = besieged.victim.statistics()
        return sum(told.get(reason, 0) for reason in ("truncated", "magic", "dropped_malformed"))

    before = counted()
    for frame in frames:
        besieged.stranger.control.send(frame)
        besieged.stranger.bulk.send(frame)
    until(lambda: counted() >= before + 2 * len(frames), what="all drops")
    assert counted() == before + 2 * len(frames)
    besieged.talk()


def test_messages_of_too_many_parts_are_dropped(besieged: Besieged) -> None:
    good = encode_control(Kind.HEARTBEAT, 1, 1, [], 0)
    shapes = [[good] * count for count in (2, 3, 500, 10_000)]
    besieged.expect(
        "dropped_malformed", len(shapes), lambda: [besieged.stranger.control.send_multipart(parts) for parts in shapes]
    )
    besieged.expect(
        "dropped_malformed", 3, lambda: [besieged.stranger.bulk.send_multipart(parts) for parts in shapes[1:]]
    )


@pytest.mark.parametrize("door", ["control", "bulk"])
def test_f41_a_frame_that_is_too_large_ends_its_connection_and_nothing_else(besieged: Besieged, door: str) -> None:
    socket: zmq.Socket[bytes] = getattr(besieged.stranger, door)
    watching = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    try:
        socket.send(bytes(64 * 1024 * 1024))
        assert watching.poll(10_000), "the connection was cut"
        assert monitor.recv_monitor_message(watching)["event"] == zmq.EVENT_DISCONNECTED
    finally:
        socket.disable_monitor()
        watching.close(linger=0)
    besieged.talk()


def test_a_peer_that_is_impersonated_with_nonsense_of_the_right_form_goes_on(besieged: Besieged) -> None:
    """Everything a stranger on this host can know about a member: its name, incarnation, feeds. Nothing raises."""
    name, incarnation = besieged.peer_card.name, besieged.peer_card.incarnation
    feed, source = feed_id(name, incarnation, TOPIC), member_id(name)
    far = 2**63 - 1
    messages: dict[Kind, tuple[Any, ...]] = {
        Kind.REGISTERED: (77, 1, [(feed, TOPIC, "reliable", 0, far, 0, incarnation, 0, 0)]),
        Kind.ACKNOWLEDGE: ([(1, feed, far)],),
        Kind.PULL: (feed, 1, far, [(0, far)]),
        Kind.JOIN: ([(feed, 1)],),
        Kind.UNKNOWN: (77,),
        Kind.STATUS: (TOPIC, 1),
        Kind.FIN: (TOPIC, 1, incarnation, feed, 0, far, True),
        Kind.ACCEPTED: (99,),
        Kind.REPLY: (99, False, 1, b"unasked"),
        Kind.FETCH: (feed, 0, 0, far, 1, True),
        Kind.UNREGISTER: (77, True),
        Kind.REQUEST: (12345, 0, "ping", 1, 1000, 255, b"\xc1", b"\xc1"),
    }
    duplicates = besieged.count("duplicate")
    for kind, fields in messages.items():
        besieged.stranger.control.send(encode_control(kind, source, incarnation, *fields))
    for kind, fields in {
        Kind.AVAILABLE: (feed, 1, far, 0, []),
        Kind.MISSING: (feed, far, 1),
        Kind.REPAIR: (feed, 1),
        Kind.CHUNK: (feed, far, far, 1, 0),
    }.items():
        besieged.stranger.bulk.send_multipart([encode_control(kind, source, incarnation, *fields), b"nonsense"])
    until(lambda: besieged.count("duplicate") > duplicates, what="the unasked reply")
    besieged.talk()


class HostilePeer:
    """A member made of raw sockets: it greets, so that the victim listens to what it broadcasts."""

    def __init__(self, victim: Card) -> None:
        self._context = zmq.Context()
        self.data = self._context.socket(zmq.XPUB)
        self.control, self.bulk = self._context.socket(zmq.ROUTER), self._context.socket(zmq.ROUTER)
        ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (self.data, self.control, self.bulk)]
        self.to_control = self._context.socket(zmq.DEALER)
        self.to_control.connect(victim.endpoints[1])
        self.incarnation = 5
        endpoints = [f"tcp://127.0.0.1:{port}" for port in ports]
        fields = ("hostile", 0, 2, JOB, this_host(), 1, 1, *endpoints, 0, [])
        self.to_control.send(encode_control(Kind.HELLO, member_id("hostile"), self.incarnation, *fields))
        self.follows: set[bytes] = set()

    def is_followed(self, prefix: bytes) -> bool:
        """Whether the victim listens to this prefix, here as everywhere."""
        while self.data.poll(0):
            told = self.data.recv()
            if told[:1] == b"\x01":
                self.follows.add(told[1:])
        return prefix in self.follows

    def close(self) -> None:
        self._context.destroy(linger=0)


def data_garbage(feed: int, incarnation: int) -> dict[str, list[bytes]]:
    """Frames for a DATA socket that begin with a feed that is followed, by the reason that counts them."""
    good = Numbering(feed, incarnation).frame([1, 2, 3])
    prefix = feed_prefix(feed)
    sealed = [prefix + middle for middle in (b"", b"TF", good[8:40])]
    huge_count = good[:36] + (2**32 - 1).to_bytes(4, "little") + good[40:]
    return {
        "truncated": sealed,
        "magic": [resealed(prefix + b"XY" + good[10:])],
        "version": [resealed(good[:10] + b"\x02" + good[11:])],
        "checksum": [good[:-1] + bytes([good[-1] ^ 1]), good[:60] + bytes([good[60] ^ 1]) + good[61:]],
        "kind": [resealed(good[:11] + b"\x09" + good[12:])],
        "shape": [resealed(huge_count)],
        "stranger": [Numbering(feed, incarnation + 1).frame([1]), Numbering(feed, 0).frame([1])],
    }


def test_garbage_on_data_is_counted_by_its_reason(besieged: Besieged) -> None:
    feed = feed_id(besieged.peer_card.name, besieged.peer_card.incarnation, TOPIC)
    hostile = HostilePeer(besieged.card)
    try:
        until(lambda: hostile.is_followed(feed_prefix(feed)), what="the victim's subscription")
        for reason, frames in data_garbage(feed, besieged.peer_card.incarnation).items():
            besieged.expect(reason, len(frames), lambda frames=frames: [hostile.data.send(frame) for frame in frames])  # type: ignore[misc]
        besieged.expect("dropped_malformed", 1, lambda: hostile.data.send_multipart([feed_prefix(feed), b"two"]))
        hostile.data.send(encode_marker(feed, besieged.peer_card.incarnation + 7, 10**6, 0, [1]))
        besieged.talk()
    finally:
        hostile.close()


def test_a_peer_of_another_protocol_version_is_refused_at_join_naming_both(tmp_path: Path) -> None:
    spec = f"memory://{tmp_path}"
    stranger = open_rendezvous(spec, rank=1, world_size=2, job=JOB)
    card = replace(a_card(1), job=JOB, version=2, incarnation=time.time_ns())
    met = threading.Thread(target=lambda: stranger.meet(card, timeout_s=20))
    met.start()
    try:
        with pytest.raises(VersionMismatchError, match="rank-1 speaks protocol version 2, we speak 1") as caught:
            join(rank=0, world_size=2, rendezvous=spec, job=JOB, timeout_s=20)
        assert caught.value.fields == {"peer": "rank-1", "ours": 1, "theirs": "2"}
    finally:
        met.join(timeout=20)
        stranger.close()


def test_the_checksums_of_this_file_are_those_of_the_protocol() -> None:
    frame = encode_control(Kind.HEARTBEAT, 1, 1, [], 0)
    assert resealed(frame) == frame
    assert frame[-8:] == checksum_of(frame[:-8]).to_bytes(8, "little")
