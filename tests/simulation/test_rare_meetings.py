"""Coincidences that random worlds meet too seldom, each built on purpose, with and without the rule that it takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from fabric.config import FabricConfig, Retention
from fabric.core.events import ControlReceived
from fabric.core.wire import Kind, encode_control, feed_id, member_id
from fabric.errors import QueueFullError
from fabric.testing import Checker, Violation, World
from tests.simulation.variants import VARIANTS, broken

KIB = 1024


def a_registration_that_expired_while_all_was_quiet() -> None:
    config = replace(FabricConfig(), retention=Retention(absent_s=3.0))
    with World(config=config) as world:
        trainer, reader = world.join(0), world.join(1)
        reader.on("losses")(lambda message: None)
        trainer.publish("losses", 1)
        trainer.flush()
        world.cut(trainer, reader)
        world.run(6.0)
        world.heal(trainer, reader)
        world.run(6.0)
        assert trainer.statistics()["registrations_expired"] == 1
        Checker(world.history).judge()


def a_subscription_that_was_closed_in_an_outage() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        trainer.publish("losses", 1)
        world.run(0.1)
        world.cut(trainer, reader)
        inbox.close()
        trainer.publish("losses", 2)
        world.run(2.0)
        world.heal(trainer, reader)
        world.run(5.0)
        Checker(world.history).judge()
        trainer.flush()


def a_record_that_was_dropped_before_its_reader_knew_of_it() -> None:
    config = replace(FabricConfig(), retention=Retention(owed_bytes_max=200 * KIB, publish_timeout_s=0.1))
    with World(config=config) as world:
        trainer, reader = world.join(0), world.join(1)
        reader.on("large")(lambda message: None)
        inbox = reader.subscribe("small", acknowledge="manual")
        small = trainer.publisher("small", when_full="drop_oldest")
        large = trainer.publisher("large", when_full="block")
        small.wait_for_subscribers(1)
        large.wait_for_subscribers(1)
        small.publish(b"dropped while it is in hand")
        message = inbox.receive()
        world.cut(trainer, reader, both=False)
        small.publish(b"dropped")
        world.run(0.1)
        with pytest.raises(QueueFullError):
            while True:
                large.publish(b"kept" * 5000)
        with pytest.raises(QueueFullError):
            small.publish(b"refused" * 1000)  # more than a quiet topic reserves
        message.acknowledge()
        world.run(0.1)
        world.heal(trainer, reader)
        world.run(3.0)
        assert trainer.statistics()["dropped_oldest"] == 2
        Checker(world.history).judge()


def a_goodbye_that_overtakes_what_was_said_before() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        reader.subscribe("losses")
        trainer.publisher("losses")
        world.run(1.0)
        life = trainer._engine.card.incarnation
        said = (1, 1, [(feed_id("rank-0", life, "losses"), "losses", "reliable", 0, 0, 0, life, 0, 0)])
        world.stop(trainer)
        world.run(1.0)
        reader._engine.submit(ControlReceived(encode_control(Kind.REGISTERED, member_id("rank-0"), life, *said)))
        world.run(5.0)
        Checker(world.history).judge()


MEETINGS: dict[str, Callable[[], None]] = {
    "expired_in_silence": a_registration_that_expired_while_all_was_quiet,
    "unregistered_once": a_subscription_that_was_closed_in_an_outage,
    "dropped_is_acknowledged": a_record_that_was_dropped_before_its_reader_knew_of_it,
    "gone_begins_again": a_goodbye_that_overtakes_what_was_said_before,
}


@pytest.mark.parametrize("variant", MEETINGS)
def test_a_rare_meeting_ends_well(variant: str) -> None:
    MEETINGS[variant]()


@pytest.mark.parametrize("variant", MEETINGS)
def test_a_rare_meeting_catches_its_variant(variant: str) -> None:
    with broken(VARIANTS[variant]), pytest.raises(Violation):
        MEETINGS[variant]()
