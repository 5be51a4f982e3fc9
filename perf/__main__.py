"""Run all benchmarks and print one table: `python -m perf [--quick] [--json] [--out FILE] [--raw-only]`.

A benchmark that breaks leaves its rows out and is named at the end; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import sys

from perf import (
    bench_demo,
    bench_durable,
    bench_fanin,
    bench_fanout,
    bench_latency,
    bench_loans,
    bench_mesh,
    bench_outage,
    bench_publish,
    bench_records,
    bench_request,
    bench_spill,
    bench_tensors,
    bench_topics,
    bench_train_step,
    bench_weights,
)
from perf.harness import main
from perf.report import Report


def run(arguments: argparse.Namespace) -> Report:
    """All benchmarks, one after the other."""
    whole = Report()
    for bench in (
        bench_records,
        bench_tensors,
        bench_loans,
        bench_request,
        bench_publish,
        bench_weights,
        bench_latency,
        bench_fanin,
        bench_fanout,
        bench_mesh,
        bench_train_step,
        bench_demo,
        bench_topics,
        bench_spill,
        bench_durable,
        bench_outage,
    ):
        print(f"{bench.__name__} ...", file=sys.stderr, flush=True)
        try:
            report = bench.run(arguments)
        except RuntimeError as error:
            whole.broken.append(f"{bench.__name__}: {error}")
            continue
        whole.add(report)
    return whole


if __name__ == "__main__":
    main(__doc__, run)
