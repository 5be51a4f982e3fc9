"""How fast do tensors of 1 to 256 MiB travel between two processes of a host, over ipc and over tcp?

float32, received as a view, checked by samples. Two sizes below 1 MiB serve the two-term fit, cost = n * a + bytes / b,
which takes the sizes up to 16 MiB: beyond, every buffer is made of new pages, and the cost of a byte is another.

Envelope: a socket copies twice in the kernel (in and out) and the receiver's buffer is touched for the first time by
the copy out: 3-4 GB/s while it stays in the caches, about 1.3 GB/s where every page is new. The fabric's publish
takes a snapshot first, at memcpy speed (12-17 GB/s): a tenth to a quarter of the time that raw pyzmq does not spend.
`raw safe` is raw pyzmq that sends a summed snapshot and verifies the sum: what these two promises cost without us.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from perf.harness import Budget, Contestant, Report, Row, compete, fit_two_terms, main, measured, span_s, teams
from perf.members import enter
from perf.raw import check_tensor, tensor_sources

KIB, MIB = 1 << 10, 1 << 20
ROUND_BYTES = {
    64 * KIB: 64 * MIB,
    256 * KIB: 128 * MIB,
    1 * MIB: 256 * MIB,
    4 * MIB: 256 * MIB,
    16 * MIB: 512 * MIB,
    64 * MIB: 512 * MIB,
    256 * MIB: 768 * MIB,
}
"""Bytes of one round by the tensor's size: some tenths of a second each."""
FIT_BYTES_MAX = 16 * MIB


class FabricSender:
    def __init__(self, *, rank: int, meeting: Path, link: str) -> None:
        self.rank, self.meeting, self.link = rank, meeting, link

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting, link=self.link)
        self.publisher = self.fabric.publisher("perf.tensors", when_full="block")
        self.publisher.wait_for_subscribers(1, timeout_s=30)
        self.sources: list[Any] = []

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        if not self.sources or self.sources[0].nbytes != size:
            self.sources = tensor_sources(size)
        start = time.monotonic_ns()
        for position in range(n):
            self.publisher.publish(self.sources[position % 2])
        self.publisher.flush(timeout_s=120)
        return {"start_ns": start}

    def close(self) -> None:
        self.fabric.close()


class FabricReceiver:
    def __init__(self, *, rank: int, meeting: Path, link: str) -> None:
        self.rank, self.meeting, self.link = rank, meeting, link
        self.sequence = 0

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting, link=self.link)
        self.inbox = self.fabric.subscribe("perf.tensors")

    def run(self, *, n: int, size: int) -> dict[str, Any]:
        for wanted in range(n):
            message = self.inbox.receive(timeout_s=120)
            if message.sequence != self.sequence:
                raise ValueError(f"expected tensor {self.sequence}, got {message.sequence}")
            check_tensor(message.value, wanted, size)
            self.sequence += 1
        end = time.monotonic_ns()
        del message
        self.inbox.drain()
        return {"end_ns": end}

    def close(self) -> None:
        self.fabric.close()


def _contestants(link: str, raw_only: bool) -> list[Contestant]:
    sides = ("perf.raw:TensorSender", "perf.raw:TensorReceiver")
    raw = [Contestant("raw", sides, {"link": link}), Contestant("raw safe", sides, {"link": link, "safe": True})]
    ours = ("perf.bench_tensors:FabricSender", "perf.bench_tensors:FabricReceiver")
    return raw if raw_only else [Contestant("fabric", ours, {"link": link}), *raw]


def _words(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def _budget(link: str, size: int) -> Budget | None:
    if link == "tcp":
        return Budget(0.95) if size >= MIB else None
    return Budget(4.0) if size >= 16 * MIB else None


def _link(arguments: argparse.Namespace, report: Report, link: str, sizes: list[int]) -> None:
    points: dict[str, list[tuple[float, float, float]]] = {}
    with teams(_contestants(link, arguments.raw_only)) as players:
        for size in sizes:
            n = max(3, ROUND_BYTES[size] // size // (8 if arguments.quick else 1))
            total = n * size
            seconds = measured(compete(players, {"n": n, "size": size}, rounds=arguments.rounds), span_s)
            rates = {name: [total / second / 1e9 for second in seen] for name, seen in seconds.items()}
            report.rows.append(Row("tensors", f"{_words(size)}, {link}", "GB/s", rates, _budget(link, size)))
            for name, seen in seconds.items():
                if size <= FIT_BYTES_MAX:
                    points.setdefault(name, []).append((n, total, median(seen)))
    for name, costs in points.items():
        report.fits[f"tensors {link} {name}"] = fit_two_terms(costs)


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    for link in ("ipc", "tcp"):
        _link(arguments, report, link, [64 * KIB, MIB, 16 * MIB] if arguments.quick else list(ROUND_BYTES))
    return report


if __name__ == "__main__":
    main(__doc__, run)
