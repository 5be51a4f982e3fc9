"""The books without one of their rules each. The checker audits them in every world, and catches these."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fabric.core.books import Books, ends_of
from fabric.core.lanes import InboundFeed
from fabric.core.subscribing import Subscribing
from fabric.core.wire import Drop
from tests.simulation.variants import Patch, Variant, wrapped


def handled_is_counted_twice() -> list[Patch]:
    def settle(original: Any, self: Any, event: Any) -> None:
        original(self, event)
        if event.handled and event.feed.floor % 7 == 3:
            event.feed.counts["handled"] += 1

    return [wrapped(Subscribing, "settle", settle)]


def drops_count_as_handled() -> list[Patch]:
    """The sum is right, and yet the books lie."""

    def settle(original: Any, self: Any, event: Any) -> None:
        original(self, event)
        counts = event.feed.counts
        counts["handled"] += counts.pop(Drop.HANDLER_EXHAUSTED, 0) + counts.pop(Drop.REJECTED, 0)

    return [wrapped(Subscribing, "settle", settle)]


def gaps_are_not_booked() -> list[Patch]:
    def pass_gap(original: Any, self: Any) -> bool:
        before = self.counts[Drop.GAP]
        moved: bool = original(self)
        self.counts[Drop.GAP] = before
        return moved

    return [wrapped(InboundFeed, "_pass_gap", pass_gap)]


def rest_is_not_given_up() -> list[Patch]:
    def close(original: Any, self: Any, inbound: Any, *, by_us: bool) -> None:
        before = inbound.counts.copy()
        original(self, inbound, by_us=by_us)
        key = inbound.subscription, inbound.feed
        inbound.counts = before
        self._past[key] = _with_counts(self._past[key], before)

    return [wrapped(Books, "close", close)]


def _with_counts(book: Any, counts: Any) -> Any:
    return replace(book, counts=ends_of(counts))


def told_once() -> list[Patch]:
    def tell(original: Any, self: Any, name: str) -> None:
        original(self, name)
        self._untold.pop(name, None)

    return [wrapped(Books, "_tell", tell)]


def confirmed_whatever_changed() -> list[Patch]:
    def on_booked(original: Any, self: Any, peer: Any, token: int, again: bool) -> None:
        original(self, peer, token, again)
        for inbound in [inbound for inbound in self.touched if inbound.source == peer.name]:
            del self.touched[inbound]

    return [wrapped(Books, "on_booked", on_booked)]


def lives_are_mixed() -> list[Patch]:
    """What an earlier life of a reader said counts for the next one."""

    def open_account(original: Any, self: Any, registration: Any, out: Any) -> Any:
        account = original(self, registration, out)
        for (name, life, number, feed), left in self._left.items():
            if (name, number, feed) == (*registration.reader, out.feed) and life < registration.incarnation:
                account.book = replace(account.book, counts=left.book.counts)
        return account

    return [wrapped(Books, "_open_account", open_account)]


BOOK_VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        handled_is_counted_twice,
        drops_count_as_handled,
        gaps_are_not_booked,
        rest_is_not_given_up,
        told_once,
        confirmed_whatever_changed,
        lives_are_mixed,
    )
}
