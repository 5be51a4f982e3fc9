"""The disk behind the engine: one thread writes to the spill log and reads from it, and says what came of it.

What the core asks for is done in order. Appends that wait together are one write. Nothing else waits for the disk: a
publisher only for room in memory, a peer for an answer that it would repeat.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol, TypeAlias

from fabric.core.disk import (
    AppendRecords,
    LoadedBurst,
    LoadRecords,
    PastFeed,
    RecordsExpired,
    RecordsLoaded,
    ReleaseRecords,
    SaveRegistrations,
    StateRecovered,
    WriteFailed,
    WriteFinished,
)
from fabric.engine.letter_values import LetterValues
from fabric.engine.lettering import LetterWish
from fabric.errors import SpillError, SpillFullError
from fabric.storage.records import Entry, Kind
from fabric.storage.state import FeedName

if TYPE_CHECKING:
    from fabric.engine.loop import Engine
    from fabric.storage.spill import SpillLog
    from fabric.storage.state import MemberState

__all__ = ["NoStore", "Store", "Storekeeper", "ThreadedStore", "recovered"]

log = logging.getLogger("fabric.storage")

Wish: TypeAlias = AppendRecords | LoadRecords | ReleaseRecords | SaveRegistrations | LetterWish
Outcome: TypeAlias = WriteFinished | WriteFailed | RecordsLoaded | RecordsExpired

AT_ONCE_MAX = 256
"""Wishes in one go: 16 MiB of bursts."""
REFUSALS_MAX = 3
"""After so many refusals in one go the disk is full, and not only too small for some."""
EXPIRY_NS = 1_000_000_000
"""Between two looks for what is too old: ages are hours."""
IDLE_S = 10.0
"""The thread looks so often for what is too old, though nobody asks for anything."""
S = 1_000_000_000
ENDING_S = 2.0
"""A close waits no longer for a disk that hangs."""


class Store(Protocol):
    """Where an engine's wishes for the disk go; it answers with events."""

    @property
    def error(self) -> SpillError | None:
        """Why the last write was refused; None if it was not."""

    def ask(self, wish: Wish) -> None:
        """Do this after all that was asked before. Called under the engine's lock; never blocks."""

    def close(self) -> None:
        """No more; what is in the log is not needed any longer."""

    def abandon(self) -> None:
        """In a forked child: let go of the parent's files without touching them."""


class Keeper(Protocol):
    """Who does what is asked for, on one thread."""

    @property
    def error(self) -> SpillError | None:
        """Why the last write was refused; None if it was not."""

    @property
    def due_ns(self) -> int | None:
        """When something that was refused is tried again; None if nothing was."""

    def work(self, wishes: Iterable[Wish]) -> list[Outcome]:
        """All of them, in order."""

    def close(self) -> None:
        """No more."""

    def abandon(self) -> None:
        """In a forked child."""


class Storekeeper:
    """Does what is asked for with a spill log, which begins with the first write. Not thread-safe.

    With a `state` the log is that of the state, and outlives this process.
    """

    def __init__(
        self,
        incarnation: int,
        open_log: Callable[[], SpillLog],
        wall_ns: Callable[[], int],
        state: MemberState | None = None,
    ) -> None:
        self._incarnation, self._open_log, self._wall_ns, self._state = incarnation, open_log, wall_ns, state
        self._expires_ns = 0
        self._log: SpillLog | None = state.log if state is not None else None
        self.values = LetterValues(incarnation, self._opened, outlives=state is not None)
        """Those of dead letters that lie in the log."""
        if state is not None:
            self.values.adopt(state.log)
        self._named: set[int] = set()
        self.error: SpillError | None = None
        self.due_ns: int | None = None  # the core asks again
        self._save_refused = False

    def work(self, wishes: Iterable[Wish]) -> list[Outcome]:
        """All of them, in order; appends that follow each other are one write."""
        outcomes = self._expire()  # first: nobody is answered with what is given up a moment later
        for _, some in groupby(wishes, key=_group_of):
            group = list(some)
            if isinstance(group[0], AppendRecords):
                outcomes += self._append([wish for wish in group if isinstance(wish, AppendRecords)])
                continue
            for wish in group:
                outcomes += self._do(wish)
        return outcomes

    def _do(self, wish: Wish) -> list[Outcome]:
        if isinstance(wish, LoadRecords):
            return [RecordsLoaded(wish.feed, tuple(self._load(wish.feed, at) for at in wish.firsts))]
        if isinstance(wish, SaveRegistrations):
            return [self._save(wish)]
        if isinstance(wish, ReleaseRecords):
            self._release(wish)
        return []

    def _save(self, wish: SaveRegistrations) -> Outcome:
        try:
            assert self._state is not None, "only who has state asks for this"
            self._state.save_registrations(wish.blob, outlives=wish.outlives)
        except SpillError as error:
            if not self._save_refused:  # say it once, however often it is refused
                log.warning("subscribers wait to be confirmed: %s", error)
            self._save_refused = True
            return WriteFailed(wish.number, wish.number, str(error))
        if self._save_refused:
            log.warning("subscribers are confirmed again")
        self._save_refused = False
        return WriteFinished(wish.number)

    def _expire(self) -> list[Outcome]:
        """What is too old; looked for now and then."""
        spill, now = self._log, self._wall_ns()
        if spill is None or now < self._expires_ns:
            return []
        self._expires_ns = now + EXPIRY_NS
        try:
            lost = self.values.expired(spill.expire(now))
            self.values.move()
        except SpillError as error:
            log.warning("segments of the spill log that are too old cannot be deleted: %s", error)
            return []
        if lost:
            log.warning("the spill log gave up what nobody fetched for too long: %s", lost[:8])
        return [RecordsExpired(span.feed, span.first, span.end) for span in lost]

    def _append(self, wishes: Sequence[AppendRecords]) -> list[Outcome]:
        """All of them together; where there is no room for all, as many as there is room for."""
        refusal = self._write(wishes)
        refused = list(wishes) if refusal else []
        if isinstance(refusal, SpillFullError) and len(wishes) > 1:
            refusal, refused = self._write_singly(wishes)
        self._note(refusal)
        outcomes: list[Outcome] = [WriteFailed(wish.number, wish.number, str(refusal)) for wish in refused]
        if len(refused) < len(wishes):
            outcomes.append(WriteFinished(wishes[-1].number))  # of those that were not refused
        return outcomes

    def _write_singly(self, wishes: Sequence[AppendRecords]) -> tuple[SpillError | None, list[AppendRecords]]:
        """Step over what is too large for the room that is left, but do not try all where there is none."""
        last: SpillError | None = None
        refused: list[AppendRecords] = []
        for wish in wishes:
            refusal = self._write([wish]) if len(refused) < REFUSALS_MAX else last
            if refusal is not None:
                last = refusal
                refused.append(wish)
        return last, refused

    def _opened(self) -> SpillLog:
        if self._log is None:
            self._log = self._open_log()
        return self._log

    def _write(self, wishes: Sequence[AppendRecords]) -> SpillError | None:
        """Why nothing of it was taken; None if it was."""
        try:
            if self._state is not None:
                self._state.require_directory()
            spill, power = self._opened(), any(wish.sync == "power" for wish in wishes)
            spill.append(self._entries(wishes), hold=power)
            if power:
                spill.sync()
        except SpillError as error:
            for part in (error, error.__cause__):
                if part is not None:
                    part.with_traceback(None)  # it would keep the whole group in memory
            return error
        self._named.update(wish.feed for wish in wishes)
        return None

    def _note(self, refusal: SpillError | None) -> None:
        """Say it once, however often it is refused."""
        if refusal is not None and self.error is None:
            log.warning("publishers wait, the spill log refuses: %s", refusal)
        elif refusal is None and self.error is not None:
            log.warning("the spill log takes records again")
        self.error = refusal

    def _entries(self, wishes: Sequence[AppendRecords]) -> list[Entry]:
        """The names of feeds that the log does not know, and the bursts. A wish of no records is a name only."""
        entries, fresh = list[Entry](), set[int]()
        for wish in wishes:
            if not wish.count or not (wish.feed in self._named or wish.feed in fresh):
                fresh.add(wish.feed)
                name = FeedName(wish.topic, wish.policy, wish.sync).encode()
                end = wish.first if not wish.count else 0
                entries.append(Entry(Kind.FEED, wish.feed, self._incarnation, end, 0, name))
            if wish.count:
                place = wish.feed, self._incarnation, wish.first, wish.count
                entries.append(Entry(Kind.BURST, *place, wish.frame, wish.payloads))
        return entries

    def _load(self, feed: int, first: int) -> LoadedBurst:
        spill = self._log
        assert spill is not None, "what was never written is never asked for"
        if spill.find(feed, first) is None:  # given up for its age, after it was asked for
            return LoadedBurst(first, None, None, lost=True)
        try:
            entry = spill.read(feed, first)
        except SpillError as error:
            log.error("a burst in the spill log cannot be read: %s", error)
            return LoadedBurst(first, None, None, lost=not isinstance(error.__cause__, OSError))
        return LoadedBurst(first, bytes(entry.frame), dict(entry.payloads) or None)

    def _release(self, wish: ReleaseRecords) -> None:
        try:
            if self._log is not None:
                self._log.release(wish.feed, wish.below)
        except SpillError as error:
            log.warning("segments of the spill log cannot be deleted: %s", error)

    def close(self) -> None:
        """Nobody needs what is in the log any more, unless it is state."""
        spill, self._log = self._log, None
        try:
            if self._state is not None:
                self._state.close()
            elif spill is not None:
                spill.destroy()
        except SpillError as error:
            log.warning("the spill log is left behind: %s", error)

    def abandon(self) -> None:
        """In a forked child."""
        spill, self._log = self._log, None
        if self._state is not None:
            self._state.abandon()
        elif spill is not None:
            spill.abandon()


def _group_of(wish: Wish) -> tuple[type, bool]:
    """What follows each other and is alike is done together; a sync that fails refuses only who asked for it."""
    return type(wish), isinstance(wish, AppendRecords) and wish.sync == "power"


def recovered(state: MemberState) -> StateRecovered:
    """What earlier lives of a member left, for its core."""
    feeds = tuple(
        PastFeed(kept.feed, kept.name.topic, kept.name.policy, kept.incarnation, kept.end, kept.exact, kept.bursts)
        for kept in state.feeds()
    )
    return StateRecovered(feeds, state.registrations)


class NoStore:
    """An engine without a disk: it refuses."""

    error: SpillError | None = None

    def __init__(self, answer: Callable[[Outcome], None]) -> None:
        self._answer = answer

    def ask(self, wish: Wish) -> None:
        """Refused."""
        if isinstance(wish, AppendRecords | SaveRegistrations):
            self._answer(WriteFailed(wish.number, wish.number, "there is no disk"))

    def close(self) -> None:
        """There is nothing."""

    def abandon(self) -> None:
        """There is nothing."""


class ThreadedStore:
    """The storage thread. It begins with the first wish."""

    def __init__(self, engine: Engine, keeper: Keeper) -> None:
        self._engine, self._keeper = engine, keeper
        self._wishes: SimpleQueue[Wish | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def error(self) -> SpillError | None:
        """Why the last write was refused; None if it was not."""
        return self._keeper.error

    def ask(self, wish: Wish) -> None:
        """Do this after all that was asked before. Called under the engine's lock; never blocks."""
        if self._thread is None:
            name = f"fabric-disk-{self._engine.card.name}"
            self._thread = threading.Thread(target=self._run, name=name, daemon=True)
            self._thread.start()
        self._wishes.put(wish)

    def _run(self) -> None:
        while self._engine.guarded(self._work):
            pass
        self._keeper.close()

    def _work(self) -> bool:
        """What is asked for now, or next; false at the end."""
        wishes, ended = self._next()
        for outcome in self._keeper.work(wishes):
            self._engine.submit(outcome)
        return not ended

    def _next(self) -> tuple[list[Wish], bool]:
        """Wait for a wish; it, and those that wait behind it: now and then nothing. And whether it is the end."""
        wishes: list[Wish] = []
        try:
            due_ns, now_ns = self._keeper.due_ns, self._engine.clock()
            wish = self._wishes.get(timeout=IDLE_S if due_ns is None else max(0.0, (due_ns - now_ns) / S))
        except Empty:
            return wishes, False
        while wish is not None:
            wishes.append(wish)
            if len(wishes) == AT_ONCE_MAX:
                break
            try:
                wish = self._wishes.get_nowait()
            except Empty:
                break
        if wish is None:  # what spills is not needed any more; letters are, and who is owed what
            return [wish for wish in wishes if isinstance(wish, LetterWish | SaveRegistrations)], True
        return wishes, False

    def close(self) -> None:
        """No more; what is in the log is not needed any longer. Twice is once."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._wishes.put(None)
            thread.join(ENDING_S)
        elif not self._closed:
            self._keeper.close()
        self._closed = True

    def abandon(self) -> None:
        """In a forked child: the thread is not here."""
        self._thread = None
        self._keeper.abandon()
