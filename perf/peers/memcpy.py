"""The 100 % line: `np.copyto` from the same sources through four warm slots of shared memory, in one process.

Nobody can hand over a snapshot on one host faster than it can be made once. The slots lie in an unlinked shared
mapping, as ours do, were all written before, and take turns, so that a slot is as cold in the caches as a real one.
There is no second process: that a reader would have to be woken is not counted.
"""

from __future__ import annotations

import mmap
import time
from pathlib import Path
from typing import Any

import numpy as np

from perf.peers.base import Array

SLOTS = 4


class Copier:
    """One process alone."""

    def __init__(self, *, rank: int, meeting: Path, **_: Any) -> None:  # noqa: ANN401 - what others need
        self.slots: list[Array] = []

    def open(self) -> None:
        pass

    def _make(self, size: int) -> None:
        if not self.slots or self.slots[0].nbytes != size:
            self.slots = [np.frombuffer(mmap.mmap(-1, size), dtype=np.uint8) for _ in range(SLOTS)]
            self.sources = [np.full(size, k + 1, dtype=np.uint8) for k in range(2)]

    def run(self, *, n: int, size: int, seeds: int = 1) -> dict[str, Any]:
        self._make(size)
        start = time.monotonic_ns()
        for position in range(n):
            np.copyto(self.slots[position % SLOTS], self.sources[position % 2])
        return {"start_ns": start, "end_ns": time.monotonic_ns(), "n": n}

    def close(self) -> None:
        pass


class StateCopier(Copier):
    """The arrays of a dictionary, as one after the other in a slot."""

    def run(self, *, shape: str, n: int) -> dict[str, Any]:
        from perf.sides import state_sizes

        sizes = state_sizes(shape)
        self._make(sum(sizes))
        start = time.monotonic_ns()
        for version in range(n):
            slot, source, at = self.slots[version % SLOTS], self.sources[version % 2], 0
            for size in sizes:
                np.copyto(slot[at : at + size], source[at : at + size])
                at += size
        return {"start_ns": start, "end_ns": time.monotonic_ns(), "n": n}
