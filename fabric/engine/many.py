"""One call of `publish_many`: by column where the values allow it (D65), else one by one; and how far it came.

A part of it is taken at a time, and what was taken stays taken if the next part finds no room, or a signal's handler
raises. Both faces go on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from fabric.config import BURST_BYTES_MAX, Policy
from fabric.core.events import BurstClosed
from fabric.core.wire import encode_columns
from fabric.engine.columns import Columns, Int64s, as_sequences, check_seeds, columns_of, number
from fabric.engine.steps import Steps, run_steps
from fabric.payloads.plans import LEAVES

if TYPE_CHECKING:
    from fabric.engine.durable import Durability
    from fabric.engine.outbox import Outbox

__all__ = ["ROOM", "Many"]

ROOM = BURST_BYTES_MAX + 16 * 1024
"""Reserved for an open burst: its records and their columns."""
FEW = 64
"""Values that are not worth columns: arrays of numpy take some 50 us, however short they are."""
FEW_BYTES = BURST_BYTES_MAX // 2
"""What is left of a call, if it is less, goes into the open burst, behind what was published before: many short calls
make full bursts."""
BURSTS_AT_ONCE = 4
"""Numbered together and then sent: 256 KiB, which stay in the cache."""
VALUES_AT_ONCE = 1024
"""Taken one by one before the asynchronous face lets others run: about a millisecond."""


class Many:
    """Values that are published together, and the sequences of those that were taken."""

    __slots__ = ("_columns", "_outbox", "_sequences", "_was_array", "seeds", "values")

    def __init__(self, outbox: Outbox, values: Any, seeds: Any) -> None:  # noqa: ANN401 - any sequences
        if len(values) != len(seeds):
            raise ValueError(f"{len(values)} values and {len(seeds)} seeds")
        self._outbox, self._was_array = outbox, False
        self._columns: Columns | None = None
        self._sequences: list[int] = []
        checked = check_seeds(seeds)
        is_plain = isinstance(values, list | tuple)
        if outbox.durability is None and not (is_plain and len(values) < FEW):
            self._columns = columns_of(values, checked)
        if not is_plain:
            self._was_array = self._columns is not None or type(values) in LEAVES
        self.values: Sequence[Any] = values if is_plain or self._columns is not None else list(values)
        self.seeds: list[int] = checked.tolist() if self._columns is None else []

    @property
    def is_over(self) -> bool:
        """Whether all was taken."""
        columns = self._columns
        return columns.at == columns.count if columns else len(self._sequences) == len(self.values)

    @property
    def sequences(self) -> list[int] | Int64s:
        """Of what was taken: an array for an array, else a list."""
        if self._columns is not None:
            told = self._columns.sequences[: self._columns.at]
            return told if self._was_array else told.tolist()
        return as_sequences(self._sequences) if self._was_array else self._sequences

    def go_on(self) -> None:
        """Take the next part. Raises as `publish`."""
        if self._columns is not None:
            self._publish_columns(self._columns)
            return
        outbox, begin = self._outbox, len(self._sequences)
        if outbox.durability is not None:
            run_steps(self.publishing(outbox.durability), outbox._until)
            return
        end, taken = begin + VALUES_AT_ONCE, list[int]()
        try:
            outbox._publish_rest(self.values[begin:end], self.seeds[begin:end], taken)
        finally:
            self._sequences += taken

    def publishing(self, durability: Durability) -> Steps[None]:
        """The steps of the rest on a durable topic."""
        return durability.publishing_many(self.values, self.seeds, self._sequences)

    def _publish_columns(self, columns: Columns) -> None:
        outbox = self._outbox
        while (filled := outbox._alone(self._take, columns)) is None:
            outbox._wait_for_room(ROOM if columns.left >= FEW_BYTES else outbox._room_for(columns.left))
        if filled:  # who fills a burst sends it
            outbox.engine.push()
            outbox._pace(filled)

    # All of these need the open burst to themselves.

    def _take(self, columns: Columns) -> int | None:
        """Some bursts, or the rest into the open one; the bytes of bursts that were filled, None without room."""
        outbox = self._outbox
        outbox._require_open()
        if columns.left < FEW_BYTES:
            return self._take_few(columns)
        if outbox.rows:
            outbox._close()
        cuts, at = list[tuple[int, int]](), columns.at
        try:
            while len(cuts) < BURSTS_AT_ONCE and columns.left_from(at) >= FEW_BYTES and outbox.budget.take(ROOM):
                cuts.append((at, at := columns.cut(at)))
            if not cuts:
                return None
            numbers, lanes = number(columns.seeds[columns.at : at], outbox.next, outbox._lanes)
            ready = self._encode(columns, cuts, numbers)
        except BaseException:
            outbox.budget.give(ROOM * len(cuts))
            raise
        size = columns.left - columns.left_from(at)
        outbox._is_busy, outbox._record_bytes = True, max(1, size // (at - columns.at))
        try:
            outbox._lanes.update(lanes)
        finally:  # also if a signal's handler raises now: numbers and bursts never disagree
            outbox.next += at - columns.at
            columns.sequences[columns.at : at] = numbers[1]
            columns.at = at
            outbox.leaving.add(*ready)
        outbox.leaving.go()
        return size

    def _encode(self, columns: Columns, cuts: Sequence[tuple[int, int]], numbers: Any) -> list[BurstClosed]:  # noqa: ANN401
        outbox, engine, begin = self._outbox, self._outbox.engine, columns.at
        incarnation, wall_ns, ready = engine.card.incarnation, engine.wall_ns(), list[BurstClosed]()
        for at, end in cuts:
            first, count = outbox.next + at - begin, end - at
            packed = numbers[:, at - begin : end - begin].tobytes() + columns.lengths[at:end].tobytes()
            frame = encode_columns(
                outbox.feed, incarnation, first, count, wall_ns, packed, columns.kind, columns.body(at, end)
            )
            seeds = tuple(columns.seeds[at:end].tolist()) if outbox.policy is Policy.LATEST else ()
            ready.append(BurstClosed(outbox.topic, first, count, frame, None, seeds, ROOM))
        return ready

    def _take_few(self, columns: Columns) -> int | None:
        """All that is left, into the open burst or a new one."""
        outbox, begin, end, size = self._outbox, columns.at, columns.count, columns.left
        if outbox.rows and outbox.size + size > outbox._burst_max:
            outbox._filled += outbox.size
            outbox._close()
        if not outbox.rows:
            if not outbox._open(outbox._room_for(size)):
                return None
            outbox.engine.note_open(outbox)
        numbers, lanes = number(columns.seeds[begin:], outbox.next, outbox._lanes)
        rows = list(chain.from_iterable(zip(*numbers.tolist(), repeat(columns.kind), columns.each(begin, end))))
        try:
            outbox._lanes.update(lanes)
        finally:  # as above
            outbox.size, outbox.next = outbox.size + size, outbox.next + end - begin
            columns.sequences[begin:], columns.at = numbers[1], end
            outbox._add(rows)
        filled, outbox._filled = outbox._filled, 0
        return filled
