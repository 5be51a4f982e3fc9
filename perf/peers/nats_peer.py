"""NATS core: nats-py and a nats-server of its own, which costs a third process on the same cores.

Settings: the server on a free port of the loopback, `max_payload` raised to 8 MiB, its pending limit to 1 GiB, so that
it cuts off no reader; the client's pending limits off. Messages are taken by a callback, not by `next_msg`; the writer
flushes at the end, and after each message where they are paced. The loop runs only inside the calls of a round.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import nats

from perf.peers import base
from perf.peers.base import await_file, cpu_of_ns, serve, tell_file

SUBJECT, METHOD = "perf.stream", "perf.echo"


class _Client:
    """A connection with its loop; the first writer keeps the server."""

    def __init__(self, place: base.Place) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = self._serve(place) if place.rank == 0 else None
        address = await_file(place.meeting / "nats.address")
        self.connection = self.loop.run_until_complete(nats.connect(address))

    def _serve(self, place: base.Place) -> Any:  # noqa: ANN401
        config = place.meeting / "nats.conf"
        config.write_text("max_payload: 8MB\nmax_pending: 1GB\nwrite_deadline: 30s\n", encoding="ascii")
        command = ["nats-server", "-c", str(config), "-a", "127.0.0.1", "-p", "-1"]
        server = serve([*command, "--ports_file_dir", str(place.meeting)])
        ports = place.meeting / f"nats-server_{server.pid}.ports"
        while not (text := await_file(ports)).endswith("}"):
            pass
        tell_file(place.meeting / "nats.address", json.loads(text)["nats"][0])
        return server

    def run(self, work: Any) -> Any:  # noqa: ANN401 - an awaitable and its result
        return self.loop.run_until_complete(work)

    def close(self) -> None:
        self.run(self.connection.close())
        if self.server:
            self.server.kill()
            self.server.wait()


class Writer(base.Writer):
    """Publishes."""

    def open(self) -> None:
        self.client = _Client(self.place)
        for number in range(self.place.readers):
            await_file(self.place.meeting / f"reader{number}.ready")

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        self.client.run(self._write(records, paced))

    async def _write(self, records: Iterable[bytes], paced: bool) -> None:
        connection = self.client.connection
        for position, record in enumerate(records):
            await connection.publish(SUBJECT, record)
            # Otherwise nothing leaves before the last is published.
            if paced or position % 256 == 255:
                await asyncio.sleep(0)
        await connection.flush(timeout=60)

    def server_cpu_ns(self) -> int:
        return cpu_of_ns(self.client.server.pid) if self.client.server else 0

    def close(self) -> None:
        self.client.close()


class Reader(base.Reader):
    """A callback fills a deque; the loop runs while that is empty."""

    def open(self) -> None:
        self.client = _Client(self.place)
        self.client.run(self._subscribe())
        tell_file(self.place.meeting / f"reader{self.place.number}.ready", "")

    async def _subscribe(self) -> None:
        self.here: deque[bytes] = deque()

        async def take(message: Any) -> None:  # noqa: ANN401
            self.here.append(message.data)
            self.client.loop.stop()

        await self.client.connection.subscribe(SUBJECT, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)
        await self.client.connection.flush()

    def read(self, n: int) -> Iterator[bytes]:
        here, left = self.here, n
        while left:
            if not here:
                self.client.loop.run_forever()
                continue
            left -= 1
            yield here.popleft()

    def close(self) -> None:
        self.client.close()


class Caller(base.Caller):
    """A request."""

    def open(self) -> None:
        self.client = _Client(self.place)
        await_file(self.place.meeting / "answerer.ready")

    def call(self, question: bytes) -> Any:  # noqa: ANN401
        return self.client.run(self.client.connection.request(METHOD, question, timeout=10)).data

    def close(self) -> None:
        self.client.close()


class Answerer(base.Answerer):
    """Answers in a callback."""

    def open(self) -> None:
        self.client = _Client(self.place)
        self.client.run(self._subscribe())
        tell_file(self.place.meeting / "answerer.ready", "")

    async def _subscribe(self) -> None:
        self.answered = self.wanted = 0

        async def answer(message: Any) -> None:  # noqa: ANN401
            await message.respond(message.data)
            self.answered += 1
            if self.answered == self.wanted:
                await self.client.connection.flush()
                self.client.loop.stop()

        await self.client.connection.subscribe(METHOD, cb=answer)
        await self.client.connection.flush()

    def serve(self, n: int) -> None:
        self.wanted += n
        while self.answered < self.wanted:
            self.client.loop.run_forever()

    def close(self) -> None:
        self.client.close()
