"""The sides of a team, written once over every library's writer and reader (`perf/peers/base.py`)."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from perf.peers import load
from perf.peers.base import HEADER, Array, Place

KIB, MIB = 1 << 10, 1 << 20
STATES = {"300 tensors": 300, "1,000 tensors": 1000}


def state_sizes(shape: str) -> list[int]:
    """Bytes of the arrays of a state dict: 300 as a model has them, or 1,000 log-uniform from 1 KiB to 4 MiB."""
    if shape == "300 tensors":
        return [4 * MIB] * 50 + [256 * KIB] * 200 + [4 * KIB] * 50
    exponents = np.random.default_rng(7).uniform(10, 22, STATES[shape])
    return [int(2**exponent) // 4 * 4 for exponent in exponents]


def check_array(array: Array, sequence: int, size: int) -> None:
    """Sampled: size, first, middle and last byte. Raises ValueError."""
    view = array.reshape(-1)
    wanted = sequence % 2 + 1
    if view.nbytes != size or not view[0] == view[-1] == view[view.size // 2] == wanted:
        raise ValueError(f"array {sequence} is not what was sent: {view.nbytes} bytes of {view[0]}, {view[-1]}")


class _Side:
    """One process: its place, and the library's class of that name."""

    kind = ""

    def __init__(self, *, rank: int, meeting: Path, library: str, **place: Any) -> None:  # noqa: ANN401
        self.place = Place(meeting=meeting, rank=rank, **place)
        self.port = load(library, self.kind)(self.place)

    def open(self) -> None:
        self.port.open()

    def server_cpu_ns(self) -> int:
        count = getattr(self.port, "server_cpu_ns", int)
        return int(count())

    def close(self) -> None:
        self.port.close()


class RecordSender(_Side):
    """n records of `size` bytes, over so many seeds of its own."""

    kind = "Writer"
    sequence = 0

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        start = time.monotonic_ns()
        self.port.write(self._records(n, size, seeds))
        self.port.finish()
        return {"start_ns": start}

    def _records(self, n: int, size: int, seeds: int) -> Iterator[bytes]:
        pack, tail = HEADER.pack, b"x" * (size - HEADER.size)
        first, base = self.place.number * seeds, self.sequence
        self.sequence += n // seeds
        for sequence in range(base, self.sequence):
            for seed in range(first, first + seeds):
                yield pack(seed, sequence) + tail


class RecordReceiver(_Side):
    """Receives those of all senders and checks every sequence."""

    kind = "Reader"

    def open(self) -> None:
        self.expected: dict[int, int] = {}
        super().open()

    def run(self, *, n: int, size: int, seeds: int) -> dict[str, Any]:
        each = n // seeds * seeds
        expected, unpack, total = self.expected, HEADER.unpack_from, each * self.place.writers
        if not expected:
            expected.update(dict.fromkeys(range(seeds * self.place.writers), 0))
        for record in self.port.read(total):
            seed, sequence = unpack(record)
            if expected[seed] != sequence or len(record) != size:
                raise ValueError(f"seed {seed}: expected {expected[seed]}, got {sequence}")
            expected[seed] = sequence + 1
        end = time.monotonic_ns()
        self.port.finish()
        return {"end_ns": end, "n": total}


class ArraySender(_Side):
    """n float32 arrays of `size` bytes; those of even and odd sequence differ."""

    kind = "Writer"

    def open(self) -> None:
        self.sequences: dict[int, int] = {}
        self.sources: list[Array] = []
        super().open()

    def run(self, *, n: int, size: int, seeds: int = 1) -> dict[str, Any]:
        if not self.sources or self.sources[0].nbytes != size:
            self.sources = [np.full(size, k + 1, dtype=np.uint8).view(np.float32) for k in range(2)]
            getattr(self.port, "prepare", len)(self.sources)
        start = time.monotonic_ns()
        self.port.write_arrays(self._items(n, seeds))
        self.port.finish()
        return {"start_ns": start}

    def _items(self, n: int, seeds: int) -> Iterator[tuple[bytes, Array]]:
        for position in range(n):
            seed = self.place.number * seeds + position % seeds
            sequence = self.sequences.get(seed, 0)
            self.sequences[seed] = sequence + 1
            yield HEADER.pack(seed, sequence), self.sources[sequence % 2]


class ArrayReceiver(_Side):
    """Receives those of all senders, each checked for order and by samples."""

    kind = "Reader"

    def open(self) -> None:
        self.expected: dict[int, int] = {}
        super().open()

    def run(self, *, n: int, size: int, seeds: int = 1) -> dict[str, Any]:
        total = n * self.place.writers
        for header, array in self.port.read_arrays([size] * total):
            seed, sequence = HEADER.unpack(header) if header else (0, self.expected.get(0, 0))
            wanted = self.expected.get(seed, 0)
            if sequence != wanted:
                raise ValueError(f"seed {seed}: expected array {wanted}, got {sequence}")
            self.expected[seed] = wanted + 1
            check_array(array.view(np.uint8), sequence, size)
        end = time.monotonic_ns()
        del array
        self.port.finish()
        return {"end_ns": end, "n": total}


class StateSender(_Side):
    """A state dict, n times."""

    kind = "Writer"

    def open(self) -> None:
        self.states: dict[str, list[dict[str, Array]]] = {}
        super().open()

    def run(self, *, shape: str, n: int) -> dict[str, Any]:
        if shape not in self.states:
            sizes = state_sizes(shape)
            self.states[shape] = [
                {f"layer.{at}.weight": np.full(size, k + 1, dtype=np.uint8) for at, size in enumerate(sizes)}
                for k in range(2)
            ]
            getattr(self.port, "prepare", len)([a for state in self.states[shape] for a in state.values()])
        start = time.monotonic_ns()
        for version in range(n):
            self.port.write_state(self.states[shape][version % 2], version)
        self.port.finish()
        return {"start_ns": start}


class StateReceiver(_Side):
    """Receives it; every array is checked by samples."""

    kind = "Reader"

    def run(self, *, shape: str, n: int) -> dict[str, Any]:
        sizes = state_sizes(shape)
        for version in range(n):
            values = self.port.read_state(sizes)
            for size, array in zip(sizes, values, strict=True):
                check_array(array, version, size)
        end = time.monotonic_ns()
        del array
        self.port.finish()
        return {"end_ns": end, "n": n}


class Stalled(_Side):
    """A reader that never reads."""

    kind = "Reader"

    def run(self, **_: Any) -> dict[str, Any]:  # noqa: ANN401
        return {}


class PacedSender(_Side):
    """n records at `rate` a second, each stamped with the moment of its call.

    One that is late because the call before it took too long is stamped with the moment at which it was due: otherwise
    a library would be measured only while it does not block.
    """

    kind = "Writer"
    sequence = 0

    def run(self, *, n: int, size: int, rate: int) -> dict[str, Any]:
        start = time.monotonic_ns()
        self.port.write(self._records(n, size, rate), paced=True)
        self.port.finish()
        return {"start_ns": start}

    def _records(self, n: int, size: int, rate: int) -> Iterator[bytes]:
        pack, tail, clock = HEADER.pack, b"x" * (size - HEADER.size), time.monotonic_ns
        due, period = clock(), 1_000_000_000 // rate
        for _ in range(n):
            due += period
            left = due - clock()
            if left > 0:
                time.sleep(left / 1e9)
            yield pack(self.sequence, clock() if left > 0 else due) + tail
            self.sequence += 1


class PacedReceiver(_Side):
    """How old each record is when it is here."""

    kind = "Reader"
    sequence = 0

    def run(self, *, n: int, size: int, rate: int) -> dict[str, Any]:
        ages, unpack, clock = [], HEADER.unpack_from, time.monotonic_ns
        for record in self.port.read(n):
            sequence, stamp = unpack(record)
            ages.append(clock() - stamp)
            if sequence != self.sequence:
                raise ValueError(f"expected {self.sequence}, got {sequence}")
            self.sequence += 1
        self.port.finish()
        return {"end_ns": clock(), "ages_ns": ages}


class _Busy:
    """A thread that runs pure Python and never gives the interpreter's lock away by itself."""

    def __init__(self, busy: bool) -> None:
        self.stop, self.thread = False, threading.Thread(target=self._spin, daemon=True)
        if busy:
            self.thread.start()

    def _spin(self) -> None:
        count = 0
        while not self.stop:
            count += 1

    def end(self) -> None:
        self.stop = True
        if self.thread.ident:
            self.thread.join()


class CallerSide(_Side):
    """n round trips, one at a time; `busy`: beside a thread that computes in Python."""

    kind = "Caller"

    def run(self, *, n: int, size: int, busy: bool = False) -> dict[str, Any]:
        times, call, clock, spinner = [], self.port.call, time.monotonic_ns, _Busy(busy)
        for sequence in range(n):
            question = sequence.to_bytes(8, "little") + b"x" * (size - 8)
            start = clock()
            answer = call(question)
            times.append(clock() - start)
            if answer != question:
                raise ValueError(f"answer {sequence} is not its question")
        spinner.end()
        return {"round_trips_ns": times}


class AnswererSide(_Side):
    """Answers them; `busy` likewise."""

    kind = "Answerer"

    def run(self, *, n: int, size: int, busy: bool = False) -> dict[str, Any]:
        spinner = _Busy(busy)
        self.port.serve(n)
        spinner.end()
        return {}
