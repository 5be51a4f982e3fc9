"""The arena of one writer: slots of shared memory, warm ones first, and who reads them. `transports.mappings` reads.

A slot goes round: taken by a publisher, frozen when it is written, forgotten when retention has let go of it, and freed
when nobody reads it any more, which the caller knows and time never decides. A slot that is used again is warm: the
page faults of a fresh one cost ten times the copy into it.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from transports.base import OneProcess
from transports.handover import Handover, Reader, SocketHandover
from transports.segments import Layout, Place, Segment, create_segment, is_within_share, slot_class

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Arena", "ArenaLimits", "Cell", "Place", "Reader", "Slot"]

Room = np.ndarray[Any, Any]

MIB: Final = 1024 * 1024
_BYTE: Final = np.dtype(np.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaLimits:
    """Every bound of an arena."""

    bytes_max: int = 512 * MIB
    """Memory of all segments of this writer, retired ones and those that readers have not let go of included."""

    segment_bytes: int = 64 * MIB
    """Slots of one segment, in bytes of address space. A larger slot has a segment of its own."""

    readers_max: int = 256
    """Readers that are connected, and as many that have left and may still look at something."""


class Cell:
    """A slot in the arena's books."""

    __slots__ = ("generation", "index", "readable", "reference", "room", "segment")

    def __init__(self, segment: _OwnSegment, index: int) -> None:
        self.segment, self.index = segment, index
        begin = segment.start + index * segment.slot_bytes
        self.room: Room = np.frombuffer(segment.memory, _BYTE, segment.slot_bytes, begin)
        self.readable = segment.readable[begin : begin + segment.slot_bytes]
        self.generation = 0
        self.reference: _Reference | None = None


class _OwnSegment(Segment):
    """A segment that we write."""

    __slots__ = ("cells", "committed", "descriptor", "fresh", "memory", "retired", "used")

    def __init__(self, layout: Layout, memory: memoryview, descriptor: int) -> None:
        super().__init__(layout, memory)
        self.memory, self.descriptor = memory, descriptor
        self.cells: list[Cell] = []
        self.fresh: list[Cell] = []
        """Cells without memory: one whose memory was refused, or that nobody came for."""
        self.committed = layout.start
        self.used = 0
        """Cells that are not free."""
        self.retired = False

    def has_fresh(self) -> bool:
        """Whether there is a slot that never had memory."""
        return bool(self.fresh) or len(self.cells) < self.slots

    def next_fresh(self) -> Cell:
        """A slot without memory."""
        if self.fresh:
            return self.fresh.pop()
        cell = Cell(self, len(self.cells))
        self.cells.append(cell)
        return cell


class _Reference(weakref.ref[Room]):
    """Tells that the last view of a slot died. Its callback is `deque.append` itself: no lock, no Python."""

    __slots__ = ("cell", "place")

    cell: Cell
    place: Place | None
    """None if it was never published."""


class Slot:
    """A piece of the arena in a writer's hand: write through `view`, then `freeze()` it, or `release()` it."""

    __slots__ = ("_arena", "_cell", "place", "view")

    def __init__(self, arena: Arena, cell: Cell, size: int) -> None:
        self._arena = arena
        self._cell: Cell | None = cell
        self.place = Place(cell.segment.number, cell.index, cell.generation)
        """What readers are told."""
        self.view = memoryview(cast("Buffer", cell.room))[:size]
        """Writable, exactly the size that was taken, at the start of a page."""

    def freeze(self) -> memoryview:
        """A read-only view of the content; when the last view of it dies, `Arena.forgotten` tells.

        `release()` has no effect afterwards. Raises BufferError while somebody looks at the writable view, ValueError
        when the slot was released, and TransportClosedError.
        """
        self._arena._check()
        view, cell = self.view, self._cell
        if cell is None:
            raise ValueError("the slot is released")
        size = len(view)
        view.release()
        if sys.getrefcount(cell.room) > _REFERENCES_ALONE:
            self.view = memoryview(cast("Buffer", cell.room))[:size]
            raise BufferError("somebody may still write to the slot")
        self._cell = None
        # An owner of its own, and not a slice of another array: numpy lets views of a slice refer to that array.
        owner: Room = np.frombuffer(cell.readable, _BYTE, size)
        reference = _Reference(owner, self._arena._returned.append)
        reference.cell, reference.place = cell, self.place
        cell.reference = reference
        return memoryview(cast("Buffer", owner))

    def release(self) -> None:
        """Give the slot back: it was never published. Idempotent, from any thread.

        While somebody looks at the writable view, the slot waits for him before it is used again.
        """
        if self._arena._usable:
            self._arena._take_back(self)


_REFERENCES_ALONE: Final = 2
"""Of the cell, and the parameter of `getrefcount`."""


class Arena(OneProcess):
    """Shared memory of one writer, offered at `address`, the path of a Unix socket.

    `take`, `free`, `forgotten` and what a `Slot` has are for any thread, the rest for one thread at a time. Raises
    AddressError if the path cannot be bound. After `close`, and in a forked child, everything but `statistics` raises
    TransportClosedError.
    """

    def __init__(self, address: str, limits: ArenaLimits | None = None) -> None:
        self.limits = limits or ArenaLimits()
        self._lock = threading.Lock()
        self._segments: dict[int, _OwnSegment] = {}
        self._free: dict[int, list[Cell]] = {}
        self._growing: dict[int, _OwnSegment] = {}
        self._closing: dict[int, int] = {}  # bytes of closed segments that readers have not let go of
        self._returned: deque[_Reference] = deque()  # bounded by the slots
        self._generation = self._numbers = 0
        self._committed = self._in_use = self._retired = 0
        self._counts = dict.fromkeys(("fresh", "reused", "fallback_full", "fallback_no_memory"), 0)
        self._handover = self._open(address)
        self._begin()

    def _open(self, address: str) -> Handover:
        return SocketHandover(address, self.limits.readers_max)

    @property
    def segments(self) -> dict[int, _OwnSegment]:
        """What a member reads of its own arena."""
        return self._segments

    # Slots.

    def take(self, size: int) -> Slot | None:
        """A slot for `size` bytes, with unknown content: the warmest that is free, else a fresh one.

        None if there is no room (`fallback_full`) or no memory (`fallback_no_memory`). Raises ValueError for less than
        one byte.
        """
        if not self._usable:
            self._refuse()
        if size < 1:
            raise ValueError(f"a slot of {size} bytes")
        slot_bytes = slot_class(size)
        with self._lock:
            free = self._free.get(slot_bytes)
            if free:
                cell = free.pop()
                self._counts["reused"] += 1
                self._enter(cell)
                return Slot(self, cell, size)
            fresh = self._reserve(slot_bytes)
        if fresh is None or not self._commit(fresh):
            return None
        return Slot(self, fresh, size)

    def _enter(self, cell: Cell) -> None:
        """Give a slot its next generation. The lock is held."""
        self._generation = cell.generation = generation = self._generation + 1
        segment = cell.segment
        segment.table[cell.index] = generation
        segment.used += 1
        self._in_use += segment.slot_bytes

    def _reserve(self, slot_bytes: int) -> Cell | None:
        """A slot without memory, and room for its memory. The lock is held."""
        segment = self._growing.get(slot_bytes)
        layout = None
        need = slot_bytes
        if segment is None or not segment.has_fresh():
            layout = Layout(self._numbers + 1, slot_bytes, max(1, self.limits.segment_bytes // slot_bytes))
            need += layout.start
        if not self._make_room(need):
            self._counts["fallback_full"] += 1
            return None
        if layout is not None:
            segment = self._add_segment(layout)
        if segment is None:
            self._counts["fallback_no_memory"] += 1
            return None
        cell = segment.next_fresh()
        segment.committed += slot_bytes
        self._committed += slot_bytes
        self._enter(cell)
        return cell

    def _add_segment(self, layout: Layout) -> _OwnSegment | None:
        """Make a segment and give it to the readers, before anybody hears of a slot in it. The lock is held."""
        try:
            descriptor, memory = self._create(layout)
        except OSError:
            return None
        segment = _OwnSegment(layout, memory, descriptor)
        self._numbers = layout.number
        self._segments[layout.number] = self._growing[layout.slot_bytes] = segment
        self._committed += segment.committed
        self._handover.give(segment)
        return segment

    def _create(self, layout: Layout) -> tuple[int, memoryview]:
        descriptor, memory = create_segment(layout)
        if not is_within_share(descriptor):
            os.close(descriptor)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return descriptor, memory

    def _commit(self, cell: Cell) -> bool:
        """Get memory for a fresh slot. Not under the lock: 64 MiB take 16 ms."""
        segment = cell.segment
        try:
            self._allocate(segment.descriptor, segment.start + cell.index * segment.slot_bytes, segment.slot_bytes)
        except OSError:
            with self._lock:
                self._counts["fallback_no_memory"] += 1
                self._uncommit(cell)
            return False
        self._counts["fresh"] += 1
        return True

    def _allocate(self, descriptor: int, offset: int, size: int) -> None:
        # A hole in the file would be filled by the first write to it, or end the process with SIGBUS.
        os.posix_fallocate(descriptor, offset, size)

    def _uncommit(self, cell: Cell) -> None:
        """Undo `_reserve`: the kernel has undone its part. The lock is held."""
        segment = cell.segment
        segment.table[cell.index] = cell.generation = 0
        segment.used -= 1
        segment.committed -= segment.slot_bytes
        self._in_use -= segment.slot_bytes
        self._committed -= segment.slot_bytes
        segment.fresh.append(cell)
        if segment.retired:
            self._retired -= segment.slot_bytes
            self._close_if_free(segment)

    def _make_room(self, need: int) -> bool:
        """Whether so much memory may be added, if need be after segments of other sizes are closed that lie idle."""
        room = self.limits.bytes_max - self._committed - need
        if room >= 0:
            return True
        for segment in list(self._segments.values()):
            if not segment.used and room + self._committed >= -need:
                before = self._committed
                self._close_segment(segment)
                room += before - self._committed
                if room >= 0:
                    return True
        return False

    def forgotten(self) -> list[Place]:
        """Slots of which the last frozen view died since the last call. They are not free yet."""
        if not self._usable:
            self._refuse()
        returned = self._returned
        places: list[Place] = []
        while returned:
            reference = returned.popleft()
            reference.cell.reference = None
            if reference.place is not None:
                places.append(reference.place)
            else:
                self._readmit(reference.cell)
        return places

    def free(self, place: Place) -> None:
        """Nobody reads a slot any more, and `forgotten` has told it. Raises ValueError for any other slot."""
        if not self._usable:
            self._refuse()
        with self._lock:
            segment = self._segments.get(place.segment)
            cell = segment.cells[place.slot] if segment is not None else None
            if cell is None or cell.generation != place.generation or cell.reference is not None:
                raise ValueError(f"{place} is not there, or somebody here still looks at it")
            self._let_go(cell)

    def _let_go(self, cell: Cell) -> None:
        """A slot is free. The lock is held."""
        segment = cell.segment
        segment.table[cell.index] = cell.generation = 0
        segment.used -= 1
        self._in_use -= segment.slot_bytes
        if segment.retired:
            self._close_if_free(segment)
            return
        free = self._free.get(segment.slot_bytes)
        if free is None:
            free = self._free[segment.slot_bytes] = []
        free.append(cell)

    def _take_back(self, slot: Slot) -> None:
        with self._lock:
            cell, slot._cell = slot._cell, None
        if cell is None:
            return
        try:
            slot.view.release()
            watched = sys.getrefcount(cell.room) > _REFERENCES_ALONE
        except BufferError:
            watched = True
        if watched:
            room = cell.room
            cell.room = _NOBODYS
            cell.reference = reference = _Reference(room, self._returned.append)
            reference.cell, reference.place = cell, None
            return
        with self._lock:
            self._let_go(cell)

    def _readmit(self, cell: Cell) -> None:
        """Whoever looked at a slot that was never published has gone."""
        segment = cell.segment
        cell.room = np.frombuffer(
            segment.memory, _BYTE, segment.slot_bytes, segment.start + cell.index * segment.slot_bytes
        )
        with self._lock:
            self._let_go(cell)

    # Segments.

    def _retire(self, segment: _OwnSegment) -> None:
        """Take nothing from a segment any more. The lock is held."""
        if segment.retired:
            return
        segment.retired = True
        self._retired += segment.committed
        self._take_out(segment)
        self._close_if_free(segment)

    def _take_out(self, segment: _OwnSegment) -> None:
        free = self._free.get(segment.slot_bytes, [])
        self._free[segment.slot_bytes] = [cell for cell in free if cell.segment is not segment]
        if self._growing.get(segment.slot_bytes) is segment:
            del self._growing[segment.slot_bytes]

    def _close_if_free(self, segment: _OwnSegment) -> None:
        if not segment.used:
            self._close_segment(segment)

    def _close_segment(self, segment: _OwnSegment) -> None:
        """Unmap a segment of which every slot is free. Its memory counts until every reader has let go of it, too."""
        if not segment.retired:
            self._retired += segment.committed
            self._take_out(segment)
        number = segment.number
        del self._segments[number]
        segment.dropped = True
        segment.cells.clear()
        segment.fresh.clear()
        self._closing[number] = segment.committed
        self._handover.drop(segment)
        if segment.descriptor >= 0:
            os.close(segment.descriptor)
        self._give_back()

    def _give_back(self) -> None:
        for number in [number for number in self._closing if not self._handover.holds(number)]:
            size = self._closing.pop(number)
            self._committed -= size
            self._retired -= size

    # Readers.

    def poll(self) -> list[Reader]:
        """Accept readers, give them the segments, notice deaths. The readers proven dead, each told once."""
        if not self._usable:
            self._refuse()
        with self._lock:
            dead = self._handover.poll()
            self._handover.catch_up(self._segments.values())
            if self._closing:
                self._give_back()
        return dead

    def refuse(self, name: str) -> None:
        """Give a reader that holds too much no segment any more, and retire every segment."""
        self._check()
        with self._lock:
            self._handover.refuse(name)
            for segment in list(self._segments.values()):
                if self._handover.holds(segment.number):
                    self._retire(segment)

    def admit(self, name: str) -> None:
        """Give a reader segments again."""
        self._check()
        with self._lock:
            self._handover.admit(name)
            self._handover.catch_up(self._segments.values())

    def reads(self, name: str) -> bool:
        """Whether a reader of this name is connected, admitted, and has been given every segment."""
        self._check()
        with self._lock:
            return self._handover.reads(name)

    def descriptors(self) -> list[int]:
        """One descriptor, the same for life, that becomes readable when `poll` has something to do."""
        self._check()
        return self._handover.descriptors()

    def statistics(self) -> dict[str, int]:
        """Bytes (committed, in use, retired), segments, readers; counters: fresh, reused, fallbacks and refusals."""
        with self._lock:
            return {
                "bytes_committed": self._committed,
                "bytes_in_use": self._in_use,
                "bytes_retired": self._retired,
                "segments": len(self._segments),
                "readers": self._handover.readers(),
                **self._counts,
                **self._handover.counts,
            }

    # The end.

    def abandon(self) -> None:
        """In a forked child: close every descriptor. In the process that made the arena it does nothing."""
        if self._closed or not self._is_inherited():
            return
        self._closed = True
        self._shut(unlink=False)

    def close(self) -> None:
        """Remove the path, close every descriptor. The memory stays until the last view of it dies. Idempotent."""
        if self._closed or not self._usable:
            return
        with self._lock:
            self._usable, self._closed = False, True
            self._shut(unlink=True)
            self._segments.clear()
            self._free.clear()
            self._growing.clear()

    def _shut(self, *, unlink: bool) -> None:
        for segment in self._segments.values():
            if segment.descriptor >= 0:
                os.close(segment.descriptor)
        self._handover.close(unlink=unlink)


_NOBODYS: Room = np.empty(0, np.uint8)
"""The room of a cell while somebody looks at its own."""
