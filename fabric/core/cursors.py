"""Cursors: where a subscription stands in each feed, as an application saves it (RULES N6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from fabric.errors import ConfigError

__all__ = ["Cursor", "Place", "Ranges", "pack_cursor", "parse_cursor"]

Ranges: TypeAlias = tuple[tuple[int, int], ...]
_END = 2**63


class Place(NamedTuple):
    """Where a subscription stands in the feeds of one source and topic."""

    incarnation: int
    """Of the feed; all earlier ones are settled."""
    floor: int
    """Everything below it is settled."""
    settled: Ranges = ()
    """What is settled above it, as ranges, lowest first."""


Cursor: TypeAlias = Mapping[tuple[str, str], Place]
"""By source and topic."""


def pack_cursor(cursor: Cursor) -> dict[str, list[Any]]:
    """As plain values that JSON and msgpack take: {"source/topic": [incarnation, floor, [[first, end], ...]]}."""
    return {
        f"{source}/{topic}": [place.incarnation, place.floor, [list(pair) for pair in place.settled]]
        for (source, topic), place in cursor.items()
    }


def parse_cursor(packed: object) -> Cursor:
    """The cursor in what `pack_cursor` made, after whatever the application did with it.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(packed, Mapping):
        raise ConfigError(f"a cursor is a dict, not {type(packed).__name__}", field="cursor")
    return dict(_entry(key, value) for key, value in packed.items())


def _entry(key: object, value: Any) -> tuple[tuple[str, str], Place]:  # noqa: ANN401 - whatever was saved
    try:
        source, topic = str(key).rsplit("/", 1)
        incarnation, floor, ranges = value
        settled = tuple((first, end) for first, end in ranges)
        _require(all(type(number) is int for number in (incarnation, floor, *(n for pair in settled for n in pair))))
        _require(0 < incarnation < 2 * _END and _is_rising([floor, *(n for pair in settled for n in pair)]))
    except (TypeError, ValueError):
        raise ConfigError(f"{key!r} does not stand in a cursor with {value!r}", field="cursor") from None
    return (source, topic), Place(incarnation, floor, settled)


def _require(sound: bool) -> None:
    if not sound:
        raise ValueError


def _is_rising(numbers: Iterable[int]) -> bool:
    """Whether each is above the one before, from 0 to the end of offsets."""
    last = -1
    for number in numbers:
        if not last < number < _END:
            return False
        last = number
    return True
