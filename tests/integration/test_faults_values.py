"""Rows of the fault catalogue (ARCHITECTURE.md) that one process shows: clocks, values, numbers, many seeds."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import Fabric, FabricConfig, join
from fabric.config import Inboxes, Retention, Spill
from fabric.core.members import Context
from fabric.core.wire import OFFSET_END
from fabric.errors import BrokenError
from tests.harness.waiting import until

MIB = 1024 * 1024
HOUR_NS = 3600 * 10**9
YEARS_NS = 10 * 365 * 24 * HOUR_NS
LEAPS_NS = (HOUR_NS, -HOUR_NS, YEARS_NS, -YEARS_NS, 0)


class Wall:
    """A wall clock that is set anew."""

    def __init__(self) -> None:
        self._true_ns, self.ahead_ns = time.time_ns, 0

    def __call__(self) -> int:
        return self._true_ns() + self.ahead_ns


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    wall = Wall()
    monkeypatch.setattr(time, "time_ns", wall)
    monkeypatch.setattr(time, "time", lambda: wall() / 1e9)
    return wall


def enter(config: FabricConfig, where: str, ranks: int = 2) -> list[Fabric]:
    members: dict[int, Fabric] = {}

    def one(rank: int) -> None:
        members[rank] = join(config, rank=rank, world_size=ranks, rendezvous=where)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return [members[rank] for rank in range(ranks)]


def test_f30_a_wall_clock_that_leaps_by_years_changes_nothing(tmp_path: Path, wall: Wall) -> None:
    """Neither order nor time-outs, nor the age of what lies on disk."""
    small = replace(
        FabricConfig(),
        retention=Retention(owed_bytes_max=1 * MIB, kept_bytes_max=1 * MIB),
        inboxes=Inboxes(hand_bytes_max=MIB // 4, hold_bytes_max=MIB // 4),
        spill=Spill(directory=tmp_path / "disk", segment_bytes=1 * MIB, bytes_max=64 * MIB, free_bytes_min=1),
    )
    ours, theirs = enter(small, f"memory://{tmp_path}")
    with ours, theirs, theirs.subscribe("words.**") as inbox:
        theirs.respond("double")(lambda request: 2 * request.value)
        publisher = ours.publisher("words.all")
        for number in range(500):  # 5 MB: most of it to disk
            publisher.publish(number.to_bytes(2, "little") * 5_000, seed=number % 3)
            if number % 100 == 99:
                until(lambda: ours.statistics().get("bursts_spilled", 0) > 0, what="something is on disk")
                wall.ahead_ns = LEAPS_NS[number // 100]
                assert ours.request("double", 21, to=1, timeout_s=20).value == 42
        values = [int.from_bytes(inbox.receive(timeout_s=20).value[:2], "little") for _ in range(500)]
        assert list(inbox.drain()) == []
        publisher.flush(timeout_s=20)
        assert values == list(range(500))
        assert inbox.gaps == ()
        assert len(theirs.dead_letters) == 0


@pytest.fixture
def alone() -> Iterator[Fabric]:
    with join(rank=0, world_size=1) as fabric:
        yield fabric


def array(size: int) -> tuple[Any, Callable[[Any], Any]]:
    return np.zeros(size, np.float32), lambda value: value.fill(7)


def tree(size: int) -> tuple[Any, Callable[[Any], Any]]:
    return {"w": [np.zeros(size, np.float32)], "n": 1}, lambda value: (value["w"][0].fill(7), value.update(n=2))


def tensor(size: int) -> tuple[Any, Callable[[Any], Any]]:
    torch = pytest.importorskip("torch")
    return torch.zeros(size), lambda value: value.fill_(7)


@pytest.mark.parametrize("size", [8, MIB], ids=["small", "large"])
@pytest.mark.parametrize("make", [array, tree, tensor], ids=lambda make: make.__name__)
def test_f39_a_value_that_is_changed_after_publish_arrives_as_it_was(
    alone: Fabric, make: Callable[[int], tuple[Any, Callable[[Any], Any]]], size: int
) -> None:
    value, change = make(size)
    inbox, publisher = alone.subscribe("t"), alone.publisher("t")
    publisher.publish(value)
    change(value)
    publisher.publish(value)
    first, second = (inbox.receive(timeout_s=20).value for _ in range(2))
    if isinstance(first, dict):
        assert [first["n"], second["n"]] == [1, 2]
        first, second = first["w"][0], second["w"][0]
    assert (float(first.min()), float(first.max())) == (0.0, 0.0)
    assert (float(second.min()), float(second.max())) == (7.0, 7.0)


LANES = 50_000
LANE_BYTES = 256
"""What a publisher remembers of a seed: its next sequence, and the offset of the record before."""


def test_f69_a_seed_costs_its_publisher_little_and_its_subscriber_nothing(alone: Fabric) -> None:
    inbox, publisher = alone.subscribe("t"), alone.publisher("t")

    def publish_and_receive(seeds: range) -> tuple[int, set[str]]:
        for seed in seeds:
            publisher.publish(b"", seed=seed)
        assert [inbox.receive(timeout_s=20).seed for _ in seeds] == list(seeds)
        assert list(inbox.drain()) == []
        publisher.flush(timeout_s=20)
        return entries(alone._engine.core.following), set(alone.statistics())

    _, counters = publish_and_receive(range(10))
    in_tables, counters_then = publish_and_receive(range(10, LANES))
    assert in_tables < 1000
    assert counters_then == counters
    lanes = publisher._lanes
    bytes_all = sys.getsizeof(lanes) + sum(map(size_of, lanes.values()))
    assert len(lanes) == LANES
    assert bytes_all <= LANES * LANE_BYTES


def size_of(lane: list[int]) -> int:
    return sys.getsizeof(lane) + sum(map(sys.getsizeof, lane))


def entries(thing: object) -> int:
    """How many things there are in all tables of these objects of the core, and of those in them."""
    count, seen, left = 0, set(), [thing]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, str | bytes | memoryview):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            inside = [*one, *one.values()]
        elif isinstance(one, list | tuple | set | frozenset | deque):
            inside = list(one)
        elif type(one).__module__.startswith("fabric.core") and not isinstance(one, Context):
            inside = [getattr(one, name) for name in fields_of(one)]
        else:
            continue
        count += len(inside)
        left += inside
    return count


def fields_of(one: object) -> list[str]:
    slots = [name for kind in type(one).__mro__ for name in getattr(kind, "__slots__", ())]
    return [name for name in [*slots, *getattr(one, "__dict__", ())] if hasattr(one, name)]


def test_f71_offsets_that_are_used_up_are_refused_before_they_wrap(alone: Fabric) -> None:
    publisher = alone.publisher("t")
    publisher.next = OFFSET_END - 10
    for publish in (
        lambda: publisher.publish(b"bytes"),
        lambda: publisher.publish(bytes(MIB)),
        lambda: publisher.publish_many([b"bytes"], seeds=[0]),
    ):
        with pytest.raises(BrokenError, match="offsets"):
            publish()
    assert publisher.next == OFFSET_END - 10, "nothing was taken"
    assert alone.publish("other", 1) == 0, "other topics go on"
    publisher.next = 0
