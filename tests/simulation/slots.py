"""Slots that should be free: retention let go of them, and whoever read there looks at them no more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fabric.engine.loop import Engine
from fabric.testing import World

__all__ = ["unfreed"]


def unfreed(world: World, engines: Sequence[Engine], zombies: Sequence[Engine]) -> Iterator[str]:
    """Slots that these publishers believe to be needed, and are not."""
    for engine in engines:
        leases = engine.core.publishing.leases
        for feed, slots in leases._forgotten.items():
            for life, needs in leases._needs[feed].items():
                for offset in slots:
                    if needs.include(offset) and not _is_looked_at(world, zombies, life, feed, offset):
                        yield f"{engine.card.name} waits for {life} with slot {offset} of {feed}"


def _is_looked_at(world: World, zombies: Sequence[Engine], life: tuple[str, int], feed: int, offset: int) -> bool:
    """A zombie may look at it, and so may the process of a life that is over."""
    engine = world.history.lives[life].engine
    if engine is None:
        return world.lingers(*life)
    hold = engine.core.following.holding._holds.get(feed)
    return engine in zombies or (hold is not None and offset in hold.views)
