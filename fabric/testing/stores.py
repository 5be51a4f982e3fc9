"""The disk of one member of a world: it does what is asked after a while of the world's time, or refuses."""

from __future__ import annotations

import errno
import mmap
import sqlite3
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fabric.core.disk import LoadRecords, RecordsExpired
from fabric.engine.lettering import Desk, LetterKeeper
from fabric.engine.loop import Engine
from fabric.engine.storing import Outcome, Storekeeper, Wish
from fabric.errors import LetterStoreBrokenError, LetterStoreFullError, SpillError
from fabric.storage.dead_letters import DeadLetterStore
from fabric.storage.hand_page import _BYTES, HandPage
from fabric.storage.spill import SpillLog
from fabric.storage.state import MemberState
from fabric.testing.disks import FakeDisk

__all__ = ["DiskPlan", "KeptLetters", "WorldStore"]

MS = 1_000_000
SYNCS_MAX = 16
"""Of so many syncs each may fail while the disk does what it was asked at once: it needs fewer."""
PIECE_BYTES = 16, 4096
"""A short write takes so much: less than any burst, and few enough pieces of a burst of 64 KiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What goes wrong on the disks of a world; default: nothing, and every disk is as fast as memory."""

    delay_ms: float = 0.0
    """The longest that a disk takes for what it is asked."""
    refusals: float = 0.0
    """Probability that a write finds the disk full: of spilled bursts, and of dead letters."""
    damage: float = 0.0
    """Probability that, before it reads, the disk flips a bit somewhere, or that a read fails."""
    sync_failures: float = 0.0
    """Probability that a sync fails: of a file, of a directory, or of a commit of dead letters. What it was to cover
    can still be read, and is lost or not when the power is; no later sync of that file covers it. Only what waits for
    syncs notices: durable topics with `sync="power"`, subscribers that a rank with state is to confirm, and letters."""
    short_writes: float = 0.0
    """Probability that, for a while, no write takes more than a piece of 16 to 4,096 bytes: each call is asked for the
    rest. A loss of power keeps any of the pieces, and with `refusals` the disk may be full after the first one, so that
    what is written is torn. Of spilled bursts and durable topics; dead letters lie in memory."""


@dataclass(slots=True, eq=False)
class KeptLetters:
    """What of the dead letters of a rank with state outlives its lives: the database, and the page of what is in hand.

    Both lie in the memory of the world: no file is written, and none is left.
    """

    connection: sqlite3.Connection | None = None
    page: mmap.mmap | None = None

    def lose_power(self) -> None:
        """What was committed is there, but nobody syncs the page."""
        self.page = None

    def close(self) -> None:
        """The world ends."""
        if self.connection is not None:
            self.connection.close()
        self.connection = self.page = None


class _WorldPage(HandPage):
    """A page that lies in the memory of the world."""

    @classmethod
    def of(cls, kept: KeptLetters) -> _WorldPage:
        """As the life before left it."""
        if kept.page is None:
            kept.page = mmap.mmap(-1, _BYTES)
        page = cls(kept.page)
        page._look("memory")
        return page

    def close(self) -> None:
        """As `HandPage.close`; what is noted stays for the next life."""
        self._map = None


class _WorldLetters(DeadLetterStore):
    """A store in memory that now and then finds its disk full, or cannot sync."""

    is_refusing: Callable[[], bool]
    is_failing: Callable[[], bool]
    kept: KeptLetters | None = None
    """Where its database is that outlives it."""

    def _begin(self) -> None:
        if self.kept is None or self.kept.connection is None:
            super()._begin()
        else:
            self._connection = self.kept.connection
            self._count(self._connection)
        if self.kept is not None:
            self.kept.connection = self._connection

    def _disconnect(self) -> None:
        if self.kept is None:
            super()._disconnect()
        self._connection = None

    def abandon(self) -> None:
        """As `DeadLetterStore.abandon`: the process is gone."""
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """As `DeadLetterStore.transaction`."""
        if self.is_refusing():
            raise LetterStoreFullError("the disk is full", directory=self.where, used=self.bytes)
        with super().transaction():
            yield
            if self.is_failing():
                raise LetterStoreBrokenError("a sync failed", directory=self.where)


class WorldStore:
    """A `Store` on a fake disk of its own."""

    def __init__(
        self,
        engine: Engine,
        plan: DiskPlan,
        seed: str,
        disk: FakeDisk | None = None,
        state: MemberState | None = None,
        letters: KeptLetters | None = None,
    ) -> None:
        self._engine, self._plan, self._rng, self._state = engine, plan, Random(seed), state
        self._chance = Random(f"{seed} syncs and pieces")
        self.disk = disk if disk is not None else FakeDisk()
        self.is_harmed = False
        """Whether it was ever damaged: only then may it lose what it took."""
        self._letters, self._is_opening = letters, False
        open_page = None if letters is None else lambda: _WorldPage.of(letters)
        chance = Random(f"{seed} again").random
        keeper = LetterKeeper(self._open_letters, engine.clock, chance=chance, open_page=open_page)
        keeper.refused, keeper.damaged = engine.letters.on_refused, engine.letters.on_damaged
        keeper.cut = engine.letters.on_cut
        self._keeper = Desk(Storekeeper(engine.card.incarnation, self._open, engine.wall_ns, state), keeper)
        self._wishes: deque[tuple[int, Wish]] = deque()

    def _open(self) -> SpillLog:
        rng = self._rng
        return SpillLog.open(
            Path(f"/spill/{self._engine.card.name}/{self._engine.card.incarnation}"),
            self._engine.config.spill,
            disk=self.disk,
            incarnation=self._engine.card.incarnation,
            clock=self._engine.wall_ns,
            identity=lambda size: rng.getrandbits(8 * size).to_bytes(size, "little"),
        )

    def _open_letters(self) -> DeadLetterStore:
        letters = _WorldLetters(None, self._engine.config.letters, None, durable=self._letters is not None)
        letters.kept = self._letters
        letters.is_refusing = lambda: not self._is_opening and self._rng.random() < self._plan.refusals
        letters.is_failing = lambda: not self._is_opening and self._chance.random() < self._plan.sync_failures
        letters._begin()
        return letters

    def read_letters(self) -> None:
        """Know what earlier lives left, before anything is handled; a join waits for it, however slow the disk is."""
        self._engine.letters.load()
        wishes = [wish for _, wish in self._wishes]
        self._wishes.clear()
        self._is_opening = True
        for outcome in self._keeper.work(wishes):
            self._engine.submit(outcome)
        self._is_opening = False

    @property
    def error(self) -> SpillError | None:
        """Why the last write was refused; None if it was not."""
        return self._keeper.error

    def ask(self, wish: Wish) -> None:
        """Do this after all that was asked before."""
        due_ns = self._engine.clock() + int(self._rng.random() * self._plan.delay_ms * MS)
        self._wishes.append((max(due_ns, self._wishes[-1][0] if self._wishes else 0), wish))

    def next_due_ns(self) -> int | None:
        """When it is done with something next, or tries again what it refused."""
        dues = (self._wishes[0][0] if self._wishes else None, self._keeper.letters.due_ns)
        return min((due for due in dues if due is not None), default=None)

    def work(self, now_ns: int) -> bool:
        """Be done with what is due; whether there was something."""
        due = [wish for due_ns, wish in self._wishes if due_ns <= now_ns]
        for _ in due:
            self._wishes.popleft()
        for outcome in self._done(due):
            self.is_harmed |= isinstance(outcome, RecordsExpired)
            self._engine.submit(outcome)
        return bool(due) or self._try_again(now_ns)

    def _try_again(self, now_ns: int) -> bool:
        letters = self._keeper.letters
        due = letters.due_ns is not None and letters.due_ns <= now_ns
        if due:
            letters.work(())
        return due

    def _done(self, wishes: list[Wish]) -> list[Outcome]:
        if wishes:
            self._fail_some()
        if any(isinstance(wish, LoadRecords) for wish in wishes) and self._rng.random() < self._plan.damage:
            self._damage()
        outcomes = self._keeper.work(wishes)
        self.disk.mend()
        self.disk.write_most = None
        if self._state is None:
            self.disk.steps.clear()  # nobody plays crashes of this disk: they need not be remembered
        return outcomes

    def _fail_some(self) -> None:
        plan, first = self._plan, 1
        if self._chance.random() < plan.short_writes:
            self.disk.write_most = self._chance.randint(*PIECE_BYTES)
            first = 2  # what is refused is torn: a piece of it is there
        if self._rng.random() < plan.refusals:
            for nth in (first, first + 1):  # a log tries twice
                self.disk.fail("write", nth, errno.ENOSPC)
        for operation in ("sync", "sync_directory"):
            for nth in range(1, SYNCS_MAX + 1):
                if self._chance.random() < plan.sync_failures:
                    self.disk.fail(operation, nth)

    def _damage(self) -> None:
        self.is_harmed = True
        segments = [path for path in self.disk.files if "seg-" in path]
        if not segments or self._rng.random() < 0.3:
            self.disk.fail("read")
            return
        content = self.disk.content(self._rng.choice(sorted(segments)))
        if content:
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)

    def kill(self) -> None:
        """The process is gone: what it asked for and was not done never is, what was written stays."""
        self._wishes.clear()
        if self._state is not None:
            self._keeper.abandon()
            self._engine.letters.abandon()  # a close would say that nothing is in hand any more

    def close(self) -> None:
        """No more."""
        self._wishes.clear()
        self._keeper.close()

    def abandon(self) -> None:
        """Nobody forks here."""
