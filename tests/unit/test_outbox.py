"""The open burst: who sends it, and how far a flood may run ahead of its readers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fabric.config import BURST_BYTES_MAX, FabricConfig, Retention
from fabric.core.wire import RECORD_BYTES
from fabric.engine import many as many_of_engine
from fabric.engine.many import ROOM
from fabric.engine.pacing import PACE_BYTES
from fabric.errors import QueueFullError
from fabric.publisher import Publisher
from fabric.subscription import Subscription
from fabric.testing import World

VALUE = b"x" * 256
FULL = BURST_BYTES_MAX // (len(VALUE) + RECORD_BYTES)
"""Records in a full burst."""


def received_by_core(fabric: Any, topic: str) -> int:
    return int(fabric._engine.core.publishing.feeds[topic].end)


@pytest.mark.parametrize("many", [False, True])
def test_who_fills_a_burst_sends_it(many: bool) -> None:
    with World(world_size=1) as world:
        member = world.join(0)
        publisher = member.publisher("t", when_full="block")
        publisher.publish(VALUE)
        world.run(0.01)
        publisher.publish(VALUE)  # in a burst of its own; a quiet one is not worth its whole room yet
        quiet = publisher._burst_max // (len(VALUE) + RECORD_BYTES)
        count = 2 * FULL if many else quiet + FULL
        if many:  # in bursts of their own: what is open leaves before them
            publisher.publish_many([VALUE] * count, seeds=[0] * count)
        else:
            for _ in range(count):
                publisher.publish(VALUE)
        # Nobody else drove: the world stood still.
        assert received_by_core(member, "t") == count + (2 if many else 1)


def test_a_flood_of_small_records_gives_way_to_its_readers() -> None:
    with World(world_size=2, checked=False) as world:
        flooding, reading = world.join(0), world.join(1)
        inbox = reading.subscribe("t")
        publisher = flooding.publisher("t", when_full="block")
        publisher.wait_for_subscribers(1, timeout_s=5)
        world.every(0.001, lambda: [None for _ in inbox.drain()])
        ahead = 0
        for _ in range(2 * PACE_BYTES // len(VALUE)):
            publisher.publish(VALUE)
            if not len(publisher.rows):
                continue
            ahead = max(ahead, publisher.next - min(publisher._readers().values()))
        assert flooding.statistics()["publish_paced"] > 0
        assert ahead * len(VALUE) <= PACE_BYTES + 4 * 1024 * 1024, "looked at every 2 MiB"


def test_the_driver_does_not_wait_for_a_burst_that_somebody_works_on() -> None:
    with World(world_size=1) as world:
        member = world.join(0)
        publisher = member.publisher("t", when_full="block")
        publisher.publish(VALUE)
        publisher._turn.pop()  # a thread that does not run now, or a signal's handler on top of a publication
        world.run(0.05)
        publisher._turn.append(None)
        with publisher.lock:
            world.run(0.05)
        assert publisher.rows
        world.run(0.01)
        assert received_by_core(member, "t") == 1


class Interrupted(Exception):
    """What a signal's handler raises."""


def test_a_burst_is_known_to_the_driver_from_its_first_row_on(monkeypatch: pytest.MonkeyPatch) -> None:
    with World(world_size=1) as world:
        member = world.join(0)
        publisher = member.publisher("t", when_full="block")
        append = publisher._append

        def interrupted(*arguments: Any) -> int:
            append(*arguments)
            raise Interrupted

        monkeypatch.setattr(publisher, "_append", interrupted)
        with pytest.raises(Interrupted):
            publisher.publish(VALUE)
        monkeypatch.undo()
        assert publisher.publish(VALUE) == 1, "the first was taken, though its publisher was interrupted"
        world.run(0.01)
        assert received_by_core(member, "t") == 2


def test_room_that_was_reserved_for_a_burst_without_rows_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with World(world_size=1) as world:
        member = world.join(0)
        publisher = member.publisher("t", when_full="block")

        def interrupted(*_: Any) -> int:
            raise Interrupted

        monkeypatch.setattr(publisher, "_append", interrupted)
        for _ in range(3):
            with pytest.raises(Interrupted):
                publisher.publish(VALUE)
        monkeypatch.undo()
        publisher.publish(VALUE)
        assert publisher.budget.reserved == publisher.room
        world.run(0.01)
        assert (publisher.budget.reserved, received_by_core(member, "t")) == (0, 1)


class InterruptedLanes(dict[int, Any]):
    """A signal's handler raises as soon as they are changed."""

    def update(self, *arguments: Any, **named: Any) -> None:
        super().update(*arguments, **named)
        raise Interrupted


@pytest.mark.parametrize("n", [70, 2 * FULL])
def test_what_interrupts_many_leaves_whole_numbers(n: int) -> None:
    with World(world_size=1) as world:
        member = world.join(0)
        inbox, publisher = member.subscribe("t"), member.publisher("t", when_full="block")
        lanes = publisher._lanes
        publisher._lanes = InterruptedLanes()
        with pytest.raises(Interrupted):
            Publisher.publish_many(publisher, [VALUE] * n, seeds=[0] * n)  # which the world's own would note
        publisher._lanes = lanes | publisher._lanes
        assert Publisher.publish(publisher, b"after") == n, "they count as taken"
        messages: list[Any] = []
        while len(messages) <= n:
            messages.append(Subscription.receive(inbox, timeout_s=1))
        assert [message.sequence for message in messages] == list(range(n + 1))
        assert messages[-1].value == b"after"


def test_many_that_are_refused_leave_no_hole() -> None:
    config = FabricConfig(retention=Retention(owed_bytes_max=3 * ROOM, publish_timeout_s=0.1))
    with World(world_size=2, config=config, checked=False) as world:
        publishing, away = world.join(0), world.join(1)
        inbox = away.subscribe("t")
        publisher = publishing.publisher("t", when_full="block")
        publisher.wait_for_subscribers(1, timeout_s=5)
        with pytest.raises(QueueFullError):
            publisher.publish_many(np.zeros((10 * FULL, 256), np.uint8), seeds=np.zeros(10 * FULL, int))
        taken = publisher.next
        assert 0 < taken < 10 * FULL
        assert publishing._engine.budget.reserved == 0
        messages: list[Any] = []
        while len(messages) < taken:
            messages += inbox.receive_many(taken, timeout_s=1)
        inbox.drain()
        assert publisher.publish_many(np.ones(3), seeds=[0, 0, 1]).tolist() == [taken, taken + 1, 0]
        assert [message.sequence for message in messages] == list(range(taken))


def test_the_room_of_many_that_are_interrupted_before_they_are_numbered_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: Any) -> Any:
        raise Interrupted

    with World(world_size=1) as world:
        publisher = world.join(0).publisher("t", when_full="block")
        monkeypatch.setattr(many_of_engine, "number", interrupted)
        with pytest.raises(Interrupted):
            publisher.publish_many([VALUE] * FULL, seeds=[0] * FULL)
        assert (publisher.next, publisher.budget.reserved) == (0, 0)


def test_many_short_calls_make_full_bursts() -> None:
    with World(world_size=1) as world:
        publisher = world.join(0).publisher("t", when_full="block")
        for _ in range(10):
            publisher.publish_many(np.zeros((100, 256), np.uint8), seeds=[0] * 100)
        publisher.close_burst()
        publisher.engine.push()
        bursts = list(publisher.engine.core.publishing.feeds["t"].kept)
        assert [burst.end - burst.first for burst in bursts] == [200] * 5
