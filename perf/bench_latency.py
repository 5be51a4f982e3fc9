"""How old is a record when it arrives, at 1,000 and 10,000 a second?

64 bytes, 4 KiB and, at 1,000 a second, 64 KiB, one by one. A record is stamped when its call begins, or when it was due
if the call before it took too long. Rows are p50, p99 and p99.9 of each round.

Envelope: two wake-ups (5 to 20 us each on a quiet machine, three times that on a loaded one), and what a library waits
for more to come: the fabric up to a millisecond, which is what makes its bursts.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import quantiles

from perf.harness import Answers, compete, main, measured, teams
from perf.peers import cast
from perf.report import Report, Row

LIBRARIES = ("fabric", "raw", "zenoh", "iceoryx2", "torch queue", "nats", "redis")
SIDES = ("perf.sides:PacedSender", "perf.sides:PacedReceiver")
CASES = ((64, 1000), (64, 10_000), (4096, 1000), (4096, 10_000), (65_536, 1000))
PERCENTILES = {"p50": 499, "p99": 989, "p99.9": 998}
"""Which of the 999 cuts."""


def age_us(answers: Answers, cut: int) -> float:
    """The percentile of one round."""
    return float(quantiles(answers[1]["ages_ns"], n=1000)[cut]) / 1e3


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    # All send at the same pace, so that none is given less to do.
    contestants = [replace(each, share=1.0) for each in cast(arguments, report, LIBRARIES, SIDES, "records")]
    with teams(contestants, report.skipped) as players:
        for size, rate in CASES[:2] if arguments.quick else CASES:
            n = rate // 4 if arguments.quick else rate + 1000
            job = {"n": n, "size": size, "rate": rate}
            answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
            for name, cut in PERCENTILES.items():
                ages = measured(answers, lambda seen, cut=cut: age_us(seen, cut))  # type: ignore[misc]
                axes = {"bytes": size, "rate": rate, "percentile": name}
                report.rows.append(Row("latency", f"{size} B at {rate:,}/s, {name}", "us", ages, axes=axes))
    return report


if __name__ == "__main__":
    main(__doc__, run)
