"""Closed bursts on their way to the core, in order: one that waits for copies from a device holds up the rest."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

from fabric.core.events import BurstClosed
from fabric.core.wire import TOMBSTONE, checksum_of, encode_burst, encode_descriptor
from fabric.engine.filling import Room, freeze
from fabric.payloads import Pending, StagingError

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["Closed", "Leaving"]


class Closed:
    """The records of a burst that is closed. `rows` are its columns: seeds, sequences, previous, kinds, bodies.

    `with_seeds`: whether the core has to know the seeds.
    """

    __slots__ = ("bodies", "columns", "first", "kinds", "metadata", "payloads", "room", "waiting", "with_seeds")

    def __init__(
        self,
        first: int,
        rows: Sequence[list[Any]],
        metadata: dict[int, bytes],
        payloads: dict[int, Room],
        waiting: list[tuple[int, Pending]],
        room: int,
        *,
        with_seeds: bool,
    ) -> None:
        self.first, self.columns = first, rows[:3]
        self.kinds, self.bodies = rows[3:]
        self.metadata, self.payloads, self.waiting, self.room = metadata, payloads, waiting, room
        self.with_seeds = with_seeds


class Leaving:
    """What has left the open burst of one feed, and not reached the core yet. Its caller keeps others out."""

    def __init__(self, engine: Engine, topic: str, feed: int) -> None:
        self._engine, self._topic, self._feed = engine, topic, feed
        self._queue: deque[Closed | BurstClosed] = deque()

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return bool(self._queue)

    def add(self, *bursts: Closed | BurstClosed) -> None:
        """These are to `go`, one after the other."""
        self._queue.extend(bursts)

    def go(self) -> None:
        """What does not wait any more leaves for the core."""
        queue = self._queue
        while queue:
            burst = queue[0]
            if isinstance(burst, Closed):
                if burst.waiting and not all(self._is_done(burst, entry) for entry in list(burst.waiting)):
                    break
                burst.waiting.clear()  # they may still look at the buffers, which are frozen now
                burst = self._encode(burst)
            self._engine.submit_later(burst)
            queue.popleft()

    def clear(self) -> None:
        """In a forked child: it belongs to the parent."""
        self._queue.clear()

    def _is_done(self, closed: Closed, entry: tuple[int, Pending]) -> bool:
        offset, pending = entry
        try:
            return pending.poll()
        except StagingError:
            self._engine.counts["copies_failed"] += 1
            closed.kinds[offset - closed.first] = TOMBSTONE
            closed.payloads.pop(offset).release()
            closed.waiting.remove(entry)
            return True

    def _encode(self, closed: Closed) -> BurstClosed:
        engine = self._engine
        payloads: dict[int, memoryview] = {}
        for offset, room in closed.payloads.items():
            frozen = freeze(room)
            view = payloads[offset] = frozen.view
            if frozen.place is not None:
                engine.sharing.note(self._feed, offset, frozen.place, len(view))
            if not closed.bodies[offset - closed.first]:  # it came from a device
                closed.bodies[offset - closed.first] = encode_descriptor(len(view), checksum_of(view))
        metadata = list(map(closed.metadata.get, range(len(closed.bodies)), repeat(b""))) if closed.metadata else None
        head = self._feed, engine.card.incarnation, closed.first, engine.wall_ns()
        seeds, sequences, previous = closed.columns
        frame = encode_burst(*head, seeds, sequences, previous, closed.kinds, closed.bodies, metadata)
        told = tuple(seeds) if closed.with_seeds else ()
        return BurstClosed(self._topic, closed.first, len(closed.bodies), frame, payloads or None, told, closed.room)
