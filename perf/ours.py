"""The fabric as the benchmarks' sides see it: the same faces that each peer has in `perf/peers/`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from perf.members import enter
from perf.peers import base
from perf.peers.base import HEADER, Array, Place

TOPIC, METHOD = "perf.stream", "perf.echo"


def _enter(place: Place, **options: Any) -> Any:  # noqa: ANN401 - a fabric
    return enter(rank=place.rank, world_size=place.world_size, meeting=place.meeting, link=place.link, **options)


class Writer(base.Writer):
    """A publisher that waits for room, or spills what is for a reader that never reads.

    An array's header becomes its seed; the sequence is the lane's own.
    """

    def open(self) -> None:
        self.fabric = _enter(self.place)
        when_full = "spill" if self.place.stalled else "block"
        self.publisher = self.fabric.publisher(f"{TOPIC}.{self.place.number}", when_full=when_full)
        self.publisher.wait_for_subscribers(self.place.readers, timeout_s=30)

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        publish = self.publisher.publish
        for record in records:
            publish(record)

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        for header, array in items:
            self.publisher.publish(array, seed=HEADER.unpack(header)[0])

    def write_state(self, state: Mapping[str, Array], version: int) -> None:
        self.publisher.publish(state)

    def finish(self) -> None:
        # The last burst need not wait for its age. A flush waits for the stalled, too.
        if not self.place.stalled:
            self.publisher.flush(timeout_s=120)

    def close(self) -> None:
        self.fabric.close()


class Reader(base.Reader):
    """A subscription."""

    def open(self) -> None:
        self.fabric = _enter(self.place)
        self.inbox = self.fabric.subscribe(f"{TOPIC}.*")

    def read(self, n: int) -> Iterator[bytes]:
        left = n
        for message in self.inbox:
            yield message.value
            left -= 1
            if not left:
                return

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for _ in sizes:
            message = self.inbox.receive(timeout_s=120)
            yield HEADER.pack(message.seed, message.sequence), message.value

    def read_state(self, sizes: Sequence[int]) -> Iterator[Array]:
        yield from self.inbox.receive(timeout_s=120).value.values()

    def finish(self) -> None:
        # Handled means: the next call. Without it the sender's flush would wait for the last message.
        self.inbox.drain()

    def close(self) -> None:
        self.fabric.close()


class Caller(base.Caller):
    """Asks the other rank."""

    def open(self) -> None:
        self.fabric = _enter(self.place, handlers="step")

    def call(self, question: bytes) -> Any:  # noqa: ANN401
        return self.fabric.request(METHOD, question, to=1).value

    def close(self) -> None:
        self.fabric.close()


class Answerer(base.Answerer):
    """Waits in `serve()`."""

    def open(self) -> None:
        self.answered = 0
        self.fabric = _enter(self.place, handlers="step")

        @self.fabric.respond(METHOD)
        def echo(request: Any) -> Any:  # noqa: ANN401
            self.answered += 1
            return request.value

    def serve(self, n: int) -> None:
        wanted = self.answered + n
        while self.answered < wanted:
            # Short, because `serve` waits its time out even when the last request has come.
            self.fabric.serve(timeout_s=0.2)

    def close(self) -> None:
        self.fabric.close()
