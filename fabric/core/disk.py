"""What crosses the seam to the disk: what it answers, and what it is asked for.

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
    "PastFeed",
    "RecordsExpired",
    "RecordsLoaded",
    "ReleaseRecords",
    "RestWanted",
    "SaveRegistrations",
    "StateRecovered",
    "WriteFailed",
    "WriteFinished",
]


class LoadedBurst(NamedTuple):
    """A burst as it was read. `frame`: None if it could not be; then `lost` says whether it never will be."""

    first: int
    frame: bytes | None
    payloads: Mapping[int, Buffer] | None
    lost: bool = False


class PastFeed(NamedTuple):
    """What an earlier life of this member left of a feed."""

    feed: int
    topic: str
    policy: str
    incarnation: int
    end: int
    exact: bool
    """Whether it ended there for certain."""
    bursts: tuple[tuple[int, int, int], ...]
    """First offset, end, and size in bytes, lowest first."""


# Events.


@crossing
class StateRecovered:
    """This member has state, which outlives it: from now on registrations are saved before they are confirmed."""

    feeds: tuple[PastFeed, ...]
    """Oldest first."""
    registrations: bytes | None
    """The last blob of `SaveRegistrations`; None if it cannot be read."""


@crossing
class RestWanted:
    """The application closes, and has state: what is still owed is written down, for the next life to serve."""


@crossing
class WriteFinished:
    """All writes up to `number` that were not refused before are on disk."""

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
    """Write a burst to the spill log; answer with `WriteFinished` or `WriteFailed`.

    One of no records makes the log know its feed, and that it ends at `first`.
    """

    number: int
    topic: str
    feed: int
    first: int
    count: int
    frame: bytes
    payloads: Mapping[int, Buffer] = field(default_factory=dict)
    policy: str = "reliable"
    sync: str = ""
    """`process` or `power` of a durable feed: whether the write is over only when it survives a loss of power.
    `closed`: the log has all that this feed owes, and nothing follows."""


@crossing
class SaveRegistrations:
    """Replace what is known on disk of who is owed what; answer with `WriteFinished` or `WriteFailed`."""

    number: int
    blob: bytes
    outlives: bool = False
    """Whether some of them outlive a clean end of this member."""


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
