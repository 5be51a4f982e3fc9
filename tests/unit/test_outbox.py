"""The open burst: who sends it, and how far a flood may run ahead of its readers."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import BURST_BYTES_MAX
from fabric.core.wire import RECORD_BYTES
from fabric.engine.pacing import PACE_BYTES
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
        if many:
            publisher.publish_many([VALUE] * (quiet + FULL), seeds=[0] * (quiet + FULL))
        else:
            for _ in range(quiet + FULL):
                publisher.publish(VALUE)
        # Nobody else drove: the world stood still.
        assert received_by_core(member, "t") == 1 + quiet + FULL


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
