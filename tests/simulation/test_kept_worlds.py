"""Worlds whose ranks have state: what the checker says of restarts, and what a rank finds again."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.core.endings import Endings
from fabric.core.lanes import InboundFeed
from fabric.testing import Checker, Violation, World


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
    world.run(60)
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
        world.run(60)
        with pytest.raises(Violation, match="I9: rank-1#1 waits for the end of"):
            Checker(world.history).judge()
