"""An arena and who reads it, real or simulated, for tests of what both have to do."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable

from fabric.testing.arenas import ArenaHub, ArenaPlan, FakeArena, FakeMappings
from transports.arena import Arena, ArenaLimits, Place
from transports.mappings import Mappings

KIB = 1024
SIZE = 64 * KIB
_numbers = itertools.count()


def address() -> str:
    """An abstract one that nobody has."""
    return f"\0arena-test-{os.getpid()}-{next(_numbers)}"


class RealArenas:
    """Arenas over memfd and Unix sockets."""

    def __init__(self) -> None:
        self.opened: list[Arena | Mappings] = []

    def arena(self, at: str, bytes_max: int = 64 * SIZE, segment_bytes: int = 8 * SIZE) -> Arena:
        """One that offers itself at an address."""
        arena = Arena(at, ArenaLimits(bytes_max=bytes_max, segment_bytes=segment_bytes))
        self.opened.append(arena)
        return arena

    def mappings(self, name: str = "reader", incarnation: int = 1, own: Arena | None = None) -> Mappings:
        """A reader."""
        mappings = Mappings(name, incarnation, own=own, own_key="own")
        self.opened.append(mappings)
        return mappings

    def close(self) -> None:
        """All of them."""
        for one in self.opened:
            one.close()


class FakeArenas(RealArenas):
    """Arenas of a simulated world."""

    def __init__(self) -> None:
        super().__init__()
        self.hubs: dict[int, ArenaHub] = {}
        self.hub = ArenaHub(0, ArenaPlan(), time.monotonic_ns)

    def arena(self, at: str, bytes_max: int = 64 * SIZE, segment_bytes: int = 8 * SIZE) -> Arena:
        """One that offers itself at an address."""
        self.hub.plan = ArenaPlan(segment_bytes=segment_bytes)
        arena = FakeArena(self.hub, at, bytes_max)
        self.opened.append(arena)
        return arena

    def mappings(self, name: str = "reader", incarnation: int = 1, own: Arena | None = None) -> Mappings:
        """A reader."""
        mappings = FakeMappings(self.hub, name, incarnation, own=own, own_key="own")
        self.opened.append(mappings)
        return mappings


def published(arena: Arena, content: bytes) -> tuple[Place, memoryview]:
    """A value in a slot, and the view that retention has of it."""
    slot = arena.take(len(content))
    assert slot is not None
    slot.view[:] = content
    return slot.place, slot.freeze()


def freed(arena: Arena, *places: Place) -> None:
    """Nobody reads them any more."""
    assert sorted(arena.forgotten()) == sorted(places)
    for place in places:
        arena.free(place)


def until(is_over: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait for another thread or process."""
    deadline = time.monotonic() + timeout_s
    while not is_over():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)
