"""zenoh (eclipse-zenoh), brokerless as we are.

Settings: peers with multicast scouting and gossip off, one explicit endpoint, the writer's (a unix socket, or tcp on a
port that was free a moment ago: zenoh's Python tells no port that the kernel chose); `Reliability.RELIABLE` and
`CongestionControl.BLOCK`, so that it drops nothing; a FIFO channel on the reader's side, so that the receive path does
not run Python. Shared memory is on over `ipc`, for arrays, in a pool of six of the largest, and off over tcp. A shared
buffer takes bytes only, so the sources are made bytes before the clock starts: in zenoh's favour, one copy less.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import zenoh
from zenoh import handlers, shm

from perf.peers import base
from perf.peers.base import MEET_TIMEOUT_S, Array, Place, await_file, tell_file

KEY, QUERY = "perf/stream", "perf/echo"


def _config(place: Place, **more: Any) -> zenoh.Config:  # noqa: ANN401
    config = zenoh.Config()
    settings = {
        "mode": "peer",
        "scouting/multicast/enabled": False,
        "scouting/gossip/enabled": False,
        "listen/endpoints": [],
        "transport/shared_memory/enabled": place.link == "ipc" and place.size_max > 1 << 16,
        **more,
    }
    for key, value in settings.items():
        config.insert_json5(key, json.dumps(value))
    return config


def _listen(place: Place, name: str) -> zenoh.Session:
    if place.link == "ipc":
        endpoint = f"unixsock-stream/{place.meeting}/{name}.sock"
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            endpoint = f"tcp/127.0.0.1:{probe.getsockname()[1]}"
    session = zenoh.open(_config(place, **{"listen/endpoints": [endpoint]}))
    tell_file(place.meeting / f"{name}.zenoh", endpoint)
    return session


def _connect(place: Place, names: Sequence[str]) -> zenoh.Session:
    endpoints = [await_file(place.meeting / f"{name}.zenoh") for name in names]
    return zenoh.open(_config(place, **{"connect/endpoints": endpoints}))


class Writer(base.Writer):
    """A publisher that blocks; each writer listens, each reader connects to all."""

    def open(self) -> None:
        place = self.place
        self.session = _listen(place, f"writer{place.number}")
        self.publisher = self.session.declare_publisher(
            KEY, congestion_control=zenoh.CongestionControl.BLOCK, reliability=zenoh.Reliability.RELIABLE
        )
        self.pool = None
        if place.link == "ipc" and place.size_max > 1 << 16:
            self.pool = shm.ShmProvider.default_backend(max(64 << 20, 6 * place.size_max))
            self.policy = shm.BlockOn(shm.GarbageCollect())
        self.bytes_of: dict[int, bytes] = {}
        for number in range(place.readers):
            await_file(place.meeting / f"reader{number}.ready")
        deadline = time.monotonic() + MEET_TIMEOUT_S
        while len(self.session.info.peers_zid()) < place.readers or not self.publisher.matching_status.matching:
            if time.monotonic() > deadline:
                raise TimeoutError("no reader came")
            time.sleep(0.01)
        # `matching` is true when one reader matches; that all do is nowhere to be asked.
        time.sleep(0.5 if place.readers > 1 else 0)

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        put = self.publisher.put
        for record in records:
            put(record)

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        for header, array in items:
            data = self.bytes_of.get(id(array)) or array.tobytes()
            if self.pool is None or len(data) < 4096:
                self.publisher.put(data, attachment=header)
                continue
            buffer = self.pool.alloc(len(data), self.policy)
            buffer[:] = data
            self.publisher.put(buffer, attachment=header)

    def prepare(self, arrays: Iterable[Array]) -> None:
        """Make bytes of what will be sent."""
        self.bytes_of = {id(array): array.tobytes() for array in arrays}

    def close(self) -> None:
        self.session.close()


class Reader(base.Reader):
    """A channel."""

    def open(self) -> None:
        place = self.place
        self.session = _connect(place, [f"writer{number}" for number in range(place.writers)])
        depth = 4 if place.size_max > 1 << 16 else 4096
        self.subscriber = self.session.declare_subscriber(KEY, handlers.FifoChannel(depth))
        tell_file(place.meeting / f"reader{place.number}.ready", "")

    def read(self, n: int) -> Iterator[bytes]:
        receive = self.subscriber.recv
        for _ in range(n):
            yield receive().payload.to_bytes()

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for _ in sizes:
            sample = self.subscriber.recv()
            yield sample.attachment.to_bytes(), np.frombuffer(sample.payload.to_bytes(), dtype=np.uint8)

    def close(self) -> None:
        self.session.close()


class Caller(base.Caller):
    """A query."""

    def open(self) -> None:
        self.session = _connect(self.place, ["answerer"])
        await_file(self.place.meeting / "answerer.ready")
        time.sleep(0.2)

    def call(self, question: bytes) -> bytes:
        return self.session.get(QUERY, payload=question).recv().ok.payload.to_bytes()

    def close(self) -> None:
        self.session.close()


class Answerer(base.Answerer):
    """A queryable."""

    def open(self) -> None:
        self.session = _listen(self.place, "answerer")
        self.queryable = self.session.declare_queryable(QUERY, handlers.FifoChannel(64))
        tell_file(self.place.meeting / "answerer.ready", "")

    def serve(self, n: int) -> None:
        for _ in range(n):
            with self.queryable.recv() as query:
                query.reply(QUERY, query.payload.to_bytes())

    def close(self) -> None:
        self.session.close()
