"""Threads that publish on one durable topic: who waits for the disk goes into the next burst with the others."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, aio, join
from fabric.config import Retention
from fabric.core.disk import AppendRecords, WriteFailed
from fabric.errors import ClosedError, FabricError, QueueFullError, UnsupportedValueError, WaitTimeoutError
from fabric.publisher import Publisher
from tests.harness.looping import true
from tests.harness.waiting import until

CONFIG = FabricConfig(retention=Retention(publish_timeout_s=30))
HASTY = FabricConfig(retention=Retention(publish_timeout_s=0.2))


class HeldDisk:
    """The disk of a member: it does with bursts what the test says, when it says so."""

    def __init__(self, fabric: Any) -> None:
        self.engine = fabric._engine
        self.store, self.engine.store = self.engine.store, self
        self.held: list[AppendRecords] = []
        self.counts: list[int] = []
        """Records in each burst that was asked for."""
        self.holding = True

    @property
    def error(self) -> Any:
        return self.store.error

    def ask(self, wish: Any) -> None:
        if isinstance(wish, AppendRecords) and wish.count:
            self.counts.append(wish.count)
            if self.holding:
                self.held.append(wish)
                return
        self.store.ask(wish)

    def write(self) -> None:
        """Take the burst that is held."""
        self.store.ask(self.held.pop())

    def refuse(self) -> None:
        """Refuse it."""
        number = self.held.pop().number
        self.engine.submit(WriteFailed(number, number, "the disk is full"))

    def let_go(self) -> None:
        """Take everything from now on."""
        self.holding = False
        while self.held:
            self.write()

    def close(self) -> None:
        self.store.close()

    def abandon(self) -> None:
        """Nobody forks here."""


class Publishing(threading.Thread):
    """A thread that publishes, and what became of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None  # type: ignore[var-annotated]
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except FabricError as error:
            self.error = error

    def over(self) -> Any:
        """What it returned or raised."""
        self.join(20)
        assert not self.is_alive()
        return self.error or self.result


@pytest.fixture
def open_alone(tmp_path: Path) -> Iterator[Callable[..., tuple[Publisher, HeldDisk, Any]]]:
    opened: list[tuple[Fabric, HeldDisk]] = []

    def open_alone(config: FabricConfig = CONFIG, **options: str) -> tuple[Publisher, HeldDisk, Any]:
        fabric = join(config, rank=0, world_size=1, state_directory=tmp_path / "state")
        inbox = fabric.subscribe("a", name="worker")
        publisher = fabric.publisher("a", policy="durable", **options)
        until(lambda: fabric._engine.core.publishing.feeds["a"].is_named, what="its name is on disk")
        opened.append((fabric, HeldDisk(fabric)))
        return publisher, opened[-1][1], inbox

    yield open_alone
    for fabric, disk in opened:
        disk.let_go()
        fabric.close()


def waiting(publisher: Publisher, count: int) -> None:
    """Until so many wait for the next burst."""
    assert publisher.durability is not None
    requests = publisher.durability._waiting
    until(lambda: len(requests) == count, what=f"{count} wait")


def values_of(inbox: Any, count: int) -> list[tuple[int, int, object]]:
    messages = [inbox.receive(timeout_s=10) for _ in range(count)]
    return [(message.offset, message.sequence, message.value) for message in messages]


def test_all_who_wait_for_the_disk_go_into_the_next_burst(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone(sync="power")
    first = Publishing(lambda: publisher.publish("first", metadata={"n": 0}))
    until(lambda: disk.held, what="the first is under way")
    others = [Publishing(lambda n=n: publisher.publish(n, seed=n % 2, metadata={"n": n})) for n in range(1, 6)]
    waiting(publisher, 5)
    some = Publishing(lambda: publisher.publish_many([b"x", b"y"], seeds=[0, 0]))
    waiting(publisher, 6)
    disk.let_go()
    assert first.over() == 0
    assert [thread.over() is not None for thread in [*others, some]] == [True] * 6
    assert disk.counts == [1, 7], "one write for all of them"
    messages = [inbox.receive(timeout_s=10) for _ in range(8)]
    assert [message.offset for message in messages] == list(range(8))
    assert messages[0].metadata == {"n": 0}
    told = {thread.work.__defaults__[0]: thread.result for thread in others}  # type: ignore[attr-defined]
    numbers = [message for message in messages[1:] if isinstance(message.value, int)]
    assert {message.value: message.sequence for message in numbers} == told
    assert all(message.metadata == {"n": message.value} for message in numbers)
    assert [message.sequence for message in messages if message.value in (b"x", b"y")] == some.result


def test_a_refused_burst_never_was_for_any_of_those_in_it(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone(when_full="fail")
    threads = [Publishing(lambda: publisher.publish("first"))]
    until(lambda: disk.held, what="the first is under way")
    threads += [Publishing(lambda n=n: publisher.publish(n, seed=n)) for n in range(3)]
    waiting(publisher, 3)
    disk.refuse()
    until(lambda: disk.held, what="the others are under way")
    disk.refuse()
    assert [type(thread.over()) for thread in threads] == [QueueFullError] * 4
    disk.let_go()
    assert publisher.publish_many(["again", 0], seeds=[0, 2]) == [0, 0]
    assert values_of(inbox, 2) == [(0, 0, "again"), (1, 0, 0)]


def test_who_waits_for_room_is_tried_again_and_nobody_is_lost(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone()
    threads = [Publishing(lambda: publisher.publish("first"))]
    until(lambda: disk.held, what="the first is under way")
    threads += [Publishing(lambda n=n: publisher.publish(n)) for n in range(3)]
    waiting(publisher, 3)
    for _ in range(5):
        until(lambda: disk.held, what="something is under way")
        disk.refuse()
    disk.let_go()
    assert sorted(thread.over() for thread in threads) == [0, 1, 2, 3]
    assert {value for _, _, value in values_of(inbox, 4)} == {"first", 0, 1, 2}


def test_a_large_value_and_what_does_not_fit_go_by_themselves_in_the_order_of_waiting(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone()
    first = Publishing(lambda: publisher.publish(b"first"))
    until(lambda: disk.held, what="the first is under way")
    values = [bytes(40_000), bytes(30_000), os.urandom(100_000), b"last"]
    threads = []
    for count, value in enumerate(values, 1):
        threads.append(Publishing(lambda value=value: publisher.publish(value)))
        waiting(publisher, count)
    disk.let_go()
    assert [thread.over() for thread in [first, *threads]] == [0, 1, 2, 3, 4]
    assert disk.counts == [1] * 5
    assert [value for _, _, value in values_of(inbox, 5)] == [b"first", *values]


def test_who_waits_too_long_took_nothing_and_who_stands_behind_goes_on(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone(HASTY)
    first = Publishing(lambda: publisher.publish("first"))
    until(lambda: disk.held, what="the first is under way")
    second = Publishing(lambda: publisher.publish("second"))
    assert isinstance(second.over(), QueueFullError)
    error = first.over()
    assert isinstance(error, WaitTimeoutError)
    assert "may still be taken" in str(error)
    assert "offsets 0 to 0" in str(error)
    disk.let_go()
    assert publisher.publish("third") == 1
    assert [value for _, _, value in values_of(inbox, 2)] == ["first", "third"]


def test_who_is_closed_while_it_waits_took_nothing_and_what_is_under_way_is_taken(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone()
    first = Publishing(lambda: publisher.publish("first"))
    until(lambda: disk.held, what="the first is under way")
    others = [Publishing(lambda: publisher.publish("late")) for _ in range(2)]
    waiting(publisher, 2)
    publisher.shut()
    disk.let_go()
    assert first.over() == 0
    assert [type(thread.over()) for thread in others] == [ClosedError, ClosedError]
    assert disk.counts == [1]
    assert values_of(inbox, 1) == [(0, 0, "first")]


class Interrupted(Exception):
    """What a signal's handler raises."""


def test_an_interrupted_thread_takes_nothing_of_its_own_nor_of_those_that_wait(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone()
    disk.let_go()
    assert publisher.publish("first") == 0

    def interrupt(rows: object) -> None:
        raise Interrupted

    publisher._add = interrupt
    with pytest.raises(Interrupted):
        publisher.publish("never", metadata={"n": 1})
    assert publisher.budget.reserved == 0
    assert publisher.durability is not None
    assert publisher.durability._waiting == []
    assert publisher.publish_many(["second", os.urandom(100_000)], seeds=[0, 0]) == [1, 2]
    messages = [inbox.receive(timeout_s=10) for _ in range(3)]
    assert [(message.offset, message.metadata) for message in messages] == [(0, {}), (1, {}), (2, {})]


def test_a_value_that_cannot_travel_is_refused_in_its_own_thread(open_alone: Any) -> None:
    publisher, disk, inbox = open_alone()
    disk.let_go()
    with pytest.raises(UnsupportedValueError):
        publisher.publish(object())
    with pytest.raises(UnsupportedValueError):
        publisher.publish_many([1, 2, object(), 3], seeds=[0, 0, 0, 0])
    assert publisher.publish(3) == 2
    assert [value for _, _, value in values_of(inbox, 3)] == [1, 2, 3]


@pytest.mark.parametrize("sync", ["process", "power"])
def test_many_threads_get_dense_numbers_in_the_order_of_arrival(tmp_path: Path, sync: str) -> None:
    threads, each = 6, 40
    config = replace(CONFIG)
    with join(config, rank=0, world_size=1, state_directory=tmp_path / "state") as fabric:
        inbox = fabric.subscribe("a", name="worker")
        publisher = fabric.publisher("a", policy="durable", sync=sync)

        def work(mine: int) -> dict[object, int]:
            return {f"{mine}:{n}": publisher.publish(f"{mine}:{n}", seed=n % 3) for n in range(each)}

        crew = [Publishing(lambda mine=mine: work(mine)) for mine in range(threads)]
        told = {value: sequence for thread in crew for value, sequence in thread.over().items()}
        lanes = [0, 0, 0]
        arrived: dict[object, int] = {}
        for offset in range(threads * each):
            message = inbox.receive(timeout_s=10)
            assert (message.offset, message.sequence) == (offset, lanes[message.seed])
            lanes[message.seed] += 1
            arrived[message.value] = message.sequence
        assert arrived == told


def test_tasks_of_one_loop_go_into_the_next_burst_and_who_is_taken_along_waits_on(tmp_path: Path) -> None:
    async def publish() -> None:
        async with await aio.join(CONFIG, rank=0, world_size=1, state_directory=tmp_path / "state") as fabric:
            inbox = await fabric.subscribe("a", name="worker")
            publisher = fabric.publisher("a", policy="durable")
            await publisher.publish("named")
            disk = HeldDisk(fabric)
            requests = publisher._outbox.durability._waiting  # type: ignore[union-attr]
            first = asyncio.create_task(publisher.publish("first"))
            await true(lambda: disk.held)
            others = [asyncio.create_task(publisher.publish(number)) for number in range(5)]
            await true(lambda: len(requests) == 5)
            others.pop(1).cancel()
            await true(lambda: len(requests) == 4)
            disk.write()
            await true(lambda: disk.held)
            assert await first == 1
            disk.let_go()
            assert await asyncio.gather(*others) == [2, 3, 4, 5]
            assert disk.counts == [1, 4]
            values = [(await inbox.receive(timeout_s=10)).value for _ in range(6)]
            assert values == ["named", "first", 0, 2, 3, 4]

    asyncio.run(publish())
