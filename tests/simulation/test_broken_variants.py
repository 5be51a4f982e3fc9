"""Each rule of the protocol has a variant of the core without it, and random worlds catch every one of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from tests.simulation.book_variants import BOOK_VARIANTS
from tests.simulation.draw import DISK
from tests.simulation.play import play
from tests.simulation.soak import VARIANT_REST_S
from tests.simulation.spill_variants import SPILL_VARIANTS
from tests.simulation.test_rare_meetings import MEETINGS
from tests.simulation.variants import VARIANTS, broken

CATCHES: dict[str, tuple[int, ...]] = {
    "no_markers": (0, 7, 4),
    "heartbeat_on_change": (21, 4, 10),
    "registered_once": (0, 9, 24),
    "registrations_forgotten": (9, 4, 8),
    "released_by_fastest": (0, 4, 8),
    "credit_ignored": (2, 0, 4),
    "answer_may_be_empty": (2, 0, 4),
    "join_point_moves": (0, 7, 8),
    "acknowledge_any_session": (24,),
    "not_fenced": (20, 15, 21),
    "history_not_owed": (16, 28, 21),
    "first_available_stays": (0, 9, 8),
    "no_heartbeat_to_ourselves": (23, 9, 4),
    "offset_order": (2, 0, 4),
    "order_ignored": (7, 0, 4),
    "lane_begins_anywhere": (7, 9, 8),
    "gap_before_floor": (16, 21, 10),
    "gap_silent": (7, 0, 8),
    "gap_by_timeout": (0, 7, 8),
    "first_ignored": (11, 9, 8),
    "lost_ignored": (18, 10, 16),
    "jumps_to_newest": (9, 7, 21),
    "enters_before_settled": (9, 21, 7),
    "no_duplicate_check": (2, 5, 0),
    "rejoin_skips": (2, 0, 4),
    "joins_at_first_seen": (0, 7, 8),
    "hold_unbounded": (0, 4),
    "newcomer_gives_way": (0, 8),
    "ranges_full_at_floor": (0, 4),
    "ranges_unbounded": (4, 8),
    "room_is_not_shared": (25, 34),
    "starved_for_ever": (9, 4),
    "holes_out_of_order": (38, 60, 10),
    "acknowledges_highest": (2, 0),
    "acknowledges_once": (10, 8),
    "known_forgotten": (10, 8),
    "acknowledges_out_of_lane_order": (3, 4),
    "settles_twice": (0, 2),
}
"""Seeds that caught a variant, for a quick suite; `make soak SOAK=--variants` finds more."""
SPILL_CATCHES: dict[str, tuple[int, ...]] = {
    "released_too_early": (5, 0, 10),
    "refused_is_written": (19, 16, 0),
    "released_is_written_again": (159,),
    "history_has_holes": (37, 33, 48),
    "loaded_is_thrown_away": (16, 25, 20),
    "damage_is_ignored": (43, 48),
    "nothing_is_let_go": (16, 33, 10),
    "acknowledged_waits_for_the_disk": (0, 1, 5),
    "damage_is_handed_on": (24, 16),
    "refused_in_another_order": (10, 21, 9),
}
"""The same in worlds with a disk: without the bit that makes them so."""
BOOK_CATCHES: dict[str, tuple[int, ...]] = {
    "handled_is_counted_twice": (1, 0, 2),
    "drops_count_as_handled": (22, 24, 28),
    "gaps_are_not_booked": (5, 7, 0),
    "rest_is_not_given_up": (46, 43, 47),
    "told_once": (35, 82, 61),
    "confirmed_whatever_changed": (8, 90),
    "lives_are_mixed": (5, 18, 8),
}
"""The same for the books."""
MORE_SEEDS = 40
"""Tried when those do not catch it any more, because the worlds or the core have changed."""


@pytest.fixture(autouse=True)
def no_log() -> Iterator[None]:
    """An engine that breaks says so; here that is the point."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in MEETINGS])
def test_a_core_without_this_rule_is_caught(name: str) -> None:
    for seed in (*CATCHES.get(name, ()), *range(MORE_SEEDS)):
        try:
            with broken(VARIANTS[name]):
                play(seed, rest_s=VARIANT_REST_S)
        except Exception:  # noqa: BLE001 - a violation, an assertion of the core, or a world that stands still
            return
    pytest.fail(f"{name} got away: no seed catches it any more")


@pytest.mark.parametrize("name", SPILL_VARIANTS)
def test_a_spill_without_this_rule_is_caught(name: str) -> None:
    for seed in (*SPILL_CATCHES.get(name, ()), *range(MORE_SEEDS)):
        try:
            with broken(SPILL_VARIANTS[name]):
                play(seed | DISK, rest_s=VARIANT_REST_S)
        except Exception:  # noqa: BLE001 - a violation, an assertion of the core, or a world that stands still
            return
    pytest.fail(f"{name} got away: no seed catches it any more")


@pytest.mark.parametrize("name", BOOK_VARIANTS)
def test_books_without_this_rule_are_caught(name: str) -> None:
    for seed in (*BOOK_CATCHES.get(name, ()), *range(MORE_SEEDS)):
        try:
            with broken(BOOK_VARIANTS[name]):
                play(seed, rest_s=VARIANT_REST_S)
        except Exception:  # noqa: BLE001 - a violation, an assertion of the core, or a world that stands still
            return
    pytest.fail(f"{name} got away: no seed catches it any more")


def test_the_table_names_variants_that_exist() -> None:
    assert set(CATCHES) <= set(VARIANTS)
    assert set(SPILL_CATCHES) == set(SPILL_VARIANTS)
    assert set(BOOK_CATCHES) == set(BOOK_VARIANTS)
