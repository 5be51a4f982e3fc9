"""Reading bursts out of a spill log, each verified; what turns out damaged is noted once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fabric.errors import DamagedRecordError, InternalError
from fabric.storage.index import Contents, Place
from fabric.storage.records import Entry, Kind, MalformedEntryError, Reason, read_entry
from fabric.storage.recovering import Damage, Span
from fabric.storage.segments import Shelf

__all__ = ["Reader"]


class Reader:
    """The reading half of a log."""

    def __init__(self, contents: Contents, shelf: Shelf) -> None:
        self._contents, self._shelf = contents, shelf
        self.damage: list[Damage] = []
        """What was found damaged, in recovery or since."""

    def read(self, feed: int, first: int) -> Entry:
        """The burst that begins with this offset.

        Raises:
            DamagedRecordError: it is not what was written.
        """
        place = self._contents.exactly(feed, first)
        if place is None:
            raise InternalError(f"no burst of feed {feed} begins at {first}: ask `find` or `spans` first")
        segment = self._shelf[place.segment]
        try:
            header, entry = read_entry(self._shelf.file(segment).read, segment.seed, place.position, segment.used)
        except (MalformedEntryError, OSError) as error:
            raise self._damaged(feed, place, error) from error
        if (header.kind, header.feed, header.first, header.end) != (Kind.BURST, feed, first, place.end):
            raise self._damaged(feed, place, MalformedEntryError(Reason.HEADER))
        return entry

    def all(self) -> Iterator[Entry]:
        """All bursts in the order of writing, but for damaged ones."""
        for feed, first in self._contents.in_order():
            with contextlib.suppress(DamagedRecordError):
                yield self.read(feed, first)

    def _damaged(self, feed: int, place: Place, error: Exception) -> DamagedRecordError:
        """Note it once, and name it."""
        known = error if isinstance(error, MalformedEntryError) else MalformedEntryError(Reason.UNREADABLE)
        lost, segment, position = Span(feed, place.first, place.end), place.segment, place.position
        damage = Damage(segment=segment, position=position, size=known.size, reason=known.reason, lost=lost)
        if damage not in self.damage:
            self.damage.append(damage)
        return DamagedRecordError(
            str(known.reason),
            segment=segment,
            position=position,
            size=known.size,
            feed=feed,
            first=place.first,
            end=place.end,
        )
