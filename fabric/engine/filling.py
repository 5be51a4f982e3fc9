"""Where the bytes of a large value go: a slot that others look into, a buffer of our own, or memory near a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fabric.core import wire
from fabric.payloads import Pending, Plan, PooledBuffer, sampled_sum
from transports.arena import Slot

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["Filled", "Room", "fill"]

Room: TypeAlias = PooledBuffer | Slot
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
