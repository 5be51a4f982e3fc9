"""Shared memory between members of one host: our arena, and what we look at in those of others.

The core decides what is read and what may be reused; here are the slots by the names that it knows, (feed, offset).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from fabric.config import Verify
from fabric.core.cards import Card
from fabric.core.sharing import (
    AdmitReader,
    ArenaReached,
    FreeSlots,
    ReaderGone,
    ReadSlot,
    RefuseReader,
    SlotRead,
    SlotsForgotten,
    SlotsReleased,
    SlotsWanted,
)
from fabric.core.wire import SAMPLE_BLOCKS, Descriptor, checksum_of, member_id
from fabric.payloads import sampled_sum
from transports import TransportError
from transports.arena import Arena as SharedArena
from transports.arena import ArenaLimits, Place, Reader, Slot
from transports.mappings import Mappings as SharedMappings

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["NoSharing", "Sharing", "open_sharing"]

log = logging.getLogger("fabric.arena")

POLL_NS = 5_000_000
"""New readers and dead ones are looked for so often while others keep us busy."""


class Arena(Protocol):
    """Our memory that others read; `transports.arena.Arena`, or the one of a simulated world."""

    def take(self, size: int) -> Slot | None: ...
    def forgotten(self) -> list[Place]: ...
    def free(self, place: Place) -> None: ...
    def poll(self) -> list[Reader]: ...
    def refuse(self, name: str) -> None: ...
    def admit(self, name: str) -> None: ...
    def descriptors(self) -> list[int]: ...
    def statistics(self) -> dict[str, int]: ...
    def abandon(self) -> None: ...
    def close(self) -> None: ...


class Mappings(Protocol):
    """What we read of others; `transports.arena.Mappings`, or those of a simulated world."""

    def connect(self, peer: str, address: str) -> bool: ...
    def disconnect(self, peer: str) -> None: ...
    def map(self, peer: str, place: Place, size: int) -> memoryview | None: ...
    def released(self) -> list[tuple[str, Place]]: ...
    def listen(self) -> None: ...
    def statistics(self) -> dict[str, int]: ...
    def abandon(self) -> None: ...
    def close(self) -> None: ...


class NoSharing:
    """A member whose large values travel by socket only."""

    def take(self, feed: int, size: int) -> tuple[Slot, int] | None:
        """There is no slot for a value."""
        return None

    def blocks_for(self, feed: int) -> int:
        """All of a value is summed."""
        return 0

    def note(self, feed: int, offset: int, place: Place, size: int) -> None:
        """Nothing was taken."""

    def turn(self, now: int) -> None:
        """Nothing happens."""

    def meet(self, card: Card) -> None:
        """It has no arena that we could read."""

    def part(self, name: str) -> None:
        """It had none."""

    def descriptors(self) -> list[int]:
        """Nothing to sleep on."""
        return []

    def statistics(self) -> dict[str, int]:
        """Nothing to tell."""
        return {}

    def execute(self, command: object) -> None:
        """The core never asks for anything."""
        raise AssertionError(f"{command} without an arena")

    def abandon(self) -> None:
        """Nothing was inherited."""

    def close(self) -> None:
        """Nothing is open."""


class Sharing(NoSharing):
    """One member's arena and mappings. `address_of` names the arena of a card."""

    def __init__(self, engine: Engine, arena: Arena, mappings: Mappings, address_of: Callable[[Card], str]) -> None:
        self._engine, self._arena, self._mappings, self._address_of = engine, arena, mappings, address_of
        self._verify = engine.config.arena.verify
        self._leases = engine.core.publishing.leases
        self._slots: dict[tuple[int, int], Place] = {}
        """Where values of ours lie, by feed and offset, until their slots may be reused."""
        self._values: dict[Place, tuple[int, int, int]] = {}
        """The other way round: feed, offset and bytes."""
        self._views: dict[tuple[str, Place], tuple[int, int, int]] = {}
        """What we look at: feed, offset and bytes, ..."""
        self._looks: Counter[tuple[str, Place]] = Counter()
        """... and how many views of it there are."""
        self._keys: dict[str, str] = {}
        """Under which key each peer's arena is mapped: that of its current life."""
        self._poll_ns, self._warned = 0, False
        self._commands: dict[type, Callable[[Any], None]] = {
            ReadSlot: self._read,
            FreeSlots: self._free,
            RefuseReader: self._refuse,
            AdmitReader: lambda command: self._arena.admit(command.name),
        }
        engine.submit_later(ArenaReached(engine.card.name, engine.card.incarnation))

    # Publishing, from any thread.

    def take(self, feed: int, size: int) -> tuple[Slot, int] | None:
        """A slot for a value that somebody reads there, and how many blocks of it are to be summed, 0 for all.

        None: the value needs other memory.
        """
        lives = self._leases.shared_with(feed)
        if not lives:
            return None
        slot = self._arena.take(size)
        if slot is None:
            self._note_refusal(size)
            return None
        return slot, self.blocks_for(feed)

    def blocks_for(self, feed: int) -> int:
        """How many blocks of a value in a slot are to be summed, 0 for all: who reads by socket verifies all of it."""
        lives = self._leases.shared_with(feed)
        out = self._engine.core.publishing.by_id[feed]
        names = {name for name, _ in lives}
        nobody_else = all(name in names for name, _ in [*list(out.readers), *list(out.listeners)])
        return SAMPLE_BLOCKS if lives and nobody_else and self._verify is not Verify.ALWAYS else 0

    def _note_refusal(self, size: int) -> None:
        """Of a full arena the history gives way. That the system has no memory is said once."""
        self._engine.submit(SlotsWanted(size))
        if not self._warned and self._arena.statistics()["fallback_no_memory"]:
            self._warned = True
            log.warning(
                "%s gets no more shared memory from the system: large values travel by socket", self._engine.card.name
            )

    def note(self, feed: int, offset: int, place: Place, size: int) -> None:
        """The value of this record lies there."""
        self._slots[feed, offset] = place
        self._values[place] = (feed, offset, size)

    # Driving.

    def turn(self, now: int) -> None:
        """Tell the core what happened. Needs the engine's lock."""
        submit = self._engine.submit_later
        forgotten = self._arena.forgotten()
        if forgotten:
            submit(SlotsForgotten([self._values[place] for place in forgotten if self._is_known(place)]))
        released = self._mappings.released()
        if released:  # before what was settled: an acknowledgement makes room for a value that needs a slot
            self._engine.submit_first(SlotsReleased([self._let_go(key) for key in released]))
        if now >= self._poll_ns:
            self._poll_ns = now + POLL_NS
            self._mappings.listen()
            for reader in self._arena.poll():
                submit(ReaderGone(reader.name, reader.incarnation))

    def _is_known(self, place: Place) -> bool:
        """Whether a record told of this slot; one that was refused after it was frozen is free at once."""
        if place in self._values:
            return True
        self._arena.free(place)
        return False

    def _let_go(self, key: tuple[str, Place]) -> tuple[int, int, int]:
        view = self._views[key]
        self._looks[key] -= 1
        if not self._looks[key]:
            del self._looks[key], self._views[key]
        return view

    def descriptors(self) -> list[int]:
        """Readable when a reader came or died."""
        return self._arena.descriptors()

    # Peers.

    def meet(self, card: Card) -> None:
        """A member of this host may have an arena that we can read."""
        ours = self._engine.card
        if card.host != ours.host:
            return
        self.part(card.name)  # the arena of an earlier life
        key = _key(card.name, card.incarnation)
        if self._mappings.connect(key, self._address_of(card)):
            self._keys[card.name] = key
            self._engine.submit_later(ArenaReached(card.name, card.incarnation))

    def part(self, name: str) -> None:
        """We are not connected to this member any more; what we look at stays."""
        key = self._keys.pop(name, None)
        if key is not None:
            self._mappings.disconnect(key)

    # Commands.

    def execute(self, command: object) -> None:
        """What the core decided."""
        self._commands[type(command)](command)

    def _read(self, command: ReadSlot) -> None:
        descriptor, key = command.descriptor, _key(command.peer, command.incarnation)
        assert descriptor.slot is not None, "the core asks for what lies in a slot"
        place = Place(*descriptor.slot)
        view = self._mappings.map(key, place, descriptor.size)
        if view is None:
            self._engine.submit_later(SlotsReleased([(command.feed, command.offset, 0)]))
        else:
            self._views[key, place] = (command.feed, command.offset, descriptor.size)
            self._looks[key, place] += 1
            if not self._is_intact(view, descriptor):
                self._engine.counts["slots_corrupt"] += 1
                view = None  # its release is told by its death, as any other's
        self._engine.submit_later(SlotRead(command.feed, command.offset, view))

    def _is_intact(self, view: memoryview, descriptor: Descriptor) -> bool:
        if self._verify is Verify.OFF:
            return True
        blocks = descriptor.sample
        return (sampled_sum(view, blocks) if blocks else checksum_of(view)) == descriptor.checksum

    def _free(self, command: FreeSlots) -> None:
        for name in command.slots:
            place = self._slots.pop(name)
            del self._values[place]
            self._arena.free(place)

    def _refuse(self, command: RefuseReader) -> None:
        log.warning("%s keeps half of the arena: it gets large values by socket until it lets go of them", command.name)
        self._arena.refuse(command.name)

    # The end.

    def statistics(self) -> dict[str, int]:
        """Counters of the arena and of what is mapped."""
        return {
            f"arena_{name}": value for name, value in (self._arena.statistics() | self._mappings.statistics()).items()
        }

    def abandon(self) -> None:
        """In a forked child: the parent's memory is left alone."""
        self._arena.abandon()
        self._mappings.abandon()

    def close(self) -> None:
        """No slot is given out any more; views live on."""
        self._arena.close()
        self._mappings.close()


def open_sharing(engine: Engine) -> NoSharing:
    """The shared memory of this member; none if it is turned off, or the system has none to give."""
    if not engine.config.arena.enabled:
        return NoSharing()
    card = engine.card
    try:
        arena = SharedArena(_address_of(card), ArenaLimits(bytes_max=engine.config.arena.bytes_max))
    except (OSError, TransportError) as error:
        log.warning("%s has no shared memory, large values travel by socket: %s", card.name, error)
        return NoSharing()
    mappings = SharedMappings(card.name, card.incarnation, own=arena, own_key=_key(card.name, card.incarnation))
    return Sharing(engine, arena, mappings, _address_of)


def _key(name: str, incarnation: int) -> str:
    """Under which the arena of one life of a member is mapped."""
    return f"{name}@{incarnation}"


def _address_of(card: Card) -> str:
    """Abstract: it lies in no directory, so nothing of it is left behind, whoever is killed (unix(7))."""
    return f"\0tensor-fabric-{member_id(card.name):016x}-{card.incarnation:016x}-{card.pid}"
