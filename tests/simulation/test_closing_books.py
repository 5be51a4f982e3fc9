"""Closing with the books in order: what a `CloseReport` says when all went well, and when it did not."""

from __future__ import annotations

import pytest

from fabric import CloseReport, Fabric, Ledger
from fabric.observe.ledger import Totals
from fabric.testing import Checker, FaultPlan, World

TOPIC = "layers.0.health"


def published(world: World, count: int = 10) -> tuple[Fabric, Fabric, list[object]]:
    """A trainer that has published to a reader with a handler, which has not run yet."""
    trainer, reader = world.join(0), world.join(1)
    seen: list[object] = []
    reader.on(TOPIC)(lambda message: seen.append(message.value))
    for number in range(count):
        trainer.publish(TOPIC, number)
    return trainer, reader, seen


def totals_of(report: CloseReport) -> Totals:
    assert isinstance(report.ledger, Ledger)
    return report.ledger.totals


def test_a_close_reports_what_became_of_everything() -> None:
    with World() as world:
        trainer, reader, seen = published(world)
        report = trainer.close()
        assert len(seen) == 10
        assert (report.balanced, report.unacknowledged) == (True, {})
        assert totals_of(report) == Totals(owed=10, handled=10), "the last books came in time"
        assert report.waited_s < 0.3
        world.run(1.0)
        assert totals_of(reader.close()) == Totals(owed=10, handled=10)


def test_what_the_reader_gave_up_is_said_to_the_publisher() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe(TOPIC)
        for number in range(3):
            trainer.publish(TOPIC, number)
            world.run(0.1)
        assert inbox.receive().value == 0
        assert inbox.receive().value == 1
        theirs = reader.close()
        assert theirs.balanced
        assert totals_of(theirs) == Totals(owed=3, handled=1, dropped=2)
        assert totals_of(trainer.close()) == totals_of(theirs)


@pytest.mark.parametrize("timeout_s", [0.0, 0.2, 5.0])
def test_a_close_returns_in_time_and_names_what_is_not_known(timeout_s: float) -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        reader.subscribe(TOPIC, acknowledge="manual")
        for number in range(3):
            trainer.publish(TOPIC, number)
        world.run(1.0)
        world.cut(trainer, reader)
        began_s = world.now_s
        report = trainer.close(timeout_s=timeout_s)
        assert world.now_s - began_s <= timeout_s + 0.01
        assert not report.balanced
        assert report.unacknowledged == {TOPIC: {"rank-1": (0, 3)}}
        (unknown,) = report.ledger.unknown
        assert (unknown.source, unknown.topic, unknown.subscriber) == ("rank-0", TOPIC, "rank-1")
        assert (unknown.first, unknown.end) == (0, 3)
        assert unknown.state == ("suspect" if timeout_s == 5.0 else "joined")
        assert f"nothing is known of rank-0/{TOPIC} 0..3 for rank-1#" in report.ledger.explain()


def test_the_time_that_a_handler_takes_of_a_close_is_not_granted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        reader.subscribe(TOPIC, acknowledge="manual")
        trainer.publish(TOPIC, 0)
        world.run(0.1)
        monkeypatch.setattr(trainer._dispatcher, "close", world.run)  # the one that runs takes all the time it is given
        began_s = world.now_s
        assert not trainer.close(timeout_s=1.5).balanced
        assert world.now_s - began_s <= 1.51


def test_a_reader_that_acknowledged_and_then_was_cut_off_holds_a_close_up_for_half_a_second_only() -> None:
    with World() as world:
        trainer, reader, seen = published(world, 3)
        world.run(0.1)
        world.cut(trainer, reader)
        trainer_books = trainer.ledger()
        assert trainer_books.totals.acknowledged + trainer_books.totals.handled == 3
        report = trainer.close()
        assert seen == [0, 1, 2]
        assert report.balanced
        assert report.waited_s <= 0.51


def test_the_dead_are_owed_nothing_and_what_they_had_is_a_known_unknown() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        reader.subscribe(TOPIC)
        for number in range(3):
            trainer.publish(TOPIC, number)
        world.run(0.5)
        world.kill(reader)
        world.run(10.0)
        report = trainer.close()
        assert report.balanced
        assert report.ledger.explain() == f"nobody can say any more: rank-0/{TOPIC} 0..3 for rank-1#1 (dead)"


def test_a_publisher_that_was_killed_leaves_an_open_gap_in_balance() -> None:
    with World() as world:
        trainer, reader, _ = published(world)
        world.run(1.0)
        world.kill(trainer)
        world.run(10.0)
        report = reader.close()
        assert report.balanced
        assert totals_of(report) == Totals(owed=10, handled=10)
        assert [unknown.end for unknown in report.ledger.known_unknowns] == [None]


def test_the_ledgers_of_both_sides_agree_however_much_the_network_loses() -> None:
    with World(seed=5, plan=FaultPlan(loss=0.3, delay_ms=20), world_size=3) as world:
        trainer, reader, seen = published(world, 200)
        other = world.join(2)
        inbox = other.subscribe(TOPIC, start="retained")
        world.every(0.05, lambda: list(inbox.drain()), owner=other)
        for _ in range(20):
            world.run(0.5)
            Checker(world.history).inspect()
            assert trainer.ledger().balanced
        world.calm()
        assert world.until(lambda: trainer.ledger().totals.handled == len(seen) + other.ledger().totals.handled)
        assert len(seen) == 200
        assert reader.ledger().totals == Totals(owed=200, handled=200)
        Checker(world.history).judge()
