"""What does the spill log add to writing the same bytes?

`plain` is one `os.write` for each entry's bytes into a file of its own, `fabric` is `SpillLog.append` with groups as
the storage thread hands them over: header, two checksums, index and rotation included. Neither syncs. Both write beside
each other on the file system of the temporary directory, interleaved; what is written is released after each round, and
no round begins with dirty pages of the one before.

Beside it, with no peer: how many messages of a handler that raises become dead letters in a second, and how many of
them are handled in a second once they are redriven; a round that loses one is broken. One member alone, values of
256 bytes, 64 lanes; the store lies where it lies without a state directory, and is not synced.

Envelope: XXH3 runs at 10 to 40 GB/s and costs a 1 MiB entry 3 to 10 % of its write; a 4 KiB entry costs about 1.3 us of
Python (header, sums, index) beside 1.5 to 3 us for its share of the write.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fabric.config import GIB, KIB, MIB, Spill
from perf.harness import Contestant, compete, main, measured, teams
from perf.report import Budget, Report, Row

if TYPE_CHECKING:
    from fabric import Message

CASES = ((MIB, 1), (4 * KIB, 256), (4 * KIB, 16))
"""Bytes of an entry, and entries in a group."""
FEED = 7
LETTERS = 10_000
WAIT_S = 120.0


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


class Buryer:
    """A member whose handler raises, and then does not."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.meeting = meeting

    def open(self) -> None:
        from fabric import FabricConfig, join
        from fabric.config import Letters

        # All die of one reason, which is what the handler's fuse is there for: it is made large enough.
        letters = Letters(same_reason_max=10**9)
        self.fabric = join(FabricConfig(letters=letters, spill=Spill(directory=self.meeting / "base")))
        self.failing, self.seen = True, []  # type: ignore[var-annotated]
        self.fabric.on("jobs", attempts=1)(self.handle)

    def handle(self, message: Message) -> None:
        if self.failing:
            raise ValueError("no")
        self.seen.append(message.value)

    def run(self, *, n: int) -> dict[str, Any]:
        self.seen.clear()
        self.failing, publisher, counts = True, self.fabric.publisher("jobs"), self.fabric.statistics
        values = [number.to_bytes(256, "little") for number in range(n)]
        buried, redriven = counts().get("dead_letters", 0) + n, counts().get("letters_redriven", 0) + n
        start = time.perf_counter()
        for number, value in enumerate(values):
            publisher.publish(value, seed=number % 64)
        self.wait("dead_letters", buried)
        written = time.perf_counter()
        self.failing = False
        letters = self.fabric.dead_letters
        letters.redrive(letters)
        self.wait("letters_redriven", redriven)
        end = time.perf_counter()
        if sorted(self.seen) != sorted(values) or len(letters):
            raise ValueError(f"{len(self.seen)} of {n} letters were handled, {len(letters)} are left")
        return {"write_s": written - start, "redrive_s": end - written}

    def wait(self, name: str, wanted: int) -> None:
        deadline = time.perf_counter() + WAIT_S
        while self.fabric.statistics().get(name, 0) < wanted:
            if time.perf_counter() > deadline:
                raise TimeoutError(f"{name} did not come to {wanted}: {self.fabric.statistics()}")
            self.fabric.serve(0.005)

    def close(self) -> None:
        self.fabric.dead_letters.discard(self.fabric.dead_letters)
        self.fabric.close()


def bury(arguments: argparse.Namespace, report: Report) -> None:
    """The rows of dead letters."""
    n = LETTERS // 10 if arguments.quick else LETTERS
    with teams([Contestant("fabric", ("perf.bench_spill:Buryer",))]) as players:
        answers = compete(players, {"n": n}, rounds=arguments.rounds)
        for what, key in (("written", "write_s"), ("redriven and handled", "redrive_s")):
            rates = measured(answers, lambda seen, key=key: n / seen[0][key])  # type: ignore[misc]
            report.rows.append(Row("letters", f"{n} dead letters {what}", "letters/s", rates))


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
            report.rows.append(Row("spill", case, "entries/s", rates, [budget]))
    if not arguments.raw_only:
        bury(arguments, report)
    return report


if __name__ == "__main__":
    main(__doc__, run)
