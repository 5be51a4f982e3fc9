"""A million small records between two processes: all arrive, each lane in order, within the memory that is allowed."""

from __future__ import annotations

import os
import time
from array import array
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, Message, join
from fabric.config import BURST_BYTES_MAX, Inboxes, Retention
from tests.harness.children import Parent, child, children, forget_peak, peak_bytes, resident_bytes
from tests.harness.figures import show, soak
from transports.base import SocketLimits

SEEDS, SIZE = 64, 256
MIB = 1024 * 1024
HANDLER_NS = 20_000
DONE_S = 250.0

SMALL = FabricConfig(
    retention=Retention(owed_bytes_max=32 * MIB, kept_bytes_max=8 * MIB, publish_timeout_s=30.0),
    inboxes=Inboxes(hand_bytes_max=8 * MIB, hold_bytes_max=8 * MIB),
)
"""An eighth of the defaults: the records do not fit, so that the bound is felt."""
TINY = FabricConfig(
    retention=Retention(owed_bytes_max=8 * MIB, kept_bytes_max=2 * MIB, publish_timeout_s=30.0),
    inboxes=Inboxes(hand_bytes_max=2 * MIB, hold_bytes_max=2 * MIB),
)
"""A quarter of these: 60,000 records do not fit."""
CONFIGS = {"default": FabricConfig(), "small": SMALL, "tiny": TINY}

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


QUEUE = SocketLimits().data_frames * BURST_BYTES_MAX
"""What ZeroMQ may hold of bursts, at each end: the high-water mark."""


def allowed(*ceilings: int) -> int:
    """What resident memory may grow by (DESIGN section 4)."""
    return (QUEUE + sum(ceilings)) * 5 // 4 + 64 * MIB


def body_of(offset: int) -> bytes:
    return (offset & 0xFFFF).to_bytes(2, "little") * (SIZE // 2)


def refuse_to_sleep(seconds: float) -> None:
    """In place of `time.sleep`, for every thread: whoever waits, waits for something."""
    if seconds:
        raise AssertionError(f"somebody sleeps for {seconds} s")
    os.sched_yield()


def publish_all(parent: Parent, spec: str, records: int, config: str, when_full: str) -> None:
    retention = CONFIGS[config].retention
    bodies = [body_of(offset) for offset in range(0x10000)]
    with join(CONFIGS[config], rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("layers.0.health", when_full=when_full)
        publisher.wait_for_subscribers(1, timeout_s=30)
        forget_peak()
        time.sleep = refuse_to_sleep
        base, began = resident_bytes(), time.perf_counter()
        for offset in range(records):
            publisher.publish(bodies[offset & 0xFFFF], seed=offset % SEEDS)
        spent_s = time.perf_counter() - began
        publisher.flush(timeout_s=DONE_S)
        limit, counts = allowed(retention.owed_bytes_max, retention.kept_bytes_max), fabric.statistics()
        waits = {name: counts.get(name, 0) for name in ("publish_waited", "publish_paced", "bursts_spilled")}
        parent.say(grown=peak_bytes() - base, limit=limit, spent_s=spent_s, **waits)
        parent.hear()


class Lanes:
    """The sequences of each seed as they came, in memory that is there from the start; and values that were wrong."""

    def __init__(self, records: int) -> None:
        self.expected = [array("q", range(len(range(seed, records, SEEDS)))) for seed in range(SEEDS)]
        self.sequences = [array("q", bytes(len(lane) * lane.itemsize)) for lane in self.expected]
        self.counts = [0] * SEEDS
        self.left, self.wrong = records, 0
        self.bodies = [body_of(offset) for offset in range(0x10000)]

    def take(self, message: Message) -> None:
        seed, sequence = message.seed, message.sequence
        self.sequences[seed][self.counts[seed]] = sequence
        self.counts[seed] += 1
        self.wrong += message.value != self.bodies[message.offset & 0xFFFF]
        self.left -= 1


def report(parent: Parent, fabric: Fabric, lanes: Lanes, base: int, config: str) -> None:
    inboxes = CONFIGS[config].inboxes
    parent.say(
        exact=lanes.sequences == lanes.expected,
        wrong=lanes.wrong,
        left=lanes.left,
        grown=peak_bytes() - base,
        limit=allowed(inboxes.hand_bytes_max, inboxes.hold_bytes_max),
        statistics=fabric.statistics(),
    )
    parent.hear()


def receive_all(parent: Parent, spec: str, records: int, config: str) -> None:
    lanes = Lanes(records)
    with join(CONFIGS[config], rank=1, world_size=2, rendezvous=spec) as fabric:
        forget_peak()
        base = resident_bytes()
        with fabric.subscribe("layers.**") as inbox:
            for message in inbox:
                lanes.take(message)
                if not lanes.left:
                    break
            assert inbox.gaps == ()
        report(parent, fabric, lanes, base, config)


def handle_all(parent: Parent, spec: str, records: int, config: str) -> None:
    lanes = Lanes(records)
    clock = time.perf_counter_ns
    with join(CONFIGS[config], rank=1, world_size=2, rendezvous=spec) as fabric:
        forget_peak()
        base = resident_bytes()

        @fabric.on("layers.**")
        def burn(message: Message) -> None:
            end = clock() + HANDLER_NS
            lanes.take(message)
            while clock() < end:
                pass

        parent.hear()  # the publisher is done, and flushed: all is handled
        report(parent, fabric, lanes, base, config)


def run(
    tmp_path: Path, receiver: Any, records: int, config: str, when_full: str = "spill"
) -> dict[str, dict[str, Any]]:
    arguments = {"spec": f"file://{tmp_path}", "records": records, "config": config}
    sides = child(publish_all, when_full=when_full, **arguments), child(receiver, **arguments)
    with children(*sides) as (publisher, subscriber):
        sent = publisher.hear(DONE_S)
        if receiver is handle_all:
            subscriber.tell()
        got = subscriber.hear(DONE_S)
        for one in (subscriber, publisher):
            one.tell()
            assert one.exit_code() == 0
    show(f"{records} records to {receiver.__name__}, {config} ceilings: sent {sent}, got {got}")
    return {"sent": sent, "got": got}


def check(told: dict[str, dict[str, Any]]) -> None:
    got, sent = told["got"], told["sent"]
    assert (got["left"], got["exact"], got["wrong"]) == (0, True, 0)
    assert sent["grown"] <= sent["limit"]
    assert got["grown"] <= got["limit"]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", ["default", "small"])
def test_a_million_records_arrive_each_lane_in_order_within_the_memory_bound(tmp_path: Path, config: str) -> None:
    told = run(tmp_path, receive_all, 1_000_000, config)
    check(told)
    if config == "default":
        assert told["sent"]["publish_waited"] == 0, "there was room all the time"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("when_full", ["block", "spill"])
def test_f21_a_handler_that_burns_20_us_a_record_gets_all_of_them_within_the_memory_bound(
    tmp_path: Path, when_full: str
) -> None:
    told = run(tmp_path, handle_all, 60_000, "tiny", when_full)
    check(told)
    felt = {"block": "publish_waited", "spill": "bursts_spilled"}[when_full]
    assert told["sent"][felt] > 0, "the bound was not felt"


@soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("config", ["default", "small"])
def test_a_handler_that_burns_20_us_a_record_gets_a_million(tmp_path: Path, config: str) -> None:
    check(run(tmp_path, handle_all, 1_000_000, config))
