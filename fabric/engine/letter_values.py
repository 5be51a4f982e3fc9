"""The values of dead letters that are too large for their store: one burst each in the spill log of their member.

They lie under a feed of their own, at the number of their letter. No peer hears of it: it is not among the feeds that
a next life serves. What the log gives up, for its age or for damage, is told: the letter stays, with the head of its
value.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

from fabric.errors import DamagedRecordError, SpillError
from fabric.storage.letter_rows import SPILLED, LetterRow
from fabric.storage.records import Entry, Kind
from fabric.storage.state import LETTERS_FEED, FeedName

if TYPE_CHECKING:
    from fabric.storage.recovering import Span
    from fabric.storage.spill import SpillLog

__all__ = ["LetterValues"]

log = logging.getLogger("fabric.storage")

GONE = "the spill log has its value no more"
EXPIRED = "the spill log gave its value up for its age"
DAMAGED = "its value was damaged in the spill log"


class LetterValues:
    """The values that one spill log keeps for letters. Not thread-safe.

    `open_log` gives the log, which begins with its first use. With `outlives` the values survive a loss of power.
    `cut` is told which letter has lost its value, and why.
    """

    def __init__(self, incarnation: int, open_log: Callable[[], SpillLog], *, outlives: bool) -> None:
        self._incarnation, self._open_log, self._outlives = incarnation, open_log, outlives
        self._sizes: dict[int, int] = {}
        self.bytes = 0
        """Of all values, in bytes."""
        self.cut: Callable[[int, str], None] = lambda number, why: None

    def adopt(self, spill: SpillLog) -> None:
        """What an earlier life kept in this log."""
        for place in spill.places(LETTERS_FEED):
            self._note(place.first, place.size)

    def __contains__(self, number: int) -> bool:
        return number in self._sizes

    def _note(self, number: int, size: int) -> None:
        self._forget(number)
        self._sizes[number] = size
        self.bytes += size

    def _forget(self, number: int) -> None:
        self.bytes -= self._sizes.pop(number, 0)

    def keep(self, number: int, value: memoryview, bytes_max: int) -> str:
        """Keep the value of a letter, unless all of them would be more than `bytes_max`; why not, or nothing."""
        if number in self._sizes:  # its row was refused, and is tried again
            return ""
        if self.bytes + value.nbytes > bytes_max:
            return f"letters.values_bytes_max is used up: {self.bytes} of {bytes_max} bytes"
        try:
            self._append(Entry(Kind.BURST, LETTERS_FEED, self._incarnation, number, 1, value.cast("B")))
        except SpillError as error:
            return f"the spill log refused its value: {error}"
        self._note(number, value.nbytes)
        return ""

    def _append(self, entry: Entry) -> None:
        spill = self._open_log()
        name = Entry(Kind.FEED, LETTERS_FEED, self._incarnation, 0, 0, FeedName("", "letters", "").encode())
        spill.append([entry] if LETTERS_FEED in spill.names else [name, entry], hold=self._outlives)
        if not self._outlives:
            return
        try:
            spill.sync()
        except SpillError as error:  # the next sync writes it again; a loss of power before that is told by `whole`
            log.warning("the value of dead letter %d would not survive a loss of power: %s", entry.first, error)

    def whole(self, row: LetterRow) -> LetterRow:
        """A letter with all of its value; without, if that is lost. Raises `SpillError` if it cannot be read now."""
        if row.cut != SPILLED:
            return row
        if row.id not in self._sizes:
            return replace(row, cut=GONE)
        try:
            value = bytes(self._open_log().read(LETTERS_FEED, row.id).frame)
        except DamagedRecordError as error:
            if isinstance(error.__cause__, OSError):
                raise
            value = b""
        if len(value) == row.size and xxh3_64_intdigest(value) == row.checksum:
            return replace(row, value=value)
        self.discard([row.id])
        self._lose(row.id, DAMAGED)
        return replace(row, cut=DAMAGED)

    def _lose(self, number: int, why: str) -> None:
        self._forget(number)
        log.error("dead letter %d has only the head of its value left: %s", number, why)
        self.cut(number, why)

    def expired(self, lost: Iterable[Span]) -> list[Span]:
        """What the log gave up for its age: that of letters is told to them; the rest is returned."""
        others: list[Span] = []
        for span in lost:
            if span.feed != LETTERS_FEED:
                others.append(span)
                continue
            for number in range(span.first, span.end):
                self._lose(number, EXPIRED)
        return others

    def discard(self, numbers: Collection[int]) -> None:
        """These letters are over."""
        gone = [number for number in numbers if number in self._sizes]
        for number in gone:
            self._forget(number)
        if gone:
            self._release(gone)

    def _release(self, numbers: Collection[int]) -> None:
        try:
            self._open_log().discard(LETTERS_FEED, numbers)
        except SpillError as error:
            log.warning("segments of the spill log cannot be deleted: %s", error)

    def matched(self, rows: Iterable[LetterRow]) -> Iterator[LetterRow]:
        """The rows of a store, each with what the log has for it; values without a row are discarded at the end."""
        found: set[int] = set()
        for row in rows:
            if row.cut == SPILLED and row.id not in self._sizes:
                log.error("dead letter %d has only the head of its value left: %s", row.id, GONE)
                yield replace(row, cut=GONE)
                continue
            if row.cut == SPILLED:
                found.add(row.id)
            yield row
        rest = [number for number in self._sizes if number not in found]
        for number in rest:
            self._forget(number)
        if rest or self._sizes:  # a value that was moved lies twice in a log that was read anew
            self._release(rest)

    def move(self) -> None:
        """Write behind, once more, what alone keeps the oldest segment of a log that is half full."""
        if not self._sizes:
            return
        try:
            spill = self._open_log()
            firsts = spill.held_up(LETTERS_FEED)
            for first in firsts:
                self._append(spill.read(LETTERS_FEED, first))
            if firsts:
                spill.discard(LETTERS_FEED, ())
        except SpillError as error:
            log.warning("values of dead letters stay where they are in the spill log: %s", error)
