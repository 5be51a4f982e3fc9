"""The words of the model: records, rows, cursors, and what a run draws by chance."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

NONE = -1
"""`previous` of the first record of a lane."""
Key = tuple[int, int]
"""Incarnation and offset."""


class Record(NamedTuple):
    """A record. It has 1, 2 or 3 units, which stand for bytes."""

    incarnation: int
    offset: int
    lane: int
    sequence: int
    previous: int
    value: float

    @property
    def key(self) -> Key:
        return self.incarnation, self.offset


class Row(NamedTuple):
    """A feed as its publisher names it to a subscription."""

    incarnation: int
    join: int
    first: int
    end: int
    before: int
    """The incarnation whose feed comes first; 0: none."""
    ending: int
    """0: it goes on. 1: it ended at `end`. 2: so much of it is known."""


class Cursor(NamedTuple):
    incarnation: int
    floor: int
    above: frozenset[int]
    redriven: frozenset[Key]

    def covers(self, key: Key) -> bool:
        """Whether this offset is settled."""
        return key < (self.incarnation, self.floor) or (key[0] == self.incarnation and key[1] in self.above)


class Saved(NamedTuple):
    """What an application keeps with its own state."""

    cursor: Cursor
    delivered: int
    gaps: int
    open_gaps: int
    start: Key


class Violation(Exception):
    """An invariant does not hold."""


def size(records: Iterable[Record]) -> int:
    """Their units."""
    return sum(1 + int(record.value * 3) for record in records)


def count_ranges(offsets: Collection[int]) -> int:
    return sum(1 for offset in offsets if offset - 1 not in offsets)


@dataclass(frozen=True)
class Profile:
    """With a name it outlives its sessions; with a cursor its application says what counts."""

    name: bool
    cursor: bool
    start: str
    pace: float
    lanes: frozenset[int] | None


@dataclass
class Options:
    """Swarm: every run draws its own sizes, policies and faults, some of them off, so that rare pairs meet."""

    subscribers: int
    lanes: int
    burst: int
    rate: float
    style: str
    level: str
    """`memory`: reliable. `process`, `power`: durable, with that sync."""
    when_full: str
    memory: int
    disk: int
    feeds_kept: int
    expiry: float
    patience: float
    """How long the next life of a publisher is waited for."""
    append_failure: float
    loss: float
    doubling: float
    delay: float
    stragglers: float
    lull: int
    room: int
    credit: int
    ask: int
    ranges: int
    window: int
    far: int
    near: int
    saving: float
    poison: float
    transient: float
    attempts: int
    on_failure: str
    redrive: bool
    letters: int
    obituaries: float
    """How many deaths of publishers are proven to a subscriber."""
    stops: list[str]
    lose_cursor: float
    faults: dict[str, int] = field(default_factory=dict)


def draw_profile(rng: random.Random, options: Options) -> Profile:
    cursor = rng.random() < 0.5
    return Profile(
        name=cursor or rng.random() < 0.5,
        cursor=cursor,
        start=rng.choice(["live", "retained"]),
        pace=rng.choice([0.2, 0.9]),
        lanes=rng.choice([None, None, frozenset(range(0, options.lanes, 2))]),
    )


def draw_options(rng: random.Random) -> Options:
    pick, style = rng.choice, rng.choice(["handler", "handler", "iterator"])
    redrive, letters = pick([(True, 1), (True, 2), (True, 1000), (False, 1000)])
    return Options(
        subscribers=pick([1, 2, 3]),
        lanes=pick([1, 2, 3, 8]),
        burst=pick([1, 4]),
        rate=pick([0.3, 0.7]),
        style=style,
        level=pick(["memory", "process", "power"]),
        when_full=pick(["spill", "spill", "block", "drop_oldest"]),
        memory=pick([2, 6, 1000]),
        disk=pick([4, 10, 1000]),
        feeds_kept=pick([2, 1000]),
        expiry=pick([8, 30, 1e9, 1e9]),
        patience=pick([10, 1e9, 1e9]),
        append_failure=pick([0, 0.1]),
        loss=pick([0, 0.05, 0.4]),
        doubling=pick([0, 0.2]),
        delay=pick([0.1, 0.5, 3]),
        stragglers=pick([0, 0.1]),
        lull=pick([0, 40]),
        room=pick([3, 9, 200]),
        credit=pick([1, 6, 64]),
        ask=pick([2, 64]),
        ranges=pick([1, 3, 64]),
        window=pick([1, 3, 8]),
        far=pick([3, 10, 1000]),
        near=pick([1, 3]),
        saving=pick([0.03, 0.1, 0.3]),
        poison=pick([0, 0.2, 0.5]),
        transient=pick([0, 0.3]),
        attempts=pick([1, 3]),
        on_failure=pick(["skip", "park", "park"]) if style == "handler" else "skip",
        redrive=redrive,
        letters=letters,
        obituaries=pick([0, 0.5, 1]),
        stops=pick([["kill"], ["power"], ["clean"], ["clean", "clean", "kill"], ["kill", "power", "clean"]]),
        lose_cursor=pick([0, 0.4]),
        faults={
            "nothing": 40,
            "sync": 4,
            "repair_handler": 4,
            "stop_publisher": pick([0, 2, 4]),
            "replace_publisher": pick([0, 0, 1, 8]),
            "corrupt": pick([0, 0, 2]),
            "stop_subscriber": pick([0, 2, 4]),
            "cut": pick([0, 2, 4]),
        },
    )
