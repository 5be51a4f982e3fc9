"""Payloads on their way in: chunks put together in warm memory, and compared with their checksum."""

from __future__ import annotations

import numpy as np

from fabric.core import events
from fabric.core.wire import checksum_of
from fabric.payloads import BufferPool, Digest, PooledBuffer, copy_summed, sampled_sum

__all__ = ["Assemblies"]


class _Assembly:
    """One payload. One that comes as a single chunk is taken as it is.

    `summed`: how many bytes from its beginning `digest` has seen, chunk after chunk; -1 once their sum was wrong.
    `starved`: there was no memory for it; what still comes is in vain, until it is begun again.
    """

    __slots__ = ("digest", "place", "size", "starved", "summed", "view")

    def __init__(self, size: int) -> None:
        self.size = size
        self.digest, self.summed, self.starved = Digest(), 0, False
        self.place: PooledBuffer | None = None
        self.view: memoryview | None = None

    @property
    def filled(self) -> memoryview:
        """What was put together."""
        assert self.place is not None, "all of it was placed"
        return self.place.view


class Assemblies:
    """All payloads of one member that are under way."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool = pool
        self._all: dict[tuple[int, int], _Assembly] = {}

    def begin(self, command: events.BeginPayload) -> None:
        """Expect a payload."""
        self._all[command.space, command.number] = _Assembly(command.size)

    def place(self, command: events.PlaceChunk) -> None:
        """Put a chunk in its place. Raises `MemoryError`, once: there is no room for the payload."""
        assembly = self._all[command.space, command.number]
        if assembly.starved:
            return
        chunk = memoryview(command.chunk)
        if chunk.nbytes == assembly.size:
            assembly.view = chunk.toreadonly()
            return
        if assembly.place is None:
            assembly.starved = True  # unless it goes well
            assembly.place = self._pool.take(assembly.size)
            assembly.starved = False
        target = assembly.place.view[command.position : command.position + chunk.nbytes]
        if command.position == assembly.summed:
            copy_summed(target, chunk, assembly.digest)
            assembly.summed += chunk.nbytes
        else:
            np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(chunk, np.uint8))

    def is_starved(self, space: int, number: int) -> bool:
        """Whether there was no memory for this payload."""
        return self._all[space, number].starved

    def finish(self, command: events.FinishPayload) -> memoryview | None:
        """The bytes, read-only; None if they are not what their publisher sent: then they are expected once more."""
        key = command.space, command.number
        assembly = self._all[key]
        if self._sum(assembly, command.sample) != command.checksum:
            assembly.view, assembly.summed = None, -1
            return None
        del self._all[key]
        if assembly.view is None:
            assert assembly.place is not None, "all of it was placed"
            return assembly.place.freeze()
        if assembly.place is not None:
            assembly.place.release()
        return assembly.view

    def _sum(self, assembly: _Assembly, sample: int) -> int:
        if sample:
            return sampled_sum(assembly.view if assembly.view is not None else assembly.filled, sample)
        if assembly.view is not None:
            return checksum_of(assembly.view)
        return assembly.digest.intdigest() if assembly.summed == assembly.size else checksum_of(assembly.filled)

    def drop(self, command: events.DropPayload) -> None:
        """Give up a payload."""
        assembly = self._all.pop((command.space, command.number), None)
        if assembly is not None and assembly.place is not None:
            assembly.place.release()
