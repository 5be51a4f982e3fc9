"""Does a record cost more when there are 10,000 topics and 100 patterns, rather than one of each?

One pattern matches every topic, the others none: what is measured is finding that out, not delivering a hundred times.
`runs of 64`: so many records on a topic before the next topic has its turn. `runs of 1`: another topic with each
record, the worst case for whoever joins the records of a topic into bursts. The first record on a topic pays for its
publisher and the matching, once; it is told apart, as microseconds a topic, in the notes of the JSON.

Envelope: patterns are matched once a topic and the answer is cached, so the cost should be that of two dictionary
look-ups, far below a microsecond. ZeroMQ matches each frame in a trie of prefixes, at the cost of the prefix's length.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from perf.harness import Contestant, Team, compete, main, measured, span_s, teams
from perf.members import enter
from perf.peers.pyzmq_work import RECORD_BYTES
from perf.report import Budget, Report, Row

SIZES = ((1, 1), (10_000, 1), (1, 100), (10_000, 100))
"""Topics and patterns."""


def names(topics: int, patterns: int) -> tuple[list[str], list[str]]:
    """So many topics, all matched by the first of so many patterns."""
    others = [f"others.block{position}.**" for position in range(patterns - 1)]
    return [f"layers.block{position}.health" for position in range(topics)], ["layers.**", *others]


class FabricSender:
    def __init__(self, *, rank: int, meeting: Path, topics: list[str], patterns: list[str]) -> None:
        self.rank, self.meeting, self.topics, self.position = rank, meeting, topics, 0

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.publishers: list[Any] = []

    def run(self, *, n: int, run_length: int) -> dict[str, Any]:
        value, topics = b"x" * RECORD_BYTES, self.topics
        start = time.monotonic_ns()
        if not self.publishers:
            self.publishers = [self.fabric.publisher(topic, when_full="block") for topic in topics]
        publishers, count = self.publishers, len(topics)
        for _ in range(n // run_length):
            publish = publishers[self.position % count].publish
            self.position += 1
            for _ in range(run_length):
                publish(value)
        self.fabric.flush(timeout_s=60)
        return {"start_ns": start}

    def close(self) -> None:
        self.fabric.close()


class FabricReceiver:
    def __init__(self, *, rank: int, meeting: Path, topics: list[str], patterns: list[str]) -> None:
        self.rank, self.meeting, self.patterns = rank, meeting, patterns
        self.expected = dict.fromkeys(topics, 0)

    def open(self) -> None:
        self.fabric = enter(rank=self.rank, world_size=2, meeting=self.meeting)
        self.inbox, *self.others = [self.fabric.subscribe(pattern) for pattern in self.patterns]

    def run(self, *, n: int, run_length: int) -> dict[str, Any]:
        expected, left = self.expected, n
        for message in self.inbox:
            topic = message.topic
            if message.sequence != expected[topic] or len(message.value) != RECORD_BYTES:
                raise ValueError(f"{topic}: expected {expected[topic]}, got {message.sequence}")
            expected[topic] += 1
            left -= 1
            if not left:
                break
        end = time.monotonic_ns()
        self.inbox.drain()
        return {"end_ns": end}

    def close(self) -> None:
        self.fabric.close()


def _contestants(raw_only: bool) -> list[Contestant]:
    libraries = {"raw": ("perf.peers.pyzmq_work:TopicSender", "perf.peers.pyzmq_work:TopicReceiver")}
    if not raw_only:
        libraries["fabric"] = ("perf.bench_topics:FabricSender", "perf.bench_topics:FabricReceiver")
    return [
        Contestant(f"{library} {topics}x{patterns}", sides, dict(zip(("topics", "patterns"), named, strict=True)))
        for library, sides in libraries.items()
        for topics, patterns in SIZES
        for named in [names(topics, patterns)]
    ]


def _first_records(players: dict[str, Team]) -> dict[str, float]:
    """Microseconds of the first record on each of the 10,000 topics."""
    costs = {}
    for name, team in players.items():
        topics = int(name.split()[1].partition("x")[0])
        costs[name] = span_s(team.call("run", n=topics, run_length=1)) / topics * 1e6
    return {name: cost for name, cost in costs.items() if " 1x" not in name}


def _play(players: dict[str, Team], n: int, run_length: int, rounds: int) -> list[Row]:
    """A row for each size, and one for the dearest beside the cheapest: what topics and patterns cost."""
    answers = compete(players, {"n": n, "run_length": run_length}, rounds=rounds)
    seen = measured(answers, lambda sides: n / span_s(sides))
    libraries = [library for library in ("fabric", "raw") if f"{library} 1x1" in players]
    rows = []
    for topics, patterns in SIZES:
        values = {library: seen[f"{library} {topics}x{patterns}"] for library in libraries}
        case = f"{topics} topics x {patterns} patterns, runs of {run_length}"
        rows.append(Row("topics", case, "records/s", values))
    shares = {
        library: [many / one for many, one in zip(seen[f"{library} 10000x100"], seen[f"{library} 1x1"], strict=True)]
        for library in libraries
    }
    # No budget names a number; 0.8 is what "independent of both" must mean on a noisy machine.
    budgets = [Budget(0.8, 1, peer="")] if run_length > 1 else []
    rows.append(Row("topics", f"rate at 10000x100 / at 1x1, runs of {run_length}", "ratio", shares, budgets))
    return rows


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    with teams(_contestants(arguments.raw_only)) as players:
        first = _first_records(players)
        for run_length in (64, 1):
            n = 6_400 if arguments.quick else 64_000
            report.rows += _play(players, n, run_length, arguments.rounds)
    report.rows[0].notes["first_record_us"] = first
    return report


if __name__ == "__main__":
    main(__doc__, run)
