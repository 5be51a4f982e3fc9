"""Shared memory without each of its rules. Every variant has to be caught by some seed with `SHARED`."""

from __future__ import annotations

from typing import Any

import numpy as np

from fabric.core.holding import Holding, _Hold
from fabric.core.leases import Leases
from fabric.core.obtaining import Obtaining
from fabric.core.sharing import FreeSlots, ReaderGone
from fabric.testing.arenas import FakeMappings
from tests.simulation.variants import Patch, Variant, wrapped


def freed_although_leased() -> list[Patch]:
    def on_forgotten(self: Any, event: Any) -> None:
        self._context.emit(FreeSlots([(feed, offset) for feed, offset, _ in event.slots]))

    return [(Leases, "on_forgotten", on_forgotten)]


def leased_is_not_awaited() -> list[Patch]:
    def may_read(self: Any, feed: int, offset: int) -> bool:
        return feed in self._holds

    def obtain(original: Any, self: Any, followed: Any, offset: int, descriptor: Any) -> None:
        if self._holding.reaches(followed.peer.name, followed.incarnation):
            self._holding.begin(followed.feed, followed.peer.name, followed.inbounds)
        original(self, followed, offset, descriptor)

    return [(Holding, "may_read", may_read), wrapped(Obtaining, "_obtain", obtain)]


def generation_ignored() -> list[Patch]:
    """What is told by mistake is found out by its generation alone; so both are broken."""

    def map_slot(original: Any, self: Any, peer: str, place: Any, size: int) -> Any:
        segment = self._find(peer, place.segment)
        if segment is not None and place.slot < segment.slots:
            place = place._replace(generation=segment.table[place.slot])
        return original(self, peer, place, size)

    return [wrapped(FakeMappings, "map", map_slot), *leased_is_not_awaited()]


def floor_is_what_was_taken() -> list[Patch]:
    def floor_now(original: Any, self: Any) -> int:
        return max([int(original(self)), *(inbound.known for inbound in self.inbounds)])

    def may_read(self: Any, feed: int, offset: int) -> bool:
        hold = self._holds.get(feed)
        return hold is not None and hold.is_leased

    return [wrapped(_Hold, "floor_now", floor_now), (Holding, "may_read", may_read)]


def held_is_not_told() -> list[Patch]:
    def row(original: Any, self: Any, hold: Any) -> Any:
        return (*original(self, hold)[:4], [])

    return [wrapped(Holding, "_row", row)]


def released_when_settled() -> list[Patch]:
    def read(self: Any, feed: int, offset: int) -> None:
        """A view is not counted."""

    return [(Holding, "read", read), (Holding, "on_released", lambda self, event: None)]


def goodbye_is_death() -> list[Patch]:
    def leave(self: Any, peer: Any) -> None:
        self.on_gone(ReaderGone(peer.name, peer.incarnation))

    return [(Leases, "leave", leave)]


def death_is_not_told() -> list[Patch]:
    return [(Leases, "on_gone", lambda self, event: None)]


def told_once_and_never_again() -> list[Patch]:
    return [(Leases, "tick", lambda self: setattr(self, "_recall_ns", 0))]


def lost_tails_are_kept() -> list[Patch]:
    return [(_Hold, "pass_by", lambda self, end: None)]


def views_share_an_owner() -> list[Patch]:
    """A view is told dead when the first look at it is over."""

    def map_slot(original: Any, self: Any, peer: str, place: Any, size: int) -> Any:
        view = original(self, peer, place, size)
        if view is None:
            return None
        return memoryview(np.frombuffer(self._find(peer, place.segment).readable, np.uint8))[
            _begin(self._find(peer, place.segment), place) :
        ][:size]

    return [wrapped(FakeMappings, "map", map_slot)]


def _begin(segment: Any, place: Any) -> int:
    return int(segment.start + place.slot * segment.slot_bytes)


def overtaken_is_believed() -> list[Patch]:
    def on_holds(original: Any, self: Any, peer: Any, rows: Any) -> None:
        for readers in self._needs.values():
            for life, needs in readers.items():
                if life == (peer.name, peer.incarnation):
                    needs.serial = -1
        original(self, peer, rows)

    return [wrapped(Leases, "on_holds", on_holds)]


ARENA_VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        freed_although_leased,
        leased_is_not_awaited,
        generation_ignored,
        floor_is_what_was_taken,
        held_is_not_told,
        released_when_settled,
        goodbye_is_death,
        death_is_not_told,
        told_once_and_never_again,
        lost_tails_are_kept,
        views_share_an_owner,
        overtaken_is_believed,
    )
}
