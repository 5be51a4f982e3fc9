"""Dead letters and their store, as tests make them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from fabric.config import Letters
from fabric.storage.dead_letters import DATABASE, DeadLetterStore
from fabric.storage.disk import OS_DISK
from fabric.storage.letter_rows import COLUMNS, LetterRow, from_row
from fabric.storage.salvage import rows_in

LIMITS = Letters()


def letter(number: int, value: bytes = b"", **others: Any) -> LetterRow:
    """A letter whose fields follow from its number."""
    value = value or number.to_bytes(2, "big") * 40
    fields: dict[str, Any] = {
        "id": number,
        "kind": "letter",
        "subscription": "jobs.**",
        "source": "rank-1",
        "incarnation": 2**63 + 5,
        "topic": "jobs.a",
        "seed": number % 3,
        "sequence": number // 3,
        "first": number,
        "end": number + 1,
        "reason": "handler_exhausted",
        "detail": f"ValueError: {number} is no good",
        "attempts": 5,
        "parked": False,
        "published_ns": 1_700_000_000_000_000_000,
        "buried_ns": 1_700_000_000_000_000_000 + number,
        "value_kind": 0,
        "size": len(value),
        "checksum": xxh3_64_intdigest(value),
        "metadata": b"",
        "value": value,
        "cut": "",
    }
    return LetterRow(**{**fields, **others})


def filled(path: Path, letters: list[LetterRow], limits: Letters = LIMITS) -> DeadLetterStore:
    """An open store with these letters."""
    store = DeadLetterStore.open(path, limits)
    with store.transaction():
        for each in letters:
            store.add(each)
    return store


def salvaged(path: Path) -> dict[int, set[int]]:
    """The ids of letters that can be read without SQLite, by the page of their cell."""
    directory = OS_DISK.enter(path)
    file = directory.open(DATABASE)
    found: dict[int, set[int]] = {}
    for page, row in rows_in(file, columns=len(COLUMNS)):
        read = from_row(row)
        if read is not None:
            found.setdefault(page, set()).add(read.id)
    file.close()
    directory.close()
    return found
