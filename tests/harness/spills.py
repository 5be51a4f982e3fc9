"""Small spill logs on a fake disk, for tests."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

from fabric.config import Spill
from fabric.storage.disk import Disk
from fabric.storage.recovering import segment_name
from fabric.storage.spill import Entry, Kind, SpillLog
from fabric.testing.disks import FakeDisk

WHERE = Path("/spill")
FEED = 7
BIG = bytes(300)


def named(feed: int = FEED, *, incarnation: int = 1) -> Entry:
    return Entry(Kind.FEED, feed, incarnation, 0, 0, b"topic %d" % feed)


def burst(first: int, records: int = 1, *, feed: int = FEED, frame: bytes | None = None, **payloads: bytes) -> Entry:
    """A burst; payloads are named by their offsets: `o5=b"..."`."""
    body = b"frame of %d from %d" % (feed, first) if frame is None else frame
    return Entry(Kind.BURST, feed, 1, first, records, body, {int(name[1:]): data for name, data in payloads.items()})


def small(**settings: Any) -> Spill:
    """Limits with segments of a kibibyte."""
    chosen: dict[str, Any] = {"bytes_max": 1 << 20, "segment_bytes": 1024, "free_bytes_min": 1}
    return Spill(**(chosen | settings))


class Clock:
    """Wall time in nanoseconds, under the test's hand."""

    def __init__(self) -> None:
        self.now_ns = 10**18

    def __call__(self) -> int:
        return self.now_ns

    def advance(self, seconds: float) -> None:
        self.now_ns += int(seconds * 1e9)


def identities() -> Any:
    """Random bytes that are the same in each run; each log needs its own."""
    numbers = count(1)
    return lambda size: next(numbers).to_bytes(size, "big")


def opened(disk: Disk | None = None, limits: Spill | None = None, **options: Any) -> SpillLog:
    options.setdefault("incarnation", 1)
    return SpillLog.open(WHERE, limits or small(), disk=FakeDisk() if disk is None else disk, **options)


def held(log: SpillLog) -> list[Entry]:
    """All bursts, payloads as bytes, so that they can be compared."""
    return [plain(entry) for entry in log.recovered()]


def plain(entry: Entry) -> Entry:
    return entry._replace(
        frame=bytes(entry.frame), payloads={offset: bytes(data) for offset, data in entry.payloads.items()}
    )


def path(number: int) -> str:
    """Of a segment on a fake disk."""
    return f"{WHERE}/{segment_name(number)}"


def begun(disk: FakeDisk, limits: Spill | None = None, **options: Any) -> SpillLog:
    """A log that names a feed and holds one burst of it."""
    log = opened(disk, limits, **options)
    log.append([named(), burst(0)])
    return log


def firsts(log: SpillLog) -> list[int]:
    """First offsets of all bursts."""
    return [entry.first for entry in held(log)]


def reopened(disk: FakeDisk) -> list[int]:
    """First offsets of all bursts that another process finds; nothing is damaged."""
    log = opened(disk)
    found = firsts(log)
    assert log.damage == ()
    log.close()
    return found
