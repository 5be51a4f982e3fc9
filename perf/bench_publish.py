"""How long does `publish` keep the training thread?

One call at a time, with a pause of 2 ms after each, so that nothing queues: what is measured is the call, a snapshot
included, and not the way to the subscriber, who takes everything meanwhile. For tensors the number is the time of the
call over its bound, 10 us + bytes at half the rate at which `memcpy` copies the same bytes in the same round.

Envelope: 256 bytes are one number, one append and one wake-up. A tensor is copied once, at memcpy's rate where the
memory is warm; where each page is new, at a third of it.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import numpy as np

from perf.harness import Contestant, compete, main, measured, span_s, teams
from perf.peers import cast
from perf.report import Budget, Report, Row
from perf.sides import ArrayReceiver, ArraySender

KIB, MIB = 1 << 10, 1 << 20
TENSORS = (MIB, 16 * MIB)
PAUSE_S = 0.002


class Publisher(ArraySender):
    """Times each call; 256 bytes are sent as bytes, more as an array."""

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        value: Any = b"x" * size if size < KIB else np.ones(size, dtype=np.uint8)
        publish, clock, times = self.port.publisher.publish, time.perf_counter_ns, []
        for _ in range(n):
            start = clock()
            publish(value)
            times.append(clock() - start)
            time.sleep(PAUSE_S)
        self.port.finish()
        return {"call_us": median(times) / 1e3}


class Taker(ArrayReceiver):
    """Takes what comes."""

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        for _ in self.port.read(n):
            pass
        self.port.finish()
        return {}


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    if arguments.raw_only:
        return report
    sides = ("perf.bench_publish:Publisher", "perf.bench_publish:Taker")
    ours = [Contestant("fabric", sides, {"library": "fabric", "size_max": max(TENSORS)})]
    everybody = argparse.Namespace(only=None, raw_only=False)
    line = cast(everybody, report, ["memcpy"], ("perf.peers.memcpy:Copier",), "arrays")
    with teams([*ours, *line], report.skipped) as players:
        copier = players.pop("memcpy")
        for size in (256, *TENSORS):
            n = 20 if arguments.quick else 100 if size < 16 * MIB else 30
            answers = compete(players, {"n": n, "size": size}, rounds=arguments.rounds)
            calls = measured(answers, lambda seen: float(seen[0]["call_us"]))["fabric"]
            if size == 256:
                bound = Budget(3, 1.5, peer="", at_most=True)
                report.rows.append(Row("publish", "call with 256 B", "us", {"fabric": calls}, [bound]))
                continue
            copies = compete({"memcpy": copier}, {"n": 8, "size": size}, rounds=arguments.rounds)["memcpy"]
            allowed = [10 + 2 * span_s(copy) / 8 * 1e6 for copy in copies]
            shares = [call / most for call, most in zip(calls, allowed, strict=True)]
            bound = Budget(1, 0.5, peer="", at_most=True)
            row = Row("publish", f"call with {size // MIB} MiB over its bound", "ratio", {"fabric": shares}, [bound])
            row.notes = {"call_us": calls, "bound_us": allowed}
            report.rows.append(row)
    return report


if __name__ == "__main__":
    main(__doc__, run)
