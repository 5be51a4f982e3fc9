"""torch RPC (TensorPipe). Deprecated by its authors; many jobs have it.

Settings: the transports that the wheel has at run time (its shared-memory transport is not in official builds, so tcp
by libuv), one worker thread on each side, so that calls run in their order, four calls under way.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed import rpc

from perf.peers import base
from perf.peers.base import Array, Place

WINDOW = 4
_arrived: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()


def _deliver(header: bytes, value: Any) -> None:  # noqa: ANN401
    _arrived.put((header, value))


_answered = [0]


def _echo(question: bytes) -> bytes:
    _answered[0] += 1
    return question


def _open(place: Place) -> None:
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"file://{place.meeting}/rpc", num_worker_threads=1, rpc_timeout=60
    )
    rpc.init_rpc(f"side{place.rank}", rank=place.rank, world_size=place.world_size, rpc_backend_options=options)


class Writer(base.Writer):
    """Calls a function of each reader."""

    def open(self) -> None:
        _open(self.place)
        place = self.place
        self.readers = [f"side{rank}" for rank in range(place.writers, place.world_size)]

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        under_way: deque[Any] = deque()
        for header, array in items:
            for reader in self.readers:
                under_way.append(rpc.rpc_async(reader, _deliver, args=(header, torch.from_numpy(array))))
            while len(under_way) >= WINDOW * len(self.readers):
                under_way.popleft().wait()
        for call in under_way:
            call.wait()

    def close(self) -> None:
        rpc.shutdown()


class Reader(base.Reader):
    """Takes what the calls delivered."""

    def open(self) -> None:
        _open(self.place)

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        for _ in sizes:
            header, value = _arrived.get(timeout=60)
            yield header, value.numpy()

    def close(self) -> None:
        rpc.shutdown()


class Caller(base.Caller):
    """A synchronous call."""

    def open(self) -> None:
        _open(self.place)

    def call(self, question: bytes) -> Any:  # noqa: ANN401
        return rpc.rpc_sync("side1", _echo, args=(question,))

    def close(self) -> None:
        rpc.shutdown()


class Answerer(base.Answerer):
    """Its worker thread answers; `serve` only waits for the end."""

    wanted = 0

    def open(self) -> None:
        _open(self.place)

    def serve(self, n: int) -> None:
        self.wanted += n
        while _answered[0] < self.wanted:
            time.sleep(0.01)

    def close(self) -> None:
        rpc.shutdown()
