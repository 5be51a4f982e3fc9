"""A subscriber written from PROTOCOL.md alone: pyzmq, msgpack, numpy and xxhash, nothing of the library.

It proves that the page is enough. Section numbers refer to it; `page.py` has the frames and values. One thread and no
error handling: a test that meets what it does not expect fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgpack
import zmq
from xxhash import xxh3_64_intdigest as xxh3

from tests.harness.page import (
    ACKNOWLEDGE,
    ADDRESSED,
    AVAILABLE,
    BYE,
    CHUNK,
    DESCRIPTOR,
    FETCH,
    HEARTBEAT,
    HELLO,
    JOIN,
    PULL,
    REGISTER,
    REGISTERED,
    REPAIR,
    REPLY,
    REQUEST,
    ROSTER,
    ROSTER_ASK,
    VERSION,
    Data,
    Message,
    Record,
    decode_data,
    decode_message,
    decode_value,
    encode_message,
    feed_id,
    member_id,
    reply_space,
)

CREDIT = 8 * 1024 * 1024
REPEAT_S = 0.05
"""How long an answer is awaited before the question is repeated."""
TIMEOUT_S = 15.0


# Section 5: the dialogues.


@dataclass
class Feed:
    """What is known of one feed: what came, and the offsets that DATA or a heartbeat spoke of."""

    feed: int
    topic: str
    join: int
    end: int
    records: dict[int, Record] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    told: int = 0
    """Below this, what is absent is lost: a marker, or a later burst, said so."""

    @property
    def floor(self) -> int:
        offset = self.join
        while offset in self.records or offset in self.gone:
            offset += 1
        return offset

    def missing(self) -> list[tuple[int, int]]:
        absent = [o for o in range(self.join, self.told) if o not in self.records and o not in self.gone]
        return [(offset, offset + 1) for offset in absent]

    def lanes(self) -> dict[int, list[Record]]:
        """What may be handed over, by seed, in order: each record behind its `previous`."""
        settled = set(range(-1, self.join)) | self.gone
        lanes: dict[int, list[Record]] = {}
        for offset, record in sorted(self.records.items()):
            if record.previous in settled:
                settled.add(offset)
                lanes.setdefault(record.seed, []).append(record)
        return lanes


class Reader:
    """A member that only listens. `lose(record)` makes it deaf for a burst on DATA that holds such a record."""

    def __init__(self, job: str, name: str, *, data: str, control: str, bulk: str) -> None:
        self.job, self.name, self.id, self.incarnation = job, name, member_id(name), time.time_ns()
        self.context: zmq.Context[Any] = zmq.Context()
        self.publisher, self.control_in, self.bulk_in = (
            self._bound(kind) for kind in (zmq.PUB, zmq.ROUTER, zmq.ROUTER)
        )
        self.subscriber = self.context.socket(zmq.SUB)
        self.subscriber.connect(data)
        self.control_out = self.context.socket(zmq.DEALER)
        self.control_out.connect(control)
        self.bulk_address = bulk  # a subscriber never sends on BULK
        self.poller = zmq.Poller()
        for socket in (self.subscriber, self.control_in, self.bulk_in):
            self.poller.register(socket, zmq.POLLIN)
        self.peer, self.peer_id, self.peer_incarnation, self.peer_sees = "", 0, 0, 0
        self.feeds: dict[int, Feed] = {}
        self.totals: dict[int, int] = {}
        self.echoed: set[int] = set()
        self.available: dict[int, Message] = {}
        self.chunks: dict[tuple[int, int], dict[int, bytes]] = {}
        self.replies: dict[int, list[Any]] = {}
        self.said_bye: list[Any] | None = None
        self.cards: list[Any] = []
        self.lose: Callable[[Record], bool] = lambda record: False
        self.lost: list[int] = []
        self.repaired: list[int] = []
        self.heard: list[int] = []
        """The kinds of all messages that came."""
        self.tokens = iter(range(1, 2**63))
        self.beat_s = 0.0

    def _bound(self, kind: int) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self.context.socket(kind)
        socket.bind("tcp://127.0.0.1:*")
        return socket

    def close(self) -> None:
        self.context.destroy(linger=200)

    # 5.1

    def card(self) -> tuple[Any, ...]:
        sockets = (self.publisher, self.control_in, self.bulk_in)
        addresses = [socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode() for socket in sockets]
        return (self.name, 0, 1, self.job, "elsewhere", os.getpid(), VERSION, *addresses)

    def hello(self) -> None:
        """Say hello until the member says that it knows us."""
        self.ask(self._say_hello, lambda: self.peer_sees == self.incarnation, "an answer to HELLO")
        self._say_hello()

    def _say_hello(self) -> None:
        self.send(HELLO, *self.card(), self.peer_incarnation, [])

    def roster(self) -> list[Any]:
        self.ask(
            lambda: self.send(ROSTER_ASK, *self.card(), self.incarnation), lambda: ROSTER in self.heard, "a roster"
        )
        return self.cards

    # 5.2, 5.3

    def register(self, subscription: int, pattern: str, *, start: str = "live") -> list[Feed]:
        """Register; returns the feeds that match by now."""
        self.ask(
            lambda: self.send(REGISTER, subscription, pattern, start, "reliable", False, [], ""),
            lambda: len(self.feeds) >= self.totals.get(subscription, 1),
            "REGISTERED",
        )
        return list(self.feeds.values())

    def follow(self, feed: Feed) -> None:
        """Listen to a feed; returns when the link is live."""
        self.subscriber.subscribe(feed.feed.to_bytes(8, "little"))
        nonce = (self.id + next(self.tokens)) % 2**64
        self.ask(lambda: self.send(JOIN, [(feed.feed, nonce)]), lambda: nonce in self.echoed, "the echo of a nonce")

    # 5.4, 5.6

    def repair(self, feed: Feed) -> None:
        """Pull what is missing until nothing is."""
        while ranges := feed.missing()[:64]:
            token = next(self.tokens)
            self.ask(
                lambda token=token, ranges=ranges: self.send(PULL, feed.feed, token, CREDIT, ranges),  # type: ignore[misc]
                lambda token=token: token in self.available,  # type: ignore[misc]
                "AVAILABLE",
            )
            _, _, first, _, lost = self.available.pop(token).fields
            feed.gone |= set(range(feed.join, first)) - feed.records.keys()
            for begin, end in lost:
                feed.gone |= set(range(begin, end))

    def receive_to(self, feed: Feed, end: int) -> None:
        """Until every offset below `end` is here, pulling what does not come by itself."""

        def look() -> bool:
            self.repair(feed)
            return feed.floor >= end

        self.ask(lambda: None, look, f"offsets below {end}")

    def acknowledge(self, subscription: int, feed: Feed) -> None:
        self.send(ACKNOWLEDGE, [(subscription, feed.feed, feed.floor)])

    # 5.5

    def value(self, feed: Feed, record: Record) -> Any:
        """The value of a record, fetched if it is addressed."""
        if not record.kind & ADDRESSED:
            return decode_value(record.kind, record.body)
        return decode_value(record.kind & ~ADDRESSED, self.fetch(feed.feed, record.offset, record.body))

    def fetch(self, space: int, number: int, descriptor: bytes) -> bytes:
        size, checksum = DESCRIPTOR.unpack(descriptor)
        chunks = self.chunks.setdefault((space, number), {})
        self.ask(
            lambda: self.send(FETCH, space, number, 0, size, next(self.tokens), False),
            lambda: sum(map(len, chunks.values())) >= size,
            "all chunks",
        )
        blob = b"".join(chunk for _, chunk in sorted(chunks.items()))
        assert len(blob) == size
        assert xxh3(blob) == checksum, "not what was published"
        return blob

    # 5.8

    def request(self, method: str, text: str) -> Any:
        """Ask with a text; returns the value of the reply."""
        number = next(self.tokens)
        self.ask(
            lambda: self.send(REQUEST, number, number, method, 1, 10_000, 2, b"", text.encode()),
            lambda: number in self.replies,
            "a reply",
        )
        failed, kind, blob = self.replies.pop(number)
        if failed:
            return msgpack.unpackb(blob)
        if kind & ADDRESSED:
            blob = self.fetch(reply_space(self.id, self.incarnation, self.peer_id), number, blob)
        return decode_value(kind & ~ADDRESSED, blob)

    # 5.9

    def await_bye(self) -> list[Any]:
        self.ask(lambda: None, lambda: self.said_bye is not None, "BYE")
        assert self.said_bye is not None
        return self.said_bye

    # Sending, waiting, receiving.

    def send(self, kind: int, *fields: Any) -> None:
        self.control_out.send(encode_message(kind, self.id, self.incarnation, *fields))

    def ask(
        self, question: Callable[[], None], is_over: Callable[[], bool], what: str, timeout_s: float = 15.0
    ) -> None:
        """Ask, and again after a while, until it is over; everything may be lost on its way."""
        deadline = time.monotonic() + TIMEOUT_S
        while not is_over():
            assert time.monotonic() < deadline, f"{what} did not come"
            question()
            again = time.monotonic() + REPEAT_S
            while not is_over() and time.monotonic() < again:
                self.turn(again)

    def turn(self, until_s: float) -> None:
        """Take what is here, or wait for it."""
        if self.peer_incarnation and time.monotonic() - self.beat_s > 1.0:  # 5.7
            self.beat_s = time.monotonic()
            self.send(HEARTBEAT, [], self.peer_incarnation)
        for socket, _ in self.poller.poll(max(0.0, (until_s - time.monotonic()) * 1000)):
            for frames in _waiting(socket):
                if socket is self.subscriber:
                    self._on_data(decode_data(frames[0]))
                else:
                    self._on_message(decode_message(frames[1]), frames[2] if len(frames) > 2 else b"")

    def _on_data(self, data: Data) -> None:
        feed = self.feeds[data.feed]
        assert data.incarnation == self.peer_incarnation
        if data.nonces is not None:
            self.echoed.update(data.nonces)
        elif any(self.lose(record) for record in data.records):
            self.lost += [record.offset for record in data.records]
            return
        feed.records.update({record.offset: record for record in data.records})
        feed.told = max(feed.told, data.end)

    def _on_message(self, message: Message, chunk: bytes) -> None:
        if message.kind == HELLO:
            self.peer, self.peer_id, self.peer_incarnation = message.fields[0], message.source, message.incarnation
            assert member_id(self.peer) == self.peer_id
        known = (message.source, message.incarnation) == (self.peer_id, self.peer_incarnation)
        if not known and message.kind != ROSTER:
            return  # it may greet us later than it registers with us
        self.heard.append(message.kind)
        handler = _HANDLERS.get(message.kind)
        if handler is not None:
            handler(self, chunk, *message.fields)
        if message.kind == AVAILABLE:
            self.available[message.fields[1]] = message

    def _on_hello(self, _: bytes, *fields: Any) -> None:
        self.peer_sees = fields[10]

    def _on_register(self, _: bytes, subscription: int, *rest: Any) -> None:
        self.send(REGISTERED, subscription, 0, [])  # we publish nothing

    def _on_registered(self, _: bytes, subscription: int, total: int, feeds: list[Any]) -> None:
        self.totals[subscription] = total
        for feed, topic, _policy, join, end, *_ in feeds:
            assert feed == feed_id(self.peer, self.peer_incarnation, topic)
            self.feeds.setdefault(feed, Feed(feed, topic, join, end, told=end))

    def _on_heartbeat(self, _: bytes, feeds: list[Any], seen: int) -> None:
        self.peer_sees = seen

    def _on_repair(self, chunk: bytes, feed: int, token: int) -> None:
        burst = decode_data(chunk)
        assert burst.feed == feed
        self.repaired += [record.offset for record in burst.records]
        self.feeds[feed].records.update({record.offset: record for record in burst.records})

    def _on_chunk(self, chunk: bytes, space: int, number: int, position: int, token: int, checksum: int) -> None:
        assert checksum in (0, xxh3(chunk))
        self.chunks[space, number][position] = chunk

    def _on_reply(self, _: bytes, number: int, failed: bool, kind: int, blob: bytes) -> None:
        self.replies[number] = [failed, kind, blob]

    def _on_roster(self, _: bytes, cards: list[Any]) -> None:
        self.cards = cards

    def _on_bye(self, _: bytes, ends: list[Any], is_last: bool) -> None:
        self.said_bye = ends


_HANDLERS: dict[int, Callable[..., None]] = {
    HELLO: Reader._on_hello,
    REGISTER: Reader._on_register,
    REGISTERED: Reader._on_registered,
    HEARTBEAT: Reader._on_heartbeat,
    BYE: Reader._on_bye,
    REPLY: Reader._on_reply,
    ROSTER: Reader._on_roster,
    REPAIR: Reader._on_repair,
    CHUNK: Reader._on_chunk,
}


def _waiting(socket: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """The messages that are here now."""
    while socket.get(zmq.EVENTS) & zmq.POLLIN:
        yield socket.recv_multipart()
