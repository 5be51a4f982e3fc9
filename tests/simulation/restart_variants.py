"""Restarts without one of their rules each, as `variants.py` does it to the rest: registrations, cursors, kept ends."""

from __future__ import annotations

from typing import Any

from fabric.config import Policy
from fabric.core.ancestry import Ancestry
from fabric.core.endings import Endings
from fabric.core.keeping import Keeping
from fabric.core.lanes import InboundFeed
from fabric.core.publishing import Publishing
from fabric.core.registrations import Registrations
from fabric.core.saving import Saving
from fabric.core.subscribing import Subscribing
from fabric.core.subscriptions import Subscription
from fabric.engine.durable import Durability
from fabric.storage.spill import SpillLog
from fabric.storage.state import MemberState
from tests.simulation.variants import Patch, Variant, wrapped

# Who is owed what.


def registrations_are_not_restored() -> list[Patch]:
    return [wrapped(Registrations, "restore", lambda original, self, packed: True)]


def confirmed_before_it_is_written_down() -> list[Patch]:
    return [wrapped(Saving, "is_due", lambda original, self, registration: False)]


def positions_are_not_saved() -> list[Patch]:
    """What was acknowledged in one life counts for nothing in the next."""
    return [wrapped(Publishing, "_position_of", lambda original, self, registration, feed: registration.joins[feed])]


def damage_means_that_nobody_is_owed() -> list[Patch]:
    """Registrations that cannot be read are as good as none."""

    def restore(original: Any, self: Any, packed: Any) -> bool:
        original(self, packed)
        return True

    return [wrapped(Registrations, "restore", restore)]


def unsubscribing_is_not_written_down() -> list[Patch]:
    def on_unregister(original: Any, self: Any, peer: Any, number: int, rests: bool) -> None:
        persists, self.registrations.persists = self.registrations.persists, False
        original(self, peer, number, rests)
        self.registrations.persists = persists

    return [wrapped(Publishing, "on_unregister", on_unregister)]


def sessions_begin_where_the_last_began() -> list[Patch]:
    """And not where it stood."""

    def starts(registration: Any, line: Any, stated: Any) -> Any:
        readers = [(out, out.readers.pop(registration.reader, None)) for out in line]
        found = original(registration, line, stated)
        for out, position in readers:
            if position is not None:
                out.readers[registration.reader] = position
        return found

    def rest(original: Any, self: Any, registration: Any) -> None:
        joins = dict(registration.joins)
        original(self, registration)
        registration.joins.update(joins)

    original = Ancestry.starts
    return [(Ancestry, "starts", staticmethod(starts)), wrapped(Publishing, "_rest", rest)]


def released_by_the_first_that_has_it() -> list[Patch]:
    """A feed of an earlier life goes when one reader is through with it, though another lacks some."""

    def end_past(original: Any, self: Any, out: Any, reader: Any, floor: int) -> None:
        original(self, out, reader, floor)
        if floor >= out.end:
            out.readers.update(dict.fromkeys(out.readers, out.end))
            self._settle(out)

    return [wrapped(Publishing, "_end_past", end_past)]


def told_what_was_handled() -> list[Patch]:
    """And not what the saved cursor says: what was handled and not saved is gone with its subscriber."""
    return [(InboundFeed, "told_floor", property(lambda self: self.floor))]


# Durable writes.


def sent_before_it_is_written() -> list[Patch]:
    def close_burst(original: Any, self: Any, event: Any) -> None:
        original(self, event)
        if self.feeds[event.topic].policy is Policy.DURABLE:
            self._send(self.feeds[event.topic], event)

    return [wrapped(Publishing, "close_burst", close_burst)]


def refused_keeps_its_numbers() -> list[Patch]:
    return [wrapped(Durability, "_undo", lambda original, self, attempt: None)]


def power_is_not_synced() -> list[Patch]:
    return [wrapped(SpillLog, "sync", lambda original, self: None)]


# Ends.


def closes_keep_nothing() -> list[Patch]:
    def begin(original: Any, self: Any, feeds: Any) -> None:
        original(self, [])

    return [wrapped(Keeping, "begin", begin)]


def kept_ends_with_the_goodbye() -> list[Patch]:
    """A goodbye does not say that the next life has the rest."""

    def stop(original: Any, self: Any) -> list[tuple[int, int, bool]]:
        return [(feed, end, False) for feed, end, _ in original(self)]

    return [wrapped(Publishing, "stop", stop)]


def kept_rows_are_forgotten() -> list[Patch]:
    """The same of feeds that a subscriber has not come to."""
    return [wrapped(Subscription, "keep_rows", lambda original, self, feeds: None)]


def the_dead_are_not_waited_for() -> list[Patch]:
    """A durable feed ends with its publisher, as if it lay in memory."""

    def orphan(original: Any, self: Any, inbound: Any) -> None:
        self._finish(inbound, 0, exact=False)

    return [wrapped(Endings, "_orphan", orphan)]


def next_lives_are_not_asked() -> list[Patch]:
    """Where the feeds of the life before ended is what it said, and nothing more of them comes."""
    return [wrapped(Endings, "welcome", lambda original, self, peer: None)]


def enters_whatever_was_before() -> list[Patch]:
    """The next feed of a topic begins although the one before has not been named yet."""

    def add_feed(original: Any, self: Any, subscription: Any, peer: Any, row: Any) -> Any:
        return original(self, subscription, peer, row._replace(before=0))

    return [wrapped(Subscribing, "_add_feed", add_feed)]


def kept_ends_are_not_certain() -> list[Patch]:
    """What a close wrote down says nothing about where its feeds ended."""

    def is_certain(original: Any, self: Any, incarnation: int, name: Any) -> bool:
        return name.policy == "durable" and bool(original(self, incarnation, name))

    return [wrapped(MemberState, "_is_certain", is_certain)]


def lost_with_the_power_is_certain() -> list[Patch]:
    """What was not synced and is gone was never there: its end is told as exact."""
    return [wrapped(MemberState, "_is_certain", lambda original, self, incarnation, name: True)]


def inexact_ends_are_told_exact() -> list[Patch]:
    def row(original: Any, self: Any, registration: Any, out: Any) -> Any:
        fields = original(self, registration, out)
        return (*fields[:-1], min(1, fields[-1]))

    def on_status(original: Any, self: Any, peer: Any, topic: str, incarnation: int) -> None:
        for out in self.ancestry.past():
            out.exact = True
        original(self, peer, topic, incarnation)

    return [wrapped(Publishing, "_row", row), wrapped(Publishing, "on_status", on_status)]


RESTART_VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        registrations_are_not_restored,
        confirmed_before_it_is_written_down,
        positions_are_not_saved,
        damage_means_that_nobody_is_owed,
        unsubscribing_is_not_written_down,
        sessions_begin_where_the_last_began,
        released_by_the_first_that_has_it,
        told_what_was_handled,
        sent_before_it_is_written,
        refused_keeps_its_numbers,
        power_is_not_synced,
        closes_keep_nothing,
        kept_ends_with_the_goodbye,
        kept_rows_are_forgotten,
        the_dead_are_not_waited_for,
        next_lives_are_not_asked,
        enters_whatever_was_before,
        kept_ends_are_not_certain,
        lost_with_the_power_is_certain,
        inexact_ends_are_told_exact,
    )
}
