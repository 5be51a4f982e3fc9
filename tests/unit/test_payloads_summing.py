"""Values and payloads are summed while they are copied; the sum is that of what lies there."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch

from fabric.core.events import BeginPayload, DropPayload, FinishPayload, PlaceChunk
from fabric.core.wire import checksum_of
from fabric.engine.assembling import Assemblies
from fabric.payloads import BufferPool, plan
from fabric.payloads.summing import BLOCK_BYTES, Digest, copy_summed

LARGE = np.arange(3 * BLOCK_BYTES // 4 + 5, dtype=np.float32)
VALUES: list[Any] = [
    LARGE,
    LARGE[::2],
    LARGE.astype(">f4"),
    LARGE.reshape(-1, 1).T,
    np.zeros(0),
    torch.arange(100_000).reshape(100, 1000),
    torch.arange(100_000).reshape(100, 1000).T,
    torch.ones(70_001, dtype=torch.bfloat16),
    b"x" * 70_000,
    {"a": LARGE, "b": [1, "two", torch.ones(3)]},
]


@pytest.mark.parametrize("value", VALUES, ids=[type(value).__name__ + str(n) for n, value in enumerate(VALUES)])
def test_a_value_is_written_as_ever_and_its_sum_is_that_of_its_blob(value: Any) -> None:
    planned = plan(value, limit=2**30)
    target = bytearray(planned.size + 3)
    assert plan(value, limit=2**30).write_summed(memoryview(target)) == checksum_of(planned.tobytes())
    assert target == planned.tobytes() + b"\0\0\0"


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 1])
def test_a_copy_in_blocks_is_the_whole_copy(size: int) -> None:
    source, target, digest = bytes(range(256)) * (size // 256 + 1), bytearray(size), Digest(b"before")
    copy_summed(memoryview(target), memoryview(source)[:size], digest)
    assert target == source[:size]
    assert digest.intdigest() == checksum_of(b"before" + source[:size])


PAYLOAD = bytes(range(256)) * 20
PIECES = [(0, 1000), (1000, 3000), (3000, 5120)]


def place(assemblies: Assemblies, begin: int, end: int, payload: bytes = PAYLOAD) -> None:
    assemblies.place(PlaceChunk(1, 2, begin, payload[begin:end]))


@pytest.mark.parametrize("order", list(permutations(PIECES)))
def test_chunks_may_come_in_any_order(order: tuple[tuple[int, int], ...]) -> None:
    assemblies = Assemblies(BufferPool(2**20))
    assemblies.begin(BeginPayload(1, 2, len(PAYLOAD)))
    for begin, end in order:
        place(assemblies, begin, end)
    view = assemblies.finish(FinishPayload(1, 2, checksum_of(PAYLOAD)))
    assert view == PAYLOAD
    assert view is not None
    assert view.readonly


@pytest.mark.parametrize("pieces", [PIECES, [(0, len(PAYLOAD))]])
def test_what_was_spoilt_on_the_way_may_come_again(pieces: list[tuple[int, int]]) -> None:
    assemblies, spoilt = Assemblies(BufferPool(2**20)), PAYLOAD[:-1] + b"?"
    assemblies.begin(BeginPayload(1, 2, len(PAYLOAD)))
    for payload, wanted in ((spoilt, None), (spoilt, None), (PAYLOAD, PAYLOAD)):
        for begin, end in pieces:
            place(assemblies, begin, end, payload)
        assert assemblies.finish(FinishPayload(1, 2, checksum_of(PAYLOAD))) == wanted


def test_what_is_given_up_returns_its_buffer() -> None:
    pool = BufferPool(2**20)
    assemblies = Assemblies(pool)
    assemblies.begin(BeginPayload(1, 2, len(PAYLOAD)))
    place(assemblies, 0, 10)
    assemblies.drop(DropPayload(1, 2))
    assemblies.drop(DropPayload(1, 2))
    assert pool.statistics().bytes_in_use == 0
