"""Worlds whose ranks have state: what the checker says of restarts, and what a rank finds again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fabric.core.endings import Endings
from fabric.core.lanes import InboundFeed
from fabric.errors import QueueFullError
from fabric.testing import Checker, DiskPlan, Violation, World
from fabric.testing.disks import FakeDisk


def restarted(world: World, end: str) -> list[Any]:
    """Five durable records, of which the subscriber has two when their publisher dies; what it has a while later."""
    trainer, worker = world.join(0, host="a"), world.join(1, host="b")
    done: list[Any] = []
    worker.on("jobs.*")(lambda message: done.append(message.value))
    jobs = trainer.publisher("jobs.x", policy="durable", sync="power")
    for number in range(5):
        if number == 2:
            trainer.flush()
            world.cut(trainer, worker)
        jobs.publish(number)
    world.kill(trainer) if end == "kill" else world.lose_power("a")
    world.heal("rank-0", "rank-1")
    world.join(0, host="a")
    world.run(10)
    return done


@pytest.mark.parametrize("end", ["kill", "power"])
def test_who_has_all_of_an_earlier_life_waits_for_nothing(end: str) -> None:
    with World(1, state=True) as world:
        assert restarted(world, end) == list(range(5))
        Checker(world.history).judge()


def never_told(*_: object, **__: object) -> None:
    """Where the feed ended is not heard."""


def told_and_not_fetched(_: Endings, peer: object, inbound: InboundFeed, first: int, end: int, *, exact: bool) -> None:
    """... heard, and nothing is done about it."""
    inbound.fin = end


@pytest.mark.parametrize("broken", [never_told, told_and_not_fetched])
def test_who_waits_for_ever_is_found(broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endings, "end_past", broken)
    with World(1, state=True) as world:
        assert restarted(world, "kill") == [0, 1]
        with pytest.raises(Violation, match=r"I9: rank-1#1 waits for the end of .*'jobs\.x'"):
            Checker(world.history).judge()


def test_who_has_everything_and_is_never_told_that_it_was_everything_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Endings, "end_past", never_told)
    with World(1, state=True) as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("jobs.x")
        trainer.publisher("jobs.x", policy="durable").publish(1)
        assert inbox.receive().value == 1
        list(inbox.drain())
        world.kill(trainer)
        world.join(0, host="a")
        world.run(10)
        with pytest.raises(Violation, match="I9: rank-1#1 waits for the end of"):
            Checker(world.history).judge()


def buried(world: World, *, keeper: bool = False) -> Any:
    """A worker with three letters; with a `keeper`, to which they are still owed, they can come again."""
    trainer, worker = world.join(0, host="a"), world.join(1, host="b")
    if keeper:
        worker.subscribe("jobs.*", name="keeper")

    @worker.on("jobs.*", attempts=1)
    def handle(message: Any) -> None:
        raise ValueError

    trainer.publisher("jobs.x", policy="durable").publish_many([1, 2, 3], seeds=[0, 0, 0])
    assert world.until(lambda: len(worker.dead_letters) == 3)
    if not keeper:
        trainer.flush(timeout_s=60)
    return worker


@pytest.mark.parametrize("end", ["kill", "stop", "power"])
def test_letters_outlive_their_rank_and_may_be_redriven(end: str) -> None:
    with World(1, state=True, disk=DiskPlan(delay_ms=20, refusals=0.3, sync_failures=0.3)) as world:
        worker = buried(world)
        world.stop(worker) if end == "stop" else world.kill(worker) if end == "kill" else world.lose_power("b")
        worker = world.join(1, host="b")
        assert [(letter.sequence, letter.value()) for letter in worker.dead_letters] == [(0, 1), (1, 2), (2, 3)]
        done: list[Any] = []
        worker.on("jobs.*")(lambda message: done.append(message.value))
        worker.dead_letters.redrive(worker.dead_letters)
        assert world.until(lambda: done == [1, 2, 3] and not len(worker.dead_letters))
        world.run(5)
        world.kill(worker)
        assert len(world.join(1, host="b").dead_letters) == 0
        Checker(world.history).judge()


@pytest.mark.parametrize("redriven", [False, True])
def test_a_record_that_is_a_letter_of_an_earlier_life_is_settled_for_the_checker(redriven: bool) -> None:
    with World(1, state=True) as world:
        worker = buried(world, keeper=True)
        world.kill(worker)
        worker = world.join(1, host="b")
        done: list[Any] = []
        worker.on("jobs.*", start="retained")(lambda message: done.append(message.value))
        if redriven:
            worker.dead_letters.redrive(worker.dead_letters)
        world.run(5)
        assert (done, worker.statistics()["letters_known"]) == ([1, 2, 3] if redriven else [], 3)
        Checker(world.history).inspect()
        Checker(world.history).judge()


def test_a_full_disk_keeps_nobody_from_reading_letters() -> None:
    with World(1, state=True) as world:
        world.kill(buried(world))
        world._disk = DiskPlan(refusals=1.0, sync_failures=1.0, delay_ms=500)
        assert len(world.join(1, host="b", wait=False).dead_letters) == 3


def test_letters_end_with_a_rank_without_state() -> None:
    with World(1) as world:
        trainer, worker = world.join(0), world.join(1)
        inbox = worker.subscribe("t", acknowledge="manual")
        trainer.publish("t", 1)
        inbox.receive().reject("no")
        assert world.until(lambda: len(worker.dead_letters) == 1)
        world.kill(worker)
        assert len(world.join(1).dead_letters) == 0


@pytest.mark.parametrize("end", ["kill", "power"])
def test_a_message_that_kills_its_rank_is_counted_unless_the_power_went(end: str) -> None:
    with World(1, state=True) as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        attempts: list[int] = []

        def fatal(message: Any) -> None:
            attempts.append(message.attempt)
            if len(attempts) < 3:
                world.kill(worker) if end == "kill" else world.lose_power("b")

        worker.subscribe("jobs.*", name="keeper")  # so that all of it is still owed when the next life comes
        worker.on("jobs.*", attempts=2)(fatal)
        trainer.publisher("jobs.x", policy="durable").publish(1)
        while worker in world.members:
            world.run(0.1)
        for _ in range(2):
            worker = world.join(1, host="b")
            worker.on("jobs.*", attempts=2, start="retained")(fatal)
            world.run(5)
        assert attempts == ([1, 2] if end == "kill" else [1, 1, 1])
        assert [letter.reason for letter in worker.dead_letters] == (["handler_exhausted"] if end == "kill" else [])


@pytest.mark.parametrize(
    ("wrong", "steps"), [({"short_writes": 1.0}, "write"), ({"sync_failures": 1.0}, "sync_failed")]
)
def test_a_plan_reaches_the_disk(wrong: dict[str, float], steps: str) -> None:
    with World(1, state=True, disk=DiskPlan(**wrong)) as world:
        jobs = world.join(0).publisher("jobs.x", policy="durable", sync="power", when_full="fail")
        before = [step.verb for step in world._disks["rank-0"].steps].count(steps)
        if steps == "write":
            jobs.publish(bytes(10_000))
        else:
            with pytest.raises(QueueFullError):
                jobs.publish(1)
        assert [step.verb for step in world._disks["rank-0"].steps].count(steps) >= before + 2


def test_what_a_failed_sync_was_to_cover_is_covered_by_no_later_one() -> None:
    disk = FakeDisk()
    file = disk.enter(Path("/d")).open("f", create=True)
    disk.enter(Path("/d")).sync()
    file.write([b"lost"], 0)
    disk.fail("sync")
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file.write([b"kept"], 4)
    file.sync()
    assert disk.content("/d/f") == b"lostkept"
    assert disk.crashed(len(disk.steps)).content("/d/f") == b"\0\0\0\0kept"
