"""What does the spill log add to writing the same bytes?

`plain` is one `os.write` for each entry's bytes into a file of its own, `fabric` is `SpillLog.append` with groups as
the storage thread hands them over: header, two checksums, index and rotation included. Neither syncs. Both write beside
each other on the file system of the temporary directory, interleaved; what is written is released after each round, and
no round begins with dirty pages of the one before.

Envelope: XXH3 runs at 10 to 40 GB/s and costs a 1 MiB entry 3 to 10 % of its write; a 4 KiB entry costs about 1.3 us of
Python (header, sums, index) beside 1.5 to 3 us for its share of the write.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import Any

from fabric.config import GIB, KIB, MIB, Spill
from perf.harness import Budget, Contestant, Report, Row, compete, main, measured, teams

CASES = ((MIB, 1), (4 * KIB, 256), (4 * KIB, 16))
"""Bytes of an entry, and entries in a group."""
FEED = 7


class PlainWriter:
    """One write call an entry."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.path = meeting / "plain"

    def open(self) -> None:
        pass

    def run(self, *, size: int, group: int, n: int) -> dict[str, Any]:
        data = os.urandom(size)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        start = time.perf_counter()
        for _ in range(n):
            if os.write(fd, data) != size:
                raise OSError("a short write: is the disk full?")
        took = time.perf_counter() - start
        os.close(fd)
        self.path.unlink()
        return {"took_s": took}

    def close(self) -> None:
        pass


class FabricWriter:
    """Groups of entries appended to a spill log."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.directory, self.first = meeting / "spill", 0

    def open(self) -> None:
        from fabric.storage.spill import Entry, Kind, SpillLog

        self.entry, self.burst = Entry, Kind.BURST
        self.log = SpillLog.open(self.directory, Spill(bytes_max=8 * GIB, free_bytes_min=1))
        self.log.append([Entry(Kind.FEED, FEED, 1, 0, 0, b"layers.0.health")])

    def run(self, *, size: int, group: int, n: int) -> dict[str, Any]:
        data, first = os.urandom(size), self.first
        groups = [
            [self.entry(self.burst, FEED, 1, at, 1, data) for at in range(begin, begin + group)]
            for begin in range(first, first + n, group)
        ]
        start = time.perf_counter()
        for entries in groups:
            self.log.append(entries)
        took = time.perf_counter() - start
        self.first = first + n
        for at in (first, self.first - 1):
            if self.log.read(FEED, at).frame != data:
                raise ValueError(f"entry {at} is another one than was written")
        self.log.release(FEED, self.first)
        return {"took_s": took}

    def close(self) -> None:
        self.log.destroy()
        shutil.rmtree(self.directory, ignore_errors=True)


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    sides = {"plain": ("perf.bench_spill:PlainWriter",)}
    if not arguments.raw_only:
        sides["fabric"] = ("perf.bench_spill:FabricWriter",)
    with teams([Contestant(name, side) for name, side in sides.items()]) as players:
        for size, group in CASES:
            n = (16 if arguments.quick else 256) * MIB // size
            answers = compete(players, {"size": size, "group": group, "n": n}, rounds=arguments.rounds)
            rates = measured(answers, lambda seen, n=n: n / seen[0]["took_s"])  # type: ignore[misc]
            budget = Budget(0.8, peer="plain") if size == MIB else Budget(200_000, peer="")
            case = f"append of {size // KIB} KiB entries, {group} a group"
            report.rows.append(Row("spill", case, "entries/s", rates, budget))
    return report


if __name__ == "__main__":
    main(__doc__, run)
