"""Redis: redis-py with hiredis, and a redis-server of its own, which costs a third process on the same cores.

Settings: nothing is persisted, no limit of memory, none of a subscriber's output buffer; a unix socket whatever the row
says; 256 commands in a pipeline without transaction (one where messages are paced, or arrays). `pub/sub` is fire and
forget; `stream` is XADD and XREADGROUP with COUNT 256 and NOACK, emptied after each round.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import redis

from perf.peers import base
from perf.peers.base import MEET_TIMEOUT_S, Array, Place, await_file, cpu_of_ns, serve, tell_file

KEY, PIPELINE = "perf", 256


def _connect(place: Place) -> redis.Redis:
    path = place.meeting / "redis.sock"
    client = redis.Redis(unix_socket_path=str(path), socket_timeout=60)
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while True:
        try:
            client.ping()
        except redis.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return client


class Writer(base.Writer):
    """The first keeps the server."""

    def open(self) -> None:
        place = self.place
        self.server = self._serve() if place.number == 0 else None
        self.client = _connect(place)
        for number in range(place.readers):
            await_file(place.meeting / f"reader{number}.ready")

    def _serve(self) -> Any:  # noqa: ANN401
        limits = ["--client-output-buffer-limit", "pubsub 0 0 0", "--proto-max-bulk-len", "1gb"]
        quiet = ["--save", "", "--appendonly", "no", "--port", "0"]
        place = ["--unixsocket", str(self.place.meeting / "redis.sock"), "--dir", str(self.place.meeting)]
        return serve(["redis-server", *limits, *quiet, *place])

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        depth, pipe, waiting = 1 if paced else PIPELINE, self.client.pipeline(transaction=False), 0
        for record in records:
            if self.place.style == "stream":
                pipe.xadd(KEY, {"d": record})
            else:
                pipe.publish(KEY, record)
            waiting += 1
            if waiting == depth:
                pipe.execute()
                waiting = 0
        pipe.execute()

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        for header, array in items:
            self.client.xadd(KEY, {"h": header, "d": array.data.cast("B")})  # type: ignore[dict-item]

    def server_cpu_ns(self) -> int:
        return cpu_of_ns(self.server.pid) if self.server else 0

    def close(self) -> None:
        self.client.close()
        if self.server:
            self.server.kill()
            self.server.wait()


class Reader(base.Reader):
    """A subscription, or the only consumer of a group of its own."""

    def open(self) -> None:
        self.client = _connect(self.place)
        self.group = f"group{self.place.number}"
        if self.place.style == "stream":
            self.client.xgroup_create(KEY, self.group, mkstream=True)
        else:
            self.inbox = self.client.pubsub(ignore_subscribe_messages=True)
            self.inbox.subscribe(KEY)
            self.inbox.get_message(timeout=1)
        tell_file(self.place.meeting / f"reader{self.place.number}.ready", "")

    def read(self, n: int) -> Iterator[bytes]:
        if self.place.style == "stream":
            for fields in self._entries(n, PIPELINE):
                yield fields[b"d"]
            return
        listen = self.inbox.listen()
        for _ in range(n):
            yield next(listen)["data"]

    def _entries(self, n: int, count: int) -> Iterator[Any]:
        left = n
        while left:
            told = self.client.xreadgroup(
                self.group, "reader", {KEY: ">"}, count=min(count, left), block=10_000, noack=True
            )
            for _, entries in told.items() if isinstance(told, dict) else told:
                found = entries[0] if isinstance(told, dict) else entries
                for _, fields in found:
                    left -= 1
                    yield fields

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for fields in self._entries(len(sizes), 8):
            yield fields[b"h"], np.frombuffer(fields[b"d"], dtype=np.uint8)

    def finish(self) -> None:
        if self.place.style == "stream" and self.place.readers == 1:
            self.client.xtrim(KEY, maxlen=0, approximate=False)

    def close(self) -> None:
        self.client.close()
