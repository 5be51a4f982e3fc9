"""What a member knows of its dead letters, and how they come again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from fabric.config import Letters as Limits
from fabric.core.events import Deliver, MessagesSettled
from fabric.core.guards import Breaker
from fabric.engine.handler import Handler
from fabric.engine.inbox import Inbox
from fabric.engine.letter_forms import TOO_LARGE, Burial, cut_text, letter_of, message_of
from fabric.engine.lettering import (
    LetterKeeper,
    LetterWish,
    ReadLetters,
)
from fabric.errors import LetterStoreBrokenError
from fabric.message import HeldMessage, Message, TriedMessage
from fabric.storage.dead_letters import DeadLetterStore
from fabric.storage.hand_page import HandPage
from fabric.storage.letter_rows import LetterRow
from tests.harness.letters import LIMITS, letter
from tests.unit.test_dispatch import engine_of

S = 1_000_000_000


class AtOnce:
    """A store that answers when it is told to."""

    error = None

    def __init__(self) -> None:
        self.wishes: list[LetterWish] = []
        self.keeper = LetterKeeper(lambda: DeadLetterStore.open(None, LIMITS), lambda: 0)

    def ask(self, wish: Any) -> None:
        self.wishes.append(wish)

    def work(self) -> None:
        wishes, self.wishes = self.wishes, []
        self.keeper.work(wishes)

    def close(self) -> None:
        """Nothing."""

    def abandon(self) -> None:
        """Nothing."""


def message_for(row: LetterRow) -> TriedMessage:
    item = message_of(row, 1)
    return TriedMessage(item.burst, 0, item.feed)


class Book:
    """The letters of an engine, a store that waits to be told, and one inbox."""

    def __init__(self) -> None:
        self.engine = engine_of("rank-0")
        self.store = self.engine.store = AtOnce()  # type: ignore[assignment]
        self.letters = self.engine.letters
        self.inbox = Inbox(1)
        self.name = self.letters.claim("jobs.**")
        self.letters.bind(self.name, self.inbox)

    def bury(self, number: int, reason: str = "handler_exhausted", *, parked: bool = False, seed: int = 0) -> None:
        message = message_for(letter(number, seed=seed, size=8, value=b"12345678"))
        self.letters.bury(message, self.name, Burial(reason, "no", 1, parked), lambda: None)

    def arrived(self) -> list[int]:
        """Sequence numbers of what came into the inbox, which is emptied."""
        items = list(self.inbox.items)
        self.inbox.items.clear()
        self.items: list[Deliver] = items
        return [item.burst.first for item in items]

    def settle(self, item: Deliver, handled: int) -> None:
        event = MessagesSettled(item.feed, item.burst.first, item.burst.end, handled, item.size)
        self.letters.settled(event)


def test_a_letter_comes_back_as_the_message_that_it_was() -> None:
    row = letter(9, b"value", metadata=b"\x81\xa1a\x01", seed=4, value_kind=0)
    message = message_for(row)
    again = letter_of(message, row.subscription, Burial(row.reason, row.detail, row.attempts), LIMITS, row.buried_ns)
    assert again == LetterRow(**{**{name: getattr(row, name) for name in row.__slots__}, "id": 0})
    assert (message.offset, message.metadata, message.published_ns) == (9, {"a": 1}, row.published_ns)
    assert not Message.redelivered.fget(message) if row.parked else message.redelivered  # type: ignore[attr-defined]
    assert HeldMessage(message._burst, 0, message._feed, lambda *_: None).redelivered


def test_a_text_is_cut_between_characters() -> None:
    assert cut_text("n\u00e4h", 2) == "n" and cut_text("\ud800", 10) == "?"


def test_a_letter_that_is_being_written_is_not_there_yet() -> None:
    book = Book()
    book.bury(1)
    assert (book.letters.all(), book.letters.count) == ([], 0)
    assert book.letters.redrive([1], dry_run=False) == ([], {1: "it is gone"}, 0)
    assert book.letters.discard([1]) == 0
    book.store.work()
    assert ([each.first for each in book.letters.all()], book.letters.count) == ([1], 1)


def test_a_record_that_has_a_letter_keeps_it() -> None:
    book, told = Book(), []
    message = message_for(letter(1, value=b"12345678"))
    for reason in ("rejected", "handler_exhausted"):
        book.letters.bury(message, book.name, Burial(reason, "no", 1), lambda reason=reason: told.append(reason))  # type: ignore[misc]
        book.store.work()
    assert told == ["rejected", "handler_exhausted"]
    assert [each.reason for each in book.letters.all()] == ["rejected"]
    book.letters.discard([1])
    book.bury(1)
    book.store.work()
    assert [(each.id, each.first) for each in book.letters.all()] == [(2, 1)]


def test_a_letter_is_never_on_its_way_twice() -> None:
    book = Book()
    book.bury(1)
    book.store.work()
    assert book.letters.redrive([1], dry_run=False)[0] == [1]
    assert book.letters.redrive([1], dry_run=False)[1] == {1: "it is on its way already"}
    assert book.letters.discard([1]) == 0
    book.letters.release(book.name)  # while the store reads it
    name = book.letters.claim("jobs.**")
    book.letters.bind(name, book.inbox)
    assert book.letters.redrive([1], dry_run=False)[0] == [1]
    book.store.work()
    assert book.arrived() == [1], "what was sent for the first inbox is not handed to the second"
    book.settle(book.items[0], 1)
    book.settle(book.items[0], 1)
    assert book.letters.count == 0
    book.store.work()
    assert book.store.keeper._opened().letters is not None and len(book.store.keeper._opened()) == 0


def test_so_many_are_on_their_way_at_once_and_no_more() -> None:
    book = Book()
    book.letters._limits = Limits(redriven_at_once_max=3, redriven_bytes_max=17)
    for number in range(1, 7):
        book.bury(number)
    book.store.work()
    book.letters.redrive(range(1, 7), dry_run=False)
    book.store.work()
    assert book.arrived() == [1, 2], "17 bytes have room for two of 8"
    waiting = book.items
    book.settle(waiting[0], 1)
    book.store.work()
    assert book.arrived() == [3]
    book.settle(waiting[1], 0)
    book.settle(book.items[0], 1)
    book.store.work()
    assert book.arrived() == [4, 5]
    assert [each.first for each in book.letters.all()] == [2, 4, 5, 6]


def test_followers_come_one_by_one_and_stop_at_one_that_died() -> None:
    book = Book()
    for number, reason in enumerate(["handler_exhausted", "parked", "parked", "handler_exhausted", "parked"], 1):
        book.bury(number, reason, parked=True)
    book.bury(6, "handler_exhausted", parked=True, seed=1)
    book.store.work()
    assert book.letters.is_parked(book.name, ("rank-1", "jobs.a", 0))
    assert book.letters.redrive([2, 3], dry_run=True)[1] == dict.fromkeys(
        (2, 3), "an older letter of its lane goes first"
    )
    assert book.letters.redrive([1, 2, 4], dry_run=True) == ([1, 2], {4: "an older letter of its lane goes first"}, 1)
    assert book.letters.redrive([1], dry_run=False) == ([1], {}, 2)
    seen = []
    for _ in range(4):
        book.store.work()
        seen += book.arrived()
        if book.items:
            book.settle(book.items[0], 1)
    assert seen == [1, 2, 3]
    assert book.letters.discard([4]) == 1
    book.store.work()
    book.store.work()
    assert book.arrived() == [5]
    book.settle(book.items[0], 1)
    assert not book.letters.is_parked(book.name, ("rank-1", "jobs.a", 0))
    assert book.letters.is_parked(book.name, ("rank-1", "jobs.a", 1))


def test_when_the_oldest_dies_again_those_that_were_to_follow_stay() -> None:
    book = Book()
    for number in (1, 2, 3):
        book.bury(number, parked=True)
    book.store.work()
    assert book.letters.redrive([1, 2], dry_run=False)[0] == [1, 2]
    book.store.work()
    assert book.arrived() == [1]
    book.settle(book.items[0], 0)
    book.store.work()
    assert book.arrived() == []
    assert book.letters.discard([2]) == 1
    assert book.letters.redrive([1, 3], dry_run=False)[0] == [1, 3]


def test_what_cannot_come_again_keeps_its_lane_closed_and_says_so() -> None:
    book = Book()
    book.letters._limits = Limits(record_bytes_max=7, value_bytes_max=7)
    book.bury(1, parked=True)
    book.letters._limits = Limits()
    book.bury(2, "parked", parked=True)
    book.store.work()
    refused = book.letters.redrive([1, 2], dry_run=False)[1]
    assert refused == {1: TOO_LARGE, 2: "an older letter of its lane goes first"}
    assert book.letters.discard([1]) == 1
    book.store.work()
    assert book.arrived() == [2]


def test_a_letter_whose_value_the_log_gives_up_on_its_way_stays_one_and_says_why(caplog: Any) -> None:
    book = Book()
    book.bury(1)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    (wish,) = book.store.wishes
    assert isinstance(wish, ReadLetters)
    book.letters.on_cut(1, "too old")
    book.letters.on_cut(99, "nobody's")
    wish.then([letter(1, cut="too old")])
    assert "letter 1 is not redriven: too old" in caplog.text and book.arrived() == []
    assert book.letters.redrive([1], dry_run=True) == ([], {1: "too old"}, 0)
    assert (book.letters.count, book.engine.counts["letters_cut"]) == (1, 1)


def test_what_only_waited_in_an_earlier_life_goes_on_when_its_handler_is_there() -> None:
    book = Book()
    rows = [letter(1, parked=True, reason="parked", seed=0), letter(2, seed=1), letter(4, kind="notice")]
    with contextlib.closing(DeadLetterStore.open(None, LIMITS)) as store:
        for row in rows:
            store.add(row)
        book.store.keeper._store = store
        book.letters.release(book.name)
        book.letters.load()
        assert not book.letters.is_ready
        book.store.work()
        assert book.letters.is_ready and len(book.letters.notices()) == 1
        known = [book.letters.known.drop_of(row.key) for row in rows]
        assert known == [(True, "parked"), (True, "handler_exhausted"), (False, None)]
        book.letters.bind(book.letters.claim("jobs.**"), book.inbox)
        book.store.work()
        assert book.arrived() == [1]
        book.bury(9)
        assert book.letters._book.entries[5].facts.first == 9, "numbers go on where the earlier life ended"


def test_a_follower_waits_while_nobody_handles_it() -> None:
    book = Book()
    book.bury(1, parked=True)
    book.bury(2, "parked", parked=True)
    book.store.work()
    book.letters.release(book.name)
    assert book.letters.discard([1]) == 1
    book.store.work()
    assert (book.arrived(), [each.first for each in book.letters.all()]) == ([], [2])


def test_what_damage_took_is_no_letter_any_more_and_its_lane_goes_on() -> None:
    book = Book()
    book.bury(1, parked=True)
    book.bury(2, "parked", parked=True)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    book.store.keeper._opened().remove(1)
    book.store.work()
    book.letters.on_damaged([99])
    book.store.work()
    assert book.arrived() == [2]
    counts = book.engine.counts
    assert (counts["letters_lost"], counts["letter_stores_damaged"]) == (1, 1)


def test_a_letter_that_cannot_be_read_for_now_stays_one(caplog: Any) -> None:
    book = Book()
    book.bury(1)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    (wish,) = book.store.wishes
    assert isinstance(wish, ReadLetters)
    wish.then([LetterStoreBrokenError("read error", directory="x")])
    assert "not redriven" in caplog.text and book.arrived() == []
    assert book.letters.redrive([1], dry_run=True)[0] == [1]


def test_a_letter_that_died_again_has_its_newest_reason() -> None:
    book = Book()
    book.bury(1)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    book.store.work()
    assert book.arrived() == [1]
    feed: Any = book.items[0].feed
    book.letters.died_again(feed, Burial("rejected", "x" * 3000, 2))
    book.settle(book.items[0], 0)
    book.store.work()
    (facts,) = book.letters.all()
    assert (facts.reason, facts.attempts, len(facts.detail)) == ("rejected", 3, 2048)
    stored = book.store.keeper._opened().read(1)
    assert (stored.reason, stored.attempts, stored.detail) == (facts.reason, facts.attempts, facts.detail)
    book.letters._lose([1])
    book.letters.died_again(feed, Burial("rejected", "gone", 2))
    assert book.letters.all() == []


def test_a_closed_engine_asks_for_nothing(tmp_path: Path) -> None:
    book = Book()
    book.letters.page = HandPage.open(tmp_path)
    book.engine.close(0.0)
    book.bury(1)
    assert book.store.wishes == [] and book.letters.page is None
    book.letters.page = HandPage.open(tmp_path)
    book.letters.abandon()
    book.letters.abandon()
    assert book.letters.page is None


def test_a_disk_that_fails_when_a_letter_was_handled_does_not_bring_it_back(tmp_path: Path) -> None:
    book = Book()
    book.letters.page = HandPage.open(tmp_path)
    book.bury(1)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    book.store.work()
    assert book.arrived() == [1]
    book.settle(book.items[0], 1)
    full, store = LetterStoreBrokenError("no", directory="x"), book.store.keeper._opened()

    @contextlib.contextmanager
    def refuse() -> Any:
        raise full
        yield

    transaction = store.transaction
    store.transaction = refuse  # type: ignore[method-assign]
    book.store.work()
    assert book.letters.count == 0 and 1 in store
    again = HandPage.open(tmp_path)
    assert len(again.finished) == 1, "the next life would know"
    again.close()
    store.transaction = transaction  # type: ignore[method-assign]
    book.store.work()
    book.store.keeper.work(())
    assert 1 not in store and book.letters.page.finished == set()
    assert not HandPage.open(tmp_path).finished
    book.letters.close()


def test_a_record_that_dies_again_while_its_letter_is_written_waits_for_that_letter() -> None:
    book, told = Book(), []
    message = message_for(letter(1, value=b"12345678"))
    for number in (1, 2):
        book.letters.bury(message, book.name, Burial("rejected", "no", 1), lambda number=number: told.append(number))  # type: ignore[misc]
    assert (told, book.letters.waiting) == ([], 1), "not before it is written (D1)"
    book.store.work()
    assert (told, book.letters.waiting, book.letters.count) == ([1, 2], 0, 1)


def test_of_one_that_saves_cursors_a_handled_letter_hides_and_its_lane_goes_on() -> None:
    book = Book()
    book.letters.release(book.name)
    name = book.letters.claim("jobs.**")
    book.letters.bind(name, book.inbox, [])
    for number, reason in ((1, "handler_exhausted"), (2, "parked"), (3, "handler_exhausted")):
        book.bury(number, reason, parked=True)
    book.store.work()
    book.letters.redrive([1], dry_run=False)
    for number in (1, 2):
        book.store.work()
        assert book.arrived() == [number]
        book.settle(book.items[0], 1)
    saved = book.letters.handled_by(name)
    assert [slot.offset for slot in saved] == [1, 2] and [each.id for each in book.letters.all()] == [3]
    assert book.letters.redrive([1], dry_run=True)[1] == {1: "it is gone"} and book.letters.discard([1]) == 0
    book.letters.commit(name, saved[:1])
    assert book.letters.handled_by(name) == saved[1:] and book.letters.count == 1
    book.letters.release(name)
    assert [each.id for each in book.letters.all()] == [2, 3]
    book.letters.bind(book.letters.claim("jobs.**"), book.inbox)
    book.store.work()
    assert book.arrived() == [2], "in its place again"
    book.store.work()
    assert sorted(book.store.keeper._opened().numbers()) == [2, 3]


# The breaker of a handler.


def test_a_handler_that_is_left_alone_has_nothing_to_do_until_one_may_try() -> None:
    inbox = Inbox(1)
    handler = Handler(print, inbox, "t", 1, parks=False, breaker=Breaker(1, 2 * S))
    assert (handler.due_ns(), handler.has_work(0, 1)) == (None, False)
    inbox.items.append(message_of(letter(1), 1))
    handler.retries.append((5, 0, ("rank-1", "t", 0, False)))
    assert (handler.due_ns(), handler.has_work(0, 1)) == (5, True)
    handler.breaker = handler.breaker.fail(0, 0, "a")
    assert (handler.due_ns(), handler.has_work(2 * S - 1, 1)) == (2 * S, False)
    assert handler.has_work(2 * S, 1)
    inbox.items.clear()
    handler.retries.clear()
    assert (handler.due_ns(), handler.has_work(2 * S, 1)) == (None, False)
    handler.crowded.append(("rank-1", "t", 0, False))
    assert (handler.due_ns(), handler.has_work(2 * S, 1), handler.has_work(2 * S, 0)) == (2 * S, True, False)
