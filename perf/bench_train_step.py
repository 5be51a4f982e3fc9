"""What does the fabric take from a training step of 50 ms?

Four ranks; each publishes the health of 12 layers, float32 of (1,000, 4), in every step: 192 kB. Once rank 0 hears all
of it (a controller), once every rank does. A rank computes for 20 ms and then waits for the rest of the step, as it
would for its collective. The ranks begin a quarter of a step apart, so that on two cores there is a core for each that
computes: otherwise the wall time of a call would mostly be the time in which another rank has the core.

share = ((wall time in fabric calls on the training thread) + 2 x (CPU of the process's other threads)) / time of the
steps. The other threads count twice, since what they burn is taken from the training thread, and more of it where the
interpreter's lock changes hands.

Envelope: 12 snapshots of 16 kB at 2 us each, 12 calls at 3 us, 48 messages to take at 2 us: 0.16 ms or 0.3 %.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

import numpy as np

from perf.harness import Answers, Contestant, compete, main, measured, teams
from perf.members import enter
from perf.peers.pyzmq_work import RawMesh
from perf.report import Budget, Report, Row

RANKS, LAYERS, SHAPE = 4, 12, (1000, 4)
KEYS = ("calls_ns", "calls_cpu_ns", "publish_ns", "others_cpu_ns")
STEP_NS, BUSY_NS = 50_000_000, 20_000_000


class Talk(Protocol):
    """What a training step does with the messages."""

    def publish(self, layer: int, value: np.ndarray[Any, Any], step: int) -> None: ...

    def take(self, step: int) -> int: ...

    def close(self) -> None: ...


class FabricTalk:
    def __init__(self, rank: int, meeting: Path, listens: bool) -> None:
        self.fabric = enter(rank=rank, world_size=RANKS, meeting=meeting)
        self.publishers = [self.fabric.publisher(f"layers.block{layer}.health") for layer in range(LAYERS)]
        self.inbox = self.fabric.subscribe("layers.**.health") if listens else None

    def publish(self, layer: int, value: np.ndarray[Any, Any], step: int) -> None:
        self.publishers[layer].publish(value, metadata={"step": step})

    def take(self, step: int) -> int:
        self.fabric.step(step)
        if self.inbox is None:
            return 0
        return sum(message.value.shape == SHAPE for message in self.inbox.drain())

    def close(self) -> None:
        self.fabric.close()


class RawTalk:
    def __init__(self, rank: int, meeting: Path, listens: bool, listeners: int) -> None:
        self.mesh = RawMesh(rank=rank, meeting=meeting, ranks=RANKS, topics=LAYERS)
        self.mesh.open(listens)
        self.mesh.await_listeners(listeners)
        self.listens = listens

    def publish(self, layer: int, value: np.ndarray[Any, Any], step: int) -> None:
        self.mesh.publish(layer, value)

    def take(self, step: int) -> int:
        return self.mesh.drain() if self.listens else 0

    def close(self) -> None:
        self.mesh.close()


class Rank:
    """A rank that trains and talks."""

    def __init__(self, *, rank: int, meeting: Path, library: str, listeners: int) -> None:
        self.rank, self.meeting, self.library, self.listeners = rank, meeting, library, listeners
        self.step = 0

    def open(self) -> None:
        listens = self.rank < self.listeners
        self.talk: Talk
        if self.library == "raw":
            self.talk = RawTalk(self.rank, self.meeting, listens, self.listeners)
        else:
            self.talk = FabricTalk(self.rank, self.meeting, listens)
        self.values = [np.full(SHAPE, layer, dtype=np.float32) for layer in range(LAYERS)]

    def run(self, *, steps: int) -> dict[str, Any]:
        calls_ns = calls_cpu_ns = publish_ns = taken = 0
        time.sleep(self.rank * STEP_NS / RANKS / 1e9)
        before_all, before_thread = time.process_time_ns(), time.thread_time_ns()
        start = time.monotonic_ns()
        for position in range(steps):
            _compute_until(time.monotonic_ns() + BUSY_NS)
            wall, cpu = time.monotonic_ns(), time.thread_time_ns()
            for layer, value in enumerate(self.values):
                self.talk.publish(layer, value, self.step)
            publish_ns += time.monotonic_ns() - wall
            taken += self.talk.take(self.step)
            calls_ns += time.monotonic_ns() - wall
            calls_cpu_ns += time.thread_time_ns() - cpu
            self.step += 1
            time.sleep(max(0, start + (position + 1) * STEP_NS - time.monotonic_ns()) / 1e9)
        others_ns = (time.process_time_ns() - before_all) - (time.thread_time_ns() - before_thread)
        spent = {"calls_ns": calls_ns, "calls_cpu_ns": calls_cpu_ns, "publish_ns": publish_ns}
        return spent | {"others_cpu_ns": others_ns, "taken": taken, "steps": steps}

    def close(self) -> None:
        self.talk.close()


def _compute_until(deadline_ns: int) -> None:
    """Elementwise numpy: one thread, the interpreter's lock given back inside, like a small training step."""
    block = np.ones(16_384, dtype=np.float32)
    while time.monotonic_ns() < deadline_ns:
        np.tanh(block, out=block)


def share(answer: dict[str, Any]) -> float:
    """Per cent of one rank's step."""
    return float(100 * (answer["calls_ns"] + 2 * answer["others_cpu_ns"]) / (answer["steps"] * STEP_NS))


def _per_step_us(rounds: list[Answers], key: str) -> float:
    """Mean over rounds and ranks."""
    return mean(answer[key] / answer["steps"] / 1e3 for answers in rounds for answer in answers)


def _case(arguments: argparse.Namespace, listeners: int, case: str, budgets: list[Budget]) -> Row:
    contestants = [
        Contestant(library, ("perf.bench_train_step:Rank",) * RANKS, {"library": library, "listeners": listeners})
        for library in (["raw"] if arguments.raw_only else ["fabric", "raw"])
    ]
    with teams(contestants) as players:
        answers = compete(players, {"steps": 8 if arguments.quick else 40}, rounds=arguments.rounds)
    row = Row("train step", case, "%", measured(answers, lambda ranks: mean(map(share, ranks))), budgets)
    for name, rounds in answers.items():
        row.notes[name] = {key.replace("_ns", "_us_per_step"): _per_step_us(rounds, key) for key in KEYS}
        row.notes[name]["publish_us"] = _per_step_us(rounds, "publish_ns") / LAYERS
        row.notes[name]["worst_rank_percent"] = max(share(answer) for ranks in rounds for answer in ranks)
    return row


def run(arguments: argparse.Namespace) -> Report:
    budgets = [Budget(1.0, 0.3, peer="", at_most=True)]
    controller = _case(arguments, 1, "share of 50 ms, rank 0 hears all", budgets)
    return Report([controller, _case(arguments, RANKS, "share of 50 ms, all hear all", [])])


if __name__ == "__main__":
    main(__doc__, run)
