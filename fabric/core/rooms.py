"""What one subscription may hold: its room, and the claims of addressed values on it (I7)."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from fabric.core.wire import Burst, Descriptor, Drop, decode_descriptor
from fabric.errors import WireFormatError

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed

__all__ = ["STALE_MAX", "Claims", "Highest", "Room"]

STALE_MAX = 64
"""Offsets of records that gave way are swept out once there are so many."""


class Room:
    """The bytes that one subscription may hold, over all its feeds."""

    __slots__ = (
        "hand",
        "hand_max",
        "hold",
        "hold_max",
        "payload",
        "payload_bytes_max",
        "payload_max",
        "queue",
        "ranges_max",
    )

    def __init__(
        self,
        *,
        hand_max: int,
        hold_max: int,
        ranges_max: int,
        payload_max: int = 128 * 1024 * 1024,
        payload_bytes_max: int = 1024 * 1024 * 1024,
    ) -> None:
        self.hand = self.hold = self.payload = 0
        self.payload_max, self.payload_bytes_max = payload_max, payload_bytes_max
        self.queue: dict[InboundFeed, None] = {}
        """Feeds that have something ready and wait for room in the hand, which one of the others may have."""
        self.hand_max, self.hold_max, self.ranges_max = hand_max, hold_max, ranges_max

    @property
    def left(self) -> int:
        """Bytes that may be asked for."""
        return max(0, self.hand_max - self.hand) + max(0, self.hold_max - self.hold)


class Claims:
    """The addressed values of one feed that were asked for, or are here and not handed over, within the room.

    The next record of the feed always has some: else what follows it could wait for room that it takes itself.
    """

    __slots__ = ("_awaiting", "_held", "_room", "_waiting", "sizes")

    def __init__(self, room: Room, held: dict[int, Burst], awaiting: set[int]) -> None:
        self._room, self._held, self._awaiting = room, held, awaiting
        self._waiting: list[int] = []
        """A heap of held offsets whose values nobody asked for yet; stale ones are met and dropped."""
        self.sizes: dict[int, int] = {}
        """Bytes, by held offset."""

    def __bool__(self) -> bool:
        """Whether values wait for room."""
        return bool(self._waiting)

    def expect(self, offset: int) -> None:
        """This held record is addressed."""
        heappush(self._waiting, offset)

    def lowest(self) -> tuple[int, Descriptor, str | None] | None:
        """The lowest value that nobody asked for: its offset, what is said of it, why it cannot be had."""
        while self._waiting:
            offset = self._waiting[0]
            burst = self._held.get(offset)
            if burst is None or offset not in self._awaiting or offset in self.sizes:
                heappop(self._waiting)
                continue
            try:
                descriptor = decode_descriptor(burst.body(offset - burst.first))
            except WireFormatError:  # an empty value is none either: it would never be complete
                return offset, Descriptor(0, 0), Drop.UNDECODABLE
            return offset, descriptor, Drop.TOO_LARGE if descriptor.size > self._room.payload_bytes_max else None
        return None

    def take(self, offset: int, size: int, *, is_next: bool) -> bool:
        """Take room for a value; False if there is none. One that has it already needs no more."""
        room = self._room
        if offset in self.sizes:
            return True
        if not is_next and room.payload and room.payload + size > room.payload_max:
            return False
        self.sizes[offset] = size
        room.payload += size
        return True

    def give(self, offset: int) -> None:
        """This record is not held any more."""
        self._room.payload -= self.sizes.pop(offset, 0)

    def under_way(self) -> list[tuple[int, Descriptor]]:
        """The values that have room and have not come, lowest first."""
        found = []
        for offset in sorted(self._awaiting & self.sizes.keys()):
            burst = self._held[offset]
            found.append((offset, decode_descriptor(burst.body(offset - burst.first))))
        return found


class Highest:
    """The highest of the held offsets.

    Asked for with every row once the room is used up: looking through 100,000 rows each time took seconds.
    """

    __slots__ = ("_held", "_tops")

    def __init__(self, held: dict[int, Burst]) -> None:
        self._held = held
        self._tops: list[int] = []
        """A heap of the held offsets, negated, once one had to give way; some are held no longer."""

    def note(self, offset: int) -> None:
        """This one is held from now on."""
        if self._tops:
            heappush(self._tops, -offset)

    def find(self) -> int:
        """The highest; something is held."""
        if len(self._tops) > STALE_MAX + 2 * len(self._held):
            self._tops.clear()
        if not self._tops:
            self._tops += [-offset for offset in self._held]
            heapify(self._tops)
        while -self._tops[0] not in self._held:
            heappop(self._tops)
        return -self._tops[0]
