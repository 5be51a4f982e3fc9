"""Which records are, or were, letters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fabric.engine.known_records import KnownRecords
from tests.harness.letters import letter

FEED: Any = SimpleNamespace(source="rank-1", incarnation=2**63 + 5, topic="jobs.a")


def test_a_burst_is_told_what_is_known_of_its_records_and_no_other() -> None:
    known = KnownRecords(10)
    assert known.of_burst("jobs.**", FEED, range(100)) == {}
    for number in (3, 7, 200):
        known.add(letter(number).key, "rejected")
    known.end(letter(7).key, "handled")
    assert known.of_burst("jobs.**", FEED, range(100)) == {3: "rejected", 7: "handled"}
    assert known.of_burst("jobs.**", FEED, range(8, 200)) == {}
    assert known.of_burst("jobs.*", FEED, range(100)) == {}
    assert [known.drop_of(letter(number).key) for number in (3, 7, 8)] == [
        (True, "rejected"),
        (True, None),
        (False, None),
    ]


def test_of_those_that_are_over_the_oldest_are_forgotten_and_letters_never() -> None:
    known = KnownRecords(2)
    known.add(letter(0).key, "rejected")
    for number in (1, 2, 3):
        known.end(letter(number).key, "handled")
    known.end(letter(2).key, "rejected")
    assert known.of_burst("jobs.**", FEED, range(9)) == {0: "rejected", 2: "rejected", 3: "handled"}
    assert known.forgotten == 1
    known.add(letter(3).key, "rejected")
    known.end(letter(4).key, "handled")
    assert known.of_burst("jobs.**", FEED, range(9)) == {0: "rejected", 2: "rejected", 3: "rejected", 4: "handled"}
    for number in (0, 2, 3, 4, 4):
        known.forget(letter(number).key)
    assert known.of_burst("jobs.**", FEED, range(9)) == {}
