"""The letters of a member in memory, without their values: which there are, in which parked lanes, and who may go.

Not thread-safe: `Letters` holds its lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from fabric.core.wire import Drop
from fabric.storage.letter_rows import LetterKey, LetterRow

__all__ = ["Entry", "LetterBook", "LetterLane", "lane_of"]

LetterLane = tuple[str, str, str, int]
"""Subscription, source, topic, seed."""


@dataclass(slots=True, eq=False)
class Entry:
    """One letter, without its value."""

    facts: LetterRow
    written: bool = True
    asked: bool = False
    """Whether it is to come again."""
    queued: bool = False
    sent: int = 0
    """The number under which it is on its way, or in a hand; 0 if it is not."""
    handled: bool = False
    """It came again and was handled, but its application has saved no cursor that says so (RULES D4)."""
    then: list[Callable[[], None]] = field(default_factory=list)
    """Who waits for it to be written."""

    @classmethod
    def of(cls, facts: LetterRow, *, written: bool = True) -> Entry:
        """The letter of a row."""
        return cls(replace(facts, value=b"", metadata=b""), written)

    @property
    def whole(self) -> bool:
        """Whether it can come again."""
        return not self.facts.is_cut

    @property
    def is_letter(self) -> bool:
        """Whether it is there to be looked at."""
        return self.written and not self.handled


class LetterBook:
    """Entries by number, and the lanes that wait for them."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.lanes: dict[LetterLane, dict[int, None]] = {}
        """The letters of each parked lane, oldest first, those included that are being written."""
        self.count = 0
        """How many are letters."""
        self.hidden: dict[int, None] = {}
        """Those that were handled, which nobody has saved."""
        self._keys: dict[LetterKey, int] = {}
        self._next = 1

    def number(self, facts: LetterRow) -> LetterRow:
        """Give a new letter or notice its number."""
        self._next += 1
        return replace(facts, id=self._next - 1)

    def pass_over(self, number: int) -> None:
        """This number was given in an earlier life."""
        self._next = max(self._next, number + 1)

    def find(self, key: LetterKey) -> Entry | None:
        """The letter of a record."""
        number = self._keys.get(key)
        return None if number is None else self.entries[number]

    def of(self, name: str) -> Iterator[Entry]:
        """All of one handler or subscription."""
        return (entry for entry in self.entries.values() if entry.facts.subscription == name)

    def enter(self, entry: Entry) -> Entry:
        """It is a letter, or will be one once it is written."""
        facts = entry.facts
        self.entries[facts.id], self._keys[facts.key] = entry, facts.id
        self.count += entry.is_letter
        if facts.parked:
            self.lanes.setdefault(lane_of(facts), {})[facts.id] = None
        return entry

    def remove(self, number: int) -> Entry | None:
        """It is none any more."""
        entry = self.entries.pop(number, None)
        if entry is not None:
            self.count -= entry.is_letter
            self._keys.pop(entry.facts.key, None)
            self.hidden.pop(number, None)
            self._leave_lane(entry)
        return entry

    def _leave_lane(self, entry: Entry) -> None:
        lane = lane_of(entry.facts)
        waiting = self.lanes.get(lane, {})
        if entry.facts.id in waiting:
            del waiting[entry.facts.id]
            if not waiting:
                del self.lanes[lane]

    def written(self, entry: Entry) -> list[Callable[[], None]]:
        """It is on disk; who waited for that."""
        entry.written = True
        self.count += 1
        told, entry.then = entry.then, []
        return told

    def hide(self, entry: Entry) -> None:
        """It was handled, and stays in the store until that is saved."""
        entry.handled, self.hidden[entry.facts.id] = True, None
        self.count -= 1
        self._leave_lane(entry)

    def show(self, entry: Entry) -> None:
        """Nobody saved that it was handled: it is a letter as before."""
        entry.handled = False
        del self.hidden[entry.facts.id]
        self.count += 1
        if entry.facts.parked:
            lane = lane_of(entry.facts)
            self.lanes[lane] = dict.fromkeys(sorted([*self.lanes.get(lane, ()), entry.facts.id]))

    def first_of(self, lane: LetterLane) -> Entry | None:
        """The oldest letter of a parked lane."""
        number = next(iter(self.lanes.get(lane, ())), None)
        return None if number is None else self.entries[number]

    # Who may come again.

    def choose(self, wanted: set[int], takes: Callable[[str], bool]) -> tuple[list[int], dict[int, str], int]:
        """(those that may, why others may not, how many wait behind them). `takes`: whether somebody has that name."""
        facts = (self.entries[number].facts for number in wanted if number in self.entries)
        lanes = {lane: self._prefix(lane, wanted) for each in facts if each.parked and (lane := lane_of(each))}
        refused = {number: why for number in sorted(wanted) if (why := self._refusal(number, lanes, takes))}
        chosen = [number for number in sorted(wanted) if number not in refused]
        return chosen, refused, sum(self._behind(lane, set(chosen)) for lane in lanes)

    def _prefix(self, lane: LetterLane, wanted: set[int]) -> set[int]:
        """The oldest letters of a lane, as far as each is wanted, and can come again, or is on its way."""
        found: set[int] = set()
        for number in self.lanes.get(lane, ()):
            entry = self.entries[number]
            if not entry.asked and not (number in wanted and entry.whole and entry.written):
                break
            found.add(number)
        return found

    def _refusal(self, number: int, first: dict[LetterLane, set[int]], takes: Callable[[str], bool]) -> str:
        entry = self.entries.get(number)
        if entry is None or not entry.is_letter:
            return "it is gone"
        if entry.asked:
            return "it is on its way already"
        if not entry.whole:
            return entry.facts.cut
        if not takes(entry.facts.subscription):
            return "nobody here handles its pattern"
        if entry.facts.parked and number not in first[lane_of(entry.facts)]:
            return "an older letter of its lane goes first"
        return ""

    def _behind(self, lane: LetterLane, chosen: set[int]) -> int:
        """How many letters, that only waited for those before them, follow the last chosen one."""
        count, seen = 0, False
        for number in self.lanes.get(lane, ()):
            if number in chosen:
                count, seen = 0, True
            elif seen and self.entries[number].facts.reason != Drop.PARKED:
                break
            elif seen:
                count += 1
        return count


def lane_of(facts: LetterRow) -> LetterLane:
    """Where it waits, if its lane is parked."""
    return facts.subscription, facts.source, facts.topic, facts.seed
