"""The dead letters of one member: what is kept of them in memory, and what is asked of their store.

Dead letters are written by the storage thread, together with all that wait, and only then do their offsets settle. A
store that refuses is asked again after a while; until it takes a letter, the lane of that letter waits, and nobody
else.

A letter that is redriven comes to its handler or subscription as if it had just arrived, in the hand of a
`RedrivenFeed`; when it is handled there it leaves the store, which remembers it. Of a parked lane only the oldest
letter may go, and what came after it follows by itself.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from fabric.core import events
from fabric.core.books import HANDLED
from fabric.core.cursors import Slot
from fabric.core.wire import Drop
from fabric.engine.known_records import KnownRecords
from fabric.engine.letter_book import Entry, LetterBook, LetterLane, lane_of
from fabric.engine.letter_forms import Burial, cut_text, letter_of, message_of, notice_of
from fabric.engine.lettering import (
    ChangeLetter,
    EndLetter,
    LetterWish,
    LoadLetters,
    ReadLetters,
    WriteLetter,
)
from fabric.errors import FabricError, LettersDamagedError
from fabric.message import Message, RedrivenFeed
from fabric.storage.hand_page import key_of
from fabric.storage.letter_rows import SPILLED, LetterRow

if TYPE_CHECKING:
    from fabric.engine.inbox import Inbox
    from fabric.engine.loop import Engine
    from fabric.storage.hand_page import HandPage

__all__ = ["Letters"]

log = logging.getLogger("fabric.handlers")

_COUNTS = (
    "dead_letters",
    "letters_waiting",
    "letters_refused",
    "letters_redriven",
    "letters_died_again",
    "letters_discarded",
    "letters_cut",
    "letters_known",
    "letters_forgotten",
    "letters_lost",
    "letter_stores_damaged",
    "handlers_paused",
)


class Letters:
    """The letters of one member. From any thread; asks the store under the engine's lock, and never holds its own then.

    `known` holds what letters are, or were, about: such a record is not handled again (D1).
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._limits = engine, engine.config.letters
        engine.counts.update(dict.fromkeys(_COUNTS, 0))  # several threads count: no key may appear while one looks
        self._lock = threading.Lock()
        self._book = LetterBook()
        self._notices: deque[LetterRow] = deque(maxlen=self._limits.notices_max)
        self._takers: dict[str, Inbox | None] = {}
        self._saving: set[str] = set()
        """Names whose application saves cursors: what they handled stays in the store until one says so (D4)."""
        self._queue: deque[int] = deque()
        self._sent_bytes = self._sent = self._tickets = 0
        self.known = KnownRecords(self._limits.remembered_max)
        self.page: HandPage | None = None
        self.is_ready = True
        """False while the letters of an earlier life are read: nothing is handled before they are known."""
        self.is_idle = True
        """Fast path: there was no letter yet, and no earlier life."""
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

    def bind(self, name: str, inbox: Inbox, saved: Iterable[Slot] | None = None) -> None:
        """Letters of this name come again here; of lanes in which some only wait for each other, at once.

        `saved`: of an application that saves cursors, the letters that its cursor names as handled.
        """
        if saved is not None:
            with self._lock:
                self._saving.add(name)
            self.commit(name, saved)
        with self._lock:
            self._takers[name] = inbox
            waiting = [lane for lane in self._book.lanes if lane[0] == name]
        for lane in waiting:
            self._follow(lane)

    def release(self, name: str) -> None:
        """It takes nothing any more; what was on its way to it, or handled and not saved, stays a letter."""
        with self._lock:
            self._takers.pop(name, None)
            self._saving.discard(name)
            for entry in self._book.of(name):
                if entry.asked:
                    self._return(entry)
                if entry.handled:
                    self._book.show(entry)

    def _return(self, entry: Entry) -> None:
        if entry.sent:
            self._sent -= 1
            self._sent_bytes -= entry.facts.size
        entry.asked, entry.sent = False, 0

    def handled_by(self, name: str) -> list[Slot]:
        """The letters that came again here and were handled, as far as no cursor that was committed names them."""
        with self._lock:
            hidden = [self._book.entries[number].facts for number in self._book.hidden]
        return [
            Slot(facts.source, facts.topic, facts.incarnation, facts.first)
            for facts in hidden
            if facts.subscription == name
        ]

    def commit(self, name: str, saved: Iterable[Slot]) -> None:
        """The application saved a cursor that names these letters as handled: they are over (D4)."""
        with self._lock:
            keys = [(name, slot.source, slot.incarnation, slot.topic, slot.offset) for slot in saved]
            entries = map(self._book.find, keys)
            found = [entry.facts for entry in entries if entry is not None and entry.written and not entry.sent]
            gone = [self._over(facts, HANDLED) for facts in found]
        self._ask(*(EndLetter(facts) for facts in gone))
        for facts in gone:
            self._follow(lane_of(facts))

    # Burying.

    def room(self, *, parked: bool) -> int:
        """How many more letters may wait for the store; of lanes that are parked already, fewer."""
        most = self._limits.waiting_max
        return (-(-most // 2) if parked else most) - self.waiting

    @property
    def waiting(self) -> int:
        """How many letters wait to be written."""
        return self._engine.counts["letters_waiting"]

    def is_parked(self, name: str, lane: tuple[str, str, int]) -> bool:
        """Whether the letters of this lane have to go first."""
        return (name, *lane) in self._book.lanes

    def bury(self, message: Message, name: str, why: Burial, then: Callable[[], None]) -> None:
        """Write a letter, and call `then` on the storage thread when it is written; until then its lane waits.

        A record that has a letter keeps it.
        """
        facts = letter_of(message, name, why, self._limits, self._engine.wall_ns())
        with self._lock:
            known = self._book.find(facts.key)
            if known is None:
                self.is_idle = False
                facts = self._book.number(facts)
                entry = self._book.enter(Entry.of(facts, written=False))
                entry.then.append(then)
                self._engine.counts["letters_waiting"] += 1
            elif not known.written:
                known.then.append(then)
        if known is None:
            value = message._blob() if facts.cut == SPILLED else None
            self._ask(WriteLetter(facts, lambda: self._on_written(entry), value))
        elif known.written:
            then()

    def _on_written(self, entry: Entry) -> None:
        with self._lock:
            told = self._book.written(entry)
            self.known.add(entry.facts.key, entry.facts.reason)
            self._engine.counts["letters_waiting"] -= 1
            self._engine.counts["dead_letters"] += 1
        for then in told:
            then()
        self._follow(lane_of(entry.facts))

    def notice(self, command: events.ReportGap) -> None:
        """Note records that were lost without a letter. Under the engine's lock; nobody waits for it."""
        facts = notice_of(command, self._name_of(command.subscription), self._engine.wall_ns())
        with self._lock:
            facts = self._book.number(facts)
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
        entries = [Entry.of(facts) for facts in rows]  # before the lock: it may be long, and the driver takes it, too
        finished = set(page.finished) if page is not None else set()
        over = [entry for entry in entries if finished and key_of(entry.facts.key) in finished]
        with self._lock:
            for entry in entries:
                self._load_one(entry)
            gone = [self._over(entry.facts, HANDLED) for entry in over if entry.facts.kind == "letter"]
            self.page, self.is_ready = page, True
        for number in finished - {key_of(facts.key) for facts in gone}:
            assert page is not None, "nothing is finished without one"
            page.forget(number)  # the store knew
        self._ask(*(EndLetter(facts, self._forgetting(facts)) for facts in gone))
        self._engine.on_progress()

    def _load_one(self, entry: Entry) -> None:
        facts = entry.facts
        self._book.pass_over(facts.id)
        if facts.kind == "notice":
            self._notices.append(facts)
        elif facts.kind == "over":
            self._remember(facts, facts.reason)
        else:
            self._book.enter(entry)
            self.known.add(facts.key, facts.reason)

    def on_refused(self, error: FabricError | None) -> None:
        """The store refuses, or takes letters again."""
        self.error = error
        if error is not None:
            self._engine.counts["letters_refused"] += 1

    def on_cut(self, number: int, why: str) -> None:
        """The spill log has not, or not any more, the value of this letter: it stays, and cannot come again."""
        with self._lock:
            entry = self._book.entries.get(number)
            if entry is not None:
                entry.facts = replace(entry.facts, cut=why)
                self._engine.counts["letters_cut"] += 1

    def on_damaged(self, numbers: Iterable[int]) -> None:
        """The store was damaged, and mended; these letters are lost."""
        self._engine.counts["letter_stores_damaged"] += 1
        self._lose(numbers)

    def _lose(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            with self._lock:
                entry = self._book.remove(number)
                if entry is not None:
                    self._return(entry)
                    self.known.forget(entry.facts.key)
            if entry is not None:
                self._engine.counts["letters_lost"] += 1
                self._follow(lane_of(entry.facts))

    # Looking.

    @property
    def count(self) -> int:
        """How many letters are written."""
        return self._book.count

    def all(self) -> list[LetterRow]:
        """The letters that are written, oldest first, without their values."""
        with self._lock:
            return [entry.facts for entry in self._book.entries.values() if entry.is_letter]

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
            chosen, refused, behind = self._book.choose(set(numbers), lambda name: self._takers.get(name) is not None)
            if dry_run:
                return chosen, refused, behind
            for number in chosen:
                self._book.entries[number].asked = True
                self._offer(number)
        self._pump()
        return chosen, refused, behind

    def _offer(self, number: int) -> None:
        """Queue a letter, if it is its turn in its lane."""
        facts = self._book.entries[number].facts
        first = self._book.first_of(lane_of(facts))
        if not facts.parked or (first is not None and first.facts.id == number):
            self._enqueue(number)

    def _enqueue(self, number: int) -> None:
        if not self._book.entries[number].queued:
            self._book.entries[number].queued = True
            self._queue.append(number)

    def _pump(self) -> None:
        """Send for letters, as many as may be on their way."""
        some: dict[int, int] = {}
        limits = self._limits
        with self._lock:
            while self._queue and self._sent < limits.redriven_at_once_max:
                entry = self._book.entries.get(self._queue[0])
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
                entry = self._book.entries.get(number)
                is_ours = entry is not None and entry.sent == ticket
                inbox = self._takers.get(entry.facts.subscription) if entry is not None and is_ours else None
                refusal = row if isinstance(row, FabricError) else row.cut if row.is_cut else None
                if entry is not None and inbox is not None and refusal is not None:
                    self._return(entry)
            if isinstance(row, LettersDamagedError):
                self._lose([number])
            elif isinstance(row, FabricError) or row.is_cut:
                log.warning("letter %d is not redriven: %s", number, refusal)
            elif inbox is not None:
                inbox.items.append(message_of(row, inbox.number))
        self._engine.on_progress()

    def settled(self, event: object) -> None:
        """A letter that came again is out of the hand: handled, and so no letter any more, or still one."""
        assert isinstance(event, events.MessagesSettled)
        number = cast("RedrivenFeed", event.feed).letter
        with self._lock:
            entry = self._book.entries.get(number)
            if entry is None or not entry.sent:  # whoever had it is closed, and it stayed a letter
                return
            gone = self._settle(entry) if event.handled else None
            self._return(entry)
            if not event.handled:
                for other in self._book.lanes.get(lane_of(entry.facts), ()):  # what was to follow it stays, too
                    self._book.entries[other].asked = False
        if gone is not None:
            self._ask(EndLetter(gone, self._forgetting(gone)))
        if event.handled:
            self._engine.counts["letters_redriven"] += 1
            self._follow(lane_of(entry.facts))
        self._pump()

    def _settle(self, entry: Entry) -> LetterRow | None:
        """It was handled: it is over, or will be once its application has saved that."""
        if entry.facts.subscription in self._saving:
            self._book.hide(entry)
            return None
        if self.page is not None:  # first of all: from here on a kill does not bring it back
            self.page.finish(key_of(entry.facts.key))
        return self._over(entry.facts, HANDLED)

    def _over(self, facts: LetterRow, reason: str) -> LetterRow:
        """It is no letter any more; what stays of it."""
        self._book.remove(facts.id)
        self._remember(facts, reason)
        return replace(facts, reason=reason)

    def _remember(self, facts: LetterRow, reason: str) -> None:
        self.known.end(facts.key, reason)
        self._engine.counts["letters_forgotten"] = self.known.forgotten

    def _forgetting(self, facts: LetterRow) -> Callable[[], None]:
        """The store knows now that it is over: the page need not."""
        page, key = self.page, key_of(facts.key)
        return (lambda: None) if page is None else lambda: page.forget(key)

    def died_again(self, feed: RedrivenFeed, why: Burial) -> None:
        """A letter that came again died again: it stays, with its newest reason."""
        with self._lock:
            entry = self._book.entries.get(feed.letter)
            if entry is None:
                return
            detail = cut_text(why.detail, self._limits.detail_bytes_max)
            attempts = entry.facts.attempts + why.attempts
            entry.facts = replace(entry.facts, reason=str(why.reason), detail=detail, attempts=attempts)
            self.known.add(entry.facts.key, entry.facts.reason)
        self._engine.counts["letters_died_again"] += 1
        self._ask(ChangeLetter(entry.facts.id, entry.facts.reason, detail, attempts))

    def discard(self, numbers: Iterable[int]) -> int:
        """Give letters up for good; how many there were. One that is on its way is no letter to be given up."""
        with self._lock:
            wanted = dict.fromkeys(numbers)
            entries = [entry for number in wanted if (entry := self._book.entries.get(number)) is not None]
            gone = [self._over(each.facts, each.facts.reason) for each in entries if each.is_letter and not each.asked]
        self._engine.counts["letters_discarded"] += len(gone)
        self._ask(*(EndLetter(facts) for facts in gone))
        for facts in gone:
            self._follow(lane_of(facts))
        return len(gone)

    def _follow(self, lane: LetterLane) -> None:
        """The oldest letter of a parked lane goes on, if it was asked for, or only waited for those before it."""
        with self._lock:
            entry = self._book.first_of(lane)
            if entry is None or not self._follows(entry):
                return
            entry.asked = True
            self._enqueue(entry.facts.id)
        self._pump()

    def _follows(self, entry: Entry) -> bool:
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
