"""What only pyzmq does beside us: records joined by hand, topics and patterns, and the mesh of a training job.

The settings are those of `pyzmq.py`.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from perf.peers.base import HEADER
from perf.peers.pyzmq import Sockets, await_subscriptions

__all__ = ["BLOCK", "RECORD_BYTES", "JoinedReceiver", "JoinedSender", "RawMesh", "TopicReceiver", "TopicSender"]

RECORD_BYTES = 256
BLOCK = 256
"""Records in one frame of the joined variant: 64 KiB where a record has 256 bytes."""


# Many records, one frame.


class JoinedSender:
    """Sends n records over so many seeds, 256 of them joined in one frame: what an application would write by hand."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.sockets = Sockets(meeting, "ipc")
        self.socket = self.sockets.make(zmq.PUSH, hwm=64)
        self.base = 0

    def open(self) -> None:
        """Bind."""
        self.sockets.bind(self.socket, "records")

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        """One round; n is a multiple of `BLOCK`, which is a multiple of seeds."""
        send, pack, tail = self.socket.send, HEADER.pack, b"x" * (size - HEADER.size)
        base, self.base, rows = self.base, self.base + n // seeds, BLOCK // seeds
        start = time.monotonic_ns()
        for first in range(base, base + n // seeds, rows):
            block = range(first, first + rows)
            send(b"".join([pack(seed, sequence) + tail for sequence in block for seed in range(seeds)]))
        return {"start_ns": start}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


class JoinedReceiver:
    """Receives them and checks every sequence."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.sockets = Sockets(meeting, "ipc")
        self.socket = self.sockets.make(zmq.PULL, hwm=64)
        self.expected: list[int] = []

    def open(self) -> None:
        """Connect."""
        self.sockets.connect(self.socket, "records")

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        """One round; raises ValueError at the first record out of order."""
        self.expected = self.expected or [0] * seeds
        receive, unpack, expected = self.socket.recv, HEADER.unpack_from, self.expected
        for _ in range(0, n, BLOCK):
            frame = receive()
            for position in range(0, len(frame), size):
                record = frame[position : position + size]
                seed, sequence = unpack(record)
                if expected[seed] != sequence or len(record) != size:
                    raise ValueError(f"seed {seed}: expected {expected[seed]}, got {sequence}")
                expected[seed] = sequence + 1
        return {"end_ns": time.monotonic_ns(), "n": n}

    def close(self) -> None:
        """Close the sockets."""
        self.sockets.close()


# Many topics, many patterns: PUB/SUB, since that is where ZeroMQ matches.


class TopicSender:
    """Sends records in whose head the topic stands: `topic NUL header payload`, one frame."""

    def __init__(self, *, rank: int, meeting: Path, topics: list[str], patterns: list[str]) -> None:
        self.sockets = Sockets(meeting, "ipc")
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
        self.sockets = Sockets(meeting, "ipc")
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
        self.sockets = Sockets(meeting, "ipc")
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
