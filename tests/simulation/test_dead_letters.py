"""Dead letters in a world: slow and full stores, kills, lossy links; no record is handled twice or out of order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fabric.errors import WaitTimeoutError
from fabric.testing import Checker, DiskPlan, World
from tests.simulation.letter_jobs import LetterJob, Parked, Rejected, Skipped


def test_an_offset_settles_only_when_its_letter_is_written() -> None:
    with World(disk=DiskPlan(delay_ms=400)) as world:
        trainer, reader = world.join(0), world.join(1)

        @reader.on("t", attempts=1)
        def handle(message: Any) -> None:
            if message.value == 0:
                raise ValueError

        publisher = trainer.publisher("t")
        publisher.publish(0, seed=0)
        publisher.publish(1, seed=1)
        world.run(0.001)
        floors = set()

        def look() -> bool:
            written = len(reader.dead_letters) == 1
            floors.add((written, publisher._readers()[("rank-1", 1)] > 0))
            return written

        assert world.until(look)
        assert (False, True) not in floors, "acknowledged before it was written"
        trainer.flush(timeout_s=60)
        assert reader.dead_letters[0].value() == 0
        Checker(world.history).judge()


def test_a_rejected_message_settles_only_when_its_letter_is_written() -> None:
    with World(disk=DiskPlan(delay_ms=400)) as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("t", acknowledge="manual")
        for value in range(4):
            trainer.publish("t", value, seed=value % 2)
        messages = [inbox.receive() for _ in range(4)]
        messages[0].reject("no")
        messages[2].acknowledge()
        messages[3].acknowledge()
        floors = trainer.publisher("t")._readers()
        for _ in range(1000):
            if len(reader.dead_letters):
                break
            assert floors["rank-1", 1] == 0, "acknowledged before it was written"
            world.run(0.001)
            floors = trainer.publisher("t")._readers()
        trainer.flush(timeout_s=60)
        assert [letter.sequence for letter in reader.dead_letters] == [0]
        Checker(world.history).judge()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("job", [Parked, Skipped, Rejected])
def test_whatever_happens_each_record_comes_to_one_end(job: Callable[[int], LetterJob], seed: int) -> None:
    """Letters are redriven, given up and refused while records still come; links lose and disks are slow."""
    job(seed).play()


def test_a_reader_that_is_killed_with_letters_leaves_nothing_open() -> None:
    with World(disk=DiskPlan(delay_ms=50)) as world:
        trainer, reader = world.join(0), world.join(1)

        @reader.on("t", attempts=1)
        def handle(message: Any) -> None:
            raise ValueError

        trainer.publish("t", 1)
        world.run(0.01)
        world.kill(reader)
        world.run(1)
        again = world.join(1)
        assert len(again.dead_letters) == 0
        with pytest.raises(WaitTimeoutError):
            trainer.publish("t", 2)
            trainer.publisher("t").wait_for_subscribers(1, timeout_s=1)
