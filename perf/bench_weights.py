"""How long until every reader on this host has a new state dict?

Weights pushed by a trainer: 300 tensors, 250 MiB, to 1, 2 and 4 readers; and a state dict of 1,000 tensors, log-uniform
from 1 KiB to 4 MiB, about 500 MiB, to one. The fabric publishes the dictionary as one value; the others send one tensor
after the other, `torch queue` each as a file descriptor. Rates count the bytes once, whatever the number of readers.

Envelope: sockets copy a tensor twice for each reader, shared memory once for all: `memcpy` is that copy alone.
"""

from __future__ import annotations

import argparse

from perf.harness import compete, main, measured, span_s, teams
from perf.peers import cast
from perf.report import Report, Row
from perf.sides import state_sizes

LIBRARIES = ("fabric", "raw", "raw tcp", "zenoh", "iceoryx2", "gloo", "torch rpc", "torch queue")
SENDER, RECEIVER = "perf.sides:StateSender", "perf.sides:StateReceiver"
CASES = (("300 tensors", 1), ("300 tensors", 2), ("300 tensors", 4), ("1,000 tensors", 1))


def _case(arguments: argparse.Namespace, report: Report, shape: str, readers: int) -> Row:
    sizes = state_sizes(shape)
    sides, total = (SENDER, *(RECEIVER,) * readers), sum(sizes)
    contestants = cast(arguments, report, LIBRARIES, sides, "arrays", readers=readers, size_max=max(sizes))
    contestants += cast(arguments, report, ["memcpy"], ("perf.peers.memcpy:StateCopier",), "arrays")
    with teams(contestants, report.skipped) as players:
        answers = compete(players, {"shape": shape, "n": 1}, rounds=arguments.rounds, skipped=report.skipped)
    rates = measured(answers, lambda seen: total / span_s(seen) / 1e9)
    return Row("weights", f"{shape}, {total >> 20} MiB, to {readers}", "GB/s", rates, axes={"readers": readers})


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    for shape, readers in CASES[:1] if arguments.quick else CASES:
        report.rows.append(_case(arguments, report, shape, readers))
    return report


if __name__ == "__main__":
    main(__doc__, run)
