"""What does one publisher reach with 1, 2 and 4 subscribers, and what does one that stalls do to the others?

Records of 1 KiB and arrays of 4 and 16 MiB; the rate of messages, each counted once, until the last subscriber has the
last. `stalled`: beside two that read, one that subscribed and never reads. Who blocks then is named as left out: that
is what it promises. `raw pub` keeps for the stalled one whatever memory holds.

Envelope: sockets copy twice for each subscriber; shared memory copies once for all.
"""

from __future__ import annotations

import argparse

from perf.harness import compete, main, measured, span_s, teams
from perf.peers import LOSES, cast
from perf.report import Budget, Report, Row

KIB, MIB = 1 << 10, 1 << 20
ARRAYS = ("fabric", "raw", "zenoh", "iceoryx2")
RECORDS = ("fabric", "raw", "raw pub", "zenoh", "nats", "redis")
STALLED = ("fabric", "raw nodrop", "raw pub", "zenoh", "nats")
ROUND = {KIB: 20_000, 4 * MIB: 32, 16 * MIB: 8}
"""Messages of a round by their size."""


def _play(
    arguments: argparse.Namespace, report: Report, size: int, readers: int, stalled: int = 0
) -> dict[str, list[float]]:
    """Messages a second, round by round, of each library."""
    what = "records" if size == KIB else "arrays"
    libraries = STALLED if stalled else RECORDS if size == KIB else ARRAYS
    kind = "Record" if size == KIB else "Array"
    sides = (f"perf.sides:{kind}Sender", *(f"perf.sides:{kind}Receiver",) * readers)
    sides += ("perf.sides:Stalled",) * stalled
    place = {"readers": readers + stalled, "size_max": max(size, 64 * KIB), "stalled": stalled}
    n = ROUND[size] // (8 if arguments.quick else 1)
    skipped: dict[str, str] = {}
    with teams(cast(arguments, report, libraries, sides, what, **place), skipped) as players:
        job = {"n": n, "size": size, "seeds": 1}
        answers = compete(players, job, rounds=arguments.rounds, skipped=skipped)
    where = f"fan-out of {size // KIB} KiB" + (", one stalled" if stalled else "")
    report.skipped |= {f"{name}, {where}": why for name, why in skipped.items()}
    return measured(answers, lambda seen: max(side.get("n", 0) for side in seen) / span_s(seen))


def run(arguments: argparse.Namespace) -> Report:
    report = Report(skipped={"iceoryx2, floods of records": LOSES})
    for size in [KIB, 4 * MIB] if arguments.quick else list(ROUND):
        words = f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB"
        by_count = {}
        for readers in (1, 4) if arguments.quick or size == 16 * MIB else (1, 2, 4):
            by_count[readers] = rates = _play(arguments, report, size, readers)
            axes = {"readers": readers, "bytes": size}
            report.rows.append(Row("fan-out", f"{words}, {readers} subscribers", "messages/s", rates, axes=axes))
        one, four = by_count[1], by_count[4]
        costs = {name: [a / b for a, b in zip(one[name], four[name], strict=True)] for name in four if name in one}
        budgets = [Budget(1.6, 1.3, peer="", at_most=True)] if size == 16 * MIB else []
        report.rows.append(Row("fan-out", f"{words}: time to four / to one", "ratio", costs, budgets))
        if size == KIB and not arguments.quick:
            rates = _play(arguments, report, size, 2, 1)
            report.rows.append(Row("fan-out", f"{words}, 2 subscribers, one more stalled", "messages/s", rates))
    return report


if __name__ == "__main__":
    main(__doc__, run)
