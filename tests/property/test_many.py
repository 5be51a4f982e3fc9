"""What is published many at a time is what would have been published one by one, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.wire import BURST_BYTES_MAX, RECORD_BYTES, decode_data
from fabric.engine.columns import number
from fabric.testing import World

DTYPES = ("u1", "<f4", ">i2", "?", "<c16", "<f2")


@pytest.fixture(scope="module")
def worlds() -> Iterator[World]:
    with World(world_size=1, checked=False) as world:
        yield world


def records_of(publisher: Any) -> list[tuple[int, int, int, int, bytes]]:
    """Seed, sequence, previous, kind and body of all that its feed has, by offset; the bursts are as they must be."""
    publisher.close_burst()
    publisher.engine.push()
    out, rows = publisher.engine.core.publishing.feeds[publisher.topic], list[tuple[int, int, int, int, bytes]]()
    for stored in out.kept:
        burst, nonces = decode_data(stored.frame)
        assert nonces is None and burst.first == len(rows)
        burst.check()
        seeds, sequences, kinds, _, _ = burst.columns
        bodies = [burst.body(index) for index in range(burst.count)]
        assert sum(map(len, bodies)) + RECORD_BYTES * burst.count <= BURST_BYTES_MAX
        rows += zip(seeds, sequences, burst.previous, kinds, bodies, strict=True)
    return rows


def some_values(random: Random) -> Any:
    n, width = random.choice([1, 2, 70, 300, 600]), random.choice([0, 1, 3, 64, 256])
    shape = random.choice([(n,), (n, width), (n, width), (n, 2, width)])
    kind = random.choice(["bytes", "bytes", "mixed", "tuple", "array", "array", "strided", "tensor"])
    if kind in ("array", "strided", "tensor"):
        array = np.arange(np.prod(shape)).reshape(shape).astype(random.choice(DTYPES))
        if kind == "strided":
            return array[::-1]
        if kind == "tensor":
            torch = pytest.importorskip("torch")
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        return array
    values: list[Any] = [random.randbytes(random.choice([width, width, 3])) for _ in range(n)]
    if kind == "mixed":
        values[random.randrange(n)] = {"loss": 1.5}
    return tuple(values) if kind == "tuple" else values


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 3, 64, 10_000, 2**63]))
def test_many_is_one_by_one(worlds: World, seed: int, lanes: int) -> None:
    member, random = worlds.members[0] if worlds.members else worlds.join(0), Random(seed)
    name = f"t.{seed}-{lanes}-{random.random()}".replace("0.", "x")
    singly, together = member.publisher(f"{name}.a"), member.publisher(f"{name}.b")
    for _ in range(random.randint(1, 5)):
        values = some_values(random)
        seeds = [random.randrange(lanes) for _ in range(len(values))]
        told = [singly.publish(value, seed=seed) for value, seed in zip(values, seeds, strict=True)]
        given = np.array(seeds) if random.random() < 0.5 else seeds
        sequences = together.publish_many(values, seeds=given)
        assert list(sequences) == told
        assert isinstance(sequences, list) is isinstance(values, list | tuple)
        if random.random() < 0.3:
            assert singly.publish(b"one", seed=1) == together.publish(b"one", seed=1)
        if random.random() < 0.2:
            together.close_burst()
    assert records_of(together) == records_of(singly)
    assert together.next == singly.next


@given(st.lists(st.integers(0, 5) | st.integers(2**62, 2**63 - 1), min_size=1, max_size=50), st.integers(0, 2**40))
def test_numbers_by_column(seeds: list[int], first: int) -> None:
    before = {0: (7, 3), 2**62: (1, 0)}
    numbers, after = number(np.array(seeds, "<i8"), first, before)
    lanes = {seed: list(lane) for seed, lane in before.items()}
    expected = []
    for offset, seed in enumerate(seeds, first):
        sequence, previous = lanes.get(seed, (0, -1))
        expected.append([seed, sequence, previous])
        lanes[seed] = [sequence + 1, offset]
    assert numbers.T.tolist() == expected
    assert after == {seed: lanes[seed] for seed in seeds}
