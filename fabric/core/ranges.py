"""Sets of offsets as sorted, disjoint, half-open ranges: the algebra of settling, repair and cursors."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

__all__ = ["RangeSet"]


class RangeSet:
    """A set of integers held as ranges `first <= offset < end`. Adding at the upper end, the common case, is O(1).

    `firsts` is for looking only: whether it is empty says whether the set is, without a call, which the fast paths of
    every burst ask several times.
    """

    __slots__ = ("_ends", "firsts")

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self.firsts: list[int] = []
        self._ends: list[int] = []
        for first, end in ranges:
            self.add(first, end)

    def add(self, first: int, end: int) -> None:
        """Add every offset in `first <= offset < end`."""
        if first >= end:
            return
        firsts, ends = self.firsts, self._ends
        if not ends or first > ends[-1]:
            firsts.append(first)
            ends.append(end)
            return
        low, high = bisect_left(ends, first), bisect_right(firsts, end)
        if low < high:
            first, end = min(first, firsts[low]), max(end, ends[high - 1])
        firsts[low:high], ends[low:high] = [first], [end]

    def remove(self, first: int, end: int) -> None:
        """Remove every offset in `first <= offset < end`."""
        firsts, ends = self.firsts, self._ends
        low, high = bisect_right(ends, first), bisect_left(firsts, end)
        if low >= high or first >= end:
            return
        kept = [(firsts[low], first), (end, ends[high - 1])]
        kept = [(begin, stop) for begin, stop in kept if begin < stop]
        firsts[low:high] = [begin for begin, _ in kept]
        ends[low:high] = [stop for _, stop in kept]

    def trim(self, floor: int) -> None:
        """Remove every offset below `floor`."""
        if self.firsts and self.firsts[0] < floor:
            self.remove(self.firsts[0], floor)

    def end_of(self, offset: int) -> int:
        """The end of the range that holds `offset`, or `offset` itself if none does."""
        index = bisect_right(self.firsts, offset) - 1
        return max(offset, self._ends[index]) if index >= 0 else offset

    def touches(self, offset: int) -> bool:
        """Whether adding `offset` would open no new range: it is inside one or next to one."""
        return offset in self or offset - 1 in self or offset + 1 in self

    def missing(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The ranges of `first <= offset < end` that are not in the set, lowest first."""
        index = bisect_right(self._ends, first)
        while first < end:
            begin = self.firsts[index] if index < len(self.firsts) else end
            if first < begin:
                yield first, min(begin, end)
            first = self._ends[index] if index < len(self._ends) else end
            index += 1

    def __contains__(self, offset: int) -> bool:
        index = bisect_right(self.firsts, offset) - 1
        return index >= 0 and offset < self._ends[index]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(list(zip(self.firsts, self._ends, strict=True)))

    def __len__(self) -> int:
        return len(self.firsts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeSet) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def __repr__(self) -> str:
        return f"RangeSet({list(self)})"

    @property
    def count(self) -> int:
        """The number of offsets in the set."""
        return sum(self._ends) - sum(self.firsts)

    @property
    def end(self) -> int:
        """One past the highest offset; 0 if the set is empty."""
        return self._ends[-1] if self._ends else 0
