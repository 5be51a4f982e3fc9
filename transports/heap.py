"""One habit of glibc's allocator that doubles what it costs to receive."""

from __future__ import annotations

import ctypes
import functools

__all__ = ["keep_freed_memory"]

KEPT_BYTES = 31 * 1024 * 1024
"""Just below the highest threshold that glibc adapts to, 32 MiB on 64 bits (mallopt(3), M_MMAP_THRESHOLD)."""


@functools.cache
def keep_freed_memory() -> None:
    """Let malloc keep the memory of received frames instead of giving it back to the kernel; once a process.

    libzmq allocates each frame that it receives and frees it when it was read. glibc gives freed memory back once the
    top of a heap is larger than twice the largest mapped block that was ever freed, and then each frame is made of
    fresh pages: 1,300 faults for a tensor of 16 MiB, 6.5 ms of the receiver's processors instead of 4.5
    (perf/bench_tensors.py, tcp). A program that has freed one large array has taught its allocator already; this
    teaches it at once. It holds for the whole process: up to 62 MiB of freed memory may stay at the top of each heap.
    Elsewhere than on glibc it has no effect.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.free(libc.malloc(KEPT_BYTES))
