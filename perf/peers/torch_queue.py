"""torch.multiprocessing's queue: what a training script has without installing anything.

Settings: its defaults; a tensor's memory is handed over as a file descriptor. Each array is copied into a tensor of its
own first, as a trainer must whose weights change: the queue shares the memory that it is given. One queue a reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import multiprocessing

from perf.peers import base
from perf.peers.base import Array

__all__ = ["Reader", "Writer", "queues"]


def queues(context: Any, sides: int) -> list[Any]:  # noqa: ANN401
    """One for each side; readers use theirs. The bound keeps a writer from filling the memory."""
    return [multiprocessing.get_context("spawn").Queue(64) for _ in range(sides)]


class Writer(base.Writer):
    """Puts into the queue of each reader."""

    def open(self) -> None:
        torch.set_num_threads(1)
        place = self.place
        self.queues = place.shared[place.writers :]

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        for record in records:
            for each in self.queues:
                each.put(record)

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        for header, array in items:
            tensor = torch.from_numpy(array).clone()
            for each in self.queues:
                each.put((header, tensor))


class Reader(base.Reader):
    """Gets from its own."""

    def open(self) -> None:
        torch.set_num_threads(1)
        self.queue = self.place.shared[self.place.rank]

    def read(self, n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield self.queue.get(timeout=60)

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for _ in sizes:
            header, tensor = self.queue.get(timeout=60)
            yield header, tensor.numpy()
