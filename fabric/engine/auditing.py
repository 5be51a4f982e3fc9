"""Draws up the ledger from the core's books."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fabric.core.books import DROPPED, HANDLED, LETTERS, Book, Reckoning
from fabric.core.machine import FabricCore
from fabric.core.wire import Drop
from fabric.observe.ledger import Ledger, LedgerRow, Totals, Unknown

__all__ = ["draw_up"]


def draw_up(core: FabricCore, *, final: bool = False) -> Ledger:
    """The ledger at this moment; needs the engine's lock. A ledger of thousands of feeds takes milliseconds.

    `final`: for one who closes. What his readers have not settled he will not hear of any more.
    """
    return Ledger(core.context.name, tuple(_row(reckoning, final=final) for reckoning in core.reckon()))


def _row(reckoning: Reckoning, *, final: bool) -> LedgerRow:
    book, end = reckoning.book, reckoning.end
    settled, is_reader = book.settled, reckoning.acknowledged is not None
    acknowledged = max(0, (reckoning.acknowledged or 0) - book.join - settled)
    rest = end - book.join - settled - acknowledged
    is_over = reckoning.lost or (final and reckoning.left)  # who is over is owed no more than what he settled
    floor = max(book.floor, reckoning.acknowledged or 0)
    totals = _totals(book, end - book.join - (rest if is_over else 0), acknowledged, 0 if is_over else rest)
    state = "lost" if is_over else "left" if reckoning.left else book.state if book.source else "sum"
    who = (book.source, book.topic, book.incarnation, book.subscriber, book.subscription)
    row = LedgerRow(*who, state, reckoning.peer, book.join, end, floor, totals, book.counts, feeds=reckoning.feeds)
    unknown = Unknown(row.source, row.topic, row.subscriber, row.subscription, floor, end, row.peer)
    if book.open_gap:
        return replace(row, known_unknown=replace(unknown, first=end, end=None))
    if is_over and rest:
        return replace(row, known_unknown=unknown)
    if final and is_reader and rest:
        return replace(row, kept=unknown) if reckoning.kept else replace(row, unknown=(unknown,))
    return row


def _totals(book: Book, owed: int, acknowledged: int, in_flight: int) -> Totals:
    counts = book.counts
    return Totals(
        owed=owed,
        handled=counts.get(HANDLED, 0),
        dead_lettered=_sum(counts, LETTERS),
        gap=counts.get(Drop.GAP, 0),
        dropped=_sum(counts, DROPPED),
        not_asked=counts.get(Drop.NOT_ASKED, 0),
        acknowledged=acknowledged,
        in_flight=in_flight,
    )


def _sum(counts: Mapping[str, int], reasons: tuple[str, ...]) -> int:
    return sum(counts.get(reason, 0) for reason in reasons)
