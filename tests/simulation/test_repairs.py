"""I16: what is repaired is at most what was lost, and one window. Late is not lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fabric.config import FabricConfig, Repair
from fabric.testing import Checker, FaultPlan, World
from tests.simulation.variants import broken, heartbeat_without_grace
from transports import Link

WINDOW_BYTES = 64 * 1024
RECORDS, RECORD_BYTES = 200, 10_000


def repaired_bytes_when_data_is_late(monkeypatch: pytest.MonkeyPatch) -> int:
    """Data takes 400 ms, in order; heartbeats, which list its end, take none. Nothing is lost."""
    config = replace(FabricConfig(), repair=Repair(window_bytes=WINDOW_BYTES))
    plan = FaultPlan(delay_ms=1, links=frozenset({Link.DATA}))
    with World(plan=plan, config=config) as world:
        monkeypatch.setattr(world.hub, "_delay", lambda writer: 400_000_000)
        trainer, reader = world.join(0), world.join(1)
        seen: list[bytes] = []
        reader.on("layers")(lambda message: seen.append(message.value))
        trainer.publish("layers", b"first")
        world.run(2.0)
        for number in range(RECORDS):
            trainer.publish("layers", b"%d" % number * (RECORD_BYTES // len(b"%d" % number)))
            world.run(0.02)
        trainer.flush()
        assert len(seen) == RECORDS + 1
        Checker(world.history).judge()
        return reader.statistics().get("bytes_repaired", 0)


def test_late_data_is_not_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repaired_bytes_when_data_is_late(monkeypatch) <= WINDOW_BYTES


def test_a_heartbeat_without_grace_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    with broken(heartbeat_without_grace):
        assert repaired_bytes_when_data_is_late(monkeypatch) > 2 * WINDOW_BYTES


def test_repair_costs_what_was_lost_and_a_window() -> None:
    config = replace(FabricConfig(), repair=Repair(window_bytes=WINDOW_BYTES))
    plan = FaultPlan(loss=0.1, links=frozenset({Link.DATA}))
    with World(seed=3, plan=plan, config=config) as world:
        trainer, reader = world.join(0), world.join(1)
        reader.on("layers")(lambda message: None)
        trainer.publish("layers", b"first")
        world.run(1.0)
        for number in range(RECORDS):
            trainer.publish("layers", b"%d" % number * (RECORD_BYTES // len(b"%d" % number)))
            world.run(0.01)
        trainer.flush()
        lost = world.hub.statistics()["dropped_loss"] * (RECORD_BYTES + 1000)
        assert lost > 0
        assert reader.statistics()["bytes_repaired"] <= lost + WINDOW_BYTES
