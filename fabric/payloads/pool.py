"""Warm memory: buffers that are used again, because the page faults of fresh memory cost ten times the copy into it."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import numpy as np

if TYPE_CHECKING:
    from typing_extensions import Buffer

Room = np.ndarray[Any, Any]

ALIGNMENT: Final = 64
"""Buffers start at a multiple of this many bytes: a cache line."""

CLASS_MIN: Final = 256
"""Bytes of the smallest size class."""


class PoolStatistics(NamedTuple):
    """What a pool holds and did. Bytes are those of the size classes: up to 25 % beyond what was asked."""

    bytes_in_use: int
    bytes_idle: int
    fresh: int
    reused: int
    freed: int
    abandoned: int


def size_class(size: int) -> int:
    """The size of the buffer that serves `size` bytes: a power of two times 1, 1.25, 1.5 or 1.75; at least 256."""
    if size <= CLASS_MIN:
        return CLASS_MIN
    quarter = 1 << ((size - 1).bit_length() - 3)
    return -(-size // quarter) * quarter


def _allocate(size: int) -> Room:
    return np.empty(size, np.uint8)


class _OwnerReference(weakref.ref[Room]):
    """Tells that the last view of a frozen buffer died. Its callback is `deque.append` itself: no lock, no Python."""

    __slots__ = ("room",)

    room: Room


class BufferPool:
    """Byte buffers for reuse, last in first out within a size class, so that the warmest comes first. Thread-safe.

    `bytes_max` bounds the idle bytes; what comes back beyond it is freed. `allocate(size)` makes fresh memory, for
    example page-locked.
    """

    def __init__(self, bytes_max: int, *, allocate: Callable[[int], Room] = _allocate) -> None:
        self._bytes_max = bytes_max
        self._allocate = allocate
        self._lock = threading.Lock()
        self._idle: dict[int, list[Room]] = {}
        self._returned: deque[_OwnerReference] = deque()  # bounded by the frozen buffers that exist
        self._frozen: dict[int, _OwnerReference] = {}
        self._bytes_idle = self._bytes_in_use = 0
        self._fresh = self._reused = self._freed = self._abandoned = 0

    def take(self, size: int) -> PooledBuffer:
        """A buffer of exactly `size` bytes, with unknown content."""
        capacity = size_class(size)
        with self._lock:
            if self._returned:
                self._drain()
            idle = self._idle.get(capacity)
            room = idle.pop() if idle else None
            self._bytes_in_use += capacity
            if room is not None:
                self._bytes_idle -= capacity
                self._reused += 1
                return PooledBuffer(self, room, size)
            self._fresh += 1
        try:
            room = _aligned_room(self._allocate, capacity)
        except BaseException:
            with self._lock:
                self._bytes_in_use -= capacity
                self._fresh -= 1
            raise
        return PooledBuffer(self, room, size)

    def statistics(self) -> PoolStatistics:
        """The figures of now."""
        with self._lock:
            self._drain()
            return PoolStatistics(
                self._bytes_in_use, self._bytes_idle, self._fresh, self._reused, self._freed, self._abandoned
            )

    def _drain(self) -> None:
        """Take back the frozen buffers whose last view died. The lock is held."""
        while self._returned:
            reference = self._returned.popleft()
            del self._frozen[id(reference)]
            self._give_back(reference.room)

    def _give_back(self, room: Room) -> None:
        capacity = len(room)
        self._bytes_in_use -= capacity
        if self._bytes_idle + capacity > self._bytes_max:
            self._freed += 1
            return
        self._bytes_idle += capacity
        self._idle.setdefault(capacity, []).append(room)

    def _released(self, room: Room) -> None:
        with self._lock:
            self._give_back(room)

    def _abandon(self, room: Room) -> None:
        """Somebody still looks at the buffer: its memory lives as long as he looks, and is not used again."""
        with self._lock:
            self._bytes_in_use -= len(room)
            self._abandoned += 1

    def _freeze(self, room: Room, size: int) -> memoryview:
        # An owner that is a slice of `room` would not do: numpy lets views of it refer to `room` itself.
        owner: Room = np.frombuffer(memoryview(cast("Buffer", room)), np.uint8)
        owner.flags.writeable = False
        reference = _OwnerReference(owner, self._returned.append)
        reference.room = room
        with self._lock:
            self._frozen[id(reference)] = reference
        return memoryview(cast("Buffer", owner))[:size]


def _aligned_room(allocate: Callable[[int], Room], capacity: int) -> Room:
    raw = allocate(capacity + ALIGNMENT - 1)
    start = -raw.__array_interface__["data"][0] % ALIGNMENT
    # Not a slice of `raw`: numpy would let views of it refer to `raw`, and `_is_watched` could not see them.
    room: Room = np.frombuffer(memoryview(cast("Buffer", raw))[start : start + capacity], np.uint8)
    return room


def _is_watched(room: Room) -> bool:
    """Whether anything but the caller's one variable refers to the memory; memoryviews and arrays over it do."""
    return sys.getrefcount(room) > _REFERENCES_ALONE


_REFERENCES_ALONE: Final = 3
"""The caller's variable, our parameter, and that of `getrefcount`."""


class PooledBuffer:
    """A buffer from a pool: write through `view`, then `release()` it, or `freeze()` it for readers."""

    __slots__ = ("_pool", "_room", "view")

    def __init__(self, pool: BufferPool, room: Room, size: int) -> None:
        self._pool = pool
        self._room: Room | None = room
        self.view = memoryview(cast("Buffer", room))[:size]
        """Writable, exactly the size that was taken, 64-byte aligned."""

    def release(self) -> None:
        """Give the buffer back. Idempotent, from any thread.

        A buffer that some array still looks at is left to that array instead of being used again.
        """
        with self._pool._lock:
            room, self._room = self._room, None
        if room is None:
            return
        try:
            self.view.release()
        except BufferError:
            self._pool._abandon(room)
            return
        if _is_watched(room):
            self._pool._abandon(room)
        else:
            self._pool._released(room)

    def freeze(self) -> memoryview:
        """A read-only view of the content; the buffer comes back when the last view of that view dies.

        `release()` has no effect afterwards. Raises `BufferError` while somebody looks at the writable view, and
        `ValueError` when the buffer was released.
        """
        size = len(self.view)
        self.view.release()
        with self._pool._lock:
            room, self._room = self._room, None
        if room is None:
            raise ValueError("the buffer is released")
        if _is_watched(room):
            self._room, self.view = room, memoryview(cast("Buffer", room))[:size]
            raise BufferError("somebody may still write to the buffer")
        return self._pool._freeze(room, size)
