"""The executable model of the protocol holds its invariants, and each of its rules is needed."""

from __future__ import annotations

import os

import pytest

from tests.model.soak import explore, is_caught
from tests.model.variants import PUBLISHERS, SUBSCRIBERS, VARIANTS

BLOCKS = 10
PER_BLOCK = 2_000 if os.environ.get("TENSOR_FABRIC_SOAK") else 20
"""Schedules; each takes 10 to 20 ms."""
MORE_SEEDS = 40
"""Tried when those of the table do not catch a variant any more, because the model has changed."""
CATCHES: dict[str, tuple[int, ...]] = {
    "no_heartbeat": (0, 1),
    "heartbeat_on_change": (6, 8),
    "incarnation_forgotten": (1, 3),
    "number_before_append": (1, 3),
    "power_not_synced": (43, 220),
    "exact_always": (58, 88),
    "released_by_fastest": (3, 5),
    "answer_may_be_empty": (1, 3),
    "credit_ignored": (1, 3),
    "join_point_moves": (1, 4),
    "acknowledge_any_session": (170, 633),
    "not_fenced": (15, 18),
    "registrations_forgotten": (1, 14),
    "registration_not_written": (1, 14),
    "restored_as_it_was": (1, 26),
    "names_forgotten": (124, 174),
    "past_is_not_owed": (1, 7),
    "only_this_life": (1, 7),
    "before_not_told": (1, 14),
    "inexact_told_exact": (57, 58),
    "since_stays": (138, 150),
    "unknown_place_is_none": (7, 9),
    "begins_where_it_began": (8, 27),
    "kept_is_not_written": (13, 26),
    "before_ignored": (1, 14),
    "named_feeds_missed_at_once": (13, 30),
    "kept_is_a_final_gap": (6, 26),
    "past_dies_with_who_serves_it": (1205, 1522),
    "durable_dies": (54, 127),
    "old_life_is_not_fenced_off": (13, 19),
    "offset_order": (3, 4),
    "sequence_order": (4, 9),
    "lane_begins_anywhere": (4, 9),
    "gap_before_floor": (71, 108),
    "gap_silent": (1, 5),
    "gap_by_timeout": (0, 4),
    "first_ignored": (1, 4),
    "lost_ignored": (13, 22),
    "jumps_to_newest": (1, 7),
    "enters_before_settled": (1, 12),
    "no_duplicate_check": (0, 1),
    "rejoin_skips": (2, 4),
    "hold_unbounded": (4, 9),
    "newcomer_gives_way": (4, 24),
    "ranges_full_at_floor": (3, 9),
    "ranges_unbounded": (16, 80),
    "credit_beyond_room": (0, 4),
    "window_stays": (40, 51),
    "acknowledges_handled": (30, 207),
    "acknowledges_highest": (204, 777),
    "cursor_is_floor": (344, 474),
    "cursor_is_highest": (474, 590),
    "acknowledges_out_of_lane_order": (20, 24),
    "letter_handled_again": (27, 63),
    "redrive_deletes": (396, 566),
    "redrive_not_in_cursor": (84, 91),
    "redrive_too_early": (165, 211),
    "park_is_skip": (13, 15),
    "parked_not_settled": (4, 51),
    "park_whole_lane": (165, 340),
}
"""Schedules that caught a variant; `python -m tests.model.soak --variants` finds more."""


@pytest.mark.timeout(60 + PER_BLOCK)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_the_invariants_hold(block: int) -> None:
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        explore(seed)


def test_the_same_seed_gives_the_same_history() -> None:
    assert [explore(seed).digest for seed in range(5)] == [explore(seed).digest for seed in range(5)]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_model_without_this_rule_is_caught(name: str) -> None:
    if not any(is_caught(name, seed) for seed in (*CATCHES[name], *range(MORE_SEEDS))):
        pytest.fail(f"{name} got away: no schedule catches it any more")


def test_a_seed_of_the_table_passes_with_the_rule() -> None:
    for seed in sorted({seeds[0] for seeds in CATCHES.values()}):
        explore(seed)


def test_the_table_names_the_variants() -> None:
    assert set(CATCHES) == set(VARIANTS)
    assert not PUBLISHERS.keys() & SUBSCRIBERS.keys()
