"""A million small records between two processes: all arrive, each lane in order, within the memory that DESIGN section 4 allows."""

from __future__ import annotations

import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import FabricConfig, Message, join
from fabric.config import Inboxes, Retention
from tests.harness.children import Parent, child, children, forget_peak, peak_bytes, resident_bytes

SEEDS = 64
SIZE = 256
MIB = 1024 * 1024
SLACK = 64 * MIB

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

CONFIG = FabricConfig(retention=Retention(owed_bytes_max=64 * MIB, kept_bytes_max=16 * MIB, publish_timeout_s=30.0))
"""A quarter of the defaults, so that the records do not fit and the bound is felt."""


def ceilings_of(retention: Retention) -> int:
    return retention.owed_bytes_max + retention.kept_bytes_max


def hand_and_hold(inboxes: Inboxes) -> int:
    return inboxes.hand_bytes_max + inboxes.hold_bytes_max


def body(offset: int) -> bytes:
    return offset.to_bytes(8, "little") * (SIZE // 8)


def publish_all(parent: Parent, spec: str, records: int, default: bool) -> None:
    config = FabricConfig() if default else CONFIG
    bodies = [body(offset) for offset in range(256)]
    with join(config, rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("layers.0.health")
        publisher.wait_for_subscribers(1, timeout_s=30)
        forget_peak()
        base, began = resident_bytes(), time.perf_counter()
        publish = publisher.publish
        for offset in range(records):
            publish(bodies[offset & 255], seed=offset % SEEDS)
        spent = time.perf_counter() - began
        publisher.flush(timeout_s=120)
        grown = peak_bytes() - base
        allowed = ceilings_of(config.retention) * 1.25 + SLACK
        told = fabric.statistics()
        parent.say(grown=grown, allowed=allowed, spent_s=spent, waited=told.get("publish_waited", 0))
        parent.hear()


class Lanes:
    """The sequences of each seed as they came, and what was wrong with a value."""

    def __init__(self) -> None:
        self.sequences = [array("q") for _ in range(SEEDS)]
        self.wrong = self.count = 0

    def take(self, message: Message) -> None:
        seed, sequence = message.seed, message.sequence
        self.sequences[seed].append(sequence)
        if message.value[:1] != ((sequence * SEEDS + seed) & 255).to_bytes(1, "little"):
            self.wrong += 1
        self.count += 1

    def verdict(self, records: int) -> dict[str, Any]:
        expected = [array("q", range(len(range(seed, records, SEEDS)))) for seed in range(SEEDS)]
        return {"exact": self.sequences == expected, "wrong": self.wrong, "count": self.count}


def receive_all(parent: Parent, spec: str, records: int, default: bool) -> None:
    config = FabricConfig() if default else replace(CONFIG, inboxes=Inboxes(hand_bytes_max=8 * MIB, hold_bytes_max=8 * MIB))
    lanes = Lanes()
    with join(config, rank=1, world_size=2, rendezvous=spec) as fabric:
        lanes.take_room = None  # type: ignore[attr-defined]
