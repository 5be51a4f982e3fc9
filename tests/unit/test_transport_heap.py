"""What glibc does with freed memory, and that it can be taught."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROUNDS = 20
PROGRAM = """
import ctypes, resource, sys
from transports.heap import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.free.argtypes = [ctypes.c_size_t], ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "taught":
    keep_freed_memory()
    keep_freed_memory()
def some_frames():
    frames = [libc.malloc(4 << 20) for _ in range(3)]
    for frame in frames:
        ctypes.memset(frame, 1, 4 << 20)
    for frame in frames:
        libc.free(frame)
some_frames()
some_frames()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({rounds}):
    some_frames()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Page faults of some rounds of three frames of 4 MiB, received and freed."""
    command = [sys.executable, "-c", PROGRAM.replace("{rounds}", str(ROUNDS)), how]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this is about glibc's allocator")
def test_freed_frames_are_not_given_back_to_the_kernel() -> None:
    assert faults("untaught") > 100 * ROUNDS
    assert faults("taught") < 10 * ROUNDS
