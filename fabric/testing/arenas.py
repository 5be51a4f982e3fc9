"""Shared memory of a simulated world: the real books of slots over plain bytes, and no sockets.

A slot that is freed is poisoned at once, so that whoever still looks at it sees other bytes than were published.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Final

import numpy as np

from transports.arena import Arena, ArenaLimits, Cell, Slot
from transports.handover import Offer, Reader
from transports.mappings import Mappings, Writer
from transports.segments import Kind, Layout, Place, Segment, unpack_packet

__all__ = ["ArenaHub", "ArenaPlan", "FakeArena", "FakeMappings"]

POISON: Final = 0xDD
MS: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaPlan:
    """What goes wrong with shared memory; default: nothing. `FabricConfig.arena.bytes_max` says how much there is."""

    segment_bytes: int = 256 * 1024
    refusals: float = 0.0
    """Probability that a fresh slot gets no memory."""
    blindness: float = 0.0
    """Probability that a reader cannot map a slot."""
    behind: float = 0.0
    """Probability that a segment does not fit into the socket of a reader: it gets it a little later."""
    death_ms: float = 0.0
    """How long it takes at most until the death of a reader is noticed; chance decides."""


class ArenaHub:
    """All arenas of a world, by address."""

    def __init__(self, seed: int, plan: ArenaPlan, clock: Callable[[], int]) -> None:
        self.plan, self.clock, self.rng = plan, clock, Random(f"arenas {seed}")
        self.offers: dict[str, HubHandover] = {}
        self.deaths: dict[tuple[str, int], int] = {}
        """Lives whose process has ended, and when that is noticed."""

    def died(self, name: str, incarnation: int) -> None:
        """The process of this life has ended."""
        delay_ms = self.rng.random() * self.plan.death_ms
        self.deaths.setdefault((name, incarnation), self.clock() + int(delay_ms * MS))

    def happens(self, probability: float) -> bool:
        """Chance."""
        return bool(probability) and self.rng.random() < probability


class Link:
    """The socket between a reader and a writer, as both of them use it."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.packets: deque[tuple[int, Layout, memoryview | None]] = deque()
        self.holds: set[int] = set()
        self.is_open, self.behind = True, True

    def send(self, packet: bytes) -> int:
        """The reader says that it has let go of a segment."""
        kind, layout = unpack_packet(packet)
        assert kind == Kind.GONE
        if not self.is_open:
            raise BrokenPipeError
        self.holds.discard(layout.number)
        return len(packet)

    def close(self) -> None:
        """Either end."""
        self.is_open = False


class HubHandover:
    """Gives segments to the readers of its world; see `transports.handover.SocketHandover`."""

    def __init__(self, hub: ArenaHub, address: str) -> None:
        self._hub, self._address = hub, address
        self._links: list[Link] = []
        self._known: set[Reader] = set()
        self._refused: set[str] = set()
        self.counts = {"behind": 0}
        hub.offers[address] = self

    def connect(self, reader: Reader) -> Link:
        """A reader greets."""
        for link in self._links:
            if link.reader == reader:
                link.close()
        link = Link(reader)
        self._links.append(link)
        self._known.add(reader)
        return link

    def give(self, segment: Offer) -> None:
        """To all who are neither refused nor behind."""
        for link in self._links:
            if not link.behind and link.reader.name not in self._refused:
                self._give_to(link, segment)

    def _give_to(self, link: Link, segment: Offer) -> None:
        if self._hub.happens(self._hub.plan.behind):
            link.behind = True
            self.counts["behind"] += 1
        else:
            assert isinstance(segment, Segment)
            link.packets.append((Kind.SEGMENT, segment.layout, segment.readable))
            link.holds.add(segment.number)

    def drop(self, segment: Offer) -> None:
        """Tell whoever has it."""
        for link in self._links:
            if segment.layout.number in link.holds:
                link.packets.append((Kind.DROP, segment.layout, None))

    def holds(self, number: int) -> bool:
        """Whether somebody may have a mapping of it."""
        return any(number in link.holds for link in self._links)

    def refuse(self, name: str) -> None:
        """It gets nothing any more."""
        self._refused.add(name)

    def admit(self, name: str) -> None:
        """It gets what it has not got."""
        self._refused.discard(name)
        for link in self._links:
            link.behind = link.behind or link.reader.name == name

    def catch_up(self, segments: Iterable[Offer]) -> None:
        """Give what is missing."""
        for link in self._links:
            if link.behind:
                link.behind = False
                for segment in segments:
                    admitted = link.reader.name not in self._refused and not link.behind
                    if admitted and segment.layout.number not in link.holds:
                        self._give_to(link, segment)

    def reads(self, name: str) -> bool:
        """Whether it has everything."""
        links = [link for link in self._links if link.reader.name == name]
        return name not in self._refused and any(not link.behind for link in links)

    def poll(self) -> list[Reader]:
        """The dead, each told once."""
        self._links = [link for link in self._links if link.is_open]
        now, deaths = self._hub.clock(), self._hub.deaths
        dead = sorted(reader for reader in self._known if deaths.get((reader.name, reader.incarnation), now + 1) <= now)
        self._known.difference_update(dead)
        names = {reader.name for reader in self._known}
        self._refused = {name for name in self._refused if name in names}
        return dead

    def readers(self) -> int:
        """Connected, or perhaps still looking."""
        return len(self._known)

    def descriptors(self) -> list[int]:
        """Nobody sleeps here."""
        return []

    def close(self, *, unlink: bool) -> None:
        """Nobody connects any more."""
        self._hub.offers.pop(self._address, None)
        for link in self._links:
            link.close()


class FakeArena(Arena):
    """The arena of a member of a world."""

    def __init__(self, hub: ArenaHub, address: str, bytes_max: int) -> None:
        self._hub = hub
        super().__init__(address, ArenaLimits(bytes_max=bytes_max, segment_bytes=hub.plan.segment_bytes))

    def _open(self, address: str) -> HubHandover:
        return HubHandover(self._hub, address)

    def _create(self, layout: Layout) -> tuple[int, memoryview]:
        return -1, memoryview(bytearray(layout.size))

    def _allocate(self, descriptor: int, offset: int, size: int) -> None:
        if self._hub.happens(self._hub.plan.refusals):
            raise OSError("no memory")

    def take(self, size: int) -> Slot | None:
        """As `Arena.take`."""
        slot = super().take(size)
        assert slot is None or self._is_poisoned(slot), "whoever lets go of a slot writes to it no more"
        return slot

    @staticmethod
    def _is_poisoned(slot: Slot) -> bool:
        content = np.frombuffer(slot.view, np.uint8)
        return bool((content == content[0]).all()) and content[0] in (0, POISON)

    def _let_go(self, cell: Cell) -> None:
        cell.room[:] = POISON
        super()._let_go(cell)


class FakeMappings(Mappings):
    """What a member of a world reads of others."""

    def __init__(self, hub: ArenaHub, name: str, incarnation: int, *, own: Arena, own_key: str) -> None:
        super().__init__(name, incarnation, own=own, own_key=own_key)
        self._hub = hub

    def connect(self, peer: str, address: str) -> bool:
        """As `Mappings.connect`."""
        self._check()
        self.disconnect(peer)
        offer = self._hub.offers.get(address)
        if offer is None:
            return False
        self._writers[peer] = Writer(offer.connect(Reader(self._name, self._incarnation, os.getpid())))
        return True

    def map(self, peer: str, place: Place, size: int) -> memoryview | None:
        """As `Mappings.map`."""
        return None if self._hub.happens(self._hub.plan.blindness) else super().map(peer, place, size)

    def _hear(self, writer: Writer) -> None:
        link = writer.connection
        assert isinstance(link, Link)
        while link.packets:
            kind, layout, memory = link.packets.popleft()
            if kind == Kind.SEGMENT and memory is not None:
                writer.segments[layout.number] = Segment(layout, memory)
            elif layout.number in writer.segments:
                writer.segments[layout.number].dropped = True
