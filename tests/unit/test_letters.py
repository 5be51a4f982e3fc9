"""What a member knows of its dead letters, and what its storage thread does with them."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from fabric.config import Letters as Limits
from fabric.core.events import Deliver, MessagesSettled
from fabric.engine.dispatch import Handler
from fabric.engine.fuse import Fuse
from fabric.engine.inbox import Inbox
from fabric.engine.letter_forms import Burial, cut_text, letter_of, message_of
from fabric.engine.lettering import (
    ChangeLetter,
    LetterKeeper,
    LetterWish,
    LoadLetters,
    ReadLetters,
    RemoveLetter,
    WriteLetter,
)
from fabric.errors import FabricError, LettersDamagedError, LetterStoreBrokenError, LetterStoreFullError
from fabric.message import HeldMessage, Message, TriedMessage
from fabric.storage.dead_letters import DATABASE, DeadLetterStore
from fabric.storage.hand_page import HandPage
from fabric.storage.letter_rows import LetterRow
from tests.harness.letters import LIMITS, letter
from tests.unit.test_dispatch import engine_of

S = 1_000_000_000


class Bench:
    """A keeper on a store, and what it answered."""

    def __init__(self, path: Path | None = None, limits: Limits = LIMITS) -> None:
        self.path, self.limits, self.now_ns = path, limits, 0
        self.failing: FabricError | None = None
        self.written: list[int] = []
        self.lost: list[list[int]] = []
        self.refusals: list[FabricError | None] = []
        self.keeper = LetterKeeper(self.open, lambda: self.now_ns)
        self.keeper.refused, self.keeper.damaged = self.refusals.append, self.lost.append

    def open(self) -> DeadLetterStore:
        if self.failing is not None:
            raise self.failing
        return DeadLetterStore.open(self.path, self.limits, durable=False)

    def write(self, number: int, **others: Any) -> WriteLetter:
        return WriteLetter(letter(number, **others), lambda: self.written.append(number))

    @property
    def ids(self) -> list[int]:
        return [each.id for each in self.keeper._opened().letters()]


def test_a_turn_is_one_transaction_and_answers_come_after_it() -> None:
    bench = Bench()
    seen: list[Any] = []
    bench.keeper.work([bench.write(1), bench.write(2)])
    wishes: list[LetterWish] = [
        bench.write(4),
        ChangeLetter(1, "rejected", "again", 7),
        RemoveLetter(2),
        ChangeLetter(2, "rejected", "gone", 7),
        ReadLetters((1, 2), lambda rows: seen.append(rows)),
        bench.write(3),
    ]
    commits = []
    store = bench.keeper._opened()
    assert store._connection is not None
    store._connection.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    bench.keeper.work(wishes)
    assert (bench.written, bench.ids, len(commits)) == ([1, 2, 4, 3], [1, 3, 4], 1)
    ((first, second),) = seen
    assert (first.attempts, first.detail, first.reason) == (7, "again", "rejected")
    assert isinstance(second, LettersDamagedError)
    bench.keeper.work([])
    bench.keeper.abandon()


def test_what_has_no_room_waits_in_order_and_is_said_once(caplog: Any) -> None:
    bench = Bench(limits=Limits(rows_max=2))
    with caplog.at_level(logging.WARNING, logger="fabric.storage"):
        bench.keeper.work([bench.write(number) for number in (1, 2, 3)])
        bench.keeper.work([bench.write(4), bench.write(9, kind="notice")])
    assert (bench.written, bench.ids) == ([1, 2, 9], [1, 2, 9])
    assert isinstance(bench.refusals[-1], LetterStoreFullError) and bench.keeper.due_ns == S
    assert caplog.text.count("lanes wait") == 1
    with caplog.at_level(logging.WARNING, logger="fabric.storage"):
        bench.keeper.work([bench.write(5), RemoveLetter(1)])
        assert (bench.written, bench.keeper.due_ns) == ([1, 2, 9, 3], S), "the first that waits, and no other"
        bench.keeper.work([RemoveLetter(2)])
        assert (bench.written[4:], bench.keeper.due_ns) == ([4], S)
        bench.keeper.work([RemoveLetter(3)])
    assert (bench.written, bench.ids, bench.keeper.due_ns) == ([1, 2, 9, 3, 4, 5], [4, 5, 9], None)
    assert "taken again" in caplog.text and bench.refusals[-1] is None
    bench.keeper.close()


def test_a_small_letter_does_not_overtake_a_large_one_for_which_there_is_no_room() -> None:
    bench = Bench(limits=Limits(bytes_max=4000))
    bench.keeper.work([bench.write(1), bench.write(2, value=b"x" * 3000), bench.write(3)])
    assert bench.written == [1]
    bench.keeper.work([RemoveLetter(1)])
    assert bench.written == [1, 2]
    bench.keeper.close()


def test_a_store_that_cannot_be_opened_is_tried_again_and_notices_do_not_pile_up() -> None:
    bench = Bench()
    bench.failing = LetterStoreBrokenError("no", directory="x")
    bench.keeper.work([bench.write(1), bench.write(2, kind="notice"), RemoveLetter(7)])
    assert bench.written == [] and bench.keeper.error is bench.failing
    assert len(bench.keeper._waiting) == 2
    bench.failing = None
    bench.keeper.work([])
    assert bench.written == [1]
    bench.keeper.close()
    bench.keeper.close()


def test_a_disk_that_fails_takes_nothing_of_the_turn(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "letters")
    bench.keeper.work([bench.write(1)])
    store = bench.keeper._opened()
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 8")
    bench.keeper.work([bench.write(2), bench.write(3, value=b"x" * 100_000)])
    assert (bench.written, bench.ids) == ([1], [1])
    assert isinstance(bench.keeper.error, LetterStoreFullError)
    store._connection.execute("PRAGMA max_page_count = 1000")
    bench.keeper.work([])
    assert (bench.written, bench.ids) == ([1, 2, 3], [1, 2, 3])
    bench.keeper.close()


@pytest.mark.parametrize("how", ["write", "read"])
def test_damage_is_mended_once_it_shows_and_what_it_took_is_told(tmp_path: Path, how: str) -> None:
    bench = Bench(tmp_path / "letters")
    bench.keeper.work([bench.write(number, value=bytes([number]) * 3000) for number in range(1, 30)])
    connection = bench.keeper._opened()._connection
    assert connection is not None
    connection.execute("PRAGMA cache_size = 2")
    data = bytearray((tmp_path / "letters" / DATABASE).read_bytes())
    at = data.index(bytes([7]) * 100)
    with open(tmp_path / "letters" / DATABASE, "r+b") as file:
        file.seek(at - at % 4096 if how == "write" else at)
        file.write(b"\xff" * 8)
    if how == "write":
        bench.keeper.work([RemoveLetter(number) for number in range(1, 30)])
        assert bench.ids == []
    else:
        answers: list[Any] = []
        bench.keeper.work([ReadLetters((6, 7), answers.extend)])
        assert answers[0].id == 6 and isinstance(answers[1], LettersDamagedError)
        assert [number for number in range(1, 30) if number not in bench.ids] == [7]
    assert len(bench.lost) == 1 and 7 in bench.lost[0]
    bench.keeper.close()


def test_damage_that_cannot_be_mended_for_lack_of_room_is_mended_later(tmp_path: Path, monkeypatch: Any) -> None:
    bench = Bench(tmp_path / "letters")
    bench.keeper.work([bench.write(number, value=bytes([number]) * 3000) for number in range(1, 30)])
    path = tmp_path / "letters" / DATABASE
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(data.index(bytes([7]) * 100))
        file.write(b"\xff" * 8)
    full = LetterStoreFullError("no room", directory="x", used=0)

    def refuse(*_: object) -> int:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(DeadLetterStore, "_build", refuse)
        connection = bench.keeper._opened()._connection
        assert connection is not None
        connection.execute("PRAGMA cache_size = 2")
        answers: list[Any] = []
        bench.keeper.work([ReadLetters((7,), answers.extend), bench.write(30)])
        assert answers == [full]
        bench.keeper.work([bench.write(31)])
        assert (bench.written[29:], bench.keeper.error, bench.lost) == ([30], full, [])
    bench.keeper.work([])
    assert bench.written[29:] == [30, 31] and bench.lost == [[7]]
    assert bench.ids == [number for number in range(1, 32) if number != 7]
    bench.keeper.close()


def test_letters_that_outlive_the_process_are_loaded_with_the_page(tmp_path: Path, caplog: Any) -> None:
    first = DeadLetterStore.open(tmp_path / "letters", LIMITS)
    with first.transaction():
        first.add(letter(5))
    first.close()
    page = HandPage.open(tmp_path / "letters")
    page.note(3, 2)
    page.close()
    keeper = LetterKeeper(
        lambda: DeadLetterStore.open(tmp_path / "letters", LIMITS),
        lambda: 0,
        open_page=lambda: HandPage.open(tmp_path / "letters"),
    )
    loaded: list[Any] = []
    keeper.work([LoadLetters(lambda rows, page: loaded.append(([row.id for row in rows], page)))])
    ((ids, page),) = loaded
    assert (ids, page.suspects) == ([5], {3: 2})
    page.note(4, 1)
    page.clear()
    page.close()
    assert HandPage.open(tmp_path / "letters").suspects == {3: 2}
    keeper.close()
    assert (tmp_path / "letters" / DATABASE).exists() and "discarded" not in caplog.text


def test_a_page_that_cannot_be_opened_is_said_and_letters_are_read_all_the_same(caplog: Any) -> None:
    def refuse() -> HandPage:
        raise LetterStoreBrokenError("no", directory="x")

    keeper = LetterKeeper(lambda: DeadLetterStore.open(None, LIMITS), lambda: 0, open_page=refuse)
    loaded: list[Any] = []
    keeper.work([LoadLetters(lambda rows, page: loaded.append((list(rows), page)))])
    assert loaded == [([], None)] and "cannot be counted" in caplog.text

    def break_off(rows: Any, page: Any) -> None:
        if len(loaded) == 1:
            loaded.append(None)
            raise LetterStoreBrokenError("read error", directory="x")
        loaded.append((list(rows), page))

    keeper.work([LoadLetters(break_off)])
    assert keeper.due_ns is not None
    keeper.work([])
    assert loaded[2:] == [([], None)] and keeper.due_ns is None
    keeper.close()


def test_what_cannot_be_removed_at_the_end_is_said(tmp_path: Path, caplog: Any) -> None:
    bench = Bench(tmp_path / "letters")
    bench.keeper.work([bench.write(1)])
    (tmp_path / "letters" / "another").mkdir()
    with caplog.at_level(logging.WARNING, logger="fabric.storage"):
        bench.keeper.close()
    assert "1 dead letters are discarded" in caplog.text and "left behind" in caplog.text


# The book.


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
    book.letters._limits = Limits(record_bytes_max=7)
    book.bury(1, parked=True)
    book.letters._limits = Limits()
    book.bury(2, "parked", parked=True)
    book.store.work()
    refused = book.letters.redrive([1, 2], dry_run=False)[1]
    assert refused == {1: "its value was too large to be kept whole", 2: "an older letter of its lane goes first"}
    assert book.letters.discard([1]) == 1
    book.store.work()
    assert book.arrived() == [2]


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
        assert book.letters.earlier == {rows[0].key: "parked", rows[1].key: "handler_exhausted"}
        book.letters.bind(book.letters.claim("jobs.**"), book.inbox)
        book.store.work()
        assert book.arrived() == [1]
        book.bury(9)
        assert book.letters._entries[5].facts.first == 9, "numbers go on where the earlier life ended"


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


# The fuse.


def test_a_fuse_blows_when_all_dies_of_one_reason_and_only_then() -> None:
    fuse = Fuse(Limits(same_reason_max=3, pause_s=2.0))
    assert [fuse.burn(reason, 0) for reason in ("a", "a", "b", "b")] == [False] * 4
    fuse.hold()
    assert [fuse.burn("b", 0) for _ in range(3)] == [False, False, True]
    assert fuse.until_ns == 2 * S
    assert not fuse.burn("b", S), "it is blown already"
    assert fuse.burn("b", 2 * S), "one that was tried after the pause, in vain"
    assert fuse.until_ns == 4 * S


def test_a_handler_whose_fuse_is_blown_has_nothing_to_do_until_it_is_whole() -> None:
    inbox = Inbox(1)
    fuse = Fuse(Limits(same_reason_max=1, pause_s=2.0))
    handler = Handler(print, inbox, "t", 1, parks=False, fuse=fuse)
    assert (handler.due_ns(), handler.has_work(0)) == (None, False)
    inbox.items.append(message_of(letter(1), 1))
    handler.retries.append((5, 0, ("rank-1", "t", 0)))
    assert (handler.due_ns(), handler.has_work(0)) == (5, True)
    fuse.burn("a", 0)
    assert (handler.due_ns(), handler.has_work(2 * S - 1)) == (2 * S, False)
    assert handler.has_work(2 * S)


def test_no_room_for_the_store_at_all_is_translated(monkeypatch: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fabric.storage.dead_letters.sqlite3.connect", refuse)
    with pytest.raises(LetterStoreFullError):
        DeadLetterStore.open(None, LIMITS)
