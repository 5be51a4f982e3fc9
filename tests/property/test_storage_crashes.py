"""A script of thirty operations, and a crash after each thing that it did to the disk: what is found then is true.

A burst whose append returned before the death of the process is there; one that was synced before a loss of power is
there; no burst is another than was written; and a recovery finds the same twice, however often it was cut short.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from fabric.errors import SpillError
from fabric.storage.spill import Damage, Entry, SpillLog
from fabric.testing.disks import FakeDisk
from tests.harness.spills import FEED, Clock, burst, held, identities, named, opened, plain, small

LIMITS = small(segment_bytes=640, bytes_max=64 * 640)
OTHER = 8


@dataclass
class Script:
    """What was done, and after how many steps of the disk it was done."""

    disk: FakeDisk = field(default_factory=FakeDisk)
    tried: dict[tuple[int, int], list[Entry]] = field(default_factory=dict)
    """Everything that was ever handed over, by feed and first offset."""
    begun: list[tuple[int, Entry]] = field(default_factory=list)
    written: list[tuple[int, Entry]] = field(default_factory=list)
    synced: list[tuple[int, Entry]] = field(default_factory=list)
    released: list[tuple[int, int, int]] = field(default_factory=list)
    """Before which step, feed, below."""
    failed: int = 0

    def append(self, log: SpillLog, *entries: Entry) -> None:
        bursts = [plain(entry) for entry in entries if entry.records]
        for entry in bursts:
            self.tried.setdefault((entry.feed, entry.first), []).append(entry)
        try:
            log.append(entries)
        except SpillError:
            self.failed += 1
        else:
            self.written += [(len(self.disk.steps), entry) for entry in bursts]

    def sync(self, log: SpillLog) -> None:
        before = [entry for _, entry in self.written]
        try:
            log.sync()
        except SpillError:
            self.failed += 1
        else:
            self.synced += [(len(self.disk.steps), entry) for entry in before]

    def release(self, log: SpillLog, feed: int, below: int) -> None:
        self.released.append((len(self.disk.steps), feed, below))
        log.release(feed, below)

    def needed(self, known: list[tuple[int, Entry]], upto: int) -> list[Entry]:
        """The newest of what was so by then, and not given up by then."""
        gone = {feed: below for at, feed, below in self.released if at < upto}
        newest = {(entry.feed, entry.first): entry for at, entry in known if at <= upto}
        return [entry for entry in newest.values() if entry.end > gone.get(entry.feed, 0)]


def play() -> Script:
    script = Script()
    disk, clock, identity = script.disk, Clock(), identities()
    log = opened(disk, LIMITS, keep_unsynced=True, clock=clock, identity=identity)
    script.append(log, named(), burst(0), burst(1, 2))
    script.sync(log)
    script.append(log, burst(3, frame=b"p" * 30, o3=b"payload" * 5))
    script.append(log, named(OTHER), burst(0, 4, feed=OTHER))
    script.append(log, burst(4, frame=bytes(250)))  # rotates
    script.sync(log)
    disk.write_most = 50
    script.append(log, burst(5), burst(6))  # short writes
    disk.write_most = None
    disk.fail("write", 1, errno.EIO)
    script.append(log, burst(7), burst(8))  # a bad segment
    script.release(log, FEED, 5)
    disk.fail("sync", 1, errno.EIO)
    script.sync(log)  # written and synced again
    script.append(log, burst(4, 4, feed=OTHER))
    disk.write_most = 130
    disk.fail("write", 2, errno.EIO)
    disk.fail("write", 4, errno.EIO)
    script.append(log, burst(9), burst(10))  # fails twice, parts of it are written
    disk.write_most = None
    script.append(log, burst(9, 3))  # another truth about the same offset
    script.sync(log)
    clock.advance(61)
    script.append(log, burst(12))  # rotates by age
    script.release(log, OTHER, 4)
    disk.fail("sync_directory", 1, errno.EIO)
    script.append(log, burst(13, frame=bytes(500)))  # rotates; the directory fails
    disk.fail("sync_directory", 1, errno.EIO)
    disk.fail("sync_directory", 2, errno.EIO)
    script.append(log, burst(14, frame=bytes(500)))  # rotates; the directory fails twice
    script.sync(log)
    script.release(log, OTHER, 8)
    script.release(log, FEED, 9)
    script.append(log, burst(14))
    log.close()
    log = opened(disk, LIMITS, keep_unsynced=True, clock=clock, identity=identity, incarnation=2)  # a second life
    script.append(log, named(), burst(15), burst(16, frame=bytes(300)))
    script.sync(log)
    script.append(log, burst(17, frame=bytes(300)))
    script.release(log, FEED, 15)
    script.append(log, burst(18))
    log.close()
    assert script.failed == 2, "two appends failed twice"
    return script


SCRIPT = play()
POINTS = range(len(SCRIPT.disk.steps) + 1)


def found(disk: FakeDisk) -> tuple[list[Entry], tuple[Damage, ...], frozenset[int]]:
    log = opened(disk, LIMITS, identity=identities())
    seen = held(log), tuple(log.damage), log.ended
    log.abandon()
    return seen


def check(disk: FakeDisk, wanted: list[Entry]) -> None:
    first = found(disk)
    assert found(disk) == first, "recovery is idempotent"
    entries = first[0]
    for entry in entries:
        assert entry in SCRIPT.tried[entry.feed, entry.first], "nothing is invented"
    for entry in wanted:
        assert entry in entries, f"{entry.first} of {entry.feed} is lost"
    log = opened(disk, LIMITS, identity=identities())  # and it goes on from there
    log.append([named(), burst(50)])
    log.close()
    after = found(disk)
    assert after[0] == [*entries, burst(50)]
    assert after[1] == first[1]
    assert disk.opened == 0


def patterns(upto: int) -> Iterator[Callable[[int], bool]]:
    """Which unsynced steps survive: none, and some by chance. All is the death of the process."""
    yield lambda _: False
    for seed in range(3):
        chance = random.Random(f"{upto} {seed}")
        kept = [chance.random() < 0.5 for _ in POINTS]
        yield kept.__getitem__


def test_f03_the_death_of_the_process_at_any_point_loses_nothing_that_was_appended() -> None:
    for upto in POINTS:
        check(SCRIPT.disk.crashed(upto, lambda _: True), SCRIPT.needed(SCRIPT.written, upto))


@pytest.mark.parametrize("filled", [False, True], ids=["short", "zero-filled"])
def test_f04_a_loss_of_power_at_any_point_loses_nothing_that_was_synced(filled: bool) -> None:
    for upto in POINTS:
        wanted = SCRIPT.needed(SCRIPT.synced, upto)
        for survives in patterns(upto):
            check(SCRIPT.disk.crashed(upto, survives, filled=filled), wanted)


def test_f33_the_last_write_may_be_torn_at_any_byte() -> None:
    for upto in POINTS:
        step = SCRIPT.disk.steps[upto - 1] if upto else None
        if step is None or step.verb != "write":
            continue
        wanted = SCRIPT.needed(SCRIPT.written, upto - 1)
        for torn in range(0, len(step.data), 7):
            check(SCRIPT.disk.crashed(upto, lambda _: True, torn=torn), wanted)


def test_f05_an_end_is_only_found_with_everything_before_it() -> None:
    for upto in POINTS:
        for survives in patterns(upto):
            entries, damage, ended = found(SCRIPT.disk.crashed(upto, survives))
            if 1 in ended and not damage:
                assert all(entry in entries for entry in SCRIPT.needed(SCRIPT.synced, upto) if entry.first < 15)


def test_f03_a_crash_inside_recovery_and_its_first_append_changes_nothing() -> None:
    for upto in POINTS[::5]:
        disk = SCRIPT.disk.crashed(upto, next(iter(patterns(upto))))
        entries = found(disk)[0]
        start = disk.copy()
        disk.steps.clear()
        log = opened(disk, LIMITS, identity=identities())
        log.append([named(), burst(40)])
        log.sync()
        log.close()
        for inner in range(len(disk.steps) + 1):
            for survives in (lambda _: True, lambda _: False):
                again = disk.crashed(inner, survives, start=start)
                assert found(again)[0] in (entries, [*entries, burst(40)])
