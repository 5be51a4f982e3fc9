"""A table says what its messages say, and the same messages come as would come one by one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.table import Table
from fabric.testing import World

DTYPES = ("u1", "<f4", "<i2", "?", "<c16")


@pytest.fixture(scope="module")
def worlds() -> Iterator[World]:
    with World(world_size=1, checked=False) as world:
        world.join(0)
        yield world


TWINS = (bytes(20), np.float32(1), np.int32(1), np.ones(1, "<f4"), np.ones((1, 1), "u1"), "x" * 20)
"""Of one length on the wire, but for one: only kinds and heads tell them apart."""


def same(left: Any, right: Any) -> bool:
    """Equal to the last bit, and of one type and shape."""
    if type(left) is bytes or type(right) is bytes:
        return bool(left == right)
    plain = [np.asarray(value.clone() if hasattr(value, "clone") else value) for value in (left, right)]
    facts = [(array.dtype, array.shape, array.tobytes()) for array in plain]
    return facts[0] == facts[1] and hasattr(left, "clone") == hasattr(right, "clone")


def publish_some(random: Random, publisher: Any) -> None:
    n, width = random.choice([1, 2, 70, 300]), random.choice([0, 1, 3, 256])
    array = np.arange(n * width).reshape(n, width).astype(random.choice(DTYPES))
    kind = random.choice(
        ["array", "scalars", "bytes", "bytes", "ragged", "tensor", "described", "large", *["twins"] * 3]
    )
    seeds = [random.randrange(3) for _ in range(n)]
    if kind == "tensor":
        publisher.publish_many(pytest.importorskip("torch").from_numpy(array), seeds=seeds)
    elif kind in ("array", "scalars"):
        publisher.publish_many(array if kind == "array" else np.arange(float(n)), seeds=seeds)
    elif kind == "described":
        publisher.publish(b"value", seed=2, metadata={"step": 1})
    elif kind == "large":
        publisher.publish(bytes(70_000))
    else:
        publisher.publish_many([bytes(random.choice([width, 5]) if kind == "ragged" else width)] * n, seeds=seeds)


def check(table: Table) -> None:
    """Columns beside messages."""
    messages = list(table)
    assert len(messages) == len(table) > 0
    assert messages == [table[index] for index in range(len(table))], "the same ones each time"
    assert table[-1] is messages[-1] and table[: len(messages)] == messages
    assert table.seeds.tolist() == [message.seed for message in messages]
    assert table.sequences.tolist() == [message.sequence for message in messages]
    assert table.offsets.tolist() == [message.offset for message in messages]
    named = [(run.source, run.topic, run.incarnation) for run in table.runs for _ in range(run.begin, run.end)]
    assert named == [(message.source, message.topic, message.incarnation) for message in messages]
    assert len(table.values) == len(messages)
    values = [message.value for message in messages]
    if isinstance(table.values, list):
        assert all(map(same, table.values, values))
    elif type(values[0]) is bytes:
        assert [bytes(row) for row in table.values] == values
    else:
        assert all(map(same, table.values, values))
        assert type(table.values) is type(values[0]) or table.values.ndim == 1


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 100, 10_000]), st.sampled_from(["view", "own"]), st.booleans())
def test_a_table_is_its_messages(worlds: World, seed: int, n: int, ownership: str, manual: bool) -> None:
    random, member = Random(seed), worlds.members[0]
    topic = f"t.n{seed}-{n}-{ownership}-{manual}-{random.randrange(10**9)}"
    options = {"ownership": ownership, "acknowledge": "manual" if manual else "auto"}
    inbox, other = member.subscribe(f"{topic}.*", **options), member.subscribe(f"{topic}.*", seeds=[0, 2])
    publishers = [member.publisher(f"{topic}.{name}") for name in "ab"]
    for _ in range(random.randint(1, 5)):
        publish_some(random, random.choice(publishers))
    count, taken = sum(publisher.next for publisher in publishers), list[Any]()
    while len(taken) < count:
        table = inbox.receive_many(n, timeout_s=5)
        assert isinstance(table, Table) and len(table) <= n
        check(table)
        taken += table
        if manual:
            table[-1].acknowledge()
        elif random.random() < 0.2 and len(taken) < count:
            taken.append(inbox.receive(timeout_s=5))
    for publisher in publishers:
        mine = [message for message in taken if message.topic == publisher.topic]
        for lane in range(3):
            sequences = [message.sequence for message in mine if message.seed == lane]
            assert sequences == list(range(len(sequences)))
        assert len({message.offset for message in mine}) == len(mine) == publisher.next
    wanted = sum(message.seed != 1 for message in taken)
    while wanted:
        table = other.receive_many(n, timeout_s=5)
        check(table)
        wanted -= len(table)
    inbox.close()
    other.close()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(("one", "other"), list(permutations(range(len(TWINS)), 2)))
def test_values_of_one_length_are_told_apart(worlds: World, one: int, other: int, together: bool) -> None:
    topic, member = f"twins.t{one}-{other}-{together}", worlds.members[0]
    inbox, publisher = member.subscribe(topic), member.publisher(topic)
    for value in (TWINS[one], TWINS[one], TWINS[other]):
        publisher.publish(value)
        if not together:
            publisher.close_burst()
    worlds.run(0.01)
    table = inbox.receive_many(3)
    assert len(table) == 3
    check(table)
    inbox.close()
