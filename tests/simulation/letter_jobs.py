"""Little jobs whose messages die: letters are written late or refused, come again, and are given up, all by chance.

In each the value of a record is its offset. At every moment what has settled was handled, is a letter, or was given up;
and neither the letters nor those that wait for the store are more than they may be.
"""

from __future__ import annotations

from random import Random
from typing import Any

from fabric.config import FabricConfig, Letters
from fabric.subscription import Subscription
from fabric.testing import Checker, DiskPlan, FaultPlan, World

LETTERS = Letters(rows_max=8, waiting_max=6, redriven_at_once_max=3)


class LetterJob:
    """A publisher and a reader. `seen`: what was handled, as (seed, value); `given_up`: what was discarded."""

    most = 60
    waiting_max = LETTERS.waiting_max
    config = FabricConfig(letters=LETTERS)

    def __init__(self, seed: int, *, plan: FaultPlan, disk: DiskPlan) -> None:
        self.rng = Random(seed)
        self.world = World(seed=seed, plan=plan, disk=disk, config=self.config)
        self.failing, self.published = 0.5, 0
        self.seen: list[tuple[int, int]] = []
        self.given_up: set[int] = set()

    def play(self) -> None:
        """All of it."""
        with self.world as world:
            self.trainer, self.reader = world.join(0), world.join(1)
            self.begin()
            world.every(0.02, self.look)
            assert world.until(lambda: self.published == self.most, 60)
            world.run(1.0)
            self.failing = 0.0
            assert world.until(self.is_over, 30), f"{len(self.seen)} handled, {len(self.reader.dead_letters)} letters"
            self.trainer.flush(timeout_s=60)
            assert world.until(lambda: not len(self.reader.dead_letters), 10)
            self.look()
            self.judge()

    def begin(self) -> None:
        """The tasks of both."""
        raise NotImplementedError

    def publish(self) -> None:
        """One record."""
        if self.published < self.most:
            self.trainer.publish("t", self.published, seed=self.published % 3)
            self.published += 1

    def handle(self, message: Any) -> None:
        """It fails by chance."""
        if self.rng.random() < self.failing:
            raise ValueError
        self.seen.append((message.seed, message.value))

    def give_up(self) -> None:
        """One letter, perhaps; on its way to its handler it cannot be."""
        letters = list(self.reader.dead_letters)
        if letters and self.rng.random() < 0.05:
            chosen = self.rng.choice(letters)
            if self.reader.dead_letters.discard(chosen):
                self.given_up.add(chosen.offset)

    def handled(self) -> set[int]:
        """The values that were handled."""
        return {value for _, value in self.seen}

    def is_over(self) -> bool:
        """Whether everything came to its end."""
        return len(self.handled() | self.given_up) >= self.most and not len(self.reader.dead_letters)

    def look(self) -> None:
        """What holds at every moment."""
        letters = self.reader.dead_letters
        assert len(self.seen) == len(self.handled()), "a record was handled twice"
        assert not self.handled() & self.given_up, "a letter that was given up was handled"
        assert len(letters) <= LETTERS.rows_max, "more letters than there may be"
        assert letters.waiting <= self.waiting_max, "more wait for the store than may"
        ends = self.handled() | self.given_up | {letter.offset for letter in letters}
        for floor in self.trainer.publisher("t")._readers().values():
            assert ends >= set(range(floor)), f"settled to {floor}, and nothing became of {set(range(floor)) - ends}"

    def judge(self) -> None:
        """Each once."""
        values = [value for _, value in self.seen]
        assert sorted([*values, *self.given_up]) == list(range(self.most)), "each is handled once, or given up"
        self.judge_books()

    def judge_books(self) -> None:
        """What was counted is what was seen."""
        Checker(self.world.history).judge()


class Parked(LetterJob):
    """Lanes wait for their letters; those are redriven, given up and refused while records still come."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, plan=FaultPlan(loss=0.1, delay_ms=3), disk=DiskPlan(delay_ms=30, refusals=0.2))

    def begin(self) -> None:
        """As `LetterJob.begin`."""
        self.reader.on("t", attempts=2, exhausted="park")(self.handle)
        self.world.every(0.02, self.publish)
        self.world.every(0.3, self.tend, owner=self.reader)
        self.world.every(0.07, self.give_up, owner=self.reader)

    def tend(self) -> None:
        """Some letters come again."""
        some = [letter for letter in self.reader.dead_letters if self.rng.random() < 0.7]
        report = self.reader.dead_letters.redrive(some)
        assert len(report.queued) + len(report.refused) == len(some)

    def judge(self) -> None:
        """In the order of their lanes, too."""
        super().judge()
        for lane in range(3):
            values = [value for seed, value in self.seen if seed == lane]
            assert values == sorted(values), f"lane {lane}: {values}"
        counts = self.reader.statistics()
        assert counts["dead_letters"] > 10 and counts["letters_died_again"] > 0 and counts["letters_refused"] > 0

    def judge_books(self) -> None:
        """`judge` knows no letters that only waited behind another."""
        Checker(self.world.history).inspect()
        mine = self.reader.ledger().totals
        assert self.world.until(lambda: self.trainer.ledger().totals == mine, 30), f"its publisher has not heard {mine}"
        assert mine.owed == self.most
        assert mine.dead_lettered == self.reader.statistics()["dead_letters"], f"{mine}"


class Skipped(LetterJob):
    """Lanes go on; what died comes late."""

    most = 100

    def __init__(self, seed: int) -> None:
        super().__init__(seed, plan=FaultPlan(loss=0.1), disk=DiskPlan(delay_ms=20, refusals=0.1))

    def begin(self) -> None:
        """As `LetterJob.begin`."""
        self.reader.on("t", attempts=1)(self.handle)
        self.world.every(0.01, self.publish)
        self.world.every(0.1, lambda: self.reader.dead_letters.redrive(self.reader.dead_letters), owner=self.reader)


class Rejected(LetterJob):
    """An application that saves its cursor, rejects by chance, and now and then begins again where it saved."""

    waiting_max = LetterJob.most  # who rejects is bounded by what it has in hand

    def __init__(self, seed: int) -> None:
        super().__init__(seed, plan=FaultPlan(loss=0.1, delay_ms=3), disk=DiskPlan(delay_ms=30, refusals=0.1))
        self.saved: Any = ({}, [])
        """The checkpoint: a cursor, and what was handled by then."""
        self.inbox: Subscription | None = None

    def begin(self) -> None:
        """As `LetterJob.begin`."""
        self.open()
        self.world.every(0.02, self.publish)
        self.world.every(0.05, self.work, owner=self.reader)
        self.world.every(0.4, self.tend, owner=self.reader)
        self.world.every(0.07, self.give_up, owner=self.reader)

    def open(self) -> None:
        """Begin where it saved."""
        cursor, seen = self.saved
        self.seen = list(seen)
        self.inbox = self.reader.subscribe("t", name="inbox", acknowledge="manual", cursor=cursor)

    def work(self) -> None:
        """Handle what is there, and save."""
        assert self.inbox is not None
        for message in self.inbox.drain():
            if self.rng.random() < self.failing / 2:
                message.reject("by chance")
            else:
                self.seen.append((message.seed, message.value))
                message.acknowledge()
        if self.rng.random() < 0.5 or not self.failing:
            self.save(self.inbox)
        elif self.rng.random() < 0.3 and not self.reader.dead_letters.waiting:
            self.inbox.close()
            self.open()

    def save(self, inbox: Subscription) -> None:
        """What is handled by this cursor: a record behind one whose letter is not written yet is not in it."""
        cursor = inbox.cursor()
        _, floor, ranges = cursor.get("rank-0/t", (0, 0, []))
        done = {*range(floor), *(value for first, end in ranges for value in range(first, end))}
        done |= {offset for *_, offset in cursor.get("redriven", ())}
        self.saved = cursor, [entry for entry in self.seen if entry[1] in done]
        inbox.commit(cursor)

    def tend(self) -> None:
        """Some letters come again."""
        self.reader.dead_letters.redrive([each for each in self.reader.dead_letters if self.rng.random() < 0.5])

    def judge_books(self) -> None:
        """`Checker` knows the letters of one session, and not what those before it settled: the sums alone count."""
        assert self.world.until(lambda: self.trainer.ledger().balanced and self.reader.ledger().balanced, 10)
