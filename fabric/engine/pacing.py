"""A thread that floods a topic gives way when even the fastest reader falls behind.

What the sockets cannot hold is dropped by PUB and has to be repaired, which costs more than a short wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fabric.config import BURST_BYTES_MAX
from fabric.engine.steps import Steps, Wait

if TYPE_CHECKING:
    from fabric.core.feeds import OutFeed
    from fabric.engine.loop import Engine

__all__ = ["Pacing"]

PACE_BYTES = 24 * 1024 * 1024
"""Ahead of the fastest reader; well below what the sockets hold, 1,000 bursts of 64 KiB."""
PACE_PAYLOADS = 3
"""... or so many large values: enough to keep the link busy, few enough that their buffers stay warm."""
PACE_ARENA = 4
"""... and no more than this part of an arena: what finds no slot goes by socket, and takes ten times as long."""
PACE_S = 0.1
"""The longest that a flooding thread gives way; a reader that has not moved then is not waited for until it does."""


class Pacing:
    """Of one topic."""

    def __init__(self, engine: Engine, topic: str) -> None:
        self._engine, self._topic, self._stalled_at = engine, topic, -1

    def giving_way(self, next_offset: Callable[[], int], record_bytes: int) -> Steps[None]:
        """The steps of a short wait, if one is needed; records are so large on average."""
        engine = self._engine
        out = engine.core.publishing.feeds.get(self._topic)
        most = PACE_BYTES
        if record_bytes > BURST_BYTES_MAX:
            most = min(max(most, PACE_PAYLOADS * record_bytes), engine.config.arena.bytes_max // PACE_ARENA)

        def fastest(out: OutFeed) -> int:
            return max(list(out.readers.values()), default=next_offset())

        def is_near(out: OutFeed) -> bool:
            return (next_offset() - fastest(out)) * record_bytes <= most

        if out is None or is_near(out) or fastest(out) == self._stalled_at:
            return
        engine.counts["publish_paced"] += 1
        if not (yield Wait(lambda: is_near(out), PACE_S)):
            self._stalled_at = fastest(out)
