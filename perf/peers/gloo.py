"""gloo (torch.distributed): send and recv, and broadcast to several readers.

Settings: one thread for torch, the loopback interface, and two receive tensors of each size made beforehand, which is
its normal use. It has nothing but tcp between processes, whatever the row says. No header travels: both sides take part
in each transfer, in order, and know its size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import distributed

from perf.peers import base
from perf.peers.base import Array, Place


def _open(place: Place) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    meeting = f"file://{place.meeting}/gloo"
    distributed.init_process_group("gloo", init_method=meeting, rank=place.rank, world_size=place.world_size)
    distributed.barrier()


class Writer(base.Writer):
    """Rank 0."""

    def open(self) -> None:
        _open(self.place)

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        several = self.place.readers > 1
        for _, array in items:
            tensor = torch.from_numpy(array)
            if several:
                distributed.broadcast(tensor, 0)
            else:
                distributed.send(tensor, 1)

    def close(self) -> None:
        distributed.destroy_process_group()


class Reader(base.Reader):
    """The other ranks."""

    def open(self) -> None:
        _open(self.place)
        self.tensors: dict[tuple[int, int], torch.Tensor] = {}

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        several = self.place.readers > 1
        for at, size in enumerate(sizes):
            tensor = self.tensors.setdefault((size, at % 2), torch.empty(0, dtype=torch.uint8))
            if not tensor.numel():
                tensor = self.tensors[size, at % 2] = torch.from_numpy(np.zeros(size, dtype=np.uint8))
            if several:
                distributed.broadcast(tensor, 0)
            else:
                distributed.recv(tensor, 0)
            yield None, tensor.numpy()

    def close(self) -> None:
        distributed.destroy_process_group()


class Caller(base.Caller):
    """Sends and receives in turn."""

    def open(self) -> None:
        _open(self.place)
        self.answer = torch.empty(0, dtype=torch.uint8)

    def call(self, question: bytes) -> bytes:
        if self.answer.numel() != len(question):
            self.answer = torch.empty(len(question), dtype=torch.uint8)
        distributed.send(torch.frombuffer(bytearray(question), dtype=torch.uint8), 1)
        distributed.recv(self.answer, 1)
        return self.answer.numpy().tobytes()

    def close(self) -> None:
        distributed.destroy_process_group()


class Answerer(base.Answerer):
    """The other way round; sizes are told once before, by the questions' own, which are all of 256 bytes."""

    SIZE = 256

    def open(self) -> None:
        _open(self.place)
        self.question = torch.empty(self.SIZE, dtype=torch.uint8)

    def serve(self, n: int) -> None:
        for _ in range(n):
            distributed.recv(self.question, 0)
            distributed.send(self.question, 0)

    def close(self) -> None:
        distributed.destroy_process_group()
