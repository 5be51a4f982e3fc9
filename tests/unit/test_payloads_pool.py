"""Warm buffers: reuse, bounds, alignment, and buffers that come back when their last view dies."""

from __future__ import annotations

import gc
import threading
from typing import Any

import numpy as np
import pytest

from fabric import payloads
from fabric.payloads.pool import BufferPool, size_class

MIB = 1 << 20


def address(view: memoryview) -> int:
    found: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return found


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 320, 321, 1000, 4096, 5000, 65_536, 1_000_003])
def test_a_buffer_has_the_exact_size_and_alignment(size: int) -> None:
    buffer = BufferPool(MIB).take(size)
    assert (len(buffer.view), buffer.view.readonly, buffer.view.format) == (size, False, "B")
    if size:
        assert address(buffer.view) % 64 == 0


def test_size_classes_waste_at_most_a_quarter() -> None:
    assert all(size <= size_class(size) <= 1.25 * size for size in range(257, 70_000))
    assert all(size_class(size_class(size)) == size_class(size) for size in range(1, 70_000, 7))
    assert [size_class(size) for size in (0, 1, 256, 257, 320, 321, 449, 512, 513)] == [
        *(256, 256, 256, 320, 320, 384, 512, 512, 640)
    ]


def test_a_released_buffer_is_used_again_last_in_first_out() -> None:
    pool = BufferPool(MIB)
    one, two = pool.take(5000), pool.take(5000)
    first, second = address(one.view), address(two.view)
    one.release()
    two.release()
    assert (address(pool.take(5100).view), address(pool.take(5000).view)) == (second, first)
    found = pool.statistics()
    assert (found.fresh, found.reused, found.bytes_idle, found.bytes_in_use) == (2, 2, 0, 2 * 5120)


def test_release_is_idempotent() -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(300)
    buffer.release()
    buffer.release()
    assert pool.statistics().bytes_idle == 320
    with pytest.raises(ValueError, match="released"):
        buffer.view[0]


def test_idle_bytes_stay_under_the_ceiling() -> None:
    pool = BufferPool(1000)
    buffers = [pool.take(400) for _ in range(4)]
    for buffer in buffers:
        buffer.release()
    found = pool.statistics()
    assert (found.bytes_idle, found.bytes_in_use, found.freed) == (896, 0, 2)


def test_a_frozen_buffer_is_read_only_and_returns_with_its_last_view() -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(1000)
    buffer.view[:3] = b"abc"
    where = address(buffer.view)
    frozen = buffer.freeze()
    assert (frozen.readonly, len(frozen), bytes(frozen[:3])) == (True, 1000, b"abc")
    with pytest.raises(ValueError, match="released"):
        buffer.view[0]
    buffer.release()
    array = np.frombuffer(frozen[8:16], np.int64)
    del frozen, buffer
    gc.collect()
    assert pool.statistics().bytes_in_use == 1024
    part = array[:1]
    del array
    assert pool.statistics().bytes_in_use == 1024
    del part
    assert pool.statistics().bytes_in_use == 0
    assert address(pool.take(1000).view) == where


@pytest.mark.parametrize("kind", ["array", "tensor", "tree", "part of a tensor"])
def test_a_frozen_buffer_outlives_every_decoded_view(kind: str) -> None:
    value: Any = np.arange(1000)
    if kind != "array":
        torch = pytest.importorskip("torch")
        value = torch.arange(1000)
    made = payloads.plan({"w": value} if kind == "tree" else value, limit=MIB)
    pool = BufferPool(MIB)
    buffer = pool.take(made.size)
    made.write(buffer.view)
    view = payloads.decode(made.kind, buffer.freeze())
    view = view["w"] if kind == "tree" else view[5:] if kind == "part of a tensor" else view
    del buffer
    gc.collect()
    other = pool.take(made.size)
    other.view[:] = b"\xee" * made.size
    assert int(view.sum()) == sum(range(1000)) - (10 if kind == "part of a tensor" else 0)
    assert pool.statistics().reused == 0
    del view
    gc.collect()
    assert pool.take(made.size) is not None
    assert pool.statistics().reused == 1


def test_no_kind_of_view_lets_numpy_look_through_the_owner() -> None:
    pool = BufferPool(MIB)
    view: Any = np.ndarray((10,), np.uint8, pool.take(1000).freeze())[2:]
    gc.collect()
    assert pool.statistics().bytes_in_use == 1024
    del view
    assert pool.statistics().bytes_in_use == 0


def test_a_buffer_cannot_be_frozen_while_somebody_may_write() -> None:
    buffer = BufferPool(MIB).take(100)
    writer = np.frombuffer(buffer.view, np.uint8)
    with pytest.raises(BufferError):
        buffer.freeze()
    del writer
    buffer.freeze()
    with pytest.raises(ValueError, match="released"):
        buffer.freeze()


def test_a_buffer_that_somebody_looks_at_is_not_used_again() -> None:
    pool = BufferPool(MIB)
    buffer = pool.take(100)
    looking = np.frombuffer(buffer.view, np.uint8)
    buffer.release()
    found = pool.statistics()
    assert (found.abandoned, found.bytes_idle, found.bytes_in_use) == (1, 0, 0)
    assert looking.shape == (100,)


def test_a_failed_allocation_leaves_the_figures_as_they_were() -> None:
    def refuse(size: int) -> Any:
        raise MemoryError(size)

    pool = BufferPool(MIB, allocate=refuse)
    with pytest.raises(MemoryError):
        pool.take(100)
    assert pool.statistics() == (0, 0, 0, 0, 0, 0)


def test_threads_take_and_return_without_losing_a_byte() -> None:
    pool = BufferPool(64 * MIB)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for turn in range(500):
            buffer = pool.take(300 + 100 * (turn % 5))
            buffer.view[:] = bytes([mark]) * len(buffer.view)
            if set(bytes(buffer.view)) != {mark}:
                wrong.append(turn)
            if turn % 2:
                buffer.freeze()
            else:
                buffer.release()

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    found = pool.statistics()
    assert wrong == []
    assert found.bytes_in_use == 0
    assert found.fresh + found.reused == 2000
