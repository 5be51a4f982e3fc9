"""Shared memory of simulated members: real segments, but no sockets; a slot that is free is overwritten at once.

So whoever reads a slot that he has no right to reads other bytes than were published, and the checker sees it.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

from transports.arena import Arena, ArenaLimits, Place, Reader, Slot
from transports.handover import Handover, Offer
from transports.mappings import Mappings
from transports.segments import Segment

__all__ = ["ArenaHub", "WorldArena", "WorldMappings"]

POISON = b"\xdd"
Life = tuple[str, int]


class ArenaHub:
    """All arenas of a world, by address, and who is dead."""

    def __init__(self) -> None:
        self.arenas: dict[str, WorldArena] = {}
        self.dead: set[Life] = set()


class _HubHandover:
    """Segments are given by a note of it."""

    def __init__(self, hub: ArenaHub) -> None:
        self._hub = hub
        self.given: dict[Life, set[int]] = {}
        self._refused: set[str] = set()
        self._told: set[Life] = set()
        self.counts: dict[str, int] = {}

    def greet(self, life: Life, segments: Iterable[int]) -> None:
        """A reader connects."""
        self.given[life] = set() if life[0] in self._refused else set(segments)

    def give(self, segment: Offer) -> None:
        """To every reader that is not refused."""
        for (name, _), numbers in self.given.items():
            if name not in self._refused:
                numbers.add(segment.layout.number)

    def drop(self, segment: Offer) -> None:
        """Nobody finds it any more; views live on."""
        for numbers in self.given.values():
            numbers.discard(segment.layout.number)

    def holds(self, number: int) -> bool:
        """Whether a reader may still find it."""
        return any(number in numbers for numbers in self.given.values())

    def refuse(self, name: str) -> None:
        """It gets no new ones."""
        self._refused.add(name)

    def admit(self, name: str) -> None:
        """It gets those that it lacks, with the next `catch_up`."""
        self._refused.discard(name)

    def catch_up(self, segments: Iterable[Offer]) -> None:
        """Give everybody what he has not got."""
        for segment in segments:
            self.give(segment)

    def reads(self, name: str) -> bool:
        """Whether somebody of this name is given segments."""
        return name not in self._refused and any(other == name for other, _ in self.given)

    def poll(self) -> list[Reader]:
        """Those that died since the last call."""
        dead = [life for life in self.given if life in self._hub.dead and life not in self._told]
        self._told.update(dead)
        return [Reader(name, incarnation, 1) for name, incarnation in dead]

    def readers(self) -> int:
        """How many have connected."""
        return len(self.given)

    def descriptors(self) -> list[int]:
        """The world looks by itself."""
        return []

    def close(self, *, unlink: bool) -> None:
        """Nothing is open."""


class WorldArena(Arena):
    """As `transports.arena.Arena`. `misses`: the probability that there is no slot."""

    def __init__(self, address: str, limits: ArenaLimits, hub: ArenaHub, rng: Random, misses: float = 0.0) -> None:
        self.hub, self._rng, self._misses = hub, rng, misses
        super().__init__(address, limits)
        hub.arenas[address] = self

    def _open(self, address: str) -> Handover:
        self.handover = _HubHandover(self.hub)
        return self.handover

    def take(self, size: int) -> Slot | None:
        """Or, by chance, none."""
        return None if self._rng.random() < self._misses else super().take(size)

    def free(self, place: Place) -> None:
        """The bytes are gone at once."""
        segment = self.segments[place.segment]
        if segment.table[place.slot] == place.generation:
            begin = segment.start + place.slot * segment.slot_bytes
            segment.memory[begin : begin + segment.slot_bytes] = POISON * segment.slot_bytes
        super().free(place)


class WorldMappings(Mappings):
    """As `transports.mappings.Mappings`. `misses`: the probability that a slot cannot be looked at."""

    def __init__(
        self, name: str, incarnation: int, own: WorldArena, own_key: str, rng: Random, misses: float = 0.0
    ) -> None:
        super().__init__(name, incarnation, own=own, own_key=own_key)
        self._hub, self._life, self._rng, self._misses = own.hub, (name, incarnation), rng, misses
        self._reached: dict[str, WorldArena] = {}

    def connect(self, peer: str, address: str) -> bool:
        """To an arena of this world."""
        self._check()
        arena = self._hub.arenas.get(address)
        if arena is None:
            return False
        arena.handover.greet(self._life, arena.segments)
        self._reached[peer] = arena
        return True

    def disconnect(self, peer: str) -> None:
        """Views live on."""
        self._reached.pop(peer, None)

    def map(self, peer: str, place: Place, size: int) -> memoryview | None:
        """Or, by chance, none."""
        return None if self._rng.random() < self._misses else super().map(peer, place, size)

    def _find(self, peer: str, number: int) -> Segment | None:
        arena = self._reached.get(peer)
        if arena is None:
            return super()._find(peer, number)
        return arena.segments.get(number) if number in arena.handover.given[self._life] else None

    def listen(self) -> None:
        """There are no packets."""
