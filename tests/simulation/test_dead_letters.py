"""Dead letters in a world: slow and full stores, kills, lossy links; no record is handled twice or out of order."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

from fabric import FabricConfig
from fabric.config import Letters
from fabric.errors import WaitTimeoutError
from fabric.testing import Checker, DiskPlan, FaultPlan, World


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


MOST = 60


class Chances:
    """A publisher of three lanes, a handler that fails by chance, and somebody who tends its letters by chance."""

    def __init__(self, seed: int, trainer: Any, reader: Any) -> None:
        self.rng, self.trainer, self.reader = Random(seed), trainer, reader
        self.published, self.failing = 0, 0.5
        self.seen: list[tuple[int, int]] = []
        self.given_up: set[int] = set()

    def handle(self, message: Any) -> None:
        if self.rng.random() < self.failing:
            raise ValueError
        self.seen.append((message.seed, message.value))

    def publish(self) -> None:
        if self.published < MOST:
            self.trainer.publish("t", self.published, seed=self.published % 3)
            self.published += 1

    def tend(self) -> None:
        letters = list(self.reader.dead_letters)
        if letters and self.rng.random() < 0.1:
            chosen = self.rng.choice(letters)
            value = chosen.value()
            if self.reader.dead_letters.discard(chosen):
                self.given_up.add(value)
        some = [letter for letter in letters if self.rng.random() < 0.7]
        report = self.reader.dead_letters.redrive(some)
        assert len(report.queued) + len(report.refused) == len(some)


@pytest.mark.parametrize("seed", range(4))
def test_parked_lanes_keep_their_order_whatever_happens(seed: int) -> None:
    """Letters are redriven, given up and refused while records still come; links lose and disks are slow."""
    config = FabricConfig(letters=Letters(rows_max=8, redriven_at_once_max=3))
    plan = FaultPlan(loss=0.1, delay_ms=3)
    with World(seed=seed, plan=plan, disk=DiskPlan(delay_ms=30, refusals=0.2), config=config) as world:
        trainer, reader = world.join(0), world.join(1)
        one = Chances(seed, trainer, reader)
        reader.on("t", attempts=2, exhausted="park")(one.handle)
        world.every(0.02, one.publish)
        world.every(0.3, one.tend, owner=reader)
        assert world.until(lambda: one.published == MOST, 60)
        one.failing = 0.0
        assert world.until(lambda: len(one.seen) + len(one.given_up) == MOST and not len(reader.dead_letters), 300)
        trainer.flush(timeout_s=60)
        for lane in range(3):
            values = [value for seed, value in one.seen if seed == lane]
            assert values == [value for value in range(lane, MOST, 3) if value not in one.given_up]
        counts = reader.statistics()
        assert counts["dead_letters"] > 10 and counts["letters_died_again"] > 0 and counts["letters_refused"] > 0


@pytest.mark.parametrize("seed", range(4))
def test_skipped_letters_are_handled_once_each(seed: int) -> None:
    rng = Random(seed)
    with World(seed=seed, plan=FaultPlan(loss=0.1), disk=DiskPlan(delay_ms=20, refusals=0.1)) as world:
        trainer, reader = world.join(0), world.join(1)
        seen: list[int] = []
        chance = [0.5]

        @reader.on("t", attempts=1)
        def handle(message: Any) -> None:
            if rng.random() < chance[0]:
                raise ValueError
            seen.append(message.value)

        for value in range(150):
            trainer.publish("t", value, seed=value % 4)
        world.every(0.1, lambda: reader.dead_letters.redrive(reader.dead_letters), owner=reader)
        world.run(5)
        chance[0] = 0.0
        assert world.until(lambda: len(seen) >= 150 and not len(reader.dead_letters), 60)
        assert sorted(seen) == list(range(150))


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
