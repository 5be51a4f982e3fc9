"""The engine's own part: what is queued for peers."""

from __future__ import annotations

from collections import Counter

from fabric.core.events import ConnectPeer, SendBulk
from fabric.engine.bulk import Bulk
from fabric.testing import World
from transports import Link, SendBlockedError


def ask(number: int, *, header: bytes = bytes(40), chunk: bytes | None = bytes(1000)) -> SendBulk:
    return SendBulk("rank-1", header, chunk, (number,))


def test_what_an_earlier_life_of_a_peer_asked_for_is_not_sent_to_the_next() -> None:
    with World(world_size=2) as world:
        one, other = world.join(0, wait=False), world.join(1)
        engine = one._engine
        for number in range(3):
            engine._send_bulk(ask(number))
        assert engine.bulk.bytes_for("rank-1") == 3120
        engine._connect(ConnectPeer("rank-1", other._engine.card))
        assert engine.bulk.bytes_for("rank-1") == 0


class FullPipe:
    """A transport whose pipes take so many messages."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, ...]] = []
        self.free = 0

    def unblocked(self) -> list[object]:
        return []

    def send(self, _peer: str, _link: Link, frames: tuple[bytes, ...]) -> None:
        if not self.free:
            raise SendBlockedError("rank-1")
        self.free -= 1
        self.sent.append(frames)


def test_an_answer_that_is_asked_for_again_while_it_waits_is_queued_once() -> None:
    pipe, counts = FullPipe(), Counter[str]()
    bulk = Bulk(pipe, counts)  # type: ignore[arg-type]
    for _ in range(1000):
        bulk.flush()
        for number in range(3):
            bulk.add(ask(number))
        bulk.add(ask(9, chunk=None))
    bulk.add(ask(1, header=b"the newest question", chunk=bytes(2000)))
    assert counts["bulk_asked_again"] == 3997
    assert bulk.bytes_for("rank-1") == 2 * 1040 + 2019 + 40
    bulk.add(ask(3))
    bulk.add(ask(9, header=b"after all", chunk=None))
    pipe.free = 10
    bulk.flush()
    head = bytes(40)
    assert [frames[0] for frames in pipe.sent] == [head, b"the newest question", head, head, b"after all"]
    assert bulk.bytes_for("rank-1") == 0
    bulk.add(ask(1))  # it left, and is asked for again
    bulk.flush()
    assert len(pipe.sent) == 6
