"""The same work with nothing but pyzmq, tuned as well as it can be: the line that the fabric is measured against.

What they do less than the fabric, in their favour: nothing is retained, acknowledged, repaired, checksummed or
snapshotted; a payload is sent from where it lies and must not change meanwhile. What they do alike: the receiver knows
the order and checks it, and holds the payload as bytes or as a numpy view before the clock stops. Tensors travel a
second way, `safe`, that gives two of the fabric's promises too: a snapshot is sent, and its checksum is verified.

Tuning: PUSH/PULL and PUB/SUB were both tried for records and the faster stays (PUB/SUB needs an unbounded high-water
mark, or it drops); `copy=False` from 64 KiB on, where it pays; ipc and tcp; one frame where one frame will do.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import zmq

from fabric.payloads import Digest, copy_summed

__all__ = [
    "RawMesh",
    "RecordReceiver",
    "RecordSender",
    "Requester",
    "Responder",
    "TensorReceiver",
    "TensorSender",
    "TopicReceiver",
    "TopicSender",
    "tensor_sources",
]

HEADER = struct.Struct("<QQ")
"""Seed and sequence, at the head of a record."""

RECORD_BYTES = 256
MEET_TIMEOUT_S = 30.0
SocketKinds = dict[str, tuple[int, int]]
"""Kind and high-water mark by style."""

BLOCK = 256
"""Records in one frame of the batched variant: 64 KiB."""


class _Sockets:
    """One context; addresses are told through small files in the meeting directory, so that tcp can bind port 0."""

    def __init__(self, rank: int, meeting: Path, link: str) -> None:
        self.rank, self.meeting, self.link = rank, meeting, link
        self.context = zmq.Context()

    def make(self, kind: int, *, hwm: int = 1000) -> zmq.Socket[bytes]:
        """A socket with this high-water mark (frames; 0: unbounded) that closes without lingering for long."""
        socket = self.context.socket(kind)
        socket.set_hwm(hwm)
        socket.linger = 1000
        socket.rcvtimeo = socket.sndtimeo = int(MEET_TIMEOUT_S * 1000)
        return socket

    def bind(self, socket: zmq.Socket[bytes], name: str) -> None:
        """Bind and tell the address under this name."""
        socket.bind("tcp://127.0.0.1:*" if self.link == "tcp" else f"ipc://{self.meeting}/{name}.sock")
        note = self.meeting / f"{name}.part"
        note.write_text(socket.getsockopt_string(zmq.LAST_ENDPOINT))
        note.rename(self.meeting / f"{name}.address")

    def connect(self, socket: zmq.Socket[bytes], name: str) -> None:
        """Wait until the name is told, then connect."""
        note, deadline = self.meeting / f"{name}.address", time.monotonic() + MEET_TIMEOUT_S
        while not note.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody bound {name}")
            time.sleep(0.002)
        socket.connect(note.read_text().rstrip("\0"))

    def close(self) -> None:
        """Close all sockets of the context."""
        self.context.destroy(linger=1000)


def await_subscriptions(socket: zmq.Socket[bytes], count: int) -> None:
    """Wait until an XPUB has seen so many subscriptions."""
    for _ in range(count):
        socket.recv()


# One record, one frame.


class RecordSender:
    """Sends n records of 256 bytes over so many seeds, one frame each.

    `style`: `push` (PUSH/PULL, blocks at the mark), `pub` (PUB/SUB, unbounded so that nothing drops), or `batched`
    (PUSH/PULL, 256 records joined in one frame: what an application would write by hand).
    """

    socket_kinds: ClassVar[SocketKinds] = {"push": (zmq.PUSH, 100_000), "pub": (zmq.XPUB, 0), "batched": (zmq.PUSH, 64)}

    def __init__(self, *, rank: int, meeting: Path, style: str = "push", link: str = "ipc") -> None:
        self.sockets, self.style = _Sockets(rank, meeting, link), style
        kind, hwm = self.socket_kinds[style]
        self.socket = self.sockets.make(kind, hwm=hwm)

        self.sequences: dict[int, int] = {}

    def open(self) -> None:
        """Bind; wait for the subscription where there is one."""
        self.sockets.bind(self.socket, "records")
        if self.style == "pub":
            await_subscriptions(self.socket, 1)

    def run(self, *, n: int, seeds: int) -> dict[str, Any]:
        """One round; n is a multiple of `BLOCK`, which is a multiple of seeds."""
        base, self.sequences[seeds] = self.sequences.get(seeds, 0), self.sequences.get(seeds, 0) + n // seeds
        start = time.monotonic_ns()
        (self._blocks if self.style == "batched" else self._records)(n, seeds, base)
        return {"start_ns": start, "sent_ns": time.monotonic_ns()}

    def _records(self, n: int, seeds: int, base: int) -> None:
        send, pack, tail = self.socket.send, HEADER.pack, b"x" * (RECORD_BYTES - HEADER.size)
        for sequence in range(base, base + n // seeds):
            for seed in range(seeds):
                send(pack(seed, sequence) + tail)

    def _blocks(self, n: int, seeds: int, base: int) -> None:
        send, pack, tail = self.socket.send, HEADER.pack, b"x" * (RECORD_BYTES - HEADER.size)
        rows = BLOCK // seeds
        for first in range(base, base + n // seeds, rows):
            block = range(first, first + rows)
            send(b"".join([pack(seed, sequence) + tail for sequence in block for seed in range(seeds)]))

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class RecordReceiver:
    """Receives them and checks every sequence."""

    socket_kinds: ClassVar[SocketKinds] = {"push": (zmq.PULL, 100_000), "pub": (zmq.SUB, 0), "batched": (zmq.PULL, 64)}

    def __init__(self, *, rank: int, meeting: Path, style: str = "push", link: str = "ipc") -> None:
        self.sockets, self.style = _Sockets(rank, meeting, link), style
        kind, hwm = self.socket_kinds[style]
        self.socket = self.sockets.make(kind, hwm=hwm)
        self.expected: dict[int, list[int]] = {}

    def open(self) -> None:
        """Connect and subscribe."""
        self.sockets.connect(self.socket, "records")
        if self.style == "pub":
            self.socket.subscribe(b"")

    def run(self, *, n: int, seeds: int) -> dict[str, Any]:
        """One round; raises ValueError at the first record out of order."""
        expected = self.expected.setdefault(seeds, [0] * seeds)
        (self._blocks if self.style == "batched" else self._records)(n, expected)
        return {"end_ns": time.monotonic_ns()}

    def _records(self, n: int, expected: list[int]) -> None:
        receive, unpack = self.socket.recv, HEADER.unpack_from
        for _ in range(n):
            frame = receive()
            seed, sequence = unpack(frame)
            if expected[seed] != sequence or len(frame) != RECORD_BYTES:
                raise ValueError(f"seed {seed}: expected {expected[seed]}, got {sequence}")
            expected[seed] = sequence + 1

    def _blocks(self, n: int, expected: list[int]) -> None:
        receive, unpack = self.socket.recv, HEADER.unpack_from
        for _ in range(0, n, BLOCK):
            frame = receive()
            for position in range(0, len(frame), RECORD_BYTES):
                record = frame[position : position + RECORD_BYTES]
                seed, sequence = unpack(record)
                if expected[seed] != sequence or len(record) != RECORD_BYTES:
                    raise ValueError(f"seed {seed}: expected {expected[seed]}, got {sequence}")
                expected[seed] = sequence + 1

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


# Tensors.


def tensor_sources(size: int, count: int = 2) -> list[np.ndarray[Any, np.dtype[np.float32]]]:
    """`count` float32 arrays of `size` bytes; array k is filled with k + 1, so that a receiver can tell them apart."""
    return [np.full(size // 4, k + 1, dtype=np.float32) for k in range(count)]


def check_tensor(view: np.ndarray[Any, Any], sequence: int, size: int) -> None:
    """Sampled: size, first, middle and last element. Raises ValueError."""
    wanted = sequence % 2 + 1
    if view.nbytes != size or not view[0] == view[-1] == view[view.size // 2] == wanted:
        raise ValueError(f"tensor {sequence} is not what was sent: {view.nbytes} bytes of {view[0]}, {view[-1]}")


class TensorSender:
    """Sends arrays without a copy: a header frame and the array's memory.

    `safe`: sends a summed snapshot of each instead, from warm memory that is used again once it has left.
    """

    def __init__(self, *, rank: int, meeting: Path, link: str = "ipc", safe: bool = False) -> None:
        self.sockets = _Sockets(rank, meeting, link)
        self.safe = safe
        self.snapshots: deque[tuple[np.ndarray[Any, Any], zmq.MessageTracker]] = deque()
        # Messages of two frames. The receiver's mark bounds memory; the best of the sender's was looked for by link.
        self.socket = self.sockets.make(zmq.PUSH, hwm=4 if link == "tcp" else 64)
        self.sources: list[Any] = []

    def open(self) -> None:
        """Bind."""
        self.sockets.bind(self.socket, "tensors")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        """One round of n arrays of `size` bytes."""
        if not self.sources or self.sources[0].nbytes != size:
            self.sources = tensor_sources(size)
            self.snapshots.clear()
        start = time.monotonic_ns()
        for sequence in range(n):
            (self._send_snapshot if self.safe else self._send)(sequence, self.sources[sequence % 2])
        return {"start_ns": start}

    def _send(self, sequence: int, source: np.ndarray[Any, Any]) -> None:
        self.socket.send(HEADER.pack(0, sequence), zmq.SNDMORE)
        self.socket.send(source, copy=False)  # type: ignore[arg-type]

    def _send_snapshot(self, sequence: int, source: np.ndarray[Any, Any]) -> None:
        has_left = self.snapshots and self.snapshots[0][1].done
        snapshot = self.snapshots.popleft()[0] if has_left else np.empty_like(source)
        digest = Digest()
        copy_summed(snapshot.data.cast("B"), source.data.cast("B"), digest)
        self.socket.send(HEADER.pack(digest.intdigest(), sequence), zmq.SNDMORE)
        tracker = self.socket.send(snapshot, copy=False, track=True)  # type: ignore[arg-type]
        assert tracker is not None
        self.snapshots.append((snapshot, tracker))

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class TensorReceiver:
    """Receives them as read-only numpy views of the frames; `safe`: and verifies their checksums."""

    def __init__(self, *, rank: int, meeting: Path, link: str = "ipc", safe: bool = False) -> None:
        self.sockets = _Sockets(rank, meeting, link)
        self.safe = safe
        self.socket = self.sockets.make(zmq.PULL, hwm=4)

    def open(self) -> None:
        """Connect."""
        self.sockets.connect(self.socket, "tensors")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        """One round; every array is checked by samples."""
        for wanted in range(n):
            checksum, sequence = HEADER.unpack(self.socket.recv())
            frame = self.socket.recv(copy=False)
            if sequence != wanted:
                raise ValueError(f"expected tensor {wanted}, got {sequence}")
            if self.safe and Digest(frame.buffer).intdigest() != checksum:
                raise ValueError(f"tensor {sequence} is damaged")
            check_tensor(np.frombuffer(frame.buffer, dtype=np.float32), sequence, size)
        return {"end_ns": time.monotonic_ns()}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


# Round trips.


class Requester:
    """One frame there, one frame back, one at a time."""

    def __init__(self, *, rank: int, meeting: Path, link: str = "ipc") -> None:
        self.sockets = _Sockets(rank, meeting, link)
        self.socket = self.sockets.make(zmq.DEALER)

    def open(self) -> None:
        """Connect."""
        self.sockets.connect(self.socket, "requests")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        """The nanoseconds of n round trips; raises ValueError if an answer is not its question."""
        times, tail = [], b"x" * (size - HEADER.size)
        for sequence in range(n):
            question = HEADER.pack(0, sequence) + tail
            start = time.monotonic_ns()
            self.socket.send(question)
            answer = self.socket.recv()
            times.append(time.monotonic_ns() - start)
            if answer != question:
                raise ValueError(f"answer {sequence} is not its question")
        return {"round_trips_ns": times}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class Responder:
    """Answers with what it was asked."""

    def __init__(self, *, rank: int, meeting: Path, link: str = "ipc") -> None:
        self.sockets = _Sockets(rank, meeting, link)
        self.socket = self.sockets.make(zmq.ROUTER)

    def open(self) -> None:
        """Bind."""
        self.sockets.bind(self.socket, "requests")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        """Answer n questions."""
        for _ in range(n):
            self.socket.send_multipart(self.socket.recv_multipart())
        return {}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


# Many topics, many patterns: PUB/SUB, since that is where ZeroMQ matches.


class TopicSender:
    """Sends records in whose head the topic stands: `topic NUL header payload`, one frame."""

    def __init__(self, *, rank: int, meeting: Path, topics: list[str], patterns: list[str]) -> None:
        self.sockets = _Sockets(rank, meeting, "ipc")
        self.socket = self.sockets.make(zmq.XPUB, hwm=0)
        self.heads = [topic.encode() + b"\0" for topic in topics]
        self.patterns = len(patterns)
        self.position = self.sequence = 0

    def open(self) -> None:
        """Bind; wait until every prefix is subscribed."""
        self.sockets.bind(self.socket, "topics")
        await_subscriptions(self.socket, self.patterns)

    def run(self, *, n: int, run_length: int) -> dict[str, Any]:
        """One round of n records, `run_length` on a topic, then the next topic."""
        send, pack, heads = self.socket.send, HEADER.pack, self.heads
        tail, count = b"x" * (RECORD_BYTES - HEADER.size), len(heads)
        start = time.monotonic_ns()
        for _ in range(n // run_length):
            head = heads[self.position % count]
            self.position += 1
            for _ in range(run_length):
                send(head + pack(0, self.sequence) + tail)
                self.sequence += 1
        return {"start_ns": start}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class TopicReceiver:
    """Subscribes to the patterns' fixed prefixes, ZeroMQ's only kind of pattern, and tells the topics apart."""

    def __init__(self, *, rank: int, meeting: Path, topics: list[str], patterns: list[str]) -> None:
        self.sockets = _Sockets(rank, meeting, "ipc")
        self.socket = self.sockets.make(zmq.SUB, hwm=0)
        self.prefixes = [pattern.partition("*")[0].encode() for pattern in patterns]
        self.topics, self.sequence = {topic.encode() for topic in topics}, 0

    def open(self) -> None:
        """Connect and subscribe."""
        self.sockets.connect(self.socket, "topics")
        for prefix in self.prefixes:
            self.socket.subscribe(prefix)

    def run(self, *, n: int, run_length: int) -> dict[str, Any]:
        """One round; topic and sequence are checked."""
        receive, unpack, topics = self.socket.recv, HEADER.unpack_from, self.topics
        for wanted in range(self.sequence, self.sequence + n):
            frame = receive()
            end = frame.index(b"\0")
            if frame[:end] not in topics or unpack(frame, end + 1)[1] != wanted:
                raise ValueError(f"record {wanted} is not what was sent")
        self.sequence += n
        return {"end_ns": time.monotonic_ns()}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


# A training step.


class RawMesh:
    """What a rank of a training job would write by hand: a PUB of its own, a SUB that hears all others."""

    def __init__(self, *, rank: int, meeting: Path, ranks: int, topics: int) -> None:
        self.sockets = _Sockets(rank, meeting, "ipc")
        self.publisher = self.sockets.make(zmq.XPUB, hwm=0)
        # Otherwise the same subscription of a second rank is not told.
        self.publisher.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.subscriber = self.sockets.make(zmq.SUB, hwm=0)
        self.rank, self.ranks, self.topics = rank, ranks, topics
        self.sequence = 0

    def open(self, listens: bool) -> None:
        """Meet all; the ranks that listen hear all ranks, themselves as well."""
        self.sockets.bind(self.publisher, f"rank{self.rank}")
        if listens:
            for rank in range(self.ranks):
                self.sockets.connect(self.subscriber, f"rank{rank}")
            self.subscriber.subscribe(b"")

    def await_listeners(self, count: int) -> None:
        """Wait until so many ranks hear this one."""
        await_subscriptions(self.publisher, count)

    def publish(self, topic: int, value: np.ndarray[Any, Any]) -> None:
        """One frame: rank, topic, sequence, then a snapshot of the value."""
        self.publisher.send(struct.pack("<IIQ", self.rank, topic, self.sequence) + value.tobytes())
        self.sequence += topic == self.topics - 1

    def drain(self) -> int:
        """Take what is here; the number of messages, each made an array."""
        count = 0
        while True:
            try:
                frame = self.subscriber.recv(zmq.DONTWAIT)
            except zmq.Again:
                return count
            np.frombuffer(frame, dtype=np.float32, offset=16)
            count += 1

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()
