"""What a library must do to be measured: a writer, a reader, and for round trips a caller and an answerer.

A record is bytes that begin with `HEADER`. An array travels with such a header, in whatever way the library has for
that; a library that gives its caller no choice of order may leave the header out. What `read` and `read_arrays` yield
is valid until the next is asked for, or longer.
"""

from __future__ import annotations

import ctypes
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HEADER = struct.Struct("<QQ")
"""Seed and sequence."""
MEET_TIMEOUT_S = 30.0
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a side stands: the directory in which its team meets, the link, and who else is there.

    `number`: among the writers or among the readers. `rank`: among all, the writers first. `size_max`: of an array, in
    bytes. `style`: which way of the library.
    `stalled`: so many of the readers never read. `shared`: what the processes inherited.
    """

    meeting: Path
    rank: int
    writers: int = 1
    readers: int = 1
    link: str = "ipc"
    style: str = ""
    size_max: int = 1 << 16
    stalled: int = 0
    shared: Any = None

    @property
    def number(self) -> int:
        return self.rank if self.rank < self.writers else self.rank - self.writers

    @property
    def world_size(self) -> int:
        return self.writers + self.readers


class _Port:
    """What all of them are: opened together with the others, and closed."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def open(self) -> None:
        """Meet the others; ready when it returns."""

    def finish(self) -> None:
        """A round is over."""

    def close(self) -> None:
        """Leave."""


class Writer(_Port):
    """Sends to all readers."""

    def write(self, records: Iterable[bytes], *, paced: bool = False) -> None:
        """Send them; `paced`: none may wait for another."""
        raise NotImplementedError

    def write_arrays(self, items: Iterable[tuple[bytes, Array]]) -> None:
        """Send arrays, each with its header."""
        raise NotImplementedError

    def write_state(self, state: Mapping[str, Array], version: int) -> None:
        """Send a dictionary of arrays, by default one by one in its order."""
        self.write_arrays((HEADER.pack(at, version), value) for at, value in enumerate(state.values()))


class Reader(_Port):
    """Receives from all writers."""

    def read(self, n: int) -> Iterator[Any]:
        """The next n records, as bytes or a view."""
        raise NotImplementedError

    def read_arrays(self, sizes: Sequence[int]) -> Iterator[tuple[bytes | None, Array]]:
        """The next arrays, which have these sizes in bytes, flat; their headers, or None where there is none."""
        raise NotImplementedError

    def read_state(self, sizes: Sequence[int]) -> Iterator[Array]:
        """The arrays of a dictionary in its order."""
        for _, value in self.read_arrays(sizes):
            yield value


class Caller(_Port):
    """Asks and waits for the answer."""

    def call(self, question: bytes) -> Any:  # noqa: ANN401 - bytes or a view
        """One round trip."""
        raise NotImplementedError


class Answerer(_Port):
    """Answers with what it was asked."""

    def serve(self, n: int) -> None:
        """Answer n questions."""
        raise NotImplementedError


def await_file(path: Path) -> str:
    """Wait until somebody has written it; its text."""
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nobody wrote {path.name}")
        time.sleep(0.002)
    return path.read_text(encoding="ascii")


def tell_file(path: Path, text: str) -> None:
    """Write it at once as a whole."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="ascii")
    part.rename(path)


def serve(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a broker that ends with this process."""
    prctl: Callable[[int, int], int] = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    quiet = subprocess.DEVNULL
    return subprocess.Popen(list(command), preexec_fn=tie, stdin=quiet, stdout=quiet, stderr=quiet)


def cpu_of_ns(pid: int) -> int:
    """Processor time of another process, from proc(5), in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 10_000_000
