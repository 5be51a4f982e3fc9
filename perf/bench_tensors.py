"""How fast do tensors of 1 to 256 MiB travel between two processes of a host, over ipc and over tcp?

float32, received as a view, checked by samples. Two sizes below 1 MiB serve the two-term fit, cost = n * a + bytes / b,
which takes the sizes up to 16 MiB: beyond, every buffer is made of new pages, and the cost of a byte is another.

Envelope: a socket copies twice in the kernel (in and out) and the receiver's buffer is touched for the first time by
the copy out: 3-4 GB/s while it stays in the caches, about 1.3 GB/s where every page is new. The fabric's publish
takes a snapshot first, at memcpy speed (12-17 GB/s): a tenth to a quarter of the time that raw pyzmq does not spend.
`cold` is the first message of that size between two fresh processes, one sample.
`raw safe` is raw pyzmq that sends a summed snapshot and verifies the sum: what these two promises cost without us.
"""

from __future__ import annotations

import argparse
from statistics import median

from perf.harness import Contestant, compete, cpu_s, main, measured, span_s, teams
from perf.peers import cast
from perf.report import Budget, Report, Row, fit_two_terms

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


LIBRARIES = {
    "ipc": ("fabric", "raw", "raw safe", "zenoh", "iceoryx2", "gloo", "torch rpc", "torch queue", "memcpy"),
    "tcp": ("fabric", "raw", "raw safe", "zenoh", "gloo", "torch rpc"),
}
SIDES = ("perf.sides:ArraySender", "perf.sides:ArrayReceiver")


def contestants(arguments: argparse.Namespace, report: Report, link: str, size_max: int) -> list[Contestant]:
    """All libraries that have this link, and the line of memcpy."""
    names = [name for name in LIBRARIES[link] if name != "memcpy"]
    found = cast(arguments, report, names, SIDES, "arrays", link=link, size_max=size_max)
    if "memcpy" in LIBRARIES[link]:
        found += cast(arguments, report, ["memcpy"], ("perf.peers.memcpy:Copier",), "arrays")
    return found


def _words(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"


def _budgets(link: str, size: int) -> list[Budget]:
    """Section 7 of the design, as `perf/README.md` has it."""
    if link == "tcp":
        return [Budget(0.95), Budget(1.0, 1.2, peer="gloo")] if size >= MIB else []
    if size == MIB:
        return [Budget(1.0, 1.5, peer="zenoh")]
    return [Budget(4.0), Budget(0.85, 0.95, peer="memcpy")] if size >= 16 * MIB else []


def _link(arguments: argparse.Namespace, report: Report, link: str, sizes: list[int]) -> None:
    points: dict[str, list[tuple[float, float, float]]] = {}
    with teams(contestants(arguments, report, link, max(sizes)), report.skipped) as players:
        for size in sizes:
            n = max(3, ROUND_BYTES[size] // size // (8 if arguments.quick else 1))
            total = n * size
            cold = {name: size / span_s(team.call("run", n=1, size=size)) / 1e9 for name, team in players.items()}
            job = {"n": n, "size": size}
            answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
            seconds = measured(answers, span_s)
            rates = {name: [total / second / 1e9 for second in seen] for name, seen in seconds.items()}
            axes = {"link": link, "bytes": size}
            row = Row("tensors", f"{_words(size)}, {link}", "GB/s", rates, _budgets(link, size), axes=axes)
            cost = measured(answers, lambda sides, total=total: cpu_s(sides) / total * 1e9)  # type: ignore[misc]
            row.notes = {"cold": cold, "cpu_s_per_gb": {name: median(each) for name, each in cost.items()}}
            report.rows.append(row)
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
