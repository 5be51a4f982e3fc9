"""What every benchmark shares: teams of processes, interleaved rounds, and the command line.

A *contestant* does a piece of work with a team of processes, one *side* each (a sender and a receiver, or four ranks).
All teams of a benchmark live at once and take turns (A B A B ...), so that a slow minute of the machine hits all alike;
those that do not play only sleep. A ratio is taken inside each round, then summarised.

Times are taken from CLOCK_MONOTONIC, which all processes of one host share: from the sender's first call to the moment
at which the receiver holds the last payload, checked. A sender's own rate says little: it may only have filled a queue.

A peer that breaks, or does not answer in time, is left out by name; the fabric and raw pyzmq break the benchmark.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from perf.report import Report, markdown, render

__all__ = [
    "Answers",
    "Contestant",
    "Side",
    "Team",
    "compete",
    "cpu_s",
    "fabric_is_here",
    "main",
    "measured",
    "span_s",
    "teams",
]

CALL_TIMEOUT_S = 180.0
"""No turn takes longer; a team that does not answer is ended and named."""
PEER_TIMEOUT_S = 60.0
"""The same for a peer, which is then left out."""


class Side(Protocol):
    """One process of a team. It is made in its process; `open` meets the other sides, `run` plays one round."""

    def open(self) -> None: ...

    def run(self, **job: Any) -> dict[str, Any]: ...  # noqa: ANN401 - each benchmark has its own job

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Contestant:
    """How one library does the work: `sides` are `module:class`, one process each, given `options` as keywords.

    `optional`: it is left out, by name, if it breaks. `share`: of the `n` of a job it does so much, for libraries that
    would take minutes. `shared`: `module:function` that makes, of multiprocessing's context and the number of sides,
    what its processes must inherit.
    """

    name: str
    sides: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    share: float = 1.0
    shared: str = ""


def named(factory: str) -> Any:  # noqa: ANN401 - a class or function
    """What `module:name` means."""
    module, _, name = factory.partition(":")
    return getattr(importlib.import_module(module), name)


def _cpu_ns(side: Side) -> int:
    """Of this process with all its threads, and of the server that it keeps."""
    helper: Callable[[], int] = getattr(side, "server_cpu_ns", int)
    return time.process_time_ns() + helper()


def _work(connection: Connection, factory: str, rank: int, meeting: str, options: dict[str, Any]) -> None:
    """The life of one side: do what the pipe says until it says close. A failure ends it with its traceback."""
    side: Side = named(factory)(rank=rank, meeting=Path(meeting), **options)
    while True:
        verb, job = connection.recv()
        if verb == "close":
            side.close()
            connection.send({})
            return
        if verb == "run":
            before = _cpu_ns(side)
            answer = side.run(**job)
            connection.send({"cpu_ns": _cpu_ns(side) - before, **answer})
        else:
            side.open()
            connection.send({})


class Team:
    """The processes of one contestant."""

    def __init__(self, contestant: Contestant) -> None:
        self.name, self.optional, self.share = contestant.name, contestant.optional, contestant.share
        # A short path: a unix socket's name holds 107 bytes.
        self._meeting = tempfile.mkdtemp(prefix="perf-")
        self._ends: list[Connection] = []
        self._processes: list[Any] = []
        context = multiprocessing.get_context("spawn")
        options = dict(contestant.options)
        if contestant.shared:
            options["shared"] = named(contestant.shared)(context, len(contestant.sides))
        # What is shared ends with its last owner, and a side may take long to start.
        self._options = options
        for rank, factory in enumerate(contestant.sides):
            ours, theirs = context.Pipe()
            arguments = (theirs, factory, rank, self._meeting, options)
            process = context.Process(target=_work, args=arguments, daemon=True, name=f"{self.name}-{rank}")
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def call(self, verb: str, **job: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """Let all sides do `verb` at once; their answers, by rank.

        Raises:
            RuntimeError: a side ended, or did not answer within `CALL_TIMEOUT_S` (a peer's: `PEER_TIMEOUT_S`).
        """
        if "n" in job and self.share < 1:
            job["n"] = max(1, int(job["n"] * self.share))
        for end in self._ends:
            end.send((verb, job))
        timeout_s = PEER_TIMEOUT_S if self.optional else CALL_TIMEOUT_S
        deadline = time.monotonic() + timeout_s
        answers: dict[int, dict[str, Any]] = {}
        while len(answers) < len(self._ends):
            missing = [end for rank, end in enumerate(self._ends) if rank not in answers]
            ready = wait(missing, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise RuntimeError(f"{self.name}: not all sides did {verb} within {timeout_s:g} s")
            for end in ready:
                assert isinstance(end, Connection)
                rank = self._ends.index(end)
                answers[rank] = self._take(end, rank, verb)
        return [answers[rank] for rank in range(len(self._ends))]

    def _take(self, end: Connection, rank: int, verb: str) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = end.recv()
        except (EOFError, ConnectionError):
            raise RuntimeError(f"{self.name}: side {rank} ended while it should {verb}; see its traceback") from None
        return answer

    def end(self) -> None:
        """Make sure that no process and no file is left."""
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._meeting, ignore_errors=True)
        for left in Path("/dev/shm").glob(f"{Path(self._meeting).name}*"):  # of a killed side
            left.unlink(missing_ok=True)

    def close(self) -> None:
        """Close all sides, then make sure that none is left."""
        try:
            if all(process.is_alive() for process in self._processes):
                self.call("close")
                for process in self._processes:
                    process.join(2)
        except RuntimeError:
            # How a peer leaves is not measured.
            if not self.optional:
                raise
        finally:
            self.end()


@contextmanager
def teams(contestants: Sequence[Contestant], skipped: dict[str, str] | None = None) -> Iterator[dict[str, Team]]:
    """Start and open all teams; close them whatever happens. A peer that cannot open is named in `skipped`."""
    with ExitStack() as stack:
        started = {}
        for contestant in contestants:
            team = Team(contestant)
            stack.callback(team.close)
            try:
                team.call("open")
            except RuntimeError as error:
                _leave_out(team, error, skipped)
                continue
            started[contestant.name] = team
        yield started


def _leave_out(team: Team, error: RuntimeError, skipped: dict[str, str] | None) -> None:
    """Go on without a peer; raises the error again if it is none."""
    if not team.optional or skipped is None:
        raise error
    skipped[team.name] = str(error)
    print(f"left out: {error}", file=sys.stderr, flush=True)
    team.end()


Answers = list[dict[str, Any]]
"""What the sides of a team said of one round, by rank."""


def compete(
    players: dict[str, Team],
    job: Mapping[str, Any],
    *,
    rounds: int,
    skipped: dict[str, str] | None = None,
    first: dict[str, Answers] | None = None,
) -> dict[str, list[Answers]]:
    """One warm-up round, then `rounds` interleaved ones; what each player's sides said, round by round.

    A peer that breaks leaves `players` and is named in `skipped`. `first` takes what the warm-up rounds said.
    """
    seen: dict[str, list[Answers]] = {name: [] for name in players}
    for turn in range(-1, rounds):
        # The order turns, so that nobody always plays after the same neighbour.
        at = turn % max(1, len(players))
        for name in list(players)[at:] + list(players)[:at]:
            try:
                answers = players[name].call("run", **job)
            except RuntimeError as error:
                _leave_out(players[name], error, skipped)
                del players[name], seen[name]
                continue
            if turn >= 0:
                seen[name].append(answers)
            elif first is not None:
                first[name] = answers
    return seen


def measured(seen: Mapping[str, list[Answers]], measure: Callable[[Answers], float]) -> dict[str, list[float]]:
    """One number a round."""
    return {name: [measure(answers) for answers in rounds] for name, rounds in seen.items()}


def span_s(answers: Answers) -> float:
    """Seconds from the first sender's first call to the last receiver's last checked payload."""
    start = min(answer["start_ns"] for answer in answers if "start_ns" in answer)
    end = max(answer["end_ns"] for answer in answers if "end_ns" in answer)
    return float(end - start) / 1e9


def cpu_s(answers: Answers) -> float:
    """Seconds of processor time of all sides in a round, a broker's included."""
    return float(sum(answer["cpu_ns"] for answer in answers)) / 1e9


def fabric_is_here() -> bool:
    """Whether `from fabric import join` works in this tree; without it the peers run alone."""
    try:
        return hasattr(importlib.import_module("fabric"), "join")
    except ImportError:
        return False


def main(question: str | None, run: Callable[[argparse.Namespace], Report]) -> None:
    """The command line that all benchmarks share; prints the table, or JSON with `--json`."""
    parser = argparse.ArgumentParser(description=question, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the JSON to this file, and a page and plots beside it")
    parser.add_argument("--quick", action="store_true", help="small rounds: does it run, not how fast")
    parser.add_argument("--rounds", type=int, help="rounds of each contestant (default 5, with --quick 2)")
    parser.add_argument("--only", help="libraries to run, such as fabric,raw,zenoh; default all that are installed")
    parser.add_argument("--raw-only", action="store_true", help="leave the fabric out")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.quick else 5)
    arguments.raw_only = arguments.raw_only or not fabric_is_here()
    report = run(arguments)
    data = json.dumps(report.to_json(), indent=2)
    if arguments.out:
        _write(arguments.out, data, report)
    print(data if arguments.json else render(report))
    if report.broken:
        sys.exit("\n".join(f"broken: {line}" for line in report.broken))


def _write(out: Path, data: str, report: Report) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(data + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    importlib.import_module("perf.plots").draw(json.loads(data), out)
