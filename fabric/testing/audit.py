"""Audits the books of a world: each balances at every look, agrees with what was seen, and is told without change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from fabric.core.books import Book
from fabric.core.wire import Drop
from fabric.engine.loop import Engine
from fabric.testing.history import FeedKey, History, Reading

__all__ = ["disagreements", "imbalances"]

_Key: TypeAlias = tuple[tuple[str, int, int], FeedKey]
"""Subscriber, its life and the number of the subscription; and the feed."""


def imbalances(history: History) -> Iterator[str]:
    """What is wrong with the books of those who live, at this moment."""
    own = {_key(book): book for engine in _engines(history) for book in _own(engine)}
    for engine in _engines(history):
        life = history.life_of(engine)
        for book in _own(engine):
            if not book.join <= book.floor <= book.floor + book.above <= book.known or book.booked != book.settled:
                yield f"{book}: {book.booked} are booked, {book.settled} went by"
            subscription = history.subscriptions.get((*life.key, book.subscription))
            reading = subscription.readings.get(_key(book)[1]) if subscription else None
            if reading is not None:
                yield from _against(book, reading)
        for book in _told(engine):
            truth = own.get(_key(book))
            if truth is not None and any(count > truth.counts.get(end, 0) for end, count in book.counts.items()):
                yield f"{engine.card.name} was told {book}, the truth is {truth}"


def _against(book: Book, reading: Reading) -> Iterator[str]:
    """A book says no more than what was seen to happen, and nothing less of what is lost."""
    handled = sum(1 for entry in reading.received if entry.offset not in reading.letters)
    known = len(reading.known)
    if book.counts.get("handled", 0) > handled + known:
        yield f"{book}: only {handled} were received"
    lost = sum(lost.end - lost.first for lost in reading.lost if lost.end is not None and lost.reason == Drop.GAP)
    if book.counts.get(Drop.GAP, 0) != lost:
        yield f"{book}: {lost} were reported as gaps"
    exhausted = sum(1 for reason in reading.letters.values() if reason == Drop.HANDLER_EXHAUSTED)
    if book.counts.get(Drop.HANDLER_EXHAUSTED, 0) > exhausted + known:
        yield f"{book}: only {exhausted} were buried"


def disagreements(history: History) -> Iterator[str]:
    """Where a publisher and its reader, both alive, do not have the same books; none once the fabric is at rest."""
    engines = [engine for engine in _engines(history) if not _is_outlived(history, engine)]
    own = {_key(book): book for engine in engines for book in _own(engine)}
    for engine in engines:
        for book in _told(engine):
            truth = own.get(_key(book)) if book.incarnation == engine.card.incarnation else None
            if truth is not None and (book.counts, book.state) != (truth.counts, truth.state):
                yield f"{engine.card.name} has not heard {truth}, but {book}"


def _engines(history: History) -> list[Engine]:
    return [life.engine for life in history.lives.values() if life.engine is not None and not life.engine.closed]


def _is_outlived(history: History, engine: Engine) -> bool:
    name, incarnation = engine.card.name, engine.card.incarnation
    return any(other == name and later > incarnation for other, later in history.lives)


def _own(engine: Engine) -> list[Book]:
    books = [reckoning.book for reckoning in engine.core.reckon()]
    return [book for book in books if book.subscriber == engine.card.name]


def _told(engine: Engine) -> list[Book]:
    name = engine.card.name
    books = [reckoning.book for reckoning in engine.core.reckon() if not reckoning.lost]
    return [book for book in books if book.source == name != book.subscriber]


def _key(book: Book) -> _Key:
    reader = book.subscriber, book.life, book.subscription
    return reader, FeedKey(book.source, book.incarnation, book.topic)
