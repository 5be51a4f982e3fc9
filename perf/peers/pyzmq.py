"""The same work with nothing but pyzmq, tuned as well as it can be: the line that the fabric is measured against.

What it does less than the fabric, in its favour: nothing is retained, acknowledged, repaired, checksummed or
snapshotted; a payload is sent from where it lies and must not change meanwhile. What it does alike: the receiver knows
the order and checks it, and holds the payload as bytes or as a numpy view before the clock stops. Tensors travel a
second way, `safe`, that gives two of the fabric's promises too: a snapshot is sent, and its checksum is verified.

Settings: PUSH/PULL and PUB/SUB were both tried for records and the faster stays (PUB/SUB needs an unbounded high-water
mark, or it drops); to several readers PUB/SUB, arrays of it with XPUB_NODROP and a mark of 64, so that what a slow
reader leaves does not fill the memory and nothing drops. `copy=False` from 64 KiB on, where it pays; received arrays
are views of their frames, since `recv_into` copies each once more, out of libzmq's own memory. SNDBUF and RCVBUF are
left to the kernel: over tcp it tunes them itself, over ipc libzmq does not apply them. One IO thread, as we have.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import zmq

from perf.peers import base
from perf.peers.base import HEADER, MEET_TIMEOUT_S, Array, Place, await_file, tell_file

COPY_MAX = 64 * 1024
"""Smaller ones are cheaper to copy than to hand over: a frame that is not copied wakes a thread of pyzmq's."""


class Sockets:
    """One context; addresses are told through small files in the meeting directory, so that tcp can bind port 0."""

    def __init__(self, meeting: Path, link: str) -> None:
        self.meeting, self.link = meeting, link
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
        tell_file(self.meeting / f"{name}.address", socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0"))

    def connect(self, socket: zmq.Socket[bytes], name: str) -> None:
        """Wait until the name is told, then connect."""
        socket.connect(await_file(self.meeting / f"{name}.address"))

    def close(self) -> None:
        """Close all sockets of the context."""
        self.context.destroy(linger=1000)


def await_subscriptions(socket: zmq.Socket[bytes], count: int) -> None:
    """Wait until an XPUB has seen so many subscriptions."""
    for _ in range(count):
        socket.recv()


def _style(place: Place) -> str:
    return place.style or ("push" if place.readers == 1 else "nodrop")


def _mark(place: Place, *, writes: bool) -> int:
    """Messages. For records as many as never matter; of arrays the receiver's mark bounds memory, and the best of the
    sender's was looked for by link.
    """
    style = _style(place)
    if style == "pub":
        return 0
    if place.size_max <= COPY_MAX:
        return 100_000
    return 64 if style == "nodrop" or (writes and place.link == "ipc") else 4


class Writer(base.Writer):
    """Records are one frame, arrays a header frame and their memory."""

    def open(self) -> None:
        place = self.place
        self.sockets, self.style = Sockets(place.meeting, place.link), _style(place)
        self.snapshots: deque[tuple[Array, zmq.MessageTracker]] = deque()
        if self.style in ("push", "safe"):
            self.socket = self.sockets.make(zmq.PUSH, hwm=_mark(place, writes=True))
            self.sockets.connect(self.socket, "stream")
            return
        self.socket = self.sockets.make(zmq.XPUB, hwm=_mark(place, writes=True))
        # Otherwise the same subscription of a second reader is not told.
        self.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        if self.style == "nodrop":
            self.socket.setsockopt(zmq.XPUB_NODROP, 1)
            # One that never reads shows soon.
            self.socket.sndtimeo = 5000
        self.sockets.bind(self.socket, "stream")
        await_subscriptions(self.socket, place.readers)

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        send = self.socket.send
        for record in records:
            send(record)

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        if self.style == "safe":
            for header, array in items:
                self._send_snapshot(HEADER.unpack(header)[1], array)
            return
        send = self.socket.send
        for header, array in items:
            send(header, zmq.SNDMORE)
            send(array, copy=array.nbytes < COPY_MAX)  # type: ignore[arg-type]

    def _send_snapshot(self, sequence: int, source: Array) -> None:
        """Summed, and from warm memory that is used again once it has left. The sum takes the seed's place."""
        from fabric.payloads import Digest, copy_summed

        while self.snapshots and self.snapshots[0][0].nbytes != source.nbytes:
            self.snapshots.popleft()
        has_left = self.snapshots and self.snapshots[0][1].done
        snapshot = self.snapshots.popleft()[0] if has_left else np.empty_like(source)
        digest = Digest()
        copy_summed(snapshot.data.cast("B"), source.data.cast("B"), digest)
        self.socket.send(HEADER.pack(digest.intdigest(), sequence), zmq.SNDMORE)
        tracker = self.socket.send(snapshot, copy=False, track=True)  # type: ignore[arg-type]
        assert tracker is not None
        self.snapshots.append((snapshot, tracker))

    def close(self) -> None:
        self.sockets.close()


class Reader(base.Reader):
    """Records are copied out, arrays are read-only views of their frames."""

    def open(self) -> None:
        place = self.place
        self.sockets, self.style = Sockets(place.meeting, place.link), _style(place)
        if self.style in ("push", "safe"):
            self.socket = self.sockets.make(zmq.PULL, hwm=_mark(place, writes=False))
            self.sockets.bind(self.socket, "stream")
            return
        self.socket = self.sockets.make(zmq.SUB, hwm=_mark(place, writes=False))
        self.sockets.connect(self.socket, "stream")
        self.socket.subscribe(b"")

    def read(self, n: int) -> Iterator[bytes]:
        receive = self.socket.recv
        for _ in range(n):
            yield receive()

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for size in sizes:
            header = self.socket.recv()
            if size < COPY_MAX:
                yield header, np.frombuffer(self.socket.recv(), dtype=np.uint8)
                continue
            frame = self.socket.recv(copy=False)
            if self.style == "safe":
                header = self._verified(header, frame)
            yield header, np.frombuffer(frame.buffer, dtype=np.uint8)

    def _verified(self, header: bytes, frame: zmq.Frame) -> bytes:
        from fabric.payloads import Digest

        checksum, sequence = HEADER.unpack(header)
        if Digest(frame.buffer).intdigest() != checksum:
            raise ValueError(f"tensor {sequence} is damaged")
        return HEADER.pack(0, sequence)

    def close(self) -> None:
        self.sockets.close()


class Caller(base.Caller):
    """One frame there, one frame back."""

    def open(self) -> None:
        self.sockets = Sockets(self.place.meeting, self.place.link)
        self.socket = self.sockets.make(zmq.DEALER)
        self.sockets.connect(self.socket, "requests")

    def call(self, question: bytes) -> bytes:
        self.socket.send(question)
        return self.socket.recv()

    def close(self) -> None:
        self.sockets.close()


class Answerer(base.Answerer):
    """A router that sends back what it gets."""

    def open(self) -> None:
        self.sockets = Sockets(self.place.meeting, self.place.link)
        self.socket = self.sockets.make(zmq.ROUTER)
        self.sockets.bind(self.socket, "requests")

    def serve(self, n: int) -> None:
        for _ in range(n):
            self.socket.send_multipart(self.socket.recv_multipart())

    def close(self) -> None:
        self.sockets.close()
