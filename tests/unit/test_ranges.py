"""RangeSet: what the property tests do not say."""

from __future__ import annotations

import pytest

from fabric.core.ranges import RangeSet


def test_an_empty_set_holds_nothing_and_ends_at_zero() -> None:
    empty = RangeSet()
    assert (list(empty), len(empty), empty.count, empty.end, 0 in empty) == ([], 0, 0, 0, False)
    assert list(empty.missing(3, 7)) == [(3, 7)]
    assert list(empty.missing(7, 3)) == []
    assert empty.end_of(5) == 5


def test_neighbours_become_one_range() -> None:
    assert list(RangeSet([(0, 2), (4, 6), (2, 4)])) == [(0, 6)]


def test_a_removal_in_the_middle_leaves_both_sides() -> None:
    ranges = RangeSet([(0, 10)])
    ranges.remove(3, 5)
    assert list(ranges) == [(0, 3), (5, 10)]


def test_iterating_is_safe_while_the_set_changes() -> None:
    ranges = RangeSet([(0, 1), (2, 3), (4, 5)])
    for first, end in ranges:
        ranges.remove(first, end)
    assert not ranges


def test_ranges_of_any_width_cost_the_same() -> None:
    ranges = RangeSet([(0, 2**62), (2**62 + 1, 2**64)])
    ranges.remove(5, 2**63)
    assert list(ranges) == [(0, 5), (2**63, 2**64)]
    assert ranges.count == 5 + 2**63


def test_it_is_no_key_and_equals_only_its_like() -> None:
    ranges = RangeSet([(1, 2)])
    assert ranges != [(1, 2)]
    assert ranges == RangeSet([(1, 2)])
    with pytest.raises(TypeError):
        hash(ranges)
    assert repr(ranges) == "RangeSet([(1, 2)])"
