"""What does it cost to be there: set-up, footprint, and a mesh that idles?

So many members, a process each, all connected to all: milliseconds from the call to the last that is ready, and for
each member the resident memory over its imports, file descriptors and threads; then the processor time that one takes
while nothing happens, in per cent of a core. The raw mesh is a PUB and a SUB for each member, as one would write by
hand.

Envelope: on two cores 32 processes that meet take turns; what a member does for each other one counts 32 x 31 times.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean
from typing import Any

from perf.harness import Answers, Contestant, compete, main, measured, teams
from perf.peers import missing
from perf.report import Budget, Report, Row

BUDGETS = {
    "idle": [Budget(0.5, 0.1, peer="", at_most=True)],
    "memory": [Budget(40, peer="", at_most=True)],
}
UNITS = {"ready": "ms", "idle": "%", "memory": "MiB", "files": "files", "threads": "threads"}


def resident_mib() -> float:
    """Of this process, from proc(5)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def join_fabric(rank: int, meeting: Path, count: int) -> list[Any]:
    """Each publishes, and each hears all."""
    from perf.members import enter

    fabric = enter(rank=rank, world_size=count, meeting=meeting)
    publisher, inbox = fabric.publisher(f"mesh.{rank}"), fabric.subscribe("mesh.*")
    publisher.wait_for_subscribers(count - 1, timeout_s=60)
    return [fabric, inbox]


def join_raw(rank: int, meeting: Path, count: int) -> list[Any]:
    """The same by hand."""
    from perf.peers.pyzmq_work import RawMesh

    mesh = RawMesh(rank=rank, meeting=meeting, ranks=count, topics=1)
    mesh.open(True)
    mesh.await_listeners(count)
    return [mesh]


def join_zenoh(rank: int, meeting: Path, count: int) -> list[Any]:
    """Peers; each connects to those before it."""
    import zenoh

    config = zenoh.Config()
    settings = {
        "mode": "peer",
        "scouting/multicast/enabled": False,
        "listen/endpoints": [f"unixsock-stream/{meeting}/{rank}.sock"],
        "connect/endpoints": [f"unixsock-stream/{meeting}/{other}.sock" for other in range(rank)],
    }
    for key, value in settings.items():
        config.insert_json5(key, json.dumps(value))
    session = zenoh.open(config)
    while len(session.info.peers_zid()) < count - 1:
        time.sleep(0.005)
    return [session]


def join_gloo(rank: int, meeting: Path, count: int) -> list[Any]:
    """A process group."""
    from torch import distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{meeting}/gloo", rank=rank, world_size=count)
    distributed.barrier()
    return []


JOINS = {"fabric": join_fabric, "raw": join_raw, "zenoh": join_zenoh, "gloo": join_gloo}
IMPORTS = {"fabric": "fabric", "raw": "perf.peers.pyzmq_work", "zenoh": "zenoh", "gloo": "torch.distributed"}


class Member:
    """One endpoint; it joins in its first round and stays."""

    def __init__(self, *, rank: int, meeting: Path, library: str, count: int) -> None:
        self.place, self.library = (rank, meeting, count), library
        self.held: list[Any] | None = None

    def open(self) -> None:
        __import__(IMPORTS[self.library])
        self.base = resident_mib()

    def run(self, *, idle_s: float) -> dict[str, Any]:
        if self.held is None:
            start = time.monotonic_ns()
            self.held = JOINS[self.library](*self.place)
            return {"start_ns": start, "end_ns": time.monotonic_ns()}
        before = time.process_time_ns()
        time.sleep(idle_s)
        idle = (time.process_time_ns() - before) / idle_s / 1e7
        files, threads = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        return {"idle": idle, "memory": resident_mib() - self.base, "files": files, "threads": threads}

    def close(self) -> None:
        for held in (self.held or [])[:1]:
            held.close()


def _ready_ms(answers: Answers) -> float:
    return float(max(each["end_ns"] for each in answers) - min(each["start_ns"] for each in answers)) / 1e6


def _mesh(arguments: argparse.Namespace, report: Report, count: int, libraries: tuple[str, ...]) -> None:
    """One team at a time: all at once would only measure their crowd."""
    rows: dict[str, dict[str, list[float]]] = {key: {} for key in UNITS}
    for library in libraries:
        why = missing(library)
        if why:
            report.skipped[library] = why
            continue
        options = {"library": library, "count": count}
        contestant = Contestant(library, ("perf.bench_mesh:Member",) * count, options, optional=library != "fabric")
        first: dict[str, Answers] = {}
        with teams([contestant], report.skipped) as players:
            job = {"idle_s": 0.5 if arguments.quick else 2.0}
            rounds = min(3, arguments.rounds)
            seen = compete(players, job, rounds=rounds, skipped=report.skipped, first=first)
        if library not in seen:
            continue
        rows["ready"][library] = [_ready_ms(first[library])]
        for key in list(UNITS)[1:]:
            each = measured(seen, lambda answers, key=key: mean(a[key] for a in answers))  # type: ignore[misc]
            rows[key][library] = each[library]
    for key, values in rows.items():
        budgets = BUDGETS.get(key, []) if count == 8 else []
        report.rows.append(Row("mesh", f"{count} members, {key}", UNITS[key], values, budgets))


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    asked = arguments.only.split(",") if arguments.only else list(JOINS)
    names = tuple(name for name in JOINS if name in asked and not (arguments.raw_only and name == "fabric"))
    # gloo's members import torch, which 32 processes on two cores do for a minute.
    without = tuple(name for name in names if name != "gloo")
    if arguments.quick:
        _mesh(arguments, report, 4, without)
        return report
    _mesh(arguments, report, 8, names)
    _mesh(arguments, report, 32, without)
    return report


if __name__ == "__main__":
    main(__doc__, run)
