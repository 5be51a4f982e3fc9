"""Subscriptions that begin while records flow: everything from the join offset on, exactly once, and nobody sleeps."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fabric import Fabric, FabricConfig, join, observe
from tests.harness.children import Parent, child, children
from tests.harness.figures import show

JOB = "flowing"
RATE = 50_000
TOPICS = ("flow.0.health", "flow.1.health")
SEEDS = 8
LANES = SEEDS // len(TOPICS)
"""Seeds of each topic."""
TAKEN = 500
"""Records that a cycle takes of each feed."""
CYCLES = 67
OBSERVERS = 10

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def publish_steadily(parent: Parent, spec: str, world_size: int) -> None:
    """50,000 records a second, 100 every 2 ms."""
    with join(rank=0, world_size=world_size, rendezvous=spec, job=JOB) as fabric:
        publishers = [fabric.publisher(topic) for topic in TOPICS]
        body, sent, began = bytes(64), 0, time.monotonic()
        parent.say(flows=True)
        while not parent.spoke():
            for index in range(sent, sent + 100):
                publishers[index % 2].publish(body, seed=index % SEEDS)
            sent += 100
            time.sleep(max(0.0, began + sent / RATE - time.monotonic()))
        parent.say(sent=sent, rate=sent / (time.monotonic() - began), late=fabric.statistics().get("publish_waited", 0))


def seed_of(topic: str, offset: int) -> int:
    """The seed that `publish_steadily` gives the record at this offset: every fourth one of a topic has the same."""
    return (offset * 2 + TOPICS.index(topic)) % SEEDS


def check_one_join(fabric: Fabric, delivery: str | None = None) -> int:
    """Subscribe in the middle of it all; returns how many records arrived, each in its place in its lane.

    Between lanes there is no promise: what the push missed in the beginning is repaired behind what it did not.
    """
    with fabric.subscribe("flow.**", delivery=delivery) as inbox:
        joined = inbox.joined
        assert set(joined) == {("rank-0", topic) for topic in TOPICS}, joined
        following = {
            (topic, seed_of(topic, offset)): offset
            for (_, topic), join_offset in joined.items()
            for offset in range(join_offset, join_offset + LANES)
        }
        assert len(following) == len(TOPICS) * LANES
        ends = {lane: joined["rank-0", lane[0]] + TAKEN for lane in following}
        count = 0
        while any(following[lane] < ends[lane] for lane in following):
            message = inbox.receive(timeout_s=20)
            lane = message.topic, message.seed
            assert message.offset == following[lane], f"{lane}: {message.offset} came, {following[lane]} was next"
            following[lane] += LANES
            count += 1
        assert inbox.joined == joined
        assert inbox.gaps == ()
    return count


def join_again_and_again(parent: Parent, spec: str, rank: int, world_size: int, cycles: int) -> None:
    with join(rank=rank, world_size=world_size, rendezvous=spec, job=JOB) as fabric:
        parent.hear()
        began = time.monotonic()
        counts = [check_one_join(fabric) for _ in range(cycles)]
        parent.say(cycles=len(counts), records=sum(counts), a_cycle_ms=(time.monotonic() - began) / cycles * 1e3)
        parent.hear()


def observe_again_and_again(parent: Parent, cycles: int) -> None:
    parent.hear()
    counts = []
    for number in range(cycles):
        with observe(JOB, name=f"watcher-{number}") as fabric:
            counts.append(check_one_join(fabric, "reliable"))
    parent.say(cycles=len(counts), records=sum(counts))
    parent.hear()


@pytest.mark.timeout(120)
def test_f20_every_record_from_the_join_offset_on_arrives_once_while_50000_flow_each_second(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    ranks = [child(join_again_and_again, spec=spec, rank=rank, world_size=4, cycles=CYCLES) for rank in (1, 2, 3)]
    watcher = child(observe_again_and_again, cycles=OBSERVERS)
    with children(child(publish_steadily, spec=spec, world_size=4), *ranks, watcher) as (publisher, *joining):
        assert publisher.hear()["flows"]
        for one in joining:
            one.tell()
        told = [one.hear(100) for one in joining]
        publisher.tell()
        flowed = publisher.hear()
        for one in joining:
            one.tell()
            assert one.exit_code() == 0
        assert publisher.exit_code() == 0
    show(f"joins while {flowed} flowed: {told}")
    assert [one["cycles"] for one in told] == [CYCLES] * 3 + [OBSERVERS]
    assert sum(one["cycles"] for one in told) >= 200


ROUNDS = 1000


def publish_as_soon_as_they_are_there(parent: Parent, spec: str) -> None:
    with join(rank=0, world_size=3, rendezvous=spec) as fabric:
        for number in range(ROUNDS):
            publisher = fabric.publisher(f"round.{number}")
            publisher.wait_for_subscribers(2, timeout_s=30)
            publisher.publish(number)
        parent.say(rounds=ROUNDS)
        parent.hear()


def receive_the_next(parent: Parent, spec: str, rank: int) -> None:
    with join(FabricConfig(), rank=rank, world_size=3, rendezvous=spec) as fabric:
        got = []
        for number in range(ROUNDS):
            with fabric.subscribe(f"round.{number}") as inbox:
                message = inbox.receive(timeout_s=30)
                got.append((message.value, message.sequence, message.offset))
        parent.say(exact=got == [(number, 0, 0) for number in range(ROUNDS)], rounds=len(got))
        parent.hear()


@pytest.mark.timeout(120)
def test_f20_each_member_that_was_counted_receives_the_record_published_next(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    readers = [child(receive_the_next, spec=spec, rank=rank) for rank in (1, 2)]
    began = time.monotonic()
    with children(child(publish_as_soon_as_they_are_there, spec=spec), *readers) as everybody:
        told = [one.hear(100) for one in everybody]
        show(f"{ROUNDS} rounds in {time.monotonic() - began:.1f} s")
        for one in everybody:
            one.tell()
            assert one.exit_code() == 0
    assert told == [{"rounds": ROUNDS}, {"exact": True, "rounds": ROUNDS}, {"exact": True, "rounds": ROUNDS}]
