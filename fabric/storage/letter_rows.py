"""A dead letter as a row: its columns, and the checksum that every row carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import msgpack
from xxhash import xxh3_64_intdigest

__all__ = [
    "COLUMNS",
    "KEY",
    "LETTERS_LOCK",
    "OVERHEAD_BYTES",
    "SCHEMA",
    "SPILLED",
    "LetterKey",
    "LetterRow",
    "from_row",
    "to_row",
]

LETTERS_LOCK = "letters.lock"
"""Held by who has the store; who sweeps looks for it, and needs no SQLite."""
LetterKey = tuple[str, str, int, str, int]
"""Subscription, source, incarnation, topic, offset: a record becomes one letter of a subscription, once."""
OVERHEAD_BYTES = 512
"""What a row counts for beside its value, metadata and detail: names, numbers, its entry in the index."""
_TOP = 1 << 63
SPILLED = "spilled"
"""Of a value: the row has its head, the spill log of its member all of it, at the number of the letter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterRow:
    """One letter, what is remembered of one, or a notice of records that were lost without one."""

    id: int
    """Ascending in the order of burial."""
    kind: str
    """`letter`; `notice`; or `over`: it was a letter, and is remembered without its value."""
    subscription: str
    """The pattern of its handler or subscription; those after the first with this pattern have a number behind it."""
    source: str
    incarnation: int
    topic: str
    seed: int
    """-1 in a notice."""
    sequence: int
    """-1 in a notice."""
    first: int
    """Its offset; of a notice the first one."""
    end: int
    """The offset behind it; -1 in a notice if nobody knows how far it goes."""
    reason: str
    """Why it is a letter; of one that is over what its record counts as: `handled`, or why it was a letter."""
    detail: str
    attempts: int
    parked: bool
    """Whether its lane waits for it."""
    published_ns: int
    buried_ns: int
    value_kind: int
    size: int
    """Of the whole value, in bytes; `value` may be its head."""
    checksum: int
    """XXH3-64 of the whole value."""
    metadata: bytes
    value: bytes
    cut: str
    """Empty if `value` is whole; `SPILLED`; or why nobody has it whole any more."""

    @property
    def key(self) -> LetterKey:
        """What makes it the letter of one record."""
        return self.subscription, self.source, self.incarnation, self.topic, self.first

    @property
    def bytes(self) -> int:
        """What it counts for."""
        texts = len(self.detail.encode()) + len(self.cut.encode())
        return OVERHEAD_BYTES + texts + len(self.metadata) + len(self.value)

    @property
    def is_cut(self) -> bool:
        """Whether nobody has its value whole."""
        return self.cut not in ("", SPILLED)


COLUMNS = (*(column.name for column in fields(LetterRow)), "sum")
_VALUES = attrgetter(*COLUMNS[:-1])
_TYPES = {"str": "TEXT", "bytes": "BLOB"}
_UNSIGNED = tuple(COLUMNS.index(name) for name in ("incarnation", "checksum"))
_PARKED = COLUMNS.index("parked")
KEY = ("subscription", "source", "incarnation", "topic", "first")
"""The columns of `LetterRow.key`."""


def _declare(name: str, kind: str) -> str:
    return f'"{name}" {_TYPES.get(kind, "INTEGER")}' + (" PRIMARY KEY" if name == "id" else " NOT NULL")


SCHEMA = (
    "CREATE TABLE letters ("
    + ", ".join(_declare(column.name, str(column.type)) for column in fields(LetterRow))
    + f', "sum" INTEGER NOT NULL, UNIQUE ({", ".join(KEY)}))'
)
"""The one table. Its text is compared when a store is opened: a damaged schema is damage."""


def to_row(letter: LetterRow) -> tuple[Any, ...]:
    """The values of its columns, the checksum last. SQLite's integers are signed; u64 wrap round."""
    row = list(_VALUES(letter))
    for at in _UNSIGNED:
        row[at] = _signed(row[at])
    row[_PARKED] = int(letter.parked)
    return (*row, _sum_of(row))


def from_row(row: Sequence[Any]) -> LetterRow | None:
    """The letter of a row; None if it is not what was written."""
    try:
        if len(row) != len(COLUMNS) or _sum_of(row[:-1]) != row[-1]:
            return None
    except (TypeError, ValueError, OverflowError, UnicodeError):  # what only a damaged row holds
        return None
    values = dict(zip(COLUMNS, row[:-1], strict=False))
    values["parked"] = bool(values["parked"])
    for at in _UNSIGNED:
        values[COLUMNS[at]] %= 2 * _TOP
    return LetterRow(**values)


def _sum_of(columns: Sequence[Any]) -> int:
    return _signed(xxh3_64_intdigest(msgpack.packb(list(columns))))


def _signed(number: int) -> int:
    return number - 2 * _TOP if number >= _TOP else number
