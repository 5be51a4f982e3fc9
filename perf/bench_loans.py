"""Does it matter how large a tensor is that was written in place? From a loan to the receiver's message.

A loan (float32, 64 KiB to 256 MiB, `reliable`) is entered, filled, and left; one at a time, each handled before the
next begins. The time is that of entering plus that from leaving to the moment at which another process holds the
message; filling is not in it. `publish` beside it fills memory of its own and publishes that: a snapshot, so its time
grows with the bytes.

Envelope: leaving sums 64 KiB of the value and the receiver the same, whatever its size, and the receiver touches no
more pages than these. So the time should hardly grow; a reader by socket would pay for all bytes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from perf.harness import Contestant, compete, main, teams
from perf.members import enter
from perf.report import Budget, Report, Row

KIB, MIB = 1 << 10, 1 << 20
SIZES = {64 * KIB: 60, 1 * MIB: 60, 16 * MIB: 30, 256 * MIB: 6}
"""Loans of one round, by bytes of elements."""


class Lender:
    """Lends, or publishes, and says when: of each value the time of entering, and when its leaving began."""

    def __init__(self, *, rank: int, meeting: Path, lends: bool) -> None:
        self.rank, self.meeting, self.lends = rank, meeting, lends

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.publisher = self.fabric.publisher("perf.loans", when_full="block")
        self.publisher.wait_for_subscribers(1, timeout_s=30)

    def run(self, *, sizes: dict[str, int]) -> dict[str, Any]:
        one = self._lend if self.lends else self._publish
        return {"sent": {size: [one(int(size) // 4, number) for number in range(n)] for size, n in sizes.items()}}

    def _lend(self, elements: int, number: int) -> tuple[int, int]:
        import torch

        began = time.monotonic_ns()
        with self.publisher.loan(elements, torch.float32) as tensor:
            entering = time.monotonic_ns() - began
            tensor.fill_(number)
            left = time.monotonic_ns()
        self.publisher.flush(timeout_s=60)
        return entering, left

    def _publish(self, elements: int, number: int) -> tuple[int, int]:
        import torch

        tensor = torch.full((elements,), float(number))
        left = time.monotonic_ns()
        self.publisher.publish(tensor)
        self.publisher.flush(timeout_s=60)
        return 0, left

    def close(self) -> None:
        self.fabric.close()


class Borrower:
    """Receives them, and says when it had each."""

    def __init__(self, *, rank: int, meeting: Path, lends: bool) -> None:
        self.rank, self.meeting = rank, meeting

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.inbox = self.fabric.subscribe("perf.loans")

    def run(self, *, sizes: dict[str, int]) -> dict[str, Any]:
        return {
            "had": {size: [self._receive(int(size) // 4, number) for number in range(n)] for size, n in sizes.items()}
        }

    def _receive(self, elements: int, number: int) -> int:
        value = self.inbox.receive(timeout_s=60).value
        had = time.monotonic_ns()
        if value.shape != (elements,) or value[0] != number or value[-1] != number:
            raise ValueError(f"expected {elements} times {number}, got {value.shape} of {value[0]} to {value[-1]}")
        del value
        self.inbox.drain()
        return had

    def close(self) -> None:
        self.fabric.close()


def _micros(answers: list[dict[str, Any]], size: int) -> float:
    """The median over one round, in microseconds."""
    sent, had = answers[0]["sent"][str(size)], answers[1]["had"][str(size)]
    return median(entering + end - left for (entering, left), end in zip(sent, had, strict=True)) / 1e3


def _words(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    if arguments.raw_only:
        return report
    sides = ("perf.bench_loans:Lender", "perf.bench_loans:Borrower")
    contestants = [
        Contestant("fabric", sides, {"lends": True}),
        Contestant("publish", sides, {"lends": False}),
    ]
    sizes = {str(size): max(3, n // (4 if arguments.quick else 1)) for size, n in SIZES.items()}
    with teams(contestants) as players:
        seen = compete(players, {"sizes": sizes}, rounds=arguments.rounds)
    times = {size: {name: [_micros(one, size) for one in rounds] for name, rounds in seen.items()} for size in SIZES}
    for size, values in times.items():
        report.rows.append(Row("loans", f"{_words(size)}, enter and leave to message", "us", values))
    small, large = min(SIZES), max(SIZES)
    growth = {
        name: [most / least for most, least in zip(times[large][name], times[small][name], strict=True)]
        for name in seen
    }
    case = f"{_words(large)} beside {_words(small)}"
    report.rows.append(Row("loans", case, "x", growth, [Budget(2.0, 1.2, peer="", at_most=True)]))
    return report


if __name__ == "__main__":
    main(__doc__, run)
