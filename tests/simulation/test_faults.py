"""Rows of the fault catalogue (ARCHITECTURE.md) that a world with a virtual clock shows best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fabric import Fabric, Subscription
from fabric.config import FabricConfig, Liveness, Retention, Spill
from fabric.errors import BrokenError, QueueFullError
from fabric.testing import Checker, DiskPlan, FaultPlan, World
from transports import Link

KIB = 1024
SMALL = replace(FabricConfig(), retention=Retention(owed_bytes_max=512 * KIB, publish_timeout_s=1.0))


def payload(number: int) -> bytes:
    return number.to_bytes(2, "little") * (4 * KIB)


def numbers(values: list[bytes]) -> list[int]:
    return [int.from_bytes(value[:2], "little") for value in values]


def test_f12_a_reader_whose_words_do_not_arrive_reads_on_and_is_owed_within_the_memory() -> None:
    with World(config=SMALL) as world:
        trainer, reader = world.join(0), world.join(1)
        seen: list[bytes] = []
        reader.on("losses")(lambda message: seen.append(message.value))
        publisher = trainer.publisher("losses", when_full="block")
        publisher.publish(payload(0))
        trainer.flush()
        world.cut(reader, trainer, both=False)
        taken = 1
        with pytest.raises(QueueFullError):
            while True:
                publisher.publish(payload(taken))
                taken += 1
        world.run(30.0)
        assert trainer.peers["rank-1"].state in ("suspect", "down")
        assert numbers(seen) == list(range(taken)), "the other direction is as it was"
        assert 0 < trainer._engine.core.publishing.retention.owed_bytes <= 512 * KIB
        world.heal(reader, trainer)
        assert publisher.publish(payload(taken)) == taken
        trainer.flush()
        assert numbers(seen) == list(range(taken + 1))
        Checker(world.history).judge()


def test_f19_lost_questions_and_answers_are_repeated_and_what_is_gone_is_told_once() -> None:
    few = replace(FabricConfig(), retention=Retention(owed_bytes_max=256 * KIB, kept_bytes_max=8 * KIB))
    plan = FaultPlan(loss=0.5, links=frozenset({Link.CONTROL, Link.BULK}))
    with World(seed=11, plan=plan, config=few) as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        publisher = trainer.publisher("losses", when_full="drop_oldest")
        world.cut(trainer, reader, both=False)
        for number in range(200):
            publisher.publish(payload(number))
            world.run(0.01)
        world.heal(trainer, reader)
        seen = read_to(world, inbox, 199)
        world.run(10.0)
        assert list(inbox.drain()) == []
        gone = [offset for gap in inbox.gaps for offset in range(gap.first, gap.end or 200)]
        assert gone, "some were lost for good"
        assert sorted([*seen, *gone]) == list(range(200)), "each is here once or told once"
        assert world.hub.statistics()["dropped_loss"] > 0
        Checker(world.history).judge()


def read_to(world: World, inbox: Subscription, last: int) -> list[int]:
    """Offsets of all messages up to this one."""
    seen: list[int] = []

    def is_there() -> bool:
        seen.extend(message.offset for message in inbox.drain())
        return bool(seen) and seen[-1] == last

    assert world.until(is_there)
    return seen


def test_f29_of_two_members_of_one_name_the_newer_is_heard_and_the_older_is_told() -> None:
    """Two observers here; of ranks F26 tells."""
    with World(world_size=1) as world:
        trainer = world.join(0)
        older = world.join("dashboard")
        before = older.subscribe("losses", delivery="reliable")
        trainer.publish("losses", 1)
        assert before.receive().value == 1
        newer = world.join("dashboard")
        inbox = newer.subscribe("losses", delivery="reliable")
        assert world.until(lambda: older._engine.fenced_by > 0)
        assert trainer.peers["dashboard"].incarnation == newer._engine.card.incarnation
        trainer.publish("losses", 2)
        assert inbox.receive().value == 2
        assert list(inbox.drain()) == []
        trainer.flush()
        with pytest.raises(BrokenError, match="newer incarnation"):
            older.publish("losses", 3)
        Checker(world.history).judge()


def test_f74_a_slow_disk_holds_nobody_up_before_the_memory_is_full_and_says_so_then() -> None:
    """Every write takes up to 10 s. Half of the memory is written from, the other half is published into."""
    slow = replace(
        SMALL,
        retention=replace(SMALL.retention, publish_timeout_s=60.0),
        spill=Spill(segment_bytes=256 * KIB, bytes_max=64 * 1024 * KIB, free_bytes_min=1),
        liveness=Liveness(down_s=60.0, suspect_s=30.0),
    )
    with World(config=slow, disk=DiskPlan(delay_ms=10_000)) as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        world.cut(trainer, reader)
        began, waited, number = world.now_s, 0, 0
        while not (waited := counted(trainer, "publish_waited")):
            held_from = world.now_s
            trainer.publish("losses", payload(number))
            number += 1
        assert held_from == began, "until then nobody waited for the disk"
        assert number * 8 * KIB > 256 * KIB
        for _ in range(200):
            trainer.publish("losses", payload(number))
            number += 1
        assert counted(trainer, "publish_waited") > waited, "back-pressure is counted"
        assert counted(trainer, "bursts_spilled") > 0
        world.heal(trainer, reader)
        assert read_to(world, inbox, number - 1) == list(range(number))
        trainer.flush()
        assert inbox.gaps == ()
        Checker(world.history).judge()


def counted(member: Fabric, name: str) -> Any:
    return member.statistics().get(name, 0)
