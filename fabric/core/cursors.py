"""Cursors: where a subscription stands in each feed, as an application saves it (RULES N6)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from fabric.errors import ConfigError

__all__ = ["REDRIVEN", "Cursor", "Place", "Ranges", "Slot", "pack_cursor", "parse_cursor", "parse_redriven"]

Ranges: TypeAlias = tuple[tuple[int, int], ...]
REDRIVEN = "redriven"
"""What a cursor says of dead letters. No source and topic is called so: they have a slash between them."""
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


class Slot(NamedTuple):
    """Of one record: whose dead letter came again and was handled (RULES N6)."""

    source: str
    topic: str
    incarnation: int
    offset: int


def pack_cursor(cursor: Cursor, redriven: Collection[Slot] = ()) -> dict[str, list[Any]]:
    """As plain values that JSON and msgpack take: {"source/topic": [incarnation, floor, [[first, end], ...]]}.

    Under "redriven" are letters that were handled: [[source, topic, incarnation, offset], ...]; only if there are any.
    """
    packed: dict[str, list[Any]] = {
        f"{source}/{topic}": [place.incarnation, place.floor, [list(pair) for pair in place.settled]]
        for (source, topic), place in cursor.items()
    }
    return packed | {REDRIVEN: [list(slot) for slot in redriven]} if redriven else packed


def parse_cursor(packed: object) -> Cursor:
    """The places in what `pack_cursor` made, after whatever the application did with it.

    Raises:
        ConfigError: it is no cursor.
    """
    if not isinstance(packed, Mapping):
        raise ConfigError(f"a cursor is a dict, not {type(packed).__name__}", field="cursor")
    return dict(_entry(key, value) for key, value in packed.items() if key != REDRIVEN)


def parse_redriven(packed: Mapping[str, Any]) -> frozenset[Slot]:
    """The letters that were handled, in what `pack_cursor` made.

    Raises:
        ConfigError: they are none.
    """
    try:
        slots = frozenset(Slot(*slot) for slot in packed.get(REDRIVEN, ()))
        _require(all(type(slot) is Slot and [*map(type, slot)] == [str, str, int, int] for slot in slots))
    except (TypeError, ValueError):
        raise ConfigError(f"{REDRIVEN!r} of a cursor names no letters", field="cursor") from None
    return slots


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
