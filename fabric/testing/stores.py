"""The disk of one member of a world: it does what is asked after a while of the world's time, or refuses."""

from __future__ import annotations

import errno
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
from fabric.errors import LetterStoreFullError, SpillError
from fabric.storage.dead_letters import DeadLetterStore
from fabric.storage.spill import SpillLog
from fabric.storage.state import MemberState
from fabric.testing.disks import FakeDisk

__all__ = ["DiskPlan", "WorldStore"]

MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskPlan:
    """What goes wrong on the disks of a world; default: nothing, and every disk is as fast as memory."""

    delay_ms: float = 0.0
    """The longest that a disk takes for what it is asked."""
    refusals: float = 0.0
    """Probability that a write finds the disk full: of spilled bursts, and of dead letters."""
    damage: float = 0.0
    """Probability that, before it reads, the disk flips a bit somewhere, or that a read fails."""


class _WorldLetters(DeadLetterStore):
    """A store in memory that now and then finds its disk full."""

    is_refusing: Callable[[], bool]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """As `DeadLetterStore.transaction`."""
        if self.is_refusing():
            raise LetterStoreFullError("the disk is full", directory=self.where, used=self.bytes)
        with super().transaction():
            yield


class WorldStore:
    """A `Store` on a fake disk of its own."""

    def __init__(
        self, engine: Engine, plan: DiskPlan, seed: str, disk: FakeDisk | None = None, state: MemberState | None = None
    ) -> None:
        self._engine, self._plan, self._rng, self._state = engine, plan, Random(seed), state
        self.disk = disk if disk is not None else FakeDisk()
        self.is_harmed = False
        """Whether it was ever damaged: only then may it lose what it took."""
        letters = LetterKeeper(self._open_letters, engine.clock, chance=Random(f"{seed} again").random)
        letters.refused, letters.damaged = engine.letters.on_refused, engine.letters.on_damaged
        letters.cut = engine.letters.on_cut
        self._keeper = Desk(Storekeeper(engine.card.incarnation, self._open, engine.wall_ns, state), letters)
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
        letters = _WorldLetters.open(None, self._engine.config.letters, durable=False)
        assert isinstance(letters, _WorldLetters)
        letters.is_refusing = lambda: self._rng.random() < self._plan.refusals
        return letters

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
        if wishes and self._rng.random() < self._plan.refusals:
            for nth in (1, 2):  # a log tries twice
                self.disk.fail("write", nth, errno.ENOSPC)
        if any(isinstance(wish, LoadRecords) for wish in wishes) and self._rng.random() < self._plan.damage:
            self._damage()
        outcomes = self._keeper.work(wishes)
        self.disk.mend()
        if self._state is None:
            self.disk.steps.clear()  # nobody plays crashes of this disk: they need not be remembered
        return outcomes

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

    def close(self) -> None:
        """No more."""
        self._wishes.clear()
        self._keeper.close()

    def abandon(self) -> None:
        """Nobody forks here."""
