"""Rows of the fault catalogue (ARCHITECTURE.md) that take real processes: stopped, held up, hostile, out of memory."""

from __future__ import annotations

import ctypes
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from fabric import Fabric, FabricConfig, Subscription, join
from fabric.config import BURST_BYTES_MAX, Liveness, Retention, Spill
from fabric.rendezvous import find
from tests.harness.children import Child, Parent, child, forget_peak, peak_bytes, resident_bytes
from tests.harness.reader import Reader
from tests.harness.waiting import until
from transports.base import SocketLimits

pytestmark = [pytest.mark.multiprocess]

zmq.Frame(b"x" * 65536, copy=False, track=True)
# pyzmq starts a collector for frames that are sent without a copy, once in a process: before a test looks for leaks.

MIB = 1024 * 1024
JOB = "faults"
WATCHFUL = replace(FabricConfig(), liveness=Liveness(heartbeat_ms=100, suspect_s=0.5, down_s=1.0))
HELD_S = 2.0
EACH = 100


def publish_in_parts(parent: Parent, spec: str) -> None:
    """A hundred records each time that the test asks; or it holds the GIL for as long as it is told."""
    with join(WATCHFUL, rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric:
        publisher = fabric.publisher("words.all")
        publisher.wait_for_subscribers(1, timeout_s=30)
        while asked := parent.hear():
            for number in range(EACH):
                publisher.publish(publisher.next, seed=number % 3)
            if asked.get("hold_s"):
                parent.say(holds=True)
                ctypes.PyDLL(None).usleep(int(asked["hold_s"] * 1e6))  # a foreign function that keeps the GIL


@contextmanager
def watched(tmp_path: Path) -> Iterator[tuple[Child, Fabric, Subscription]]:
    spec = f"file://{tmp_path}"
    with (
        child(publish_in_parts, spec=spec) as publisher,
        join(WATCHFUL, rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric,
        fabric.subscribe("words.**") as inbox,
    ):
        yield publisher, fabric, inbox
        assert list(inbox.drain()) == []
        publisher.tell()
        assert publisher.exit_code() == 0


def take(inbox: Subscription, count: int) -> list[int]:
    return [inbox.receive(timeout_s=20).value for _ in range(count)]


def sees(fabric: Fabric, *states: str) -> None:
    until(lambda: fabric.peers["rank-1"].state in states, what=" or ".join(states))


def check_all(fabric: Fabric, inbox: Subscription, life: int) -> None:
    """The same life goes on, and what it published meanwhile is there."""
    sees(fabric, "up")
    assert fabric.peers["rank-1"].incarnation == life
    assert inbox.gaps == ()
    assert len(fabric.dead_letters) == 0


def test_f09_a_publisher_that_was_stopped_is_down_and_then_up_in_the_same_life(tmp_path: Path) -> None:
    with watched(tmp_path) as (publisher, fabric, inbox):
        life = fabric.peers["rank-1"].incarnation
        publisher.tell(go=True)
        publisher.tell(go=True)
        assert take(inbox, EACH) == list(range(EACH))
        publisher.signal(signal.SIGSTOP)
        sees(fabric, "down")
        publisher.tell(go=True)
        publisher.signal(signal.SIGCONT)
        assert take(inbox, 2 * EACH) == list(range(EACH, 3 * EACH))
        check_all(fabric, inbox, life)


def test_f10_a_publisher_whose_gil_is_held_is_suspect_and_loses_nothing(tmp_path: Path) -> None:
    """Its sockets are libzmq's, whose threads need no GIL: connections stay."""
    with watched(tmp_path) as (publisher, fabric, inbox):
        life = fabric.peers["rank-1"].incarnation
        publisher.tell(go=True, hold_s=HELD_S)
        assert publisher.hear() == {"holds": True}
        sees(fabric, "suspect", "down")
        assert fabric.publish("others.all", 1) == 0, "nobody else is held up"
        publisher.tell(go=True)
        assert take(inbox, 2 * EACH) == list(range(2 * EACH))
        check_all(fabric, inbox, life)


# A subscriber that asks for everything and reads nothing.

SMALL = replace(
    FabricConfig(),
    retention=Retention(owed_bytes_max=8 * MIB, kept_bytes_max=1 * MIB, publish_timeout_s=30.0),
    spill=Spill(bytes_max=512 * MIB, segment_bytes=4 * MIB, free_bytes_min=1),
)
RECORD, RECORDS = 60_000, 5_000
"""300 MB. The reader itself holds 60 of them unread; the rest is far more than the memory that is allowed."""


def publish_much(parent: Parent, spec: str, directory: str) -> None:
    config = replace(SMALL, spill=replace(SMALL.spill, directory=Path(directory)))
    with join(config, rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric:
        publisher = fabric.publisher("flow.health")
        publisher.wait_for_subscribers(2, timeout_s=30)
        parent.say(ready=True)
        parent.hear()
        forget_peak()
        base = resident_bytes()
        for number in range(RECORDS):
            publisher.publish(number.to_bytes(4, "little") * (RECORD // 4))
        parent.say(grown=peak_bytes() - base, owed=sorted(publisher.handled_by(RECORDS - 1)))
        parent.hear()


def test_f22_a_subscriber_that_never_reads_costs_bounded_memory_and_delays_nobody(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}/meeting"
    with (
        child(publish_much, spec=spec, directory=str(tmp_path / "disk")) as publisher,
        join(SMALL, rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric,
        fabric.subscribe("flow.**") as inbox,
    ):
        (card,) = until(lambda: [card for card in find(JOB) if card.rank == 1], what="its card, once it has joined")
        hostile = Reader(JOB, "hostile", data=card.endpoints[0], control=card.endpoints[1], bulk=card.endpoints[2])
        try:
            hostile.hello()
            (feed,) = hostile.register(1, "flow.**")
            hostile.follow(feed)
            assert publisher.hear() == {"ready": True}
            publisher.tell()  # from here on it reads no socket
            for number in range(RECORDS):
                assert inbox.receive(timeout_s=20).value == number.to_bytes(4, "little") * (RECORD // 4)
            list(inbox.drain())
            told = publisher.hear()
        finally:
            hostile.close()
        queue = SocketLimits().data_frames * BURST_BYTES_MAX
        ceilings = SMALL.retention.owed_bytes_max + SMALL.retention.kept_bytes_max
        assert told["owed"] == ["hostile", "rank-0"]
        assert told["grown"] <= (queue + ceilings) * 5 // 4 + 64 * MIB
        publisher.tell()


# No memory for a value.

LARGE = 256 * MIB


def receive_with_little_memory(parent: Parent, spec: str) -> None:
    with join(rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric, fabric.subscribe("values.**") as inbox:
        parent.say(ready=True)
        parent.hear()
        before = resource.getrlimit(resource.RLIMIT_AS)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LARGE // 2, before[1]))
        parent.say(limited=True)
        until(lambda: fabric.statistics().get("out_of_memory", 0) > 0, timeout_s=20, what="it was tried")
        resource.setrlimit(resource.RLIMIT_AS, before)
        values = [inbox.receive(timeout_s=30).value for _ in range(2)]
        parent.say(sizes=[len(value) for value in values], exact=values[0] == bytes(LARGE), gaps=len(inbox.gaps))


def test_f75_a_value_that_there_is_no_memory_for_comes_when_there_is(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with (
        child(receive_with_little_memory, spec=spec) as reader,
        join(rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric,
    ):
        assert reader.hear() == {"ready": True}
        reader.tell()
        assert reader.hear() == {"limited": True}
        fabric.publish("values.all", bytes(LARGE))
        fabric.publish("values.all", b"small")
        assert reader.hear() == {"sizes": [LARGE, 5], "exact": True, "gaps": 0}
        assert reader.exit_code() == 0
