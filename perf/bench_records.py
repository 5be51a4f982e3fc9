"""How many small records a second arrive, in order, from one process in another, and from eight?

64 seeds, `reliable`, in three ways. One by one: `publish`, and iteration. Many: `publish_many` of a list of bytes, and
each message of what `receive_many` returns is looked at. Arrays: `publish_many` of an array whose rows are the records,
and the columns of what `receive_many` returns are looked at. Eight senders have 8 seeds each.

Envelope: on two cores two Python threads and two IO threads share the work. Raw pyzmq spends about 1 us a record on
each side, of which most is one `send` and one `recv`; whoever joins records into bursts pays that once a burst, and is
then bound by what Python does for one record, a few tenths of a microsecond on each side. By column nothing is done for
one record, and what is left is copies and the work for a burst.

`joined` is raw pyzmq with 256 records joined by hand in one frame: no topic, no repair, but the rate to dream of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from perf.harness import Answers, Contestant, compete, cpu_s, main, measured, span_s, teams
from perf.members import enter
from perf.peers import LOSES, cast
from perf.peers.pyzmq_work import BLOCK
from perf.report import Budget, Report, Row

SEEDS = 64
MANY = 1024
"""Records in one call of `publish_many` and `receive_many`."""


class FabricSender:
    def __init__(self, *, rank: int, meeting: Path, way: str) -> None:
        self.rank, self.meeting, self.way = rank, meeting, way

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.publisher = self.fabric.publisher("perf.records", when_full="block")
        self.publisher.wait_for_subscribers(1, timeout_s=30)

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        value = b"x" * size
        start = time.monotonic_ns()
        if self.way != "one by one":
            values, block = self._block(value, seeds)
            for first in range(0, n, MANY):
                count = min(MANY, n - first)
                self.publisher.publish_many(values[:count], seeds=block[:count])
        else:
            publish = self.publisher.publish
            for position in range(n):
                publish(value, seed=position % seeds)
        sent = time.monotonic_ns()
        # The last burst need not wait for its age.
        self.publisher.flush(timeout_s=60)
        return {"start_ns": start, "sent_ns": sent}

    def _block(self, value: bytes, seeds: int) -> tuple[Any, Any]:
        """The values and seeds of one call."""
        block = np.arange(MANY) % seeds
        if self.way == "arrays":
            return np.full((MANY, len(value)), ord("x"), np.uint8), block
        return [value] * MANY, block.tolist()

    def close(self) -> None:
        self.fabric.close()


class FabricReceiver:
    def __init__(self, *, rank: int, meeting: Path, way: str) -> None:
        self.rank, self.meeting, self.way = rank, meeting, way
        self.expected: dict[int, int] = {}
        self.expected_next: Any = None

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.inbox = self.fabric.subscribe("perf.records")

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        for seed in range(seeds):
            self.expected.setdefault(seed, 0)
        {"one by one": self._one_by_one, "many": self._many, "arrays": self._arrays}[self.way](n, size)
        end = time.monotonic_ns()
        # Handled means: the next call. Without it the sender's flush would wait for the last message.
        self.inbox.drain()
        return {"end_ns": end, "n": n}

    def _one_by_one(self, n: int, size: int) -> None:
        expected, left = self.expected, n
        for message in self.inbox:
            seed = message.seed
            if message.sequence != expected[seed] or len(message.value) != size:
                raise ValueError(f"seed {seed}: expected {expected[seed]}, got {message.sequence}")
            expected[seed] += 1
            left -= 1
            if not left:
                break

    def _many(self, n: int, size: int) -> None:
        expected, left = self.expected, n
        while left:
            for message in self.inbox.receive_many(min(MANY, left), timeout_s=30):
                seed = message.seed
                if message.sequence != expected[seed] or len(message.value) != size:
                    raise ValueError(f"seed {seed}: expected {expected[seed]}, got {message.sequence}")
                expected[seed] += 1
                left -= 1

    def _arrays(self, n: int, size: int) -> None:
        if self.expected_next is None:
            self.expected_next = np.zeros(len(self.expected), int)
        expected, left = self.expected_next, n
        while left:
            table = self.inbox.receive_many(min(MANY, left), timeout_s=30)
            order = table.seeds.argsort(kind="stable")
            seeds, counts = table.seeds[order], np.bincount(table.seeds, minlength=len(expected))
            wanted = expected[seeds] + np.arange(len(seeds)) - (counts.cumsum() - counts)[seeds]
            if (table.sequences[order] != wanted).any() or table.values.shape[1] != size:
                raise ValueError(f"expected {wanted}, got {table.sequences[order]}")
            expected += counts
            left -= len(table)

    def close(self) -> None:
        self.fabric.close()


LIBRARIES = ("raw", "raw pub", "zenoh", "torch queue", "nats", "redis", "redis stream")
SIDES = ("perf.sides:RecordSender", "perf.sides:RecordReceiver")
JOINED = Contestant("joined", ("perf.peers.pyzmq_work:JoinedSender", "perf.peers.pyzmq_work:JoinedReceiver"))
BUDGETS = {
    "one by one": [Budget(1.5), Budget(None, 1.3, peer="zenoh")],
    "many": [Budget(2.5), Budget(1.3, 2, peer="zenoh")],
    "arrays": [Budget(2.5), Budget(1.3, 2, peer="zenoh")],
}
"""By the ways to publish and receive."""


def rate(answers: Answers) -> float:
    """Records a second."""
    return float(max(answer.get("n", 0) for answer in answers)) / span_s(answers)


def _ours(way: str) -> Contestant:
    sides = ("perf.bench_records:FabricSender", "perf.bench_records:FabricReceiver")
    return Contestant(f"fabric {way}", sides, {"way": way})


def _rows(size: int, seen: dict[str, list[float]], cpu_us: dict[str, float]) -> list[Row]:
    """The faster style of raw pyzmq becomes `raw`."""
    best = max((name for name in ("raw", "raw pub") if name in seen), key=lambda name: median(seen[name]), default="")
    rows = []
    for case, budgets in BUDGETS.items():
        values: dict[str, list[float]] = {"fabric": seen[f"fabric {case}"]} if f"fabric {case}" in seen else {}
        values |= {"raw": seen[best]} if best else {}
        values |= {name: rates for name, rates in seen.items() if not name.startswith(("fabric", "raw"))}
        bounds = budgets if size == 256 else []
        row = Row("records", f"{size} B, 64 seeds, {case}", "records/s", values, bounds, axes={"bytes": size})
        row.notes = {"raw": best, "cpu_us": cpu_us}
        rows.append(row)
    return rows


def _one_to_one(arguments: argparse.Namespace, report: Report, sizes: Sequence[int]) -> None:
    contestants = cast(arguments, report, LIBRARIES, SIDES, "records")
    if not arguments.only or "raw" in arguments.only.split(","):
        contestants.append(JOINED)
    if not arguments.raw_only and (not arguments.only or "fabric" in arguments.only.split(",")):
        contestants = [*map(_ours, BUDGETS), *contestants]
    for size in sizes:
        n = BLOCK * (100 if arguments.quick else 1200 if size == 256 else 400)
        with teams(contestants, report.skipped) as players:
            job = {"n": n, "size": size, "seeds": SEEDS}
            answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
        cost = measured(answers, lambda sides: cpu_s(sides) * 1e6 / max(side.get("n", 0) for side in sides))
        report.rows += _rows(size, measured(answers, rate), {name: median(each) for name, each in cost.items()})


def _eight_to_one(arguments: argparse.Namespace, report: Report) -> None:
    sides = (SIDES[0],) * 8 + (SIDES[1],)
    libraries = ("fabric", "raw", "zenoh", "nats", "redis")
    n = BLOCK * (10 if arguments.quick else 100)
    with teams(cast(arguments, report, libraries, sides, "records", writers=8), report.skipped) as players:
        job = {"n": n, "size": 256, "seeds": 8}
        answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
    report.rows.append(Row("records", "256 B, 8 senders to one", "records/s", measured(answers, rate)))


def run(arguments: argparse.Namespace) -> Report:
    report = Report(skipped={"iceoryx2, floods of records": LOSES})
    _one_to_one(arguments, report, [256] if arguments.quick else [64, 256, 1024])
    if not arguments.quick:
        _eight_to_one(arguments, report)
    return report


if __name__ == "__main__":
    main(__doc__, run)
