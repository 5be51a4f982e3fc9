"""Where the bytes of a large value go: a slot that others look into, a buffer of our own, or memory near a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fabric.core import wire
from fabric.payloads import Pending, Plan, PooledBuffer, sampled_sum
from transports.arena import Place, Slot

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["Filled", "Frozen", "Room", "describe", "fill", "freeze"]


class Frozen:
    """A value that nobody can write any more: it may be put into one burst after another, until one is taken.

    Its memory comes back when the last view of it dies. `place`: where others may read it, if it lies in a slot.
    """

    __slots__ = ("place", "view")

    def __init__(self, view: memoryview, place: Place | None = None) -> None:
        self.view, self.place = view, place

    def freeze(self) -> memoryview:
        """As a pooled buffer's, but as often as it is asked."""
        return self.view

    def release(self) -> None:
        """Nothing is left to do."""


Room: TypeAlias = PooledBuffer | Slot | Frozen
Filled: TypeAlias = tuple[Room, Pending | None, bytes]
"""The value's memory, the copies that are under way, and the descriptor; empty while copies are."""


def fill(engine: Engine, planned: Plan, feed: int | None) -> Filled:
    """Take a snapshot of a value. With a `feed`, its readers may share the memory."""
    if planned.on_device:
        return *engine.devices.stage(planned), b""
    placed = engine.sharing.take(feed, planned.size) if feed is not None else None
    room, blocks = placed if placed is not None else (engine.pool.take(planned.size), 0)
    try:
        if blocks:  # all who read it share its memory: a sample will do
            planned.write(room.view)
            checksum = sampled_sum(room.view, blocks)
        else:
            checksum = planned.write_summed(room.view)
    except BaseException:
        room.release()
        raise
    slot = wire.Slot(*room.place) if isinstance(room, Slot) else None
    return room, None, wire.encode_descriptor(planned.size, checksum, blocks, slot)


def freeze(room: Room) -> Frozen:
    """Nobody can write to it any more. Raises `BufferError` while somebody can."""
    if isinstance(room, Frozen):
        return room
    return Frozen(room.freeze(), room.place if isinstance(room, Slot) else None)


def describe(frozen: Frozen, blocks: int) -> bytes:
    """The descriptor of a value that is in its place, by a sample of so many blocks; 0: of all of it."""
    view, place = frozen.view, frozen.place
    checksum = sampled_sum(view, blocks) if blocks else wire.checksum_of(view)
    slot = wire.Slot(*place) if place is not None else None
    return wire.encode_descriptor(len(view), checksum, blocks, slot)
