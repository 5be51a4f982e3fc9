"""The dead letters on the storage thread: what is asked for, in one transaction a turn, answered once it is kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fabric.core.guards import Retry
from fabric.errors import FabricError, LettersDamagedError, LetterStoreError
from fabric.storage.letter_rows import LetterRow

if TYPE_CHECKING:
    from fabric.engine.letter_values import LetterValues
    from fabric.engine.storing import Outcome, Storekeeper, Wish
    from fabric.errors import SpillError
    from fabric.storage.dead_letters import DeadLetterStore
    from fabric.storage.hand_page import HandPage

__all__ = [
    "ChangeLetter",
    "Desk",
    "EndLetter",
    "LetterKeeper",
    "LetterWish",
    "LoadLetters",
    "ReadLetters",
    "WriteLetter",
]

log = logging.getLogger("fabric.storage")

_AGAIN = Retry(1_000_000_000, 2_000_000_000)
"""In nanoseconds. What the store refuses is asked again then, or with the next wish. With full jitter that is once a
second; the members of one host have one disk, and were refused together."""


class LetterWish:
    """Something that is asked of the store of dead letters."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, eq=False)
class WriteLetter(LetterWish):
    """Keep a letter; `then` is called once it is kept, which may take until there is room.

    `value`: all of it, if the letter has only its head. It holds no memory of its own: its record waits, too.
    """

    letter: LetterRow
    then: Callable[[], None]
    value: memoryview | None = None


@dataclass(frozen=True, slots=True)
class ChangeLetter(LetterWish):
    """A letter died again."""

    number: int
    reason: str
    detail: str
    attempts: int


@dataclass(frozen=True, slots=True, eq=False)
class EndLetter(LetterWish):
    """A letter is over, for its reason: handled, or given up. `then` is called once that is written."""

    letter: LetterRow
    then: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, eq=False)
class ReadLetters(LetterWish):
    """Letters with their values; for one that cannot be read, why."""

    numbers: tuple[int, ...]
    then: Callable[[list[LetterRow | FabricError]], None]


@dataclass(frozen=True, slots=True, eq=False)
class LoadLetters(LetterWish):
    """All letters, oldest first, and the page of what was in hand."""

    then: Callable[[Iterable[LetterRow], HandPage | None], None]


class LetterKeeper:
    """Does what is asked for with the store, which begins with the first wish. Not thread-safe.

    `open_store` is called where it is used; `open_page` too, if letters outlive this process. `remembers`: whether a
    store without letters is kept for the sake of those that were. `damaged` is told of every damage, and which letters
    it took; `cut` of which letter only the head of its value is left, and why; `refused` why a write waits, and None
    when writes are taken again.
    """

    def __init__(
        self,
        open_store: Callable[[], DeadLetterStore],
        clock: Callable[[], int],
        *,
        open_page: Callable[[], HandPage] | None = None,
        remembers: bool = True,
        chance: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self._remembers, self._chance = remembers, chance
        self._open_store, self._open_page, self._clock = open_store, open_page, clock
        self._store: DeadLetterStore | None = None
        self._waiting: list[LetterWish] = []
        self._former: frozenset[int] = frozenset()
        """What was in the store before it was damaged."""
        self._again = _AGAIN
        self.damaged: Callable[[list[int]], None] = lambda numbers: None
        self.cut: Callable[[int, str], None] = lambda number, why: None
        self.refused: Callable[[FabricError | None], None] = lambda error: None
        self.error: FabricError | None = None
        self.values: LetterValues | None = None
        """Where values lie that are too large for a row; None: nowhere."""

    @property
    def due_ns(self) -> int | None:
        """When what waits is tried again; None if nothing waits."""
        return self._again.due_ns if self._waiting else None

    def work(self, wishes: Iterable[LetterWish]) -> None:
        """What is asked for, and what waited, in order; as far as the store takes it."""
        batch, self._waiting = [*self._waiting, *wishes], []
        if not batch:
            return
        batch.sort(key=lambda wish: isinstance(wish, WriteLetter))  # what makes room comes first
        done: set[int] = set()
        try:
            done, refusal = self._try(batch)
        except FabricError as error:
            refusal = error
        self._waiting = [wish for at, wish in enumerate(batch) if at not in done and not _is_notice(wish)]
        self._again = (self._again if self._waiting else _AGAIN).after(self._clock(), self._chance())
        self._note(refusal)
        self._discard([each.letter.id for at in done if isinstance(each := batch[at], EndLetter)])
        for at in sorted(done):
            self._answer(batch[at])

    def _discard(self, numbers: Collection[int]) -> None:
        if self.values is not None:
            self.values.discard(numbers)

    def _try(self, batch: Sequence[LetterWish]) -> tuple[set[int], FabricError | None]:
        """As `_commit`; damage is mended, and then it is tried once more."""
        store = self._opened()
        try:
            return self._commit(store, batch)
        except LettersDamagedError as error:
            self._mend(store, error)
        return self._commit(store, batch)

    def _opened(self) -> DeadLetterStore:
        if self._store is None:
            self._store = self._open_store()
            if self._store.damages:
                self._lose(sorted(number for number in self._former if number not in self._store))
            self._former = frozenset()
        return self._store

    def _mend(self, store: DeadLetterStore, error: LettersDamagedError) -> None:
        """Raises it if there is nothing to mend, and what keeps it from being mended; then it is opened anew."""
        self._former = store.numbers()
        try:
            if not store.find_damage(error):
                raise error
        except FabricError:
            store.close()
            self._store = None
            raise
        lost, store.lost = store.lost, []
        self._lose(lost)

    def _lose(self, numbers: list[int]) -> None:
        self._discard(numbers)
        self.damaged(numbers)

    def _commit(self, store: DeadLetterStore, batch: Sequence[LetterWish]) -> tuple[set[int], FabricError | None]:
        """Which of them are done, and why others wait: behind a letter that has no room, no other is written."""
        done: set[int] = set()
        refusal: FabricError | None = None
        with store.transaction():
            for at, wish in enumerate(batch):
                if isinstance(wish, WriteLetter):
                    missing = store.refusal(wish.letter) or (None if _is_notice(wish) else refusal)
                    if missing is None:
                        store.add(self._placed(store, wish))
                    elif not _is_notice(wish):
                        refusal = missing
                        continue
                elif isinstance(wish, ChangeLetter):
                    self._change(store, wish)
                elif isinstance(wish, EndLetter):
                    store.end(wish.letter)
                done.add(at)
        return done, refusal

    def _placed(self, store: DeadLetterStore, wish: WriteLetter) -> LetterRow:
        """The row of a letter, whose large value the log has now; if not, it says why."""
        if wish.value is None:
            return wish.letter
        why = "there is no spill log"
        if self.values is not None:
            why = self.values.keep(wish.letter.id, wish.value, store.limits.values_bytes_max)
        if not why:
            return wish.letter
        self.cut(wish.letter.id, why)
        return replace(wish.letter, cut=why)

    @staticmethod
    def _change(store: DeadLetterStore, wish: ChangeLetter) -> None:
        if wish.number in store:
            letter = store.read(wish.number)
            store.replace(replace(letter, reason=wish.reason, detail=wish.detail, attempts=wish.attempts))

    def _note(self, refusal: FabricError | None) -> None:
        """Say it once, however often it is refused."""
        if refusal is not None and self.error is None:
            log.warning("lanes wait, their dead letters are refused: %s", refusal)
        elif refusal is None and self.error is not None:
            log.warning("dead letters are taken again")
        if refusal is not None:
            for part in (refusal, refusal.__cause__):
                if part is not None:
                    part.with_traceback(None)  # it would keep the whole batch in memory
        self.error = refusal
        self.refused(refusal)

    def _answer(self, wish: LetterWish) -> None:
        if isinstance(wish, WriteLetter | EndLetter):
            wish.then()
        elif isinstance(wish, ReadLetters):
            wish.then([self._read(number) for number in wish.numbers])
        elif isinstance(wish, LoadLetters):
            self._load(wish)

    def _read(self, number: int) -> LetterRow | FabricError:
        store = self._opened()
        try:
            try:
                return self._whole(store.read(number))
            except LettersDamagedError as error:
                if number not in store:
                    return error
                self._mend(store, error)
            return self._whole(store.read(number))
        except FabricError as error:
            return error

    def _whole(self, row: LetterRow) -> LetterRow:
        return row if self.values is None else self.values.whole(row)

    def _load(self, wish: LoadLetters) -> None:
        page = None
        try:
            page = self._open_page() if self._open_page is not None else None
        except FabricError as error:
            log.error("what was in hand when the last life ended cannot be counted: %s", error)
        try:
            rows = self._opened().letters()
            wish.then(rows if self.values is None else self.values.matched(rows), page)
        except FabricError as error:
            self._note(error)
            self._waiting.append(wish)

    def close(self) -> None:
        """What lies in a store of this life alone is not needed any more, and that is said."""
        store, self._store = self._store, None
        self._waiting.clear()
        if store is None:
            return
        if self._open_page is not None and (len(store) or (self._remembers and store.remembered)):
            store.close()
            return
        if len(store):
            log.warning("%d dead letters are discarded: there is no state directory to keep them in", len(store))
        try:
            store.destroy()
        except LetterStoreError as error:
            log.warning("the store of dead letters is left behind: %s", error)

    def abandon(self) -> None:
        """In a forked child."""
        store, self._store = self._store, None
        self._waiting.clear()
        if store is not None:
            store.abandon()


def _is_notice(wish: LetterWish) -> bool:
    return isinstance(wish, WriteLetter) and wish.letter.kind == "notice"


class Desk:
    """What one storage thread does: the spill log, and the dead letters."""

    def __init__(self, spill: Storekeeper, letters: LetterKeeper) -> None:
        self._spill, self.letters = spill, letters
        letters.values = spill.values
        spill.values.cut = lambda number, why: letters.cut(number, why)

    @property
    def error(self) -> SpillError | None:
        """Why the spill log refused last; None if it did not."""
        return self._spill.error

    @property
    def due_ns(self) -> int | None:
        """When something that was refused is tried again; None if nothing was."""
        return self.letters.due_ns

    def work(self, wishes: Iterable[Wish]) -> list[Outcome]:
        """All of them; each room has its own in order."""
        asked = list(wishes)
        outcomes = self._spill.work(wish for wish in asked if not isinstance(wish, LetterWish))
        self.letters.work(wish for wish in asked if isinstance(wish, LetterWish))
        return outcomes

    def close(self) -> None:
        """Neither is needed any more."""
        self.letters.close()  # first: the directory of a state that owes nothing is removed
        self._spill.close()

    def abandon(self) -> None:
        """In a forked child."""
        self._spill.abandon()
        self.letters.abandon()
