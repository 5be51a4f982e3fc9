"""Messages on both faces: published, received, refused. What is called by name is in `test_parity_calls`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fabric import Gap
from fabric.config import Retention
from fabric.errors import (
    ClosedError,
    ConfigError,
    QueueFullError,
    ReceiveTimeoutError,
    SchemaError,
    SeedError,
    TopicError,
    UnsupportedValueError,
    WaitTimeoutError,
)
from tests.harness.faces import DEFAULT, played

SMALL = replace(DEFAULT, retention=Retention(owed_bytes_max=256 * 1024, publish_timeout_s=0.2))
PATIENT = replace(DEFAULT, retention=Retention(owed_bytes_max=256 * 1024, publish_timeout_s=20.0))
"""For those who get what they wait for."""


def lanes_of(messages: list[Any]) -> dict[int, list[int]]:
    lanes: dict[int, list[int]] = {}
    for message in messages:
        lanes.setdefault(message.seed, []).append(message.sequence)
    return lanes


# Messages.


@played()
async def test_what_is_published_is_received_with_its_facts(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("layers.**")
    sequence = await a.publish("layers.0.health", {"loss": np.arange(4.0)}, seed=7, metadata={"step": 3})
    message = await inbox.receive()
    assert (sequence, message.sequence, message.seed, message.topic) == (0, 0, 7, "layers.0.health")
    assert (message.source, message.metadata) == ("rank-0", {"step": 3})
    assert message.value["loss"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert inbox.joined == {("rank-0", "layers.0.health"): 0}


@played()
async def test_iteration_gives_every_message_in_order_and_ends_with_the_feed(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")

    async def publish_all() -> None:
        for number in range(3000):
            await a.publish("t", number.to_bytes(2, "little") * 32, seed=number % 3)
        await a.close()

    publishing = face.later(publish_all())
    messages = [message async for message in inbox]
    await publishing
    assert lanes_of(messages) == {seed: list(range(1000)) for seed in range(3)}
    assert all(
        bytes(message.value) == (3 * message.sequence + message.seed).to_bytes(2, "little") * 32 for message in messages
    )
    with pytest.raises(ClosedError):
        await inbox.receive()


@played()
async def test_breaking_off_an_iteration_loses_nothing(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    for number in range(10):
        await a.publish("t", number)
    first = []
    async for message in inbox:
        first.append(message.value)
        if len(first) == 4:
            break
    second = [(await inbox.receive()).value for _ in range(3)]
    rest = [message.value async for message in take(inbox, 3)]
    assert [*first, *second, *rest] == list(range(10))


async def take(inbox: Any, n: int) -> Any:
    async for message in inbox:
        yield message
        n -= 1
        if not n:
            return


@played()
async def test_a_message_counts_as_handled_when_the_next_is_asked_for(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    publisher = a.publisher("t")
    await publisher.publish(b"x")
    await inbox.receive()
    with pytest.raises(WaitTimeoutError, match="rank-1 at 0"):
        await publisher.flush(timeout_s=0.1)
    assert publisher.handled_by(0) == {"rank-1": False}
    inbox.drain()
    await publisher.flush()
    assert publisher.handled_by(0) == {"rank-1": True}


@played()
async def test_receive_many_takes_what_is_here_up_to_a_number(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    publisher = a.publisher("t")
    assert await publisher.publish_many([bytes([n]) for n in range(10)], seeds=[n % 2 for n in range(10)]) == [
        n // 2 for n in range(10)
    ]
    taken: list[bytes] = []
    while len(taken) < 10:
        messages = await inbox.receive_many(4, timeout_s=5)
        assert 1 <= len(messages) <= 4
        taken += [bytes(message.value) for message in messages]
    assert taken == [bytes([n]) for n in range(10)]
    with pytest.raises(ReceiveTimeoutError):
        await inbox.receive_many(1, timeout_s=0.05)


@played()
async def test_rows_of_an_array_go_out_as_values_and_come_in_as_a_table(face: Any, a: Any, b: Any) -> None:
    inbox, owner = await b.subscribe("t"), await b.subscribe("t", ownership="own")
    publisher = a.publisher("t")
    rows, seeds = np.arange(1500.0).reshape(500, 3), np.arange(500) % 4
    sequences = await publisher.publish_many(rows, seeds=seeds)
    assert sequences.tolist() == (np.arange(500) // 4).tolist()
    await publisher.publish_many(rows[:10], seeds=list(range(10)))  # too few for a burst of their own
    taken, left = [], 510
    while left:
        table = await inbox.receive_many(left, timeout_s=5)
        assert [run.topic for run in table.runs] == ["t"]
        taken.append((table.values, table.seeds, table.sequences, table.offsets))
        assert not table.values.flags.writeable
        assert table[0].value.tolist() == table.values[0].tolist()
        left -= len(table)
    values, lanes, numbers, offsets = (np.concatenate(column) for column in zip(*taken, strict=True))
    order = offsets.argsort()  # lanes do not wait for each other
    assert offsets[order].tolist() == list(range(510))
    assert np.array_equal(values[order], np.concatenate([rows, rows[:10]]))
    assert lanes[order].tolist() == [*seeds.tolist(), *range(10)]
    assert numbers[order].tolist() == [*sequences.tolist(), *[125] * 4, *[0] * 6]
    table = await owner.receive_many(5, timeout_s=5)
    assert table.values.flags.writeable and table[0].value.flags.writeable


@played()
async def test_a_table_is_in_hand_until_the_next_call(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    publisher = a.publisher("t")
    await publisher.publish_many(np.zeros((1000, 256), np.uint8), seeds=np.zeros(1000, int))
    left = 999
    while left:
        left -= len(await inbox.receive_many(left, timeout_s=5))
    assert publisher.handled_by(998) == {"rank-1": False}
    assert (await inbox.receive_many(5, timeout_s=5)).offsets.tolist() == [999]
    with pytest.raises(WaitTimeoutError, match="rank-1 at 868"):  # publishers hear of whole bursts
        await publisher.flush(timeout_s=0.3)
    inbox.drain()
    await publisher.flush()


@played()
async def test_publish_many_wants_a_seed_for_each_value(face: Any, a: Any, b: Any) -> None:
    publisher = a.publisher("t")
    with pytest.raises(ValueError, match="2 values and 1 seeds"):
        await publisher.publish_many([1, 2], seeds=[0])
    with pytest.raises(SeedError):
        await publisher.publish_many([1], seeds=[-1])
    assert publisher.next == 0


@played()
async def test_drain_gives_what_is_here_and_does_not_wait(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    assert list(inbox.drain()) == []
    for number in range(5):
        await a.publish("t", number)
    taken: list[int] = []

    def look() -> bool:
        taken.extend(message.value for message in inbox.drain())
        return len(taken) == 5

    await face.until(look)
    assert taken == list(range(5))


@played()
async def test_a_receive_that_times_out_says_what_was_reached(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    with pytest.raises(ReceiveTimeoutError, match="no message within"):
        await inbox.receive(timeout_s=0.05)
    quiet = await b.subscribe("q", idle_timeout_s=0.05)
    with pytest.raises(ReceiveTimeoutError):
        async for _ in quiet:
            pass


@played()
async def test_a_message_comes_while_somebody_waits_for_it(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")

    async def receive() -> int:
        value: int = (await inbox.receive(timeout_s=10)).value
        return value

    receiving = face.later(receive())
    await a.publish("t", 17)
    assert await receiving == 17


@played()
async def test_a_value_goes_into_given_memory_or_stays_the_next(face: Any, a: Any, b: Any) -> None:
    for acknowledge in ("auto", "manual"):
        inbox = await b.subscribe(f"t.{acknowledge}", acknowledge=acknowledge)
        await a.publish(f"t.{acknowledge}", np.arange(4, dtype=np.int64))
        with pytest.raises(SchemaError):
            await inbox.receive(into=np.zeros(3, dtype=np.int64))
        target = np.zeros(4, dtype=np.int64)
        message = await inbox.receive(into=target)
        assert message.value is target
        assert target.tolist() == [0, 1, 2, 3]
        message.acknowledge()
        inbox.drain()
        await a.publisher(f"t.{acknowledge}").flush()
        await inbox.close()
    assert b.statistics()["handled"] == 2


@played()
async def test_a_tensor_sized_value_arrives_whole(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", ownership="own")
    value = np.arange(1 << 20, dtype=np.int64)
    await a.publish("t", value)
    message = await inbox.receive()
    assert np.array_equal(message.value, value)
    message.value[0] = 5


@played()
async def test_seeds_choose_and_a_retained_start_reads_history(face: Any, a: Any, b: Any) -> None:
    early = await b.subscribe("t")
    for number in range(6):
        await a.publish("t", number, seed=number % 3)
    assert [(await early.receive()).value for _ in range(6)] == list(range(6))
    inbox = await b.subscribe("t", start="retained", seeds=[1])
    assert [(await inbox.receive()).value for _ in range(2)] == [1, 4]
    last = await b.subscribe("t", start="last")
    assert (await last.receive()).value == 5


@played()
async def test_manual_acknowledgement_and_rejection(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher = a.publisher("t")
    for number in range(3):
        await publisher.publish(number)
    messages = [await inbox.receive() for _ in range(3)]
    with pytest.raises(WaitTimeoutError):
        await publisher.flush(timeout_s=0.1)
    messages[1].acknowledge()
    messages[2].reject("no good")
    await publisher.flush()
    assert [(letter.sequence, letter.detail) for letter in b.dead_letters] == [(2, "no good")]


@played()
async def test_a_cursor_says_what_is_handled(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    await a.publisher("t").publish_many([1, 2, 3], seeds=[0, 0, 0])
    await inbox.receive()
    await inbox.receive()
    ((where, (_, floor, ranges)),) = inbox.cursor().items()
    assert (where, floor, ranges) == ("rank-0/t", 2, [])


# Publishing.


@played()
async def test_waiting_for_subscribers_ends_when_they_are_there(face: Any, a: Any, b: Any) -> None:
    publisher = a.publisher("t")
    with pytest.raises(WaitTimeoutError, match="0 of 1"):
        await publisher.wait_for_subscribers(1, timeout_s=0.05)
    waiting = face.later(publisher.wait_for_subscribers(1, timeout_s=10))
    inbox = await b.subscribe("t")
    await waiting
    await publisher.publish(1)
    assert (await inbox.receive()).value == 1


@played(config=SMALL)
async def test_a_full_retention_refuses_and_takes_nothing(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher = a.publisher("t", when_full="block")
    taken = 0
    with pytest.raises(QueueFullError) as caught:
        while True:
            await publisher.publish(b"x" * 4096, seed=taken % 7)
            taken += 1
    assert (caught.value.fields["limit"], publisher.next) == (256 * 1024, taken)
    for message in [await inbox.receive() for _ in range(taken)]:
        message.acknowledge()
    await publisher.flush()
    assert await publisher.publish(b"y" * 4096, seed=taken % 7) == taken // 7


@played(config=PATIENT)
async def test_a_full_retention_blocks_until_there_is_room(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher, n = a.publisher("t", when_full="block"), 100

    async def publish_all() -> None:
        for number in range(n):
            await publisher.publish(bytes([number]) * 4096, seed=number % 7)

    publishing = face.later(publish_all())
    await face.until(lambda: a.statistics().get("publish_waited"))
    assert publisher.next < n, "it waits"
    values = []
    for _ in range(n):
        message = await inbox.receive()
        values.append(message.value[0])
        message.acknowledge()
    await publishing
    assert values == list(range(n))


@played(config=SMALL)
async def test_a_full_retention_that_fails_at_once(face: Any, a: Any, b: Any) -> None:
    await b.subscribe("**", acknowledge="manual")
    failing = a.publisher("fail", when_full="fail")
    with pytest.raises(QueueFullError, match="waited 0 s"):
        for _ in range(1000):
            await failing.publish(b"x" * 4096)


@played(config=SMALL)
async def test_a_full_retention_that_drops_the_oldest_reports_the_gap(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher = a.publisher("t", when_full="drop_oldest")
    for number in range(200):
        await publisher.publish(number.to_bytes(2, "little") * 2048)
    assert publisher.next == 200
    seen: list[int] = []

    def look() -> bool:
        seen.extend(message.offset for message in inbox.drain())
        return bool(seen) and seen[-1] == 199

    await face.until(look)
    lost = {offset for gap in inbox.gaps for offset in range(gap.first, gap.end)}
    assert sorted({*seen} | lost) == list(range(200))


@played(config=PATIENT)
async def test_publish_many_waits_for_room_and_takes_all(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    n = 400

    async def receive_all() -> list[Any]:
        return [(message.seed, message.sequence) for message in [await inbox.receive(timeout_s=10) for _ in range(n)]]

    receiving = face.later(receive_all())
    sequences = await a.publisher("t").publish_many([b"x" * 4096] * n, seeds=[i % 5 for i in range(n)])
    assert sequences == [i // 5 for i in range(n)]
    assert await receiving == [(i % 5, i // 5) for i in range(n)]


@played()
async def test_what_cannot_be_published_is_refused(face: Any, a: Any, b: Any) -> None:
    with pytest.raises(TopicError):
        await a.publish("no topic!", 1)
    with pytest.raises(SeedError):
        await a.publish("t", 1, seed=-1)
    with pytest.raises(UnsupportedValueError):
        await a.publish("t", object())
    with pytest.raises(ConfigError):
        a.publisher("t", policy="latest")
    assert a.publisher("t") is a.publisher("t") or face.name == "sync"
    with pytest.raises(ConfigError):
        await b.subscribe("t", ownership="mine")
    with pytest.raises(ConfigError):
        await b.subscribe("t", cursor=3)


@played()
async def test_a_latest_topic_hands_out_only_the_newest_of_each_seed(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    publisher = a.publisher("t", policy="latest")
    for number in range(20):
        await publisher.publish(number, seed=number % 2)
    seen: dict[int, int] = {}

    def look() -> bool:
        seen.update({message.seed: message.value for message in inbox.drain()})
        return seen == {0: 18, 1: 19}

    await face.until(look)
    assert inbox.gaps == ()
    assert inbox.gaps_total == len(list[Gap](inbox.gaps))
