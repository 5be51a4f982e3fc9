"""Sessions of named subscriptions over lives of both sides: nothing is passed over, nothing settled comes again."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import FabricConfig, Liveness
from fabric.errors import ConfigError, QueueFullError, SpillFullError, WaitTimeoutError
from fabric.subscription import Subscription
from fabric.testing import DiskPlan, World

CONFIG = FabricConfig(subscribe_timeout_s=2.0, liveness=Liveness(suspect_s=0.5, down_s=2.0))


def stateful(seed: int = 1) -> World:
    return World(seed, config=CONFIG, state=True)


def take(world: World, inbox: Subscription, seconds: float = 2.0) -> list[Any]:
    """What comes in so much time."""
    taken: list[Any] = []

    def look() -> bool:
        taken.extend(message.value for message in inbox.drain())
        return False

    world.until(look, timeout_s=seconds)
    return taken


@pytest.mark.parametrize("policy", ["reliable", "durable"])
@pytest.mark.parametrize("end", ["close", "stop", "kill"])
def test_the_next_session_begins_where_the_last_one_stood(policy: str, end: str) -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("t", name="worker")
        publisher = trainer.publisher("t", policy=policy)
        for number in range(5):
            publisher.publish(number)
        assert take(world, inbox) == [0, 1, 2, 3, 4]
        world.run(1)
        if end == "close":
            inbox.close()
        else:
            world.stop(worker) if end == "stop" else world.kill(worker)
            world.run(1)
            worker = world.join(1, host="b")
        world.run(1)
        for number in range(5, 8):
            publisher.publish(number)
        inbox = worker.subscribe("t", name="worker")
        assert (take(world, inbox), inbox.gaps) == ([5, 6, 7], ())


@pytest.mark.parametrize("kept", [False, True], ids=["gone", "kept"])
@pytest.mark.parametrize("with_cursor", [False, True])
def test_a_settled_feed_of_an_earlier_life_does_not_come_again(kept: bool, with_cursor: bool) -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        if kept:
            trainer.subscribe("t", name="keeper").close()
        inbox = worker.subscribe("t", name="worker", cursor={} if with_cursor else None)
        publisher = trainer.publisher("t", policy="durable")
        for number in range(5):
            publisher.publish(number)
        take(world, inbox)
        world.stop(trainer)
        world.run(1)
        trainer = world.join(0, host="a")
        world.run(2)
        trainer.publisher("t", policy="durable").publish(9)
        assert (take(world, inbox), inbox.gaps) == ([9], ())
        cursor = inbox.cursor()
        if with_cursor:
            inbox.commit(cursor)
        world.run(1)
        inbox.close()
        world.run(1)
        inbox = worker.subscribe("t", name="worker", cursor=cursor if with_cursor else None)
        assert (take(world, inbox), inbox.gaps) == ([], ())


def test_after_a_clean_end_of_both_nothing_comes_again() -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("t", name="worker")
        publisher = trainer.publisher("t", policy="durable")
        for number in range(5):
            publisher.publish(number)
        assert len(take(world, inbox, 1)) == 5
        inbox.close()
        world.run(1)
        world.stop(worker)
        world.stop(trainer)
        world.run(1)
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("t", name="worker")
        assert (take(world, inbox), inbox.gaps) == ([], ())


def test_a_subscription_that_was_ended_is_not_owed_by_the_next_life() -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("t", name="worker")
        world.run(1)
        inbox.unsubscribe()
        world.run(1)
        world.kill(trainer)
        world.run(1)
        trainer = world.join(0, host="a")
        assert list(trainer._engine.core.publishing.registrations) == []


def test_one_member_has_a_named_subscription_open_once() -> None:
    with stateful() as world:
        worker = world.join(0)
        inbox = worker.subscribe("t", name="worker")
        with pytest.raises(ConfigError, match="open already"):
            worker.subscribe("t", name="worker")
        worker.subscribe("u", name="worker").close()
        inbox.close()
        worker.subscribe("t", name="worker")


@pytest.mark.parametrize(("later", "floor"), [(10**15, 3), (0, 1000)], ids=["life", "offset"])
def test_a_cursor_ahead_of_its_publisher_passes_over_nothing_and_is_a_gap(later: int, floor: int) -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        publisher = trainer.publisher("t", policy="durable")
        life = trainer._engine.card.incarnation + later
        inbox = worker.subscribe("t", name="worker", cursor={"rank-0/t": [life, floor, []]})
        for number in range(5):
            publisher.publish(number)
        assert take(world, inbox) == [0, 1, 2, 3, 4]
        assert [(gap.incarnation, gap.first, gap.end) for gap in inbox.gaps] == [(life, floor, None)]
        assert worker.statistics()["cursors_disowned"] == 1
        assert inbox.cursor() == {"rank-0/t": [trainer._engine.card.incarnation, 5, []]}
        inbox.commit(inbox.cursor())
        world.run(2)
        assert trainer.ledger().balanced
        assert set(trainer._engine.core.publishing.feeds["t"].readers.values()) == {5}


@pytest.mark.parametrize("when_full", ["block", "fail"])
@pytest.mark.parametrize("delay_ms", [0.0, 90.0])
def test_a_disk_that_refuses_to_the_end_took_nothing_and_that_is_said(when_full: str, delay_ms: float) -> None:
    with World(1, config=CONFIG, state=True, disk=DiskPlan(delay_ms=delay_ms)) as world:
        publisher = world.join(0).publisher("t", policy="durable", when_full=when_full)
        disk = world._disks["rank-0"]
        disk.capacity = disk.used
        for _ in range(3):
            with pytest.raises(QueueFullError, match=r"spill log in .* is full") as caught:
                publisher.publish(1)
            assert isinstance(caught.value.__cause__, SpillFullError)
        assert publisher.next == 0


def test_the_books_of_a_named_subscription_go_on_while_nobody_has_it_open() -> None:
    with stateful() as world:
        trainer, worker = world.join(0, host="a"), world.join(1, host="b")
        inbox = worker.subscribe("t", name="worker")
        publisher = trainer.publisher("t", policy="durable")
        for number in range(10):
            publisher.publish(number)
        world.run(1)
        inbox.receive()
        inbox.close()
        world.run(1)
        assert worker.ledger().totals.dropped == 0, "it is owed on"
        assert worker.ledger().balanced
        (row,) = [row for row in trainer.ledger().rows if row.state == "resting"]
        assert (row.subscriber, row.totals.in_flight, row.first) == ("rank-1", 10 - row.floor, row.floor)
        trainer.flush(timeout_s=1)
        for life in range(2):
            report = trainer.close(timeout_s=0.2)
            (kept,) = report.ledger.kept
            assert report.balanced, life
            assert (kept.topic, kept.subscriber, kept.first, kept.end) == ("t", "rank-1", row.floor, 10)
            assert "kept for the next life: rank-0/t" in str(report)
            world.run(1)
            trainer = world.join(0, host="a")
        inbox = worker.subscribe("t", name="worker")
        with pytest.raises(WaitTimeoutError):
            trainer.publisher("t", policy="durable").flush(timeout_s=0.5)
        assert take(world, inbox) == list(range(row.floor, 10))
        trainer.publisher("t", policy="durable").flush(timeout_s=1)
        assert trainer.close(timeout_s=1).ledger.kept == ()
