"""Many records given at once, as whole arrays: checked, cut into bursts and numbered by column, never row by row.

What the wire carries is what one `publish` for each row would have made (D65): the rows of an array or tensor become
bodies with a head, bytes are bodies as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fabric.config import BURST_BYTES_MAX
from fabric.core.wire import NONE, RECORD_BYTES
from fabric.errors import UnsupportedValueError
from fabric.payloads import ARRAY, BYTES
from fabric.payloads.plans import LEAVES, Source, load_tensors
from fabric.payloads.schema import ARRAY_HEADS, DIMENSIONS_MAX, SCALAR_FLAG
from fabric.topics import check_seed

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Columns", "Int64s", "Numbers", "as_sequences", "check_seeds", "columns_of", "number"]

Int64s = np.ndarray[Any, np.dtype[np.int64]]
_KEYS_MAX = 2**16
"""Seeds in so narrow a range are sorted as u16, which numpy does without comparing: three times as fast."""


def check_seeds(seeds: Any) -> Int64s:  # noqa: ANN401 - any sequence
    """The seeds as an array of their own. Raises `SeedError` as `check_seed` for the first that is none."""
    if isinstance(seeds, np.ndarray) and seeds.ndim == 1 and seeds.dtype.kind in "iu":
        made: Int64s = seeds.astype("<i8")  # of u64, what is too large becomes negative
    elif set(map(type, seeds)) == {int}:
        try:
            made = np.array(seeds, "<i8")
        except OverflowError:
            made = np.array([-1], "<i8")
    else:
        return np.array([check_seed(seed) for seed in seeds], "<i8")
    if len(made) and made.min() < 0:
        return np.array([check_seed(seed) for seed in seeds], "<i8")
    return made


class Columns:
    """Records of one kind, and how far they were taken: `at` of `count`."""

    __slots__ = ("at", "bodies", "count", "ends", "kind", "lengths", "seeds", "sequences")

    def __init__(self, kind: int, seeds: Int64s, lengths: Int64s, bodies: Sequence[bytes] | memoryview) -> None:
        self.kind, self.seeds, self.bodies, self.count, self.at = kind, seeds, bodies, len(seeds), 0
        self.lengths = lengths.astype("<u4")
        self.ends: Int64s = np.cumsum(lengths + RECORD_BYTES)
        """The bytes that the records up to and with each take in bursts."""
        self.sequences: Int64s = np.empty(self.count, "<i8")
        """Those of what was taken."""

    @property
    def left(self) -> int:
        """The bytes that what was not taken yet takes in bursts."""
        return self.left_from(self.at)

    def left_from(self, position: int) -> int:
        """The bytes that the records from here on take in bursts."""
        return int(self.ends[-1]) - self._size_until(position)

    def _size_until(self, position: int) -> int:
        return int(self.ends[position - 1]) if position else 0

    def cut(self, begin: int) -> int:
        """How far a burst comes that begins here."""
        return int(self.ends.searchsorted(self._size_until(begin) + BURST_BYTES_MAX, "right"))

    def body(self, begin: int, end: int) -> bytes | memoryview:
        """The bodies of these records, one after the other."""
        if isinstance(self.bodies, memoryview):
            size = len(self.bodies) // self.count
            return self.bodies[begin * size : end * size]
        return b"".join(self.bodies[begin:end])

    def each(self, begin: int, end: int) -> Sequence[bytes]:
        """The same, one by one."""
        if isinstance(self.bodies, memoryview):
            size = len(self.bodies) // self.count
            return [bytes(self.bodies[at : at + size]) for at in range(begin * size, end * size, size)]
        return self.bodies[begin:end]


def columns_of(values: Any, seeds: Int64s) -> Columns | None:  # noqa: ANN401 - any values
    """The values as columns; None for those that have to be looked at one by one."""
    if not len(values):
        return None
    if isinstance(values, list | tuple):
        if set(map(type, values)) != {bytes}:
            return None
        lengths = np.fromiter(map(len, values), "<i8", len(values))
        return Columns(BYTES, seeds, lengths, values) if lengths.max() + RECORD_BYTES <= BURST_BYTES_MAX else None
    source = _source_of(values)
    if source is None or not 0 < len(source.shape) <= DIMENSIONS_MAX:
        return None
    kind, shape = LEAVES[type(values)].kind, source.shape[1:]
    flags = SCALAR_FLAG if kind == ARRAY and not shape else 0
    head = ARRAY_HEADS[len(shape)].pack(source.code, len(shape), flags, 0, *shape)
    size = len(head) + source.nbytes // len(values)
    if size + RECORD_BYTES > BURST_BYTES_MAX:
        return None
    return Columns(kind, seeds, np.full(len(values), size, "<i8"), _headed(head, source, len(values), size))


def _source_of(values: Any) -> Source | None:  # noqa: ANN401
    """Their elements, if all of them are plain memory."""
    if type(values) not in LEAVES:
        load_tensors()
    leaf = LEAVES.get(type(values))
    try:
        source = leaf.source(values, "values") if leaf is not None else None
    except UnsupportedValueError:
        return None  # its rows may be values all the same: those of an array of objects are
    return None if source is None or source.on_device else source


def _headed(head: bytes, source: Source, count: int, size: int) -> memoryview:
    """The elements of each row behind the head of a row: a snapshot."""
    elements = source.plain()
    if elements is None:
        elements = memoryview(bytearray(source.nbytes))
        source.write(elements, 0)
    rows = np.empty((count, size), np.uint8)
    rows[:, : len(head)] = np.frombuffer(head, np.uint8)
    rows[:, len(head) :] = np.frombuffer(elements, np.uint8).reshape(count, -1) if source.nbytes else 0
    return memoryview(cast("Buffer", rows.reshape(-1)))


Numbers = tuple[np.ndarray[Any, np.dtype[np.int64]], dict[int, list[int]]]


def as_sequences(numbers: Sequence[int]) -> Int64s:
    """What is told of an array whose rows were taken one by one."""
    return np.array(numbers, "<i8")


def number(seeds: Int64s, first: int, lanes: Mapping[int, Sequence[int]]) -> Numbers:
    """Number records whose offsets begin at `first`, after what `lanes` say (next sequence, offset before), by seed.

    Returns seeds, sequences and previous as three rows, and what the lanes say afterwards. `lanes` is not touched.
    """
    count = len(seeds)
    lowest = int(seeds.min())
    narrow = int(seeds.max()) - lowest < _KEYS_MAX
    order = ((seeds - lowest).astype(np.uint16) if narrow else seeds).argsort(kind="stable")
    together = seeds[order]
    begins = np.flatnonzero(np.concatenate(([True], together[1:] != together[:-1])))
    counts = np.diff(begins, append=count)
    keys = together[begins].tolist()
    before = [lanes.get(seed) or (0, NONE) for seed in keys]
    offsets = order + first
    numbers: Int64s = np.empty((3, count), "<i8")
    numbers[0] = seeds
    bases = np.array([sequence for sequence, _ in before], "<i8")
    numbers[1, order] = np.arange(count) + np.repeat(bases - begins, counts)
    previous = np.empty(count, "<i8")
    previous[1:] = offsets[:-1]
    previous[begins] = [offset for _, offset in before]
    numbers[2, order] = previous
    after = map(list, zip((bases + counts).tolist(), offsets[begins + counts - 1].tolist(), strict=True))
    return numbers, dict(zip(keys, after, strict=True))
