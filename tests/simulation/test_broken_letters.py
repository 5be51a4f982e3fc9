"""Each rule of dead letters has a variant without it, and a job whose messages die catches every one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.simulation.letter_jobs import Parked, Rejected, Skipped
from tests.simulation.letter_variants import LETTER_VARIANTS
from tests.simulation.variants import broken

JOBS: dict[str, Callable[[int], None]] = {
    "parked": lambda seed: Parked(seed).play(),
    "skipped": lambda seed: Skipped(seed).play(),
    "rejected": lambda seed: Rejected(seed).play(),
}
CATCHES: dict[str, tuple[str, tuple[int, ...]]] = {
    "settles_before_it_is_written": ("parked", (2, 3, 1)),
    "refused_is_taken_for_written": ("parked", (0, 2, 1)),
    "refused_is_dropped": ("parked", (2, 0, 1)),
    "letters_are_unbounded": ("parked", (0, 1, 2)),
    "room_is_unbounded": ("parked", (1, 0, 2)),
    "ends_are_not_booked": ("parked", (3, 2, 1)),
    "parked_lets_through": ("parked", (0, 1, 2)),
    "any_letter_of_a_lane_goes": ("parked", (3, 0, 1)),
    "the_newest_follows": ("parked", (0, 2, 1)),
    "nothing_follows": ("parked", (12, 1, 0)),
    "handled_stays_a_letter": ("skipped", (1, 2, 3)),
    "sent_as_often_as_asked": ("parked", (3, 0, 4)),
    "discarded_on_its_way": ("rejected", (1, 13, 33)),
    "died_again_is_over": ("skipped", (0, 1, 3)),
    "what_is_over_comes_again": ("rejected", (9, 11, 1)),
    "handled_is_over_unsaved": ("rejected", (0, 10, 4)),
    "unsaved_is_hidden_for_ever": ("rejected", (11, 14, 16)),
    "saved_letters_stay": ("rejected", (2, 0, 1)),
}
"""The job that catches a variant, and seeds of it that did."""
MORE_SEEDS = 30
"""Tried when those do not catch it any more, because the jobs or the letters have changed."""


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """What is broken says so; here that is the point."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", LETTER_VARIANTS)
def test_letters_without_this_rule_are_caught(name: str) -> None:
    job, seeds = CATCHES[name]
    for seed in (*seeds, *range(MORE_SEEDS)):
        try:
            with broken(LETTER_VARIANTS[name]):
                JOBS[job](seed)
        except Exception:  # noqa: BLE001 - a violation, an assertion of the core, or a world that stands still
            return
    pytest.fail(f"{name} got away: no seed catches it any more")


def test_the_table_names_variants_that_exist() -> None:
    assert set(CATCHES) == set(LETTER_VARIANTS)
