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
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fabric.core import events
from fabric.core.wire import ADDRESSED, HAS_METADATA, NONE, Burst, Drop, checksum_of, encode_burst
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
    from fabric.core.lanes import InboundFeed
    from fabric.engine.inbox import Inbox
    from fabric.engine.loop import Engine
    from fabric.storage.hand_page import HandPage

__all__ = ["Burial", "Letters"]

log = logging.getLogger("fabric.handlers")

LetterLane = tuple[str, str, str, int]
"""Subscription, source, topic, seed."""


class Burial(NamedTuple):
    """Why a message is buried."""

    reason: str
    detail: str
    attempts: int
    parked: bool = False


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
        self._lock = threading.Lock()
        self._next = 1
        self._entries: dict[int, _Entry] = {}
        self._notices: deque[LetterRow] = deque(maxlen=self._limits.notices_max)
        self._lanes: dict[LetterLane, dict[int, None]] = {}
        """The letters of each parked lane, oldest first, those included that are being written."""
        self._takers: dict[str, Inbox] = {}
        self._queue: deque[int] = deque()
        self._sent_bytes = self._sent = self._tickets = 0
        self.earlier: dict[LetterKey, str] = {}
        self.page: HandPage | None = None
        self.is_ready = True
        """False while the letters of an earlier life are read: nothing is handled before they are known."""
        self.is_idle = True
        """Fast path: no lane is parked, there was no earlier life, and nothing is noted."""
        self.error: FabricError | None = None
        """Why the store refused last; None if it takes letters."""

    # Names.

    def claim(self, pattern: str, inbox: Inbox) -> str:
        """The name under which letters of a handler or subscription are kept: its pattern, and a number if needed."""
        with self._lock:
            name, number = pattern, 1
            while name in self._takers:
                number += 1
                name = f"{pattern}#{number}"
            self._takers[name] = inbox
        return name

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
        burst, row, limits = message._burst, message._row, self._limits
        blob = message._blob()
        facts = LetterRow(
            id=0,
            kind="letter",
            subscription=name,
            source=message.source,
            incarnation=message.incarnation,
            topic=message.topic,
            seed=message.seed,
            sequence=message.sequence,
            first=message.offset,
            end=message.offset + 1,
            reason=str(why.reason),
            detail=_text(why.detail, limits.detail_bytes_max),
            attempts=why.attempts,
            parked=why.parked,
            published_ns=message.published_ns,
            buried_ns=self._engine.wall_ns(),
            value_kind=burst.columns[2][row] & ~ADDRESSED,
            size=blob.nbytes,
            checksum=checksum_of(blob),
            metadata=burst.metadata(row),
            value=bytes(blob[: limits.record_bytes_max]),
        )
        with self._lock:
            facts = self._number(facts)
            entry = self._entries[facts.id] = _entry_of(facts, written=False)
            if why.parked:
                self._lanes.setdefault(_lane_of(facts), {})[facts.id] = None
                self.is_idle = False

        def on_written() -> None:
            with self._lock:
                entry.written = True
            self._engine.counts["dead_letters"] += 1
            then()
            self._follow(entry.facts)

        self._ask(WriteLetter(facts, on_written))

    def _number(self, facts: LetterRow) -> LetterRow:
        self._next += 1
        return replace(facts, id=self._next - 1)

    def notice(self, command: events.ReportGap) -> None:
        """Note records that were lost without a letter. Under the engine's lock; nobody waits for it."""
        facts = LetterRow(
            id=0,
            kind="notice",
            subscription=next((name for name, box in self._takers.items() if box.number == command.subscription), ""),
            source=command.source,
            incarnation=command.incarnation,
            topic=command.topic,
            seed=-1,
            sequence=-1,
            first=command.first,
            end=-1 if command.end is None else command.end,
            reason=str(command.reason),
            detail="",
            attempts=0,
            parked=False,
            published_ns=0,
            buried_ns=self._engine.wall_ns(),
            value_kind=0,
            size=0,
            checksum=0,
            metadata=b"",
            value=b"",
        )
        with self._lock:
            facts = self._number(facts)
            self._notices.append(facts)
        self._engine.store.ask(WriteLetter(facts, lambda: None))

    # An earlier life.

    def load(self) -> None:
        """Read what an earlier life left; nothing is handled before it is known."""
        self.is_ready = self.is_idle = False
        self._ask(LoadLetters(self._on_loaded))

    def _on_loaded(self, rows: Iterable[LetterRow], page: HandPage | None) -> None:
        with self._lock:
            for facts in rows:
                self._next = max(self._next, facts.id + 1)
                if facts.kind == "notice":
                    self._notices.append(facts)
                    continue
                self._entries[facts.id] = _entry_of(facts)
                self.earlier[facts.key] = facts.reason
                if facts.parked:
                    self._lanes.setdefault(_lane_of(facts), {})[facts.id] = None
            self.page, self.is_ready = page, True
        self._engine.on_progress()

    def on_refused(self, error: FabricError | None) -> None:
        """The store refuses, or takes letters again."""
        self.error = error
        if error is not None:
            self._engine.counts["letters_refused"] += 1

    def lose(self, numbers: Iterable[int]) -> None:
        """Damage took these letters."""
        for number in numbers:
            with self._lock:
                entry = self._remove(number)
                if entry is not None:
                    self._return(entry)
            if entry is not None:
                self._engine.counts["letters_damaged"] += 1
                self._follow(entry.facts)

    # Looking.

    def all(self) -> list[LetterRow]:
        """The letters that are written, oldest first, without their values."""
        with self._lock:
            return [entry.facts for entry in self._entries.values() if entry.written]

    def notices(self) -> list[LetterRow]:
        """What was lost without a letter: the latest."""
        with self._lock:
            return list(self._notices)

    def is_whole(self, number: int) -> bool:
        """Whether the store has all of the value of a letter."""
        entry = self._entries.get(number)
        return entry is not None and entry.whole

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
        if entry.facts.subscription not in self._takers:
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
                self.lose([number])
            elif isinstance(row, FabricError):
                log.warning("letter %d is not redriven: %s", number, row)
            elif inbox is not None:
                inbox.items.append(_deliver(row, inbox.number))
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
            detail = _text(why.detail, self._limits.detail_bytes_max)
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
        waited = entry.facts.reason == Drop.PARKED and entry.whole and entry.facts.subscription in self._takers
        return entry.asked or waited

    # Asking.

    def _ask(self, *wishes: LetterWish) -> None:
        engine = self._engine
        with engine.lock:
            if not engine.closed and engine.broken is None:
                for wish in wishes:
                    engine.store.ask(wish)

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
    """The oldest letters of a lane, as far as each of them is wanted or on its way."""
    found: set[int] = set()
    for number in letters:
        if number not in wanted and not entries[number].asked:
            break
        found.add(number)
    return found


def _text(text: str, most: int) -> str:
    """What can be written, and no more of it."""
    return text.encode("utf-8", "replace")[:most].decode("utf-8", "ignore")


def _deliver(row: LetterRow, number: int) -> events.Deliver:
    feed: Any = RedrivenFeed(row.id, number, row.source, row.topic, row.incarnation, row.first, parked=row.parked)
    metadata = [row.metadata] if row.metadata else None
    lane = [row.seed], [row.sequence], [NONE]
    frame = encode_burst(
        0, row.incarnation, row.first, row.published_ns, *lane, [row.value_kind], [row.value], metadata
    )
    flags = HAS_METADATA if metadata else 0
    burst = Burst(frame, 0, row.incarnation, row.first, 1, flags, row.published_ns)
    return events.Deliver(number, cast("InboundFeed", feed), burst, None, burst.size)
