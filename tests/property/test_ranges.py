"""RangeSet against a plain set of integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fabric.core.ranges import RangeSet

OFFSETS = st.integers(0, 40)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "trim"]), OFFSETS, OFFSETS), max_size=30)


def as_ranges(numbers: set[int]) -> list[tuple[int, int]]:
    firsts = sorted(number for number in numbers if number - 1 not in numbers)
    ends = sorted(number + 1 for number in numbers if number + 1 not in numbers)
    return list(zip(firsts, ends, strict=True))


def played(steps: list[tuple[str, int, int]]) -> tuple[RangeSet, set[int]]:
    ranges, numbers = RangeSet(), set[int]()
    for what, first, end in steps:
        if what == "add":
            ranges.add(first, end)
            numbers |= set(range(first, end))
        elif what == "remove":
            ranges.remove(first, end)
            numbers -= set(range(first, end))
        else:
            ranges.trim(first)
            numbers -= set(range(first))
        assert list(ranges) == as_ranges(numbers)
    return ranges, numbers


@given(STEPS)
def test_after_every_step_it_holds_what_a_set_holds(steps: list[tuple[str, int, int]]) -> None:
    ranges, numbers = played(steps)
    assert ranges.count == len(numbers)
    assert len(ranges) == len(as_ranges(numbers))
    assert bool(ranges) == bool(numbers)
    assert ranges.end == max(numbers, default=-1) + 1


@given(STEPS, st.integers(-1, 42))
def test_questions_about_one_offset_have_the_answers_of_a_set(steps: list[tuple[str, int, int]], offset: int) -> None:
    ranges, numbers = played(steps)
    assert (offset in ranges) == (offset in numbers)
    assert ranges.touches(offset) == bool({offset - 1, offset, offset + 1} & numbers)
    after = offset
    while after in numbers:
        after += 1
    assert ranges.end_of(offset) == after


@given(STEPS, OFFSETS, OFFSETS)
def test_what_is_missing_is_the_complement(steps: list[tuple[str, int, int]], first: int, end: int) -> None:
    ranges, numbers = played(steps)
    assert list(ranges.missing(first, end)) == as_ranges(set(range(first, end)) - numbers)


@given(STEPS)
def test_its_own_ranges_make_it_again(steps: list[tuple[str, int, int]]) -> None:
    ranges, _ = played(steps)
    assert RangeSet(ranges) == ranges
    assert RangeSet(reversed(list(ranges))) == ranges
