"""How many 256-byte records a second arrive, in order, from one process in another?

Published one by one and received by iteration; and `publish_many` / `receive_many`. 64 seeds, `reliable`.

Envelope: on two cores two Python threads and two IO threads share the work. Raw pyzmq spends about 1 us a record on
each side, of which most is one `send` and one `recv`; whoever joins records into bursts pays that once a burst, and is
then bound by what Python does for one record, a few tenths of a microsecond on each side.

`batched` is raw pyzmq with 256 records joined by hand in one frame: no topic, no repair, but the rate to dream of.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from perf.harness import Budget, Contestant, Report, Row, compete, main, measured, span_s, teams
from perf.members import enter
from perf.raw import BLOCK, RECORD_BYTES

SEEDS = 64
MANY = 1024
"""Records in one call of `publish_many` and `receive_many`."""


class FabricSender:
    def __init__(self, *, rank: int, meeting: Path, many: bool) -> None:
        self.rank, self.meeting, self.many = rank, meeting, many

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.publisher = self.fabric.publisher("perf.records", when_full="block")
        self.publisher.wait_for_subscribers(1, timeout_s=30)

    def run(self, *, n: int, seeds: int) -> dict[str, Any]:
        value = b"x" * RECORD_BYTES
        start = time.monotonic_ns()
        if self.many:
            values, block = [value] * MANY, [position % seeds for position in range(MANY)]
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

    def close(self) -> None:
        self.fabric.close()


class FabricReceiver:
    def __init__(self, *, rank: int, meeting: Path, many: bool) -> None:
        self.rank, self.meeting, self.many = rank, meeting, many
        self.expected: dict[int, int] = {}

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.inbox = self.fabric.subscribe("perf.records")

    def run(self, *, n: int, seeds: int) -> dict[str, Any]:
        for seed in range(seeds):
            self.expected.setdefault(seed, 0)
        (self._many if self.many else self._one_by_one)(n)
        end = time.monotonic_ns()
        # Handled means: the next call. Without it the sender's flush would wait for the last message.
        self.inbox.drain()
        return {"end_ns": end}

    def _one_by_one(self, n: int) -> None:
        expected, left = self.expected, n
        for message in self.inbox:
            seed = message.seed
            if message.sequence != expected[seed] or len(message.value) != RECORD_BYTES:
                raise ValueError(f"seed {seed}: expected {expected[seed]}, got {message.sequence}")
            expected[seed] += 1
            left -= 1
            if not left:
                break

    def _many(self, n: int) -> None:
        expected, left = self.expected, n
        while left:
            for message in self.inbox.receive_many(min(MANY, left), timeout_s=30):
                seed = message.seed
                if message.sequence != expected[seed] or len(message.value) != RECORD_BYTES:
                    raise ValueError(f"seed {seed}: expected {expected[seed]}, got {message.sequence}")
                expected[seed] += 1
                left -= 1

    def close(self) -> None:
        self.fabric.close()


def _raw(style: str) -> Contestant:
    name = "batched" if style == "batched" else f"raw {style}"
    return Contestant(name, ("perf.raw:RecordSender", "perf.raw:RecordReceiver"), {"style": style})


def _ours(many: bool) -> Contestant:
    sides = ("perf.bench_records:FabricSender", "perf.bench_records:FabricReceiver")
    return Contestant("fabric many" if many else "fabric one", sides, {"many": many})


def _rows(seen: dict[str, list[float]]) -> list[Row]:
    """The faster style of raw pyzmq becomes `raw`."""
    best = max(("raw push", "raw pub"), key=lambda name: median(seen[name]))
    rows = []
    for case, ours, must, aim in (("one by one", "fabric one", 1.5, None), ("many", "fabric many", 2.5, None)):
        values: dict[str, list[float]] = {"fabric": seen[ours]} if ours in seen else {}
        values |= {"raw": seen[best]} | {name: rates for name, rates in seen.items() if not name.startswith("fabric")}
        values.pop(best)
        row = Row("records", f"256 B, 64 seeds, {case}", "records/s", values, Budget(must, aim))
        row.notes["raw"] = best
        rows.append(row)
    return rows


def run(arguments: argparse.Namespace) -> Report:
    n = BLOCK * (100 if arguments.quick else 1200)
    contestants: Sequence[Contestant] = [_raw("push"), _raw("pub"), _raw("batched")]
    if not arguments.raw_only:
        contestants = [_ours(many=False), _ours(many=True), *contestants]
    with teams(contestants) as players:
        answers = compete(players, {"n": n, "seeds": SEEDS}, rounds=arguments.rounds)
    return Report(_rows(measured(answers, lambda sides: n / span_s(sides))))


if __name__ == "__main__":
    main(__doc__, run)
