"""What was delivered to one subscription: a queue that the driver fills and the application empties."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from fabric.core import events

__all__ = ["Gap", "Hand", "Inbox"]

GAPS_KEPT_MAX = 1000
"""Gap reports that an inbox keeps; older ones are counted."""


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets `first <= offset < end` of a feed that can no longer be had.

    `end` is None where nobody knows how far it goes.
    """

    source: str
    topic: str
    incarnation: int
    first: int
    end: int | None
    reason: str


class Inbox:
    """Deliveries and reports for one subscription. The driver appends, one thread at a time takes."""

    __slots__ = ("ended", "gaps", "gaps_total", "items", "joined", "number", "open")

    def __init__(self, number: int) -> None:
        self.number = number
        self.items: deque[events.Deliver] = deque()
        self.joined: dict[tuple[str, str], int] = {}
        """The join offset of each feed, by (source, topic); of its first incarnation that was met."""
        self.open: set[tuple[str, str]] = set()
        self.ended = False
        """Whether there were feeds and all of them are over."""
        self.gaps: deque[Gap] = deque(maxlen=GAPS_KEPT_MAX)
        self.gaps_total = 0

    def begin_feed(self, command: events.BeginFeed) -> None:
        """A feed begins."""
        key = command.source, command.topic
        self.joined.setdefault(key, command.join)
        self.open.add(key)
        self.ended = False

    def end_feed(self, command: events.EndFeed) -> None:
        """A feed is over."""
        self.open.discard((command.source, command.topic))
        self.ended = not self.open

    def report_gap(self, command: events.ReportGap) -> None:
        """Offsets are lost."""
        gap = Gap(command.source, command.topic, command.incarnation, command.first, command.end, command.reason)
        self.gaps.append(gap)
        self.gaps_total += 1


class Hand:
    """One delivery in the application's hand: which of its rows are settled, and what that means for the core.

    Rows are settled one by one in any order; the core hears of runs. Room returns with the last row.
    """

    __slots__ = ("_first", "_left", "_next", "_submit", "dropped", "handled", "item", "rows")

    def __init__(self, item: events.Deliver, submit: Callable[[object], None]) -> None:
        self.item, self._submit = item, submit
        self.rows: range | tuple[int, ...] = range(item.burst.count) if item.rows is None else item.rows
        self._left = len(self.rows)
        self._first = item.covers[0] if item.covers else None
        self._next = 0
        self.handled = 0
        self.dropped: dict[str, int] | None = None
        """Rows that were not handled, by reason, since the core was last told."""

    def drop(self, reason: str) -> None:
        """Count a row that the application does not get."""
        self.dropped = self.dropped or {}
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def _count_dropped(self) -> int:
        return sum(self.dropped.values()) if self.dropped else 0

    def settle_all(self) -> None:
        """All rows that are not settled yet were handled, but for those counted in `dropped`. The fast way out."""
        item, covers = self.item, self.item.covers
        if not self._left:
            return
        self.handled += self._left - (self._count_dropped() if self.dropped else 0)
        if covers:
            first = covers[0] if self._first is None else self._first
            self._tell(first, covers[1], item.size)
            return
        for first, end in _runs([item.burst.first + row for row in self.rows[self._next :]]):
            self._tell(first, end, item.size if end == item.burst.first + self.rows[-1] + 1 else 0)

    def settle_until(self, position: int) -> None:
        """The rows before `position`, an index into `rows`, were handled, but for those counted in `dropped`."""
        if position <= self._next:
            return
        if position >= len(self.rows):
            self.settle_all()
            self._next, self._left = len(self.rows), 0
            return
        item, done = self.item, position - self._next
        self.handled += done - self._count_dropped()
        if item.covers:
            end = item.burst.first + self.rows[position - 1] + 1
            self._tell(item.covers[0] if self._first is None else self._first, end, 0)
            self._first = end
        else:
            for first, end in _runs([item.burst.first + row for row in self.rows[self._next : position]]):
                self._tell(first, end, 0)
        self._next, self._left = position, self._left - done

    def settle_one(self, position: int, reason: str | None = None) -> None:
        """One row, in any order, was handled, or dropped for a reason.

        Unwanted rows between go with the row after them.
        """
        item, row = self.item, self.rows[position]
        offset = item.burst.first + row
        first = offset
        if item.covers:
            first = item.covers[0] if position == 0 else item.burst.first + self.rows[position - 1] + 1
        end = item.covers[1] if item.covers and position == len(self.rows) - 1 else offset + 1
        self._left -= 1
        if reason is None:
            self.handled += 1
        else:
            self.drop(reason)
        self._tell(first, end, item.size if not self._left else 0)

    def _tell(self, first: int, end: int, size: int) -> None:
        self._submit(events.MessagesSettled(self.item.feed, first, end, self.handled, size, self.dropped))
        self.handled = 0
        self.dropped = None


def _runs(offsets: list[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for offset in offsets:
        if runs and runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], offset + 1)
        else:
            runs.append((offset, offset + 1))
    return runs
