"""How fast do the rollouts of eight producers arrive at one consumer, the order of each seed kept?

Eight processes send arrays of 64 KiB and of 1 MiB, each over 8 seeds of its own; the consumer checks the order of every
seed.

Envelope: nine processes share two cores, so that this is the cost of a message on both sides and nothing else.
"""

from __future__ import annotations

import argparse

from perf.harness import compete, main, measured, span_s, teams
from perf.peers import cast
from perf.report import Report, Row

PRODUCERS, SEEDS = 8, 8
KIB = 1 << 10
LIBRARIES = ("fabric", "raw", "zenoh", "iceoryx2", "torch queue", "redis stream")
SIDES = (*("perf.sides:ArraySender",) * PRODUCERS, "perf.sides:ArrayReceiver")
ROUND = {64 * KIB: 256, 1024 * KIB: 32}
"""Arrays of each producer by their size."""


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    contestants = cast(arguments, report, LIBRARIES, SIDES, "arrays", writers=PRODUCERS, size_max=max(ROUND))
    with teams(contestants, report.skipped) as players:
        for size, each in ROUND.items():
            n = each // 16 if arguments.quick else each
            job = {"n": n, "size": size, "seeds": SEEDS}
            answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
            rates = measured(answers, lambda seen, n=n: n * PRODUCERS / span_s(seen))  # type: ignore[misc]
            case = f"{size // KIB} KiB, {PRODUCERS} producers, {PRODUCERS * SEEDS} seeds"
            report.rows.append(Row("fan-in", case, "arrays/s", rates))
    return report


if __name__ == "__main__":
    main(__doc__, run)
