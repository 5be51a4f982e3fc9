"""What does a durable topic cost beside a write, and beside SQLite?

One record at a time: `publish` on a durable topic returns when the disk has the record, as does `os.write`, with
`os.fdatasync` where a loss of power must not take it, and an insert of its own transaction into SQLite (WAL;
`synchronous=NORMAL` survives the death of the process, `FULL` a loss of power). Eight threads publish on one topic; the
plain ones write to one file, allocated before as a segment of the log is, and sync each for itself; those of SQLite
take turns on one connection. Many at a time: `publish_many`; a write, and a transaction, for each 64 KiB of records.
All lie on the file system of the temporary directory. A subscription with a name that nobody has open is owed the
records, so that they stay on disk. A round in which a lane misses a number is broken.

Envelope: a write into the page cache takes 1 to 2 us, fdatasync of a record what the disk takes. The fabric adds two
changes of threads, 42 us both on two cores, and about 50 us of Python for each burst.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fabric.config import BURST_BYTES_MAX, KIB, MIB
from perf.harness import Contestant, compete, main, measured, teams
from perf.report import Report, Row

SINGLE = (("process", 1, 4_000), ("process", 8, 16_000), ("power", 1, 600), ("power", 8, 3_200))
"""How durable, so many threads, and records of all of them in a round."""
MANY = (("process", 50_000), ("power", 50_000))
SIZES = (256, 4 * KIB)


def timed(threads: int, work: Callable[[int], None]) -> float:
    """Seconds from the start of all threads to the end of the last."""
    if threads == 1:
        start = time.perf_counter()
        work(0)
        return time.perf_counter() - start
    gate = threading.Barrier(threads + 1)

    def run(number: int) -> None:
        gate.wait()
        work(number)

    crew = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for thread in crew:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in crew:
        thread.join()
    return time.perf_counter() - start


class PlainWriter:
    """One write call a record."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.path = meeting / "plain"

    def open(self) -> None:
        pass

    def run(self, *, sync: str, size: int, threads: int, n: int, many: bool) -> dict[str, Any]:
        at_once = BURST_BYTES_MAX // size if many else 1
        data = os.urandom(size * at_once)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.posix_fallocate(fd, 0, max(64 * MIB, size * n))
        os.fsync(fd)

        def work(number: int) -> None:
            for _ in range(n // threads // at_once):
                if os.write(fd, data) != len(data):
                    raise OSError("a short write: is the disk full?")
                if sync == "power":
                    os.fdatasync(fd)

        took = timed(threads, work)
        done = os.lseek(fd, 0, os.SEEK_CUR) // size
        os.close(fd)
        self.path.unlink()
        return {"took_s": took, "records": done}

    def close(self) -> None:
        pass


class SqliteWriter:
    """One transaction a record."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.path = meeting / "records.db"

    def open(self) -> None:
        self.db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, seed INTEGER, body BLOB)")
        self.lock = threading.Lock()

    def run(self, *, sync: str, size: int, threads: int, n: int, many: bool) -> dict[str, Any]:
        self.db.execute(f"PRAGMA synchronous={'FULL' if sync == 'power' else 'NORMAL'}")
        (before,) = self.db.execute("SELECT count(*) FROM records").fetchone()
        data, at_once = os.urandom(size), BURST_BYTES_MAX // size if many else 1

        def work(number: int) -> None:
            for _ in range(n // threads // at_once):
                with self.lock:
                    if not many:
                        self.db.execute("INSERT INTO records (seed, body) VALUES (?, ?)", (number, data))
                        continue
                    self.db.execute("BEGIN")
                    self.db.executemany("INSERT INTO records (seed, body) VALUES (?, ?)", [(number, data)] * at_once)
                    self.db.execute("COMMIT")

        took = timed(threads, work)
        (after,) = self.db.execute("SELECT count(*) FROM records").fetchone()
        return {"took_s": took, "records": after - before}

    def close(self) -> None:
        self.db.close()


class FabricWriter:
    """A member alone; each thread has a lane."""

    def __init__(self, *, rank: int, meeting: Path) -> None:
        self.meeting = meeting

    def open(self) -> None:
        from fabric import join

        self.fabric = join(rank=0, world_size=1, state_directory=self.meeting / "state")
        self.fabric.subscribe("jobs.**", name="later").close()
        self.publishers = {
            sync: self.fabric.publisher(f"jobs.{sync}", policy="durable", sync=sync) for sync in ("process", "power")
        }
        self.lanes = dict.fromkeys(((sync, number) for sync in self.publishers for number in range(8)), 0)

    def run(self, *, sync: str, size: int, threads: int, n: int, many: bool) -> dict[str, Any]:
        publisher, data = self.publishers[sync], os.urandom(size)
        told: list[list[int]] = [[] for _ in range(threads)]

        def work(number: int) -> None:
            if many:
                told[number] = publisher.publish_many([data] * n, seeds=[number] * n)
                return
            add = told[number].append
            for _ in range(n // threads):
                add(publisher.publish(data, seed=number))

        took = timed(threads, work)
        for number, sequences in enumerate(told):
            first = self.lanes[sync, number]
            self.lanes[sync, number] = first + len(sequences)
            if sequences != list(range(first, first + len(sequences))):
                raise ValueError(f"lane {number} misses a number after {first}")
        return {"took_s": took, "records": sum(map(len, told))}

    def close(self) -> None:
        self.fabric.close()


def run(arguments: argparse.Namespace) -> Report:
    report = Report()
    sides = {"plain": ("perf.bench_durable:PlainWriter",), "sqlite": ("perf.bench_durable:SqliteWriter",)}
    if not arguments.raw_only:
        sides["fabric"] = ("perf.bench_durable:FabricWriter",)
    jobs = [
        (f"{size} B, {sync}, {threads} thread{'s' if threads > 1 else ''}", sync, size, threads, n, False)
        for size in SIZES
        for sync, threads, n in SINGLE
    ]
    jobs += [(f"{size} B, {sync}, many", sync, size, 1, n * 256 // size, True) for size in SIZES for sync, n in MANY]
    with teams([Contestant(name, side) for name, side in sides.items()]) as players:
        for case, sync, size, threads, records, many in jobs:
            n = records // 10 if arguments.quick else records
            job = {"sync": sync, "size": size, "threads": threads, "n": n, "many": many}
            answers = compete(players, job, rounds=arguments.rounds)
            rates = measured(answers, lambda seen: seen[0]["records"] / seen[0]["took_s"])
            report.rows.append(Row("durable", case, "records/s", rates))
    return report


if __name__ == "__main__":
    main(__doc__, run)
