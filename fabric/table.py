"""Several messages at once, as columns (D65): numbers and values as arrays, and messages where they are asked for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np

from fabric.message import Message, messages_of
from fabric.payloads.stacking import Rows, stack

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed
    from fabric.core.wire import Burst
    from fabric.message import RedrivenFeed

__all__ = ["Piece", "Run", "Table"]

Int64s = np.ndarray[Any, np.dtype[np.int64]]


class Run(NamedTuple):
    """Messages `begin <= index < end` of a table: all of one feed."""

    begin: int
    end: int
    source: str
    topic: str
    incarnation: int


class Piece:
    """Some rows of one burst, and their messages once they are made."""

    __slots__ = ("_messages", "burst", "feed", "rows")

    def __init__(
        self,
        burst: Burst,
        feed: InboundFeed | RedrivenFeed,
        rows: range | tuple[int, ...],
        messages: list[Message] | None = None,
    ) -> None:
        self.burst, self.feed, self.rows, self._messages = burst, feed, rows, messages

    @classmethod
    def of(cls, message: Message) -> Piece:
        """A message that was made already."""
        return cls(message._burst, message._feed, range(message._row, message._row + 1), [message])

    @property
    def messages(self) -> list[Message]:
        """All of them; the same ones each time."""
        if self._messages is None:
            self._messages = list(messages_of(self.burst, self.feed, self.rows, iter(self.rows)))
        return self._messages

    def pick(self, column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Of a column of the whole burst, these rows."""
        rows = self.rows
        return column[rows.start : rows.stop] if isinstance(rows, range) else column[list(rows)]

    def blobs(self) -> tuple[int, Rows] | None:
        """The kind of the values, and their bytes, where all have one kind and length and lie in the burst."""
        kinds, starts, metadata = self.burst.layout
        if metadata is not None or not isinstance(starts, range) or kinds.count(kinds[0]) != len(kinds):
            return None
        whole = np.frombuffer(self.burst.frame, np.uint8, len(starts) * starts.step - starts.step, starts.start)
        return kinds[0], self.pick(whole.reshape(-1, starts.step))


class Table(Sequence[Message]):
    """Messages in the order in which they were received, which it is a sequence of; and their columns, made when read.

    `seeds`, `sequences` and `offsets` are arrays of int64. Offsets count in a feed: `runs` says which messages are of
    which feed. No column is a view of anything that was received.
    """

    __slots__ = ("_ends", "_own", "_pieces", "offsets", "runs", "seeds", "sequences", "values")

    seeds: Int64s
    """The seed of each message."""
    sequences: Int64s
    """The number of each message in its lane."""
    offsets: Int64s
    """The position of each message in its feed."""
    runs: tuple[Run, ...]
    """Which messages are of which source, topic and incarnation."""
    values: Any
    """All values: an array of uint8 (n, k) where all are bytes of length k, an array or tensor (n, ...) where all are
    arrays or tensors of one dtype and shape; otherwise a list. Read-only, as a message's, unless the subscription owns
    its values. Reading it raises `SchemaError` if one cannot be decoded."""

    def __init__(self, pieces: list[Piece], *, own: bool) -> None:
        self._pieces, self._own = pieces, own
        self._ends = list(accumulate(len(piece.rows) for piece in pieces))

    if not TYPE_CHECKING:  # which would allow any attribute

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - a column
            """Make a column when it is read first: its slot is empty until then."""
            make = _COLUMNS.get(name)
            if make is None:
                raise AttributeError(f"'Table' object has no attribute {name!r}", name=name, obj=self)
            setattr(self, name, made := make(self))
            return made

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Message: ...

    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...

    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return list(self)[index]
        at = range(len(self))[index]
        number = bisect_right(self._ends, at)
        return self._pieces[number].messages[at - (self._ends[number - 1] if number else 0)]

    def __iter__(self) -> Iterator[Message]:
        return chain.from_iterable(piece.messages for piece in self._pieces)

    def __repr__(self) -> str:
        return f"Table({len(self)} messages of {len(self.runs)} runs)"

    # The columns.

    def _make_seeds(self) -> Int64s:
        return self._joined([piece.pick(np.frombuffer(piece.burst.packed_seeds, "<i8")) for piece in self._pieces])

    def _make_sequences(self) -> Int64s:
        return self._joined([piece.pick(np.frombuffer(piece.burst.packed_sequences, "<i8")) for piece in self._pieces])

    def _make_offsets(self) -> Int64s:
        return self._joined([piece.pick(np.arange(piece.burst.first, piece.burst.end)) for piece in self._pieces])

    @staticmethod
    def _joined(columns: list[np.ndarray[Any, Any]]) -> Int64s:
        joined: Int64s = np.concatenate(columns) if columns else np.empty(0, "<i8")
        joined.flags.writeable = False
        return joined

    def _make_runs(self) -> tuple[Run, ...]:
        runs: list[Run] = []
        for piece, end in zip(self._pieces, self._ends, strict=True):
            feed, begin = piece.feed, runs[-1].end if runs else 0
            run = Run(begin, end, feed.source, feed.topic, feed.incarnation)
            if runs and runs[-1][2:] == run[2:]:
                run = run._replace(begin=runs.pop().begin)
            runs.append(run)
        return tuple(runs)

    def _make_values(self) -> Any:  # noqa: ANN401 - an array, a tensor or a list
        parts = [blobs for piece in self._pieces if (blobs := piece.blobs()) is not None]
        if len(parts) == len(self._pieces) and len({kind for kind, _ in parts}) == 1:
            made = stack(parts[0][0], [rows for _, rows in parts], own=self._own)
            if made is not None:
                return made
        return [message.value for message in self]


_COLUMNS = {
    "seeds": Table._make_seeds,
    "sequences": Table._make_sequences,
    "offsets": Table._make_offsets,
    "runs": Table._make_runs,
    "values": Table._make_values,
}
