"""Each rule of restarts and sessions has a variant without it, and a job with state catches every one of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest

from tests.simulation.restart_variants import RESTART_VARIANTS
from tests.simulation.session_jobs import Ends, PowerLoss, Sessions
from tests.simulation.test_restarts import Job
from tests.simulation.variants import broken

PATIENCE_S = 20.0
"""For a job that a broken rule brings to a stand: of its own time, longer than any other takes."""
JOBS: dict[str, Callable[[int], None]] = {
    "killed": lambda seed: Job(seed, "killed").play(PATIENCE_S),
    "power": lambda seed: Job(seed, "power").play(PATIENCE_S),
    "sessions": lambda seed: Sessions(seed, rough=False).play(),
    "rough": lambda seed: Sessions(seed, rough=True).play(),
    "unsynced": lambda seed: PowerLoss(seed).play(),
    "ends": lambda seed: Ends(seed).play(),
}
CATCHES: dict[str, tuple[str, tuple[int, ...]]] = {
    "registrations_are_not_restored": ("killed", (2, 0, 7)),
    "confirmed_before_it_is_written_down": ("killed", (0, 7, 3)),
    "positions_are_not_saved": ("sessions", (15, 18, 9)),
    "damage_means_that_nobody_is_owed": ("rough", (0, 3, 4)),
    "unsubscribing_is_not_written_down": ("sessions", (8, 3, 0)),
    "sessions_begin_where_the_last_began": ("sessions", (4, 6, 1)),
    "released_by_the_first_that_has_it": ("killed", (8, 10, 9)),
    "told_what_was_handled": ("killed", (9, 5, 14)),
    "sent_before_it_is_written": ("killed", (19, 18, 5)),
    "refused_keeps_its_numbers": ("killed", (12, 3, 5)),
    "power_is_not_synced": ("power", (2, 3, 4)),
    "closes_keep_nothing": ("ends", (0, 7, 9)),
    "kept_ends_with_the_goodbye": ("ends", (7, 9, 12)),
    "kept_rows_are_forgotten": ("ends", (7, 17, 9)),
    "the_dead_are_not_waited_for": ("ends", (1, 0, 4)),
    "next_lives_are_not_asked": ("ends", (2, 4, 0)),
    "enters_whatever_was_before": ("ends", (1, 5, 9)),
    "kept_ends_are_not_certain": ("ends", (9, 0, 7)),
    "lost_with_the_power_is_certain": ("unsynced", (2, 1, 4)),
    "inexact_ends_are_told_exact": ("unsynced", (0, 2, 3)),
}
"""The job that catches a variant, and seeds of it that did."""
MORE_SEEDS = 60
"""Tried when those do not catch it any more, because the jobs or the core have changed."""


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """What is broken says so; here that is the point."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", RESTART_VARIANTS)
def test_a_restart_without_this_rule_is_caught(name: str) -> None:
    job, seeds = CATCHES[name]
    for seed in (*seeds, *range(MORE_SEEDS)):
        try:
            with broken(RESTART_VARIANTS[name]):
                JOBS[job](seed)
        except Exception:  # noqa: BLE001 - a violation, an assertion of the core, or a world that stands still
            return
    pytest.fail(f"{name} got away: no seed catches it any more")


@pytest.mark.parametrize("job", ["sessions", "rough", "unsynced", "ends"])
def test_the_whole_core_gets_through_these_jobs(job: str) -> None:
    """Those of `Job` are in test_restarts.py."""
    for seed in range(6):
        JOBS[job](seed)


def test_the_table_names_variants_that_exist() -> None:
    assert set(CATCHES) == set(RESTART_VARIANTS)
