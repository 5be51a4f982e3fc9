"""How long does a round trip of 256 bytes take, when the responder waits in `serve()`?

Alone, and beside a thread on each side that computes in pure Python.

Envelope: two wake-ups (a thread sleeping in epoll, 5-20 us each), two sends, two receives. Raw pyzmq: about 50 us on a
quiet machine and twice that on a loaded one, nearly all of it wake-ups of its IO threads.
"""

from __future__ import annotations

import argparse
from statistics import median, quantiles

from perf.harness import compete, main, measured, teams
from perf.peers import cast
from perf.report import Budget, Report, Row

LIBRARIES = ("fabric", "raw", "zenoh", "gloo", "torch rpc", "nats")
SIDES = ("perf.sides:CallerSide", "perf.sides:AnswererSide")
SIZE = 256
BUDGETS = [Budget(2.0, 1.5, at_most=True), Budget(0.5, peer="torch rpc", at_most=True)]


def run(arguments: argparse.Namespace) -> Report:
    report, n = Report(), 300 if arguments.quick else 3000
    with teams(cast(arguments, report, LIBRARIES, SIDES, "requests"), report.skipped) as players:
        for busy in (False, True):
            # A busy thread lets the interpreter's lock go every 5 ms at most, on both sides.
            job = {"n": n // 60 if busy else n, "size": SIZE, "busy": busy}
            answers = compete(players, job, rounds=arguments.rounds, skipped=report.skipped)
            seen = measured(answers, lambda sides: median(sides[0]["round_trips_ns"]) / 1e3)
            tails = measured(answers, lambda sides: quantiles(sides[0]["round_trips_ns"], n=100)[98] / 1e3)
            case = f"{SIZE} B round trip, " + ("beside busy Python threads" if busy else "serve()")
            row = Row("request", case, "us", seen, [] if busy else BUDGETS)
            row.notes["p99_us"] = {name: median(rounds) for name, rounds in tails.items()}
            report.rows.append(row)
    return report


if __name__ == "__main__":
    main(__doc__, run)
