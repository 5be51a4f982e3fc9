"""What crosses the seam to the spill log: what it answers, and what it is asked for.

Writes are numbered from 1 in the order in which they are asked for, over all feeds, and done in that order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import NamedTuple

from fabric.core.seam import Buffer, crossing

__all__ = [
    "AppendRecords",
    "LoadRecords",
    "LoadedBurst",
    "RecordsExpired",
    "RecordsLoaded",
    "ReleaseRecords",
    "WriteFailed",
    "WriteFinished",
]


class LoadedBurst(NamedTuple):
    """A burst as it was read. `frame`: None if it could not be; then `lost` says whether it never will be."""

    first: int
    frame: bytes | None
    payloads: Mapping[int, Buffer] | None
    lost: bool = False


# Events.


@crossing
class WriteFinished:
    """All writes up to `number` that were not refused before are in the log."""

    number: int


@crossing
class WriteFailed:
    """The disk refused the writes `first` to `number`. `reason` says why."""

    first: int
    number: int
    reason: str


@crossing
class RecordsLoaded:
    """The log answers `LoadRecords`."""

    feed: int
    bursts: tuple[LoadedBurst, ...]


@crossing
class RecordsExpired:
    """The log gave up what it held of a feed from `first` to `end`: nobody had fetched it for too long."""

    feed: int
    first: int
    end: int


# Commands.


@crossing
class AppendRecords:
    """Write a burst to the spill log; answer with `WriteFinished` or `WriteFailed`."""

    number: int
    topic: str
    feed: int
    first: int
    count: int
    frame: bytes
    payloads: Mapping[int, Buffer] = field(default_factory=dict)


@crossing
class LoadRecords:
    """Read the bursts of a feed that begin at these offsets; answer with `RecordsLoaded`."""

    feed: int
    firsts: tuple[int, ...]


@crossing
class ReleaseRecords:
    """The bursts of a feed that end at or below an offset are not needed any more."""

    feed: int
    below: int
