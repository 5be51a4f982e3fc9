"""The page of what is in hand: it survives its process, and any damage."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from fabric.errors import LetterStoreBrokenError, LetterStoreFullError
from fabric.storage import hand_page
from fabric.storage.hand_page import HAND, SLOTS, HandPage, key_of
from tests.harness.children import Parent, child


def test_what_is_settled_is_forgotten_and_the_rest_is_found_again(tmp_path: Path, caplog: Any) -> None:
    page = HandPage.open(tmp_path)
    assert page.suspects == {}
    page.note(7, 1)
    page.note(8, 1)
    page.note(7, 2)
    page.forget(8)
    page.forget(9)
    page.close()
    page.close()
    page.note(10, 1)  # after the end: nothing to write into
    again = HandPage.open(tmp_path)
    assert again.suspects == {7: 2}
    assert (again.begin(7), again.begin(7), again.begin(8)) == (2, 0, 0)
    again.note(7, 3)
    again.close()
    third = HandPage.open(tmp_path)
    assert third.suspects == {7: 3}
    third.forget(7)
    third.close()
    assert HandPage.open(tmp_path).suspects == {}
    assert caplog.messages == [], "there was nothing to say, of a fresh page either"


def hold(parent: Parent, where: str) -> None:
    page = HandPage.open(Path(where))
    page.note(5, page.begin(5) + 1)
    parent.say(noted=True)
    parent.hear()


@pytest.mark.multiprocess
def test_deaths_are_counted(tmp_path: Path) -> None:
    for death in (1, 2):
        with child(hold, where=str(tmp_path)) as other:
            other.hear()
            other.signal(9)
            other.exit_code()
        page = HandPage.open(tmp_path)
        assert page.suspects == {5: death}
        page.close()


def test_more_than_there_are_slots_is_counted_and_suspects_give_way(tmp_path: Path) -> None:
    page = HandPage.open(tmp_path)
    page.note(1, 4)
    page.note(2, 3)
    page.close()
    page = HandPage.open(tmp_path)
    for key in range(10, 10 + SLOTS - 1):
        page.note(key, 1)
    assert (page.suspects, page.overflows) == ({1: 4}, 0)
    page.note(5000, 1)
    page.note(5001, 1)
    assert (page.suspects, page.overflows) == ({}, 1)
    page.forget(10)
    page.note(5001, 1)
    assert page.overflows == 1
    page.close()


@pytest.mark.parametrize("at", [0, 31, 32, 35, 40, 50, 56, 63, 64, 100, 32 + 32 * SLOTS - 1])
def test_a_flipped_byte_costs_one_record_or_is_said(tmp_path: Path, at: int, caplog: Any) -> None:
    page = HandPage.open(tmp_path)
    page.note(7, 3)
    page.note(8, 2)
    page.close()
    data = bytearray((tmp_path / HAND).read_bytes())
    data[at] ^= 4
    (tmp_path / HAND).write_bytes(data)
    with caplog.at_level(logging.ERROR, logger="fabric.storage"):
        page = HandPage.open(tmp_path)
    assert page.suspects.items() <= {7: 3, 8: 2}.items()
    assert len(page.suspects) == 2 or "in hand" in caplog.text
    assert len(page.suspects) >= (1 if at >= 32 else 0)
    page.note(9, 1)
    page.close()


@pytest.mark.parametrize("size", [0, 1, 31, 33, 5000, 100_000])
def test_another_size_begins_anew(tmp_path: Path, size: int, caplog: Any) -> None:
    (tmp_path / HAND).write_bytes(bytes(size))
    with caplog.at_level(logging.ERROR, logger="fabric.storage"):
        page = HandPage.open(tmp_path)
    assert page.suspects == {} and ("another size" in caplog.text) is bool(size)
    page.close()


@pytest.mark.parametrize(("code", "kind"), [(errno.ENOSPC, LetterStoreFullError), (errno.EIO, LetterStoreBrokenError)])
def test_a_disk_that_refuses_says_so(tmp_path: Path, monkeypatch: Any, code: int, kind: Any) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(hand_page.os, "posix_fallocate", refuse)
    with pytest.raises(kind):
        HandPage.open(tmp_path)


def test_keys_differ_by_each_part() -> None:
    keys = [("a", "b", 1, "c", 2), ("x", "b", 1, "c", 2), ("a", "x", 1, "c", 2), ("a", "b", 3, "c", 2)]
    keys += [("a", "b", 1, "x", 2), ("a", "b", 1, "c", 12)]
    assert len({key_of(key) for key in keys}) == len(keys)


def test_a_letter_that_was_handled_is_known_until_it_is_forgotten(tmp_path: Path) -> None:
    page = HandPage.open(tmp_path)
    page.note(1, 1)
    page.finish(1)
    page.finish(2)
    page.note(3, 4)
    page.close()
    page = HandPage.open(tmp_path)
    assert (page.finished, page.suspects) == ({1, 2}, {3: 4})
    page.forget(2)
    page.clear()
    page.close()
    page = HandPage.open(tmp_path)
    assert (page.finished, page.suspects) == ({1}, {3: 4}), "an end in peace does not make it a letter again"
    page.close()


def test_a_full_page_counts_what_it_cannot_mark(tmp_path: Path) -> None:
    page = HandPage.open(tmp_path)
    for key in range(1, SLOTS + 2):
        page.finish(key)
    assert (len(page.finished), page.overflows) == (SLOTS, 1)
    page.close()
