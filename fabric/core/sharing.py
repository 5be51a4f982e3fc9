"""What crosses the seam to shared memory: what was let go of, what may be reused, what is to be looked at."""

from __future__ import annotations

from fabric.core.seam import Buffer, crossing
from fabric.core.wire import Descriptor

__all__ = [
    "AdmitReader",
    "ArenaReached",
    "FreeSlots",
    "ReadSlot",
    "ReaderGone",
    "RefuseReader",
    "SlotRead",
    "SlotsForgotten",
    "SlotsReleased",
    "SlotsWanted",
]


# Events.


@crossing
class ArenaReached:
    """We are connected to the arena of this member."""

    name: str
    incarnation: int


@crossing
class ReaderGone:
    """A process that read our arena is proven dead."""

    name: str
    incarnation: int


@crossing
class SlotsWanted:
    """A value of so many bytes found no slot: history gives way to the next."""

    size: int


@crossing
class SlotsForgotten:
    """Retention, and all who still sent them, let go of these values of ours: (feed, offset, bytes)."""

    slots: list[tuple[int, int, int]]


@crossing
class SlotsReleased:
    """Views of these values of others died: (feed, offset, bytes), once for each `ReadSlot`, in vain or not."""

    views: list[tuple[int, int, int]]


@crossing
class SlotRead:
    """What `ReadSlot` led to: a view of the value, or None if it has to be fetched."""

    feed: int
    offset: int
    payload: Buffer | None


# Commands.


@crossing
class ReadSlot:
    """Look at a value in the arena of its publisher, compare it with its checksum; answer with `SlotRead`."""

    peer: str
    incarnation: int
    feed: int
    offset: int
    descriptor: Descriptor


@crossing
class FreeSlots:
    """Nobody needs the slots of these values any more: (feed, offset)."""

    slots: list[tuple[int, int]]


@crossing
class RefuseReader:
    """This reader keeps too much: it gets nothing new in the arena."""

    name: str
    incarnation: int


@crossing
class AdmitReader:
    """It let go of that."""

    name: str
    incarnation: int
