"""Any byte of the file of dead letters flipped, any suffix cut: it is reported, and what can be read survives."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fabric.storage.dead_letters import ASIDE, DATABASE, DeadLetterStore
from fabric.storage.letter_rows import LetterRow
from fabric.storage.salvage import PAGE_BYTES
from tests.harness.letters import LIMITS, filled, letter, salvaged

LENGTHS = (30, 300, 900, 5000, 20_000)
HEAD_BYTES = 100


@functools.cache
def healthy(where: Path) -> tuple[bytes, dict[int, LetterRow], dict[int, set[int]]]:
    """A file with a history of adding and removing; its letters by id, and the ids by page."""
    store = filled(where, [letter(n, bytes([n]) * LENGTHS[n % 5]) for n in range(1, 121)])
    with store.transaction():
        for number in range(2, 120, 4):
            store.remove(number)
        store.replace(letter(5, b"new" * 2000))
    letters = {each.id: each for each in store.letters()}
    store.close()
    return (where / DATABASE).read_bytes(), letters, salvaged(where)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[int, LetterRow], dict[int, set[int]]]:
    return healthy(tmp_path_factory.mktemp("letters") / "sound")


def opened(where: Path, data: bytes) -> tuple[dict[int, LetterRow], bool]:
    """The letters of a store that finds this file, and whether it says that there is damage."""
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(mode=0o700)
    (where / DATABASE).write_bytes(data)
    store = DeadLetterStore.open(where, LIMITS, durable=False)
    with store.transaction():  # it goes on
        store.add(letter(999))
    letters = {each.id: each for each in store.letters()}
    assert letters.pop(999) == letter(999)
    reported = store.damages > 0
    store.close()
    assert (where / ASIDE).exists() is reported
    return letters, reported


def test_without_sqlite_the_same_letters_are_found_and_none_that_were_removed(sound: Any) -> None:
    _, letters, pages = sound
    found = [number for ids in pages.values() for number in ids]
    assert sorted(found) == sorted(letters)


@pytest.mark.parametrize("part", ["head", "first page", *range(8)])
def test_f65_a_flipped_byte_costs_at_most_the_letters_of_its_page(
    part: str | int, sound: Any, tmp_path: Path, caplog: Any
) -> None:
    data, letters, pages = sound
    rng = Random(f"flips {part}")
    places = {
        "head": [*range(0, HEAD_BYTES, 3)],
        "first page": [rng.randrange(HEAD_BYTES, PAGE_BYTES) for _ in range(25)],
    }.get(str(part)) or [rng.randrange(PAGE_BYTES, len(data)) for _ in range(25)]
    caplog.set_level(logging.CRITICAL, logger="fabric.storage")
    for at in places:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        found, reported = opened(tmp_path / "store", bytes(damaged))
        assert {number: letters[number] for number in found} == found, f"byte {at}: something else is read"
        lost = letters.keys() - found.keys()
        ours = pages.get(at // PAGE_BYTES + 1, set())
        overflowing = {number for number in lost if letters[number].size > PAGE_BYTES - 35 - 300}
        assert lost <= ours or (len(lost) == 1 and lost <= overflowing), f"byte {at}: {lost} are lost, not of {ours}"
        assert reported or not lost, f"byte {at}: {lost} are lost, and nobody says so"


@pytest.mark.parametrize("part", range(4))
def test_a_cut_suffix_costs_what_lay_in_it(part: int, sound: Any, tmp_path: Path, caplog: Any) -> None:
    data, letters, pages = sound
    rng = Random(f"cuts {part}")
    caplog.set_level(logging.CRITICAL, logger="fabric.storage")
    for size in [0, 1, 50, PAGE_BYTES, len(data) - 1][part::4] + [rng.randrange(len(data)) for _ in range(15)]:
        found, reported = opened(tmp_path / "store", data[:size])
        assert reported, f"cut to {size} bytes, and nobody says so"
        assert {number: letters[number] for number in found} == found
        whole = {number for page, ids in pages.items() if page * PAGE_BYTES <= size for number in ids}
        short = {number for number in whole if letters[number].size < PAGE_BYTES - 35 - 300}
        assert short <= found.keys(), f"cut to {size} bytes: {short - found.keys()} could be read"
