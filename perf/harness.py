"""What every benchmark shares: teams of processes, interleaved rounds, medians and spreads, ratios, the fit, JSON.

A *contestant* does a piece of work with a team of processes, one *side* each (a sender and a receiver, or four ranks).
All teams of a benchmark live at once and take turns (A B A B ...), so that a slow minute of the machine hits all alike;
those that do not play only sleep. A ratio is taken inside each round, then summarised.

Times are taken from CLOCK_MONOTONIC, which all processes of one host share: from the sender's first call to the moment
at which the receiver holds the last payload, checked. A sender's own rate says little: it may only have filled a queue.

No number here is ever asserted: a table says what was seen, and a row whose spread crosses its budget is undecided.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, Protocol

__all__ = [
    "Answers",
    "Budget",
    "Contestant",
    "Fit",
    "Report",
    "Row",
    "Side",
    "Team",
    "compete",
    "fabric_is_here",
    "fit_two_terms",
    "main",
    "measured",
    "render",
    "span_s",
    "spread",
    "teams",
]

CALL_TIMEOUT_S = 180.0
"""No turn takes longer; a team that does not answer is ended and named."""


class Side(Protocol):
    """One process of a team. It is made in its process; `open` meets the other sides, `run` plays one round."""

    def open(self) -> None: ...

    def run(self, **job: Any) -> dict[str, Any]: ...  # noqa: ANN401 - each benchmark has its own job

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Contestant:
    """How one library does the work: `sides` are `module:class`, one process each, given `options` as keywords."""

    name: str
    sides: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


def _work(connection: Connection, factory: str, rank: int, meeting: str, options: dict[str, Any]) -> None:
    """The life of one side: do what the pipe says until it says close. A failure ends it with its traceback."""
    module, _, name = factory.partition(":")
    side: Side = getattr(importlib.import_module(module), name)(rank=rank, meeting=Path(meeting), **options)
    while True:
        verb, job = connection.recv()
        if verb == "close":
            side.close()
            connection.send({})
            return
        if verb == "run":
            connection.send(side.run(**job))
        else:
            side.open()
            connection.send({})


class Team:
    """The processes of one contestant."""

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        # A short path: a unix socket's name holds 107 bytes.
        self._meeting = tempfile.mkdtemp(prefix="perf-")
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        for rank, factory in enumerate(contestant.sides):
            ours, theirs = context.Pipe()
            arguments = (theirs, factory, rank, self._meeting, dict(contestant.options))
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"{self.name}-{rank}")
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def call(self, verb: str, **job: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Let all sides do `verb` at once; their answers, by rank.

        Raises:
            RuntimeError: a side ended or did not answer within `CALL_TIMEOUT_S`.
        """
        for end in self._ends:
            end.send((verb, job))
        return [self._answer(rank, verb) for rank in range(len(self._ends))]

    def _answer(self, rank: int, verb: str) -> dict[str, Any]:
        try:
            if self._ends[rank].poll(CALL_TIMEOUT_S):
                answer: dict[str, Any] = self._ends[rank].recv()
                return answer
        except (EOFError, ConnectionError):
            raise RuntimeError(f"{self.name}: side {rank} ended while it should {verb}; see its traceback") from None
        raise RuntimeError(f"{self.name}: side {rank} did not {verb} within {CALL_TIMEOUT_S:g} s")

    def close(self) -> None:
        """Close all sides, then make sure that none is left."""
        try:
            if all(process.is_alive() for process in self._processes):
                self.call("close")
        finally:
            for process in self._processes:
                process.join(2)
                if process.is_alive():
                    process.kill()
                    process.join()
            shutil.rmtree(self._meeting, ignore_errors=True)


@contextmanager
def teams(contestants: Sequence[Contestant]) -> Iterator[dict[str, Team]]:
    """Start and open all teams; close them whatever happens."""
    with ExitStack() as stack:
        started = {}
        for contestant in contestants:
            started[contestant.name] = team = Team(contestant)
            stack.callback(team.close)
            team.call("open")
        yield started


Answers = list[dict[str, Any]]
"""What the sides of a team said of one round, by rank."""


def compete(players: Mapping[str, Team], job: Mapping[str, Any], *, rounds: int) -> dict[str, list[Answers]]:
    """One warm-up round, then `rounds` interleaved ones; what each player's sides said, round by round."""
    for team in players.values():
        team.call("run", **job)
    seen: dict[str, list[Answers]] = {name: [] for name in players}
    for turn in range(rounds):
        # The order turns, so that nobody always plays after the same neighbour.
        order = list(players)[turn % len(players) :] + list(players)[: turn % len(players)]
        for name in order:
            seen[name].append(players[name].call("run", **job))
    return seen


def measured(seen: Mapping[str, list[Answers]], measure: Callable[[Answers], float]) -> dict[str, list[float]]:
    """One number a round."""
    return {name: [measure(answers) for answers in rounds] for name, rounds in seen.items()}


def span_s(answers: Answers) -> float:
    """Seconds from the sender's first call (side 0) to the receiver's last checked payload (side 1)."""
    return float(answers[1]["end_ns"] - answers[0]["start_ns"]) / 1e9


def spread(values: Sequence[float]) -> float:
    """(max - min) / median."""
    middle = median(values)
    return (max(values) - min(values)) / middle if middle else 0.0


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds of the ratio ours / peer: at least `must` and `aim`, or at most if `at_most`.

    With `peer` "" they bound our own number. The source of all of them is the table of budgets in `perf/README.md`.
    """

    must: float
    aim: float | None = None
    peer: str = "raw"
    at_most: bool = False

    def verdict(self, ratios: Sequence[float]) -> str:
        """`held`, `missed`, or `undecided` where the spread crosses the bound."""
        kept = [ratio <= self.must if self.at_most else ratio >= self.must for ratio in ratios]
        return "held" if all(kept) else "undecided" if any(kept) else "missed"


@dataclass(slots=True)
class Row:
    """One line of the table: the numbers of all contestants for one case, in `unit`."""

    bench: str
    case: str
    unit: str
    values: dict[str, list[float]]
    budget: Budget | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def ratios(self, peer: str) -> list[float] | None:
        """Ours / peer of each round, or None where one of the two did not play."""
        ours, theirs = self.values.get("fabric"), self.values.get(peer)
        if not ours or not theirs:
            return None
        return [mine / other for mine, other in zip(ours, theirs, strict=True)]

    def judged(self) -> list[float] | None:
        """What the budget bounds, round by round: a ratio, or our own number."""
        peer = self.budget.peer if self.budget else "raw"
        return self.ratios(peer) if peer else self.values.get("fabric")

    def to_json(self) -> dict[str, Any]:
        """Plain data: all rounds, medians, spreads and ratios."""
        summary = {
            name: {"median": median(seen), "spread": spread(seen), "rounds": seen} for name, seen in self.values.items()
        }
        ratios = {peer: self.ratios(peer) for peer in self.values if peer != "fabric"}
        row: dict[str, Any] = {"bench": self.bench, "case": self.case, "unit": self.unit, "values": summary}
        row["ratios"] = {peer: median(seen) for peer, seen in ratios.items() if seen}
        if self.budget is not None:
            row["must"], row["aim"], row["at_most"] = self.budget.must, self.budget.aim, self.budget.at_most
            seen = self.judged()
            row["verdict"] = self.budget.verdict(seen) if seen else None
        row["notes"] = self.notes
        return row


@dataclass(frozen=True, slots=True)
class Fit:
    """cost in seconds = n * `per_item_s` + bytes / `bytes_per_s`; `worst` is the largest relative error of the fit."""

    per_item_s: float
    bytes_per_s: float
    worst: float


def fit_two_terms(points: Sequence[tuple[float, float, float]]) -> Fit:
    """Least squares of the relative error over (n, bytes, seconds); neither term may be negative.

    Relative, because the seconds reach over three decades and the small sizes say most about the first term.
    """
    sums = [0.0] * 5
    for n, size, cost in points:
        u, v = n / cost, size / cost
        sums = [old + new for old, new in zip(sums, (u * u, u * v, v * v, u, v), strict=True)]
    uu, uv, vv, u1, v1 = sums
    det = uu * vv - uv * uv
    a, c = ((u1 * vv - v1 * uv) / det, (v1 * uu - u1 * uv) / det) if det else (u1 / uu, 0.0)
    if a < 0:
        a, c = 0.0, v1 / vv
    elif c < 0:
        a, c = u1 / uu, 0.0
    worst = max(abs(n * a + size * c - cost) / cost for n, size, cost in points)
    return Fit(a, 1 / c if c else float("inf"), worst)


def fabric_is_here() -> bool:
    """Whether `from fabric import join` works in this tree; without it the raw peers run alone."""
    try:
        return hasattr(importlib.import_module("fabric"), "join")
    except ImportError:
        return False


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint() -> dict[str, Any]:
    """Where and with what the numbers were seen."""
    import zmq

    names = ("tensor-fabric", "pyzmq", "numpy", "torch", "msgpack", "xxhash")
    return {
        "versions": {name: _version(name) for name in names} | {"libzmq": zmq.zmq_version()},
        "python": sys.version.split()[0],
        "kernel": platform.release(),
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg(),
        "commit": _commit(),
    }


@dataclass(slots=True)
class Report:
    """What a benchmark found: its rows and fits, and which benchmarks broke."""

    rows: list[Row] = field(default_factory=list)
    fits: dict[str, Fit] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data with the fingerprint."""
        fits = {
            name: {"per_item_s": fit.per_item_s, "bytes_per_s": fit.bytes_per_s, "worst": fit.worst}
            for name, fit in self.fits.items()
        }
        rows = [row.to_json() for row in self.rows]
        return {"fingerprint": fingerprint(), "rows": rows, "fits": fits, "broken": self.broken}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _cells(row: Row) -> list[str]:
    """One row as text: case, unit, fabric, peers, ratio, budget, verdict."""

    def shown(name: str) -> str:
        seen = row.values.get(name)
        return f"{_number(median(seen))} ±{spread(seen) * 50:.0f} %" if seen else "-"

    peer = row.budget.peer if row.budget and row.budget.peer else "raw"
    others = [f"{name} {shown(name)}" for name in row.values if name not in ("fabric", peer)]
    ratios = row.ratios(peer)
    ratio = f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-"
    budget, bound = row.budget, "-"
    if budget:
        bound = f"{'<=' if budget.at_most else '>='} {budget.must:g}{'' if budget.peer else ' ' + row.unit}"
    judged = row.judged()
    verdict = budget.verdict(judged) if budget and judged else "-"
    return [row.bench, row.case, row.unit, shown("fabric"), shown(peer), ratio, bound, verdict, ", ".join(others)]


def render(report: Report) -> str:
    """The table and the fits as text. `±` is half the spread (max - min) in per cent of the median."""
    head = ["bench", "case", "unit", "fabric", "raw pyzmq", "ratio (range)", "must", "verdict", "also"]
    lines = [head, *(_cells(row) for row in report.rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    for name, fit in report.fits.items():
        rate = f"bytes / {fit.bytes_per_s / 1e9:.2f} GB/s" if fit.bytes_per_s != float("inf") else "0"
        text.append(f"fit {name}: cost = n * {fit.per_item_s * 1e6:.2f} us + {rate} (worst error {fit.worst:.0%})")
    return "\n".join(text)


def main(question: str | None, run: Callable[[argparse.Namespace], Report]) -> None:
    """The command line that all benchmarks share; prints the table, or JSON with `--json`."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    parser.add_argument("--quick", action="store_true", help="small rounds: does it run, not how fast")
    parser.add_argument("--rounds", type=int, help="rounds of each contestant (default 5, with --quick 2)")
    parser.add_argument("--raw-only", action="store_true", help="leave the fabric out")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.raw_only = arguments.raw_only or not fabric_is_here()
    report = run(arguments)
    data = json.dumps(report.to_json(), indent=2)
    if arguments.out:
        arguments.out.write_text(data + "\n", encoding="utf-8")
    print(data if arguments.json else render(report))
    if report.broken:
        sys.exit("\n".join(f"broken: {line}" for line in report.broken))
