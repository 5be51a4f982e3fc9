"""The records that are, or were, letters of this member: whichever life hears of them again, none is handled again.

A record comes again when its subscription begins anew among what its publisher keeps, in this life or the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fabric.core.books import HANDLED

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed
    from fabric.storage.letter_rows import LetterKey

__all__ = ["KnownRecords"]

FeedKey = tuple[str, str, int, str]
"""Subscription, source, incarnation, topic."""


class KnownRecords:
    """Offsets by feed, and what each counts as. Of letters that are over only the latest `over_max` are known.

    Whoever changes it holds the lock of the letters; looking needs none.
    """

    def __init__(self, over_max: int) -> None:
        self._over_max = over_max
        self._feeds: dict[FeedKey, dict[int, str]] = {}
        self._over: dict[LetterKey, None] = {}
        self.forgotten = 0
        """How many that are over had to be forgotten."""

    def add(self, key: LetterKey, reason: str) -> None:
        """This record is a letter."""
        self._over.pop(key, None)
        self._feeds.setdefault(key[:4], {})[key[4]] = reason

    def end(self, key: LetterKey, reason: str) -> None:
        """It is one no more: it counts as `reason` from now on."""
        self.add(key, reason)
        self._over[key] = None
        if len(self._over) > self._over_max:
            self.forget(next(iter(self._over)))
            self.forgotten += 1

    def forget(self, key: LetterKey) -> None:
        """Nothing is known of this record."""
        self._over.pop(key, None)
        offsets = self._feeds.get(key[:4], {})
        offsets.pop(key[4], None)
        if not offsets:
            self._feeds.pop(key[:4], None)

    def of_burst(self, name: str, feed: InboundFeed, offsets: range) -> Mapping[int, str]:
        """What is known of these records of one feed, for one subscription."""
        known = self._feeds.get((name, feed.source, feed.incarnation, feed.topic)) if self._feeds else None
        if not known:
            return _NOTHING
        return {offset: reason for offset in offsets if (reason := known.get(offset)) is not None}

    def drop_of(self, key: LetterKey) -> tuple[bool, str | None]:
        """Whether this record is known; and if so why it is dropped, None if it was handled."""
        reason = self._feeds.get(key[:4], _NOTHING).get(key[4])
        return reason is not None, None if reason == HANDLED else reason


_NOTHING: Mapping[int, str] = {}
