"""The dead letters of one member: what is kept of them in memory, and what is asked of their store.

Dead letters are written by the storage thread, together with all that wait, and only then do their offsets settle. A
store that refuses is asked again every second; until it takes a letter, the lane of that letter waits, and nobody else.

A letter that is redriven comes to its handler or subscription as if it had just arrived, in the hand of a
`RedrivenFeed`; when it is handled there it leaves the store. Of a parked lane only the oldest letter may go, and what
came after it follows by itself.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from fabric.core import events
from fabric.core.wire import Drop
from fabric.engine.letter_forms import Burial, cut_text, letter_of, message_of, notice_of
from fabric.engine.lettering import (
    ChangeLetter,
    LetterWish,
    LoadLetters,
    ReadLetters,
    RemoveLetter,
    WriteLetter,
)
from fabric.errors import FabricError, LettersDamagedError
from fabric.message import Message, RedrivenFeed
from fabric.storage.letter_rows import LetterKey, LetterRow

if TYPE_CHECKING:
    from fabric.engine.inbox import Inbox
    from fabric.engine.loop import Engine
    from fabric.storage.hand_page import HandPage

__all__ = ["Letters"]

log = logging.getLogger("fabric.handlers")

_COUNTS = (
    "dead_letters",
    "letters_refused",
    "letters_redriven",
    "letters_died_again",
    "letters_discarded",
    "letters_lost",
    "letter_stores_damaged",
    "handlers_paused",
)
LetterLane = tuple[str, str, str, int]
"""Subscription, source, topic, seed."""


@dataclass(slots=True, eq=False)
class _Entry:
    """One letter in the store, without its value."""

    facts: LetterRow
    whole: bool
    written: bool = True
    asked: bool = False
    """Whether it is to come again."""
    queued: bool = False
    sent: int = 0
    """The number under which it is on its way, or in a hand; 0 if it is not."""


class Letters:
    """The letters of one member. From any thread; asks the store under the engine's lock, and never holds its own then.

    `earlier` holds what letters of an earlier life were about: such a record is not handled again (D1).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._limits = engine, engine.config.letters
        engine.counts.update(dict.fromkeys(_COUNTS, 0))  # several threads count: no key may appear while one looks
        self._lock = threading.Lock()
        self._next = 1
        self._entries: dict[int, _Entry] = {}
        self._keys: set[LetterKey] = set()
        self._notices: deque[LetterRow] = deque(maxlen=self._limits.notices_max)
        self._lanes: dict[LetterLane, dict[int, None]] = {}
        """The letters of each parked lane, oldest first, those included that are being written."""
        self._takers: dict[str, Inbox | None] = {}
        self._queue: deque[int] = deque()
        self._sent_bytes = self._sent = self._tickets = self._written = 0
        self.earlier: dict[LetterKey, str] = {}
        self.page: HandPage | None = None
        self.is_ready = True
        """False while the letters of an earlier life are read: nothing is handled before they are known."""
        self.is_idle = True
        """Fast path: no lane is parked, there was no earlier life, and nothing is noted."""
        self.error: FabricError | None = None
        """Why the store refused last; None if it takes letters."""

    # Names.

    def claim(self, pattern: str) -> str:
        """A name for the letters of a handler or subscription: its pattern, and a number if another one has it.

        The same program gets the same names in its next life: ask in the order of the program.
        """
        with self._lock:
            name, number = pattern, 1
            while name in self._takers:
                number += 1
                name = f"{pattern}#{number}"
            self._takers[name] = None
        return name

    def bind(self, name: str, inbox: Inbox) -> None:
        """Letters of this name come again here; of lanes in which some only wait for each other, at once."""
        with self._lock:
            self._takers[name] = inbox
            waiting = [
                self._entries[next(iter(letters))].facts for lane, letters in self._lanes.items() if lane[0] == name
            ]
        for facts in waiting:
            self._follow(facts)

    def release(self, name: str) -> None:
        """It takes nothing any more; what was on its way to it stays a letter."""
        with self._lock:
            self._takers.pop(name, None)
            for entry in self._entries.values():
                if entry.facts.subscription == name and entry.asked:
                    self._return(entry)

    def _return(self, entry: _Entry) -> None:
        if entry.sent:
            self._sent -= 1
            self._sent_bytes -= entry.facts.size
        entry.asked, entry.sent = False, 0

    # Burying.

    def is_parked(self, name: str, lane: tuple[str, str, int]) -> bool:
        """Whether the letters of this lane have to go first."""
        return (name, *lane) in self._lanes

    def bury(self, message: Message, name: str, why: Burial, then: Callable[[], None]) -> None:
        """Write a letter, and call `then` on the storage thread when it is written; until then its lane waits."""
        facts = letter_of(message, name, why, self._limits, self._engine.wall_ns())
        with self._lock:
            known = facts.key in self._keys
            if not known:
                facts = self._number(facts)
                entry = self._enter(_entry_of(facts, written=False))
        if known:
            then()  # a record that has a letter keeps it
            return

        def on_written() -> None:
            with self._lock:
                entry.written = True
                self._written += 1
            self._engine.counts["dead_letters"] += 1
            then()
            self._follow(entry.facts)

        self._ask(WriteLetter(facts, on_written))

    def _enter(self, entry: _Entry) -> _Entry:
        facts = entry.facts
        self._entries[facts.id] = entry
        self._keys.add(facts.key)
        if facts.parked:
            self._lanes.setdefault(_lane_of(facts), {})[facts.id] = None
            self.is_idle = False
        return entry

    def _number(self, facts: LetterRow) -> LetterRow:
        self._next += 1
        return replace(facts, id=self._next - 1)

    def notice(self, command: events.ReportGap) -> None:
        """Note records that were lost without a letter. Under the engine's lock; nobody waits for it."""
        facts = notice_of(command, self._name_of(command.subscription), self._engine.wall_ns())
        with self._lock:
            facts = self._number(facts)
            self._notices.append(facts)
        self._engine.store.ask(WriteLetter(facts, lambda: None))

    def _name_of(self, number: int) -> str:
        takers = self._takers.copy().items()
        return next((name for name, inbox in takers if inbox is not None and inbox.number == number), "")

    # An earlier life.

    def load(self) -> None:
        """Read what an earlier life left; nothing is handled before it is known."""
        self.is_ready = self.is_idle = False
        self._ask(LoadLetters(self._on_loaded))

    def _on_loaded(self, rows: Iterable[LetterRow], page: HandPage | None) -> None:
        entries = [_entry_of(facts) for facts in rows]  # before the lock: it may be long, and the driver takes it, too
        with self._lock:
            for entry in entries:
                facts = entry.facts
                self._next = max(self._next, facts.id + 1)
                if facts.kind == "notice":
                    self._notices.append(facts)
                    continue
                self._enter(entry)
                self._written += 1
                self.earlier[facts.key] = facts.reason
            self.page, self.is_ready = page, True
        self._engine.on_progress()

    def on_refused(self, error: FabricError | None) -> None:
        """The store refuses, or takes letters again."""
        self.error = error
        if error is not None:
            self._engine.counts["letters_refused"] += 1

    def on_damaged(self, numbers: Iterable[int]) -> None:
        """The store was damaged, and mended; these letters are lost."""
        self._engine.counts["letter_stores_damaged"] += 1
        self._lose(numbers)

    def _lose(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with self._lock:
                entry = self._remove(number)
                if entry is not None:
                    self._return(entry)
            if entry is not None:
                self._engine.counts["letters_lost"] += 1
                self._follow(entry.facts)

    # Looking.

    @property
    def count(self) -> int:
        """How many letters are written."""
        return self._written

    def all(self) -> list[LetterRow]:
        """The letters that are written, oldest first, without their values."""
        with self._lock:
            return [entry.facts for entry in self._entries.values() if entry.written]

    def notices(self) -> list[LetterRow]:
        """What was lost without a letter: the latest."""
        with self._lock:
            return list(self._notices)

    def read(self, number: int, then: Callable[[LetterRow | FabricError], None]) -> None:
        """Call `then`, on the storage thread, with the letter and its value, or why it cannot be read."""
        self._ask(ReadLetters((number,), lambda rows: then(rows[0])))

    # Coming again.

    def redrive(self, numbers: Sequence[int], *, dry_run: bool) -> tuple[list[int], dict[int, str], int]:
        """(those that come again, why others do not, how many wait behind them and follow by themselves)."""
        with self._lock:
            refused: dict[int, str] = {}
            chosen: list[int] = []
            wanted = set(numbers)
            first = {lane: _prefix(self._entries, letters, wanted) for lane, letters in self._touched(wanted).items()}
            for number in sorted(wanted):
                reason = self._refusal(number, first)
                if reason:
                    refused[number] = reason
                else:
                    chosen.append(number)
            behind = sum(self._behind(lane, set(chosen)) for lane in first)
            if not dry_run:
                for number in chosen:
                    self._entries[number].asked = True
                    self._offer(number)
        self._pump()
        return chosen, refused, behind

    def _touched(self, wanted: set[int]) -> dict[LetterLane, dict[int, None]]:
        facts = (self._entries[number].facts for number in wanted if number in self._entries)
        lanes = {_lane_of(each) for each in facts if each.parked}
        return {lane: self._lanes[lane] for lane in lanes if lane in self._lanes}

    def _refusal(self, number: int, first: dict[LetterLane, set[int]]) -> str:
        entry = self._entries.get(number)
        if entry is None or not entry.written:
            return "it is gone"
        if entry.asked:
            return "it is on its way already"
        if not entry.whole:
            return "its value was too large to be kept whole"
        if self._takers.get(entry.facts.subscription) is None:
            return "nobody here handles its pattern"
        if entry.facts.parked and number not in first[_lane_of(entry.facts)]:
            return "an older letter of its lane goes first"
        return ""

    def _behind(self, lane: LetterLane, chosen: set[int]) -> int:
        """How many letters, that only waited for those before them, follow the last chosen one."""
        count, seen = 0, False
        for number in self._lanes[lane]:
            if number in chosen:
                count, seen = 0, True
            elif seen and self._entries[number].facts.reason != Drop.PARKED:
                break
            elif seen:
                count += 1
        return count

    def _offer(self, number: int) -> None:
        """Queue a letter, if it is its turn in its lane."""
        facts = self._entries[number].facts
        if not facts.parked or next(iter(self._lanes[_lane_of(facts)])) == number:
            self._enqueue(number)

    def _enqueue(self, number: int) -> None:
        if not self._entries[number].queued:
            self._entries[number].queued = True
            self._queue.append(number)

    def _pump(self) -> None:
        """Send for letters, as many as may be on their way."""
        some: dict[int, int] = {}
        limits = self._limits
        with self._lock:
            while self._queue and self._sent < limits.redriven_at_once_max:
                entry = self._entries.get(self._queue[0])
                if entry is not None and entry.asked:
                    if self._sent and self._sent_bytes + entry.facts.size > limits.redriven_bytes_max:
                        break
                    self._tickets += 1
                    entry.sent = some[entry.facts.id] = self._tickets
                    self._sent += 1
                    self._sent_bytes += entry.facts.size
                if entry is not None:
                    entry.queued = False
                self._queue.popleft()
        if some:
            self._ask(ReadLetters(tuple(some), lambda rows: self._send(some, rows)))

    def _send(self, tickets: dict[int, int], rows: Sequence[LetterRow | FabricError]) -> None:
        """On the storage thread: what was sent for is here. What damage took is lost, all else stays a letter."""
        for (number, ticket), row in zip(tickets.items(), rows, strict=True):
            with self._lock:
                entry = self._entries.get(number)
                is_ours = entry is not None and entry.sent == ticket
                inbox = self._takers.get(entry.facts.subscription) if entry is not None and is_ours else None
                if entry is not None and inbox is not None and isinstance(row, FabricError):
                    self._return(entry)
            if isinstance(row, LettersDamagedError):
                self._lose([number])
            elif isinstance(row, FabricError):
                log.warning("letter %d is not redriven: %s", number, row)
            elif inbox is not None:
                inbox.items.append(message_of(row, inbox.number))
        self._engine.on_progress()

    def settled(self, event: object) -> None:
        """A letter that came again is out of the hand: handled, and so no letter any more, or still one."""
        assert isinstance(event, events.MessagesSettled)
        number = cast("RedrivenFeed", event.feed).letter
        with self._lock:
            entry = self._entries.get(number)
            if entry is None:
                return
            self._return(entry)
            if event.handled:
                self._remove(number)
            else:
                for other in self._lanes.get(_lane_of(entry.facts), ()):  # what was to follow it stays, too
                    self._entries[other].asked = False
        if event.handled:
            self._engine.counts["letters_redriven"] += 1
            self._ask(RemoveLetter(number))
            self._follow(entry.facts)
        self._pump()

    def died_again(self, feed: RedrivenFeed, why: Burial) -> None:
        """A letter that came again died again: it stays, with its newest reason."""
        with self._lock:
            entry = self._entries.get(feed.letter)
            if entry is None:
                return
            detail = cut_text(why.detail, self._limits.detail_bytes_max)
            attempts = entry.facts.attempts + why.attempts
            entry.facts = replace(entry.facts, reason=str(why.reason), detail=detail, attempts=attempts)
        self._engine.counts["letters_died_again"] += 1
        self._ask(ChangeLetter(entry.facts.id, entry.facts.reason, detail, attempts))

    def discard(self, numbers: Iterable[int]) -> int:
        """Give letters up for good; how many there were. One that is on its way is no letter to be given up."""
        gone: list[LetterRow] = []
        with self._lock:
            for number in numbers:
                entry = self._entries.get(number)
                if entry is not None and entry.written and not entry.asked:
                    self._remove(number)
                    gone.append(entry.facts)
        self._engine.counts["letters_discarded"] += len(gone)
        self._ask(*(RemoveLetter(facts.id) for facts in gone))
        for facts in gone:
            self._follow(facts)
        return len(gone)

    def _remove(self, number: int) -> _Entry | None:
        entry = self._entries.pop(number, None)
        if entry is not None:
            self._written -= entry.written
            self._keys.discard(entry.facts.key)
        if entry is not None and entry.facts.parked:
            lane = _lane_of(entry.facts)
            self._lanes[lane].pop(number, None)
            if not self._lanes[lane]:
                del self._lanes[lane]
        return entry

    def _follow(self, facts: LetterRow) -> None:
        """The oldest letter of a parked lane goes on, if it was asked for, or only waited for those before it."""
        with self._lock:
            number = next(iter(self._lanes.get(_lane_of(facts), ())), None)
            entry = self._entries.get(number) if number is not None else None
            if entry is None or number is None or not self._follows(entry):
                return
            entry.asked = True
            self._enqueue(number)
        self._pump()

    def _follows(self, entry: _Entry) -> bool:
        if entry.sent or entry.queued or not entry.written:
            return False
        waited = (
            entry.facts.reason == Drop.PARKED and entry.whole and self._takers.get(entry.facts.subscription) is not None
        )
        return entry.asked or waited

    # Asking.

    def _ask(self, *wishes: LetterWish) -> None:
        engine = self._engine
        with engine.lock:
            if not engine.closed and engine.broken is None:
                for wish in wishes:
                    engine.store.ask(wish)

    def close(self) -> None:
        """The process goes on without us: what is in hand now did not kill it."""
        page, self.page = self.page, None
        if page is not None:
            page.clear()
            page.close()

    def abandon(self) -> None:
        """In a forked child: nothing of it is ours."""
        self._lock = threading.Lock()
        page, self.page = self.page, None
        if page is not None:
            page.close()


def _entry_of(facts: LetterRow, *, written: bool = True) -> _Entry:
    return _Entry(replace(facts, value=b"", metadata=b""), not facts.is_cut, written)


def _lane_of(facts: LetterRow) -> LetterLane:
    return facts.subscription, facts.source, facts.topic, facts.seed


def _prefix(entries: dict[int, _Entry], letters: Iterable[int], wanted: set[int]) -> set[int]:
    """The oldest letters of a lane, as far as each of them is wanted, and can come again, or is on its way."""
    found: set[int] = set()
    for number in letters:
        entry = entries[number]
        if not entry.asked and not (number in wanted and entry.whole and entry.written):
            break
        found.add(number)
    return found
