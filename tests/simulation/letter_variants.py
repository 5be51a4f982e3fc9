"""Dead letters without one of their rules each, as `variants.py` does it to the core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fabric.core.books import LETTERS
from fabric.core.wire import Drop
from fabric.engine.inbox import Hand
from fabric.engine.known_records import KnownRecords
from fabric.engine.letter_book import LetterBook
from fabric.engine.lettering import LetterKeeper, WriteLetter
from fabric.engine.letters import Letters
from fabric.message import RedrivenFeed
from fabric.storage.dead_letters import DeadLetterStore
from tests.simulation.variants import Patch, Variant, wrapped

# Burying.


def settles_before_it_is_written() -> list[Patch]:
    def bury(original: Any, self: Any, message: Any, name: str, why: Any, then: Any) -> None:
        original(self, message, name, why, lambda: None)
        then()

    return [wrapped(Letters, "bury", bury)]


def refused_is_taken_for_written() -> list[Patch]:
    """What the store has no room for is said to be in it."""

    def work(original: Any, self: Any, wishes: Any) -> None:
        original(self, wishes)
        waiting, self._waiting = self._waiting, []
        for wish in waiting:
            self._answer(wish)

    return [wrapped(LetterKeeper, "work", work)]


def refused_is_dropped() -> list[Patch]:
    """What the store has no room for is forgotten, and its lane waits for ever."""

    def work(original: Any, self: Any, wishes: Any) -> None:
        original(self, wishes)
        self._waiting = [wish for wish in self._waiting if not isinstance(wish, WriteLetter)]

    return [wrapped(LetterKeeper, "work", work)]


def letters_are_unbounded() -> list[Patch]:
    return [wrapped(DeadLetterStore, "refusal", lambda original, self, letter: None)]


def room_is_unbounded() -> list[Patch]:
    """However many wait for the store, handlers run."""
    return [wrapped(Letters, "room", lambda original, self, *, parked: 1 << 30)]


def ends_are_not_booked() -> list[Patch]:
    """A letter counts as handled, and not as one."""

    def settle_one(original: Any, self: Any, position: int, reason: str | None = None) -> None:
        is_record = type(self.item.feed) is not RedrivenFeed
        original(self, position, None if is_record and reason in LETTERS else reason)

    return [wrapped(Hand, "settle_one", settle_one)]


# Parked lanes.


def parked_lets_through() -> list[Patch]:
    """What comes behind a letter is handled before it."""
    return [wrapped(Letters, "is_parked", lambda original, self, name, lane: False)]


def any_letter_of_a_lane_goes() -> list[Patch]:
    """Whichever was asked for comes again, though an older one of its lane has not."""

    def offer(original: Any, self: Any, number: int) -> None:
        self._enqueue(number)

    def refusal(original: Any, self: Any, number: int, first: Any, takes: Any) -> str:
        why = str(original(self, number, first, takes))
        return "" if "older letter" in why else why

    return [wrapped(Letters, "_offer", offer), wrapped(LetterBook, "_refusal", refusal)]


def the_newest_follows() -> list[Patch]:
    """What waited in a lane follows newest first."""

    def first_of(original: Any, self: Any, lane: Any) -> Any:
        number = next(reversed(self.lanes.get(lane, {})), None)
        return None if number is None else self.entries[number]

    return [wrapped(LetterBook, "first_of", first_of)]


def nothing_follows() -> list[Patch]:
    """What waited for a letter waits for ever once that is over."""

    def refusal(original: Any, self: Any, number: int, first: Any, takes: Any) -> str:
        why = str(original(self, number, first, takes))
        waits = not why and self.entries[number].facts.reason == Drop.PARKED
        return "it follows by itself" if waits else why

    return [wrapped(Letters, "_follow", lambda original, self, lane: None), wrapped(LetterBook, "_refusal", refusal)]


# Coming again.


def handled_stays_a_letter() -> list[Patch]:
    """One that came again and was handled comes again."""
    return [wrapped(Letters, "_settle", lambda original, self, entry: None)]


def sent_as_often_as_asked() -> list[Patch]:
    """One that is on its way is sent again, and handled twice."""

    def refusal(original: Any, self: Any, number: int, first: Any, takes: Any) -> str:
        why = str(original(self, number, first, takes))
        return "" if "on its way" in why else why

    return [wrapped(LetterBook, "_refusal", refusal)]


def discarded_on_its_way() -> list[Patch]:
    """One that its handler is about to have is given up, and handled all the same."""

    def discard(original: Any, self: Any, numbers: Any) -> int:
        numbers = list(numbers)
        for number in numbers:
            if number in self._book.entries:
                self._book.entries[number].asked = False
        return int(original(self, numbers))

    return [wrapped(Letters, "discard", discard)]


def died_again_is_over() -> list[Patch]:
    """A letter has one more chance, and then it is gone."""

    def settled(original: Any, self: Any, event: Any) -> None:
        original(self, replace(event, handled=1))

    return [wrapped(Letters, "settled", settled)]


def what_is_over_comes_again() -> list[Patch]:
    """A session that begins anew is given records that were letters."""
    return [wrapped(KnownRecords, "of_burst", lambda original, self, name, feed, offsets: {})]


def handled_is_over_unsaved() -> list[Patch]:
    """A letter is over when it is handled, though no saved cursor says so: a session that begins anew lacks it."""

    def bind(original: Any, self: Any, name: str, inbox: Any, saved: Any = None) -> None:
        original(self, name, inbox, saved)
        self._saving.discard(name)

    return [wrapped(Letters, "bind", bind)]


def unsaved_is_hidden_for_ever() -> list[Patch]:
    """What was handled and not saved is a letter no more, even when nobody can save it any more."""

    def release(original: Any, self: Any, name: str) -> None:
        hidden, self._book.hidden = self._book.hidden, {}
        handled = [self._book.entries[number] for number in hidden]
        for entry in handled:
            entry.handled = False
        original(self, name)
        for entry in handled:
            entry.handled = True
        self._book.hidden = hidden

    return [wrapped(Letters, "release", release)]


def saved_letters_stay() -> list[Patch]:
    """A cursor that names a letter as handled does not end it."""
    return [wrapped(Letters, "commit", lambda original, self, name, saved: None)]


LETTER_VARIANTS: dict[str, Variant] = {
    variant.__name__: variant
    for variant in (
        settles_before_it_is_written,
        refused_is_taken_for_written,
        refused_is_dropped,
        letters_are_unbounded,
        room_is_unbounded,
        ends_are_not_booked,
        parked_lets_through,
        any_letter_of_a_lane_goes,
        the_newest_follows,
        nothing_follows,
        handled_stays_a_letter,
        sent_as_often_as_asked,
        discarded_on_its_way,
        died_again_is_over,
        what_is_over_comes_again,
        handled_is_over_unsaved,
        unsaved_is_hidden_for_ever,
        saved_letters_stay,
    )
}
