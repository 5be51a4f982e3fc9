"""The store of dead letters: what it keeps, its ceilings, its errors."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sqlite3
import stat
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric.config import Letters
from fabric.errors import (
    LettersDamagedError,
    LetterStoreBrokenError,
    LetterStoreError,
    LetterStoreFullError,
    LetterStoreLockedError,
    StateDirectoryError,
)
from fabric.storage.dead_letters import ASIDE, DATABASE, DeadLetterStore
from fabric.storage.letter_rows import OVERHEAD_BYTES, from_row, to_row
from tests.harness.children import Parent, child
from tests.harness.letters import LIMITS, filled, letter, salvaged
from tests.harness.waiting import until


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "letters"


def test_letters_come_back_as_they_were_oldest_first(where: Path) -> None:
    kept = [
        letter(1, b"x" * 100_000),
        letter(2, metadata=b"\x80", parked=True),
        letter(3, kind="notice", seed=-1, sequence=-1, end=-1, topic="jobs.b"),
        letter(4, detail="n\u00e4\0", incarnation=2**64 - 1, checksum=2**64 - 1),
    ]
    store = filled(where, kept)
    assert list(store.letters()) == kept
    store.close()
    again = DeadLetterStore.open(where, LIMITS)
    assert list(again.letters()) == kept
    assert (len(again), again.bytes, again.damages) == (3, sum(each.bytes for each in kept), 0)
    assert again.read(1) == kept[0]
    again.close()
    again.close()


def test_a_row_tells_by_itself_whether_it_was_changed() -> None:
    row = to_row(letter(7))
    assert from_row(row) == letter(7)
    for at, value in enumerate(row):
        for other in (None, "", b"?", 3, 2**70, "\ud800", value + 1 if isinstance(value, int) else value * 2 + value):
            assert from_row([*row[:at], other, *row[at + 1 :]]) is None or other == value
    assert from_row(row[1:]) is None


def test_any_tool_can_query_it(where: Path) -> None:
    filled(where, [letter(1), letter(2)]).close()
    connection = sqlite3.connect(where / DATABASE)
    assert (
        connection.execute("SELECT topic, reason, attempts FROM letters WHERE sequence = 0").fetchall()
        == [("jobs.a", "handler_exhausted", 5)] * 2
    )
    connection.close()
    assert {stat.S_IMODE(os.stat(where / name).st_mode) for name in os.listdir(where)} == {0o600}


def test_what_fails_in_a_transaction_leaves_nothing(where: Path) -> None:
    store = filled(where, [letter(1)])
    before = store.bytes
    with pytest.raises(LetterStoreBrokenError, match="no more"), store.transaction():
        store.replace(letter(1, b"another"))
        store.remove(1)
        store.add(letter(2))
        store.add(letter(3, kind="notice"))
        raise LetterStoreBrokenError("no more", directory="x")
    assert ([each.id for each in store.letters()], store.bytes, len(store)) == ([1], before, 1)
    with store.transaction():
        store.add(letter(2))
    assert [each.id for each in store.letters()] == [1, 2]
    store.close()


def test_a_record_that_has_a_letter_keeps_it(where: Path) -> None:
    store = filled(where, [letter(1)])
    with store.transaction():
        assert not store.add(letter(2, first=1, end=2))
        assert store.add(letter(3, first=1, end=2, topic="jobs.b"))
    assert ([each.id for each in store.letters()], len(store)) == ([1, 3], 2)
    store.close()


def test_what_became_of_a_letter_is_noted_and_what_is_gone_stays_gone(where: Path) -> None:
    store = filled(where, [letter(1), letter(2)])
    with store.transaction():
        store.replace(replace(letter(1), attempts=9, detail="again"))
        assert store.remove(2) and not store.remove(2)
        store.replace(letter(2))
    assert [(each.id, each.attempts, each.detail) for each in store.letters()] == [(1, 9, "again")]
    assert store.bytes == store.read(1).bytes
    with pytest.raises(LettersDamagedError, match="letter 2 is gone"):
        store.read(2)
    store.close()


def test_ceilings_in_rows_and_bytes_refuse_and_take_nothing(where: Path) -> None:
    store = filled(where, [letter(1), letter(2)], Letters(rows_max=2, bytes_max=4 * OVERHEAD_BYTES, notices_max=1))
    with pytest.raises(LetterStoreFullError, match="2 letters") as raised, store.transaction():
        store.add(letter(3))
    assert raised.value.retriable
    with store.transaction():
        store.remove(1)
    with pytest.raises(LetterStoreFullError, match="bytes"), store.transaction():
        store.add(letter(3, b"x" * 2048))
    with store.transaction():
        store.add(letter(3, b"x"))
    assert [each.id for each in store.letters()] == [2, 3]
    store.close()


def test_notices_take_no_letters_place_and_the_oldest_give_way(where: Path) -> None:
    notices = [letter(number, b"x", kind="notice") for number in (2, 3, 4)]
    store = filled(where, [letter(1), *notices], Letters(rows_max=1, notices_max=2))
    assert ([each.id for each in store.letters()], len(store), store.notices_dropped) == ([1, 3, 4], 1, 1)
    store.close()


def test_one_process_has_it_and_one_thread(where: Path) -> None:
    store = filled(where, [letter(1)])
    with pytest.raises(LetterStoreLockedError):
        DeadLetterStore.open(where, LIMITS)
    raised: list[BaseException] = []

    def use() -> None:
        try:
            store.read(1)
        except LetterStoreBrokenError as error:
            raised.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(10)
    assert "another thread" in str(raised[0])
    store.close()
    with pytest.raises(LetterStoreBrokenError, match="closed"):
        store.read(1)
    DeadLetterStore.open(where, LIMITS).close()


def test_a_directory_that_others_may_enter_is_refused(where: Path) -> None:
    where.mkdir(mode=0o755)
    with pytest.raises(StateDirectoryError):
        DeadLetterStore.open(where, LIMITS)


def test_a_forked_child_touches_nothing(where: Path) -> None:
    store = filled(where, [letter(1)])
    with store.transaction():
        store.add(letter(2))
        pid = os.fork()
        if not pid:
            store.abandon()
            os._exit(0 if not store._lock and store._connection is None else 1)
        assert os.waitpid(pid, 0)[1] == 0
        store.add(letter(3))
    assert [each.id for each in store.letters()] == [1, 2, 3]
    with pytest.raises(LetterStoreLockedError):
        DeadLetterStore.open(where, LIMITS)
    store.close()


def fork_within_a_transaction(parent: Parent, where: str) -> None:
    store = filled(Path(where), [letter(1)])
    with store.transaction():
        for number in range(2, 200):
            store.add(letter(number, b"x" * 20_000))  # more than SQLite's cache holds
        pid = os.fork()
        if not pid:
            store.abandon()
            sys.exit(0)  # with all that an interpreter does at its end
        os.waitpid(pid, 0)
    store.close()
    again = DeadLetterStore.open(Path(where), LIMITS)
    parent.say(found=len(again), damages=again.damages)


@pytest.mark.multiprocess
def test_a_forked_child_that_ends_rolls_nothing_back(where: Path) -> None:
    with child(fork_within_a_transaction, where=str(where)) as other:
        assert other.hear() == {"found": 199, "damages": 0}


def test_destroying_leaves_no_directory(where: Path) -> None:
    filled(where, [letter(1)]).destroy()
    assert not where.exists()
    store = DeadLetterStore.open(None, LIMITS)
    with store.transaction():
        store.add(letter(1))
    assert len(store) == 1
    store.destroy()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "no room"), LetterStoreFullError),
        (OSError(errno.EDQUOT, "no room"), LetterStoreFullError),
        (OSError(errno.EIO, "broken"), LetterStoreBrokenError),
        (OSError("broken"), LetterStoreBrokenError),
        (BlockingIOError(errno.EAGAIN, "locked"), LetterStoreLockedError),
    ],
)
def test_errors_of_the_system_are_translated(where: Path, error: OSError, kind: type[LetterStoreError]) -> None:
    store = DeadLetterStore.open(None, LIMITS)
    with pytest.raises(kind) as raised, store._translated():
        raise error
    assert raised.value.__cause__ is error
    store.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, LetterStoreFullError),
        (sqlite3.SQLITE_BUSY, LetterStoreLockedError),
        (sqlite3.SQLITE_IOERR_FSYNC, LetterStoreBrokenError),
        (sqlite3.SQLITE_READONLY, LetterStoreBrokenError),
        (sqlite3.SQLITE_CORRUPT, LettersDamagedError),
        (sqlite3.SQLITE_NOTADB, LettersDamagedError),
    ],
)
def test_errors_of_sqlite_are_translated(code: int, kind: type[LetterStoreError]) -> None:
    store = DeadLetterStore.open(None, LIMITS)
    error = sqlite3.OperationalError("as it says")
    error.sqlite_errorcode = code  # type: ignore[misc]
    with pytest.raises(kind) as raised, store._translated():
        raise error
    assert raised.value.__cause__ is error
    store.close()


def test_a_database_that_may_not_grow_is_full(where: Path) -> None:
    store = filled(where, [letter(1)])
    assert store._connection is not None
    store._connection.execute("PRAGMA max_page_count = 10")
    with pytest.raises(LetterStoreFullError, match="full"), store.transaction():
        store.add(letter(2, b"x" * 100_000))
    with store.transaction():
        store.add(letter(3))
    assert [each.id for each in store.letters()] == [1, 3]
    store.close()


GROUP = 200


def keep_adding(parent: Parent, where: str) -> None:
    store = DeadLetterStore.open(Path(where), LIMITS)
    number = 0
    while True:
        with store.transaction():  # larger than SQLite's cache: some of it is in the file before it is committed
            for _ in range(GROUP):
                number += 1
                store.add(letter(number, b"x" * 20_000))
                if number % GROUP == GROUP - 5 and number > 2 * GROUP:
                    parent.say(committed=number - number % GROUP)
                    parent.hear()


@pytest.mark.multiprocess
def test_what_was_committed_survives_sigkill(where: Path) -> None:
    with child(keep_adding, where=str(where)) as other:
        committed = other.hear()["committed"]
        other.signal(9)  # in the midst of a transaction
        other.exit_code()
    store = DeadLetterStore.open(where, LIMITS)
    found = [each.id for each in store.letters()]
    assert found == list(range(1, committed + 1))
    assert store.damages == 0
    store.close()


def add_to_a_small_disk(parent: Parent, where: str) -> None:
    store = DeadLetterStore.open(Path(where), LIMITS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))  # writes beyond it fail, as on a disk that is full
    number, raised = 0, ""
    while not raised:
        number += 1
        try:
            with store.transaction():
                store.add(letter(number, b"x" * 5000))
        except LetterStoreError as error:
            raised = type(error).__name__
    with store.transaction():
        store.remove(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with store.transaction():
        store.add(letter(number, b"x" * 5000))
    parent.say(number=number, raised=raised, found=[each.id for each in store.letters()])


@pytest.mark.multiprocess
def test_a_write_that_fails_takes_nothing_and_the_store_goes_on(where: Path) -> None:
    with child(add_to_a_small_disk, where=str(where)) as other:
        heard = other.hear()
    assert heard["raised"] in ("LetterStoreBrokenError", "LetterStoreFullError")
    assert heard["found"] == list(range(2, heard["number"] + 1)) and heard["number"] > 10
    store = DeadLetterStore.open(where, LIMITS)
    assert (store.damages, [each.id for each in store.letters()]) == (0, heard["found"])
    store.close()


def test_damage_that_shows_while_it_is_open_is_mended(where: Path, caplog: Any) -> None:
    store = filled(where, [letter(number, b"y" * 3000) for number in range(1, 40)])
    pages = {min(ids): page for page, ids in salvaged_of(store, where).items()}
    with open(where / DATABASE, "r+b") as file:
        file.seek((pages[max(pages)] - 1) * 4096)
        file.write(b"\xff" * 8)
    store._connection.execute("PRAGMA shrink_memory")  # type: ignore[union-attr]
    with pytest.raises(LettersDamagedError) as raised:
        list(store.letters())
    with caplog.at_level(logging.ERROR, logger="fabric.storage"):
        assert store.find_damage(raised.value)
    assert store.lost and store.damages == 1 and ASIDE in caplog.text and (where / ASIDE).exists()
    kept = [each.id for each in store.letters()]
    assert sorted(kept + store.lost) == list(range(1, 40))
    assert not store.find_damage(LetterStoreBrokenError("else", directory="x"))
    store.close()


def salvaged_of(store: DeadLetterStore, where: Path) -> dict[int, set[int]]:
    """Read from a copy: to close a second descriptor of the file would lose SQLite's lock."""
    copy = where.parent / "copy"
    copy.mkdir(mode=0o700)
    (copy / DATABASE).write_bytes((where / DATABASE).read_bytes())
    return until(lambda: salvaged(copy))


# What is over.


def test_what_is_over_is_remembered_without_its_value_and_counts_nowhere(tmp_path: Path) -> None:
    limits = replace(LIMITS, remembered_max=2, rows_max=2)
    store = filled(tmp_path / "letters", [letter(1), letter(2)], limits)
    with store.transaction():
        store.end(replace(letter(1), reason="handled"))
        store.end(letter(9))
    assert (len(store), store.remembered, 1 in store, store.bytes) == (1, 1, False, letter(2).bytes)
    with pytest.raises(LettersDamagedError), store.transaction():
        store.end(letter(2))
        raise LettersDamagedError("no", directory="x")
    assert (len(store), store.remembered, 2 in store) == (1, 1, True)
    for number in (3, 4):
        with store.transaction():
            store.add(letter(number))
            store.end(letter(number))
    assert (len(store), store.remembered) == (1, 2), "the oldest is forgotten"
    store.close()
    store = DeadLetterStore.open(tmp_path / "letters", limits)
    assert [(each.id, each.kind, each.reason, each.value) for each in store.letters()] == [
        (2, "letter", "handler_exhausted", letter(2).value),
        (3, "over", "handler_exhausted", b""),
        (4, "over", "handler_exhausted", b""),
    ]
    assert (len(store), store.remembered, store.bytes) == (1, 2, letter(2).bytes)
    store.close()


def test_a_record_whose_letter_was_over_may_be_one_again(tmp_path: Path) -> None:
    store = filled(tmp_path / "letters", [letter(1)])
    with store.transaction():
        store.end(letter(1))
        assert store.add(replace(letter(1), id=2)) and not store.add(replace(letter(1), id=3))
    assert ([(each.id, each.kind) for each in store.letters()], store.remembered) == ([(2, "letter")], 0)
    store.close()


def test_nobody_remembers_where_letters_end_with_their_process(tmp_path: Path) -> None:
    store = DeadLetterStore.open(tmp_path / "letters", LIMITS, durable=False)
    with store.transaction():
        store.add(letter(1))
        store.end(letter(1))
    assert list(store.letters()) == [] and store.remembered == 0
    store.close()
