"""What the storage thread does with dead letters."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from fabric.config import Letters as Limits
from fabric.engine.lettering import (
    ChangeLetter,
    EndLetter,
    LetterKeeper,
    LetterWish,
    LoadLetters,
    ReadLetters,
    WriteLetter,
)
from fabric.errors import FabricError, LettersDamagedError, LetterStoreBrokenError, LetterStoreFullError
from fabric.storage.dead_letters import DATABASE, DeadLetterStore
from fabric.storage.hand_page import HandPage
from tests.harness.letters import LIMITS, letter

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
        EndLetter(letter(2)),
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
    assert isinstance(bench.refusals[-1], LetterStoreFullError) and bench.keeper.due_ns == 2 * S
    assert caplog.text.count("lanes wait") == 1
    with caplog.at_level(logging.WARNING, logger="fabric.storage"):
        bench.keeper.work([bench.write(5), EndLetter(letter(1))])
        assert (bench.written, bench.keeper.due_ns) == ([1, 2, 9, 3], 2 * S), "the first that waits, and no other"
        bench.keeper.work([EndLetter(letter(2))])
        assert (bench.written[4:], bench.keeper.due_ns) == ([4], 2 * S)
        bench.keeper.work([EndLetter(letter(3))])
    assert (bench.written, bench.ids, bench.keeper.due_ns) == ([1, 2, 9, 3, 4, 5], [4, 5, 9], None)
    assert "taken again" in caplog.text and bench.refusals[-1] is None
    bench.keeper.close()


def test_a_small_letter_does_not_overtake_a_large_one_for_which_there_is_no_room() -> None:
    bench = Bench(limits=Limits(bytes_max=4000))
    bench.keeper.work([bench.write(1), bench.write(2, value=b"x" * 3000), bench.write(3)])
    assert bench.written == [1]
    bench.keeper.work([EndLetter(letter(1))])
    assert bench.written == [1, 2]
    bench.keeper.close()


def test_a_store_that_cannot_be_opened_is_tried_again_and_notices_do_not_pile_up() -> None:
    bench = Bench()
    bench.failing = LetterStoreBrokenError("no", directory="x")
    bench.keeper.work([bench.write(1), bench.write(2, kind="notice"), EndLetter(letter(7))])
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
        bench.keeper.work([EndLetter(letter(number)) for number in range(1, 30)])
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


def test_no_room_for_the_store_at_all_is_translated(monkeypatch: Any) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fabric.storage.dead_letters.sqlite3.connect", refuse)
    with pytest.raises(LetterStoreFullError):
        DeadLetterStore.open(None, LIMITS)
