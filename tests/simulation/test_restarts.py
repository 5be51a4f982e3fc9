"""Topics in worlds where members die, links fail and the power goes: every accepted record is handled once.

Durable topics survive all of it; a reliable one survives that its publisher closes before everybody has everything.

Each seed is a little job: a publisher, a subscriber that saves its cursor with what it did, and one that never dies.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from random import Random
from typing import Any

import pytest

from fabric.client import Fabric
from fabric.config import FabricConfig, Liveness, Spill
from fabric.errors import FabricError, QueueFullError, SubscribeTimeoutError
from fabric.subscription import Subscription
from fabric.testing import DiskPlan, World
from transports import FaultPlan

TOPICS = ("work.a", "work.b")
PER_BLOCK = 500 if os.environ.get("TENSOR_FABRIC_SOAK") else 4
BLOCKS = 3
CONFIG = FabricConfig(
    subscribe_timeout_s=2.0,
    liveness=Liveness(suspect_s=0.5, down_s=2.0),
    spill=Spill(segment_bytes=4096, bytes_max=1 << 22, free_bytes_min=1),
)


class Job:
    """One world, and what its application did."""

    def __init__(self, seed: int, end: str) -> None:
        rng = self.rng = Random(seed)
        loss = rng.choice([0.0, 0.05, 0.3])
        plan = FaultPlan(loss=loss, duplication=loss / 2, delay_ms=rng.choice([0.0, 1.0, 20.0]))
        refusals = rng.choice([0.0, 0.0, 0.2]) if end != "closed" else 0.0  # a close does not ask a full disk twice
        chance = Random(f"disk {seed}")
        self.sync_failures = chance.choice([0.0, 0.1, 0.4]) if end != "closed" else 0.0
        disk = DiskPlan(
            delay_ms=rng.choice([0.0, 5.0, 100.0]),
            refusals=refusals,
            sync_failures=self.sync_failures,
            short_writes=chance.choice([0.0, 0.0, 0.3]),
        )
        self.world = World(seed, plan=plan, disk=disk, config=CONFIG, world_size=3, state=True)
        self.end, self.numbers = end, itertools.count()
        self.accepted: dict[tuple[str, int, int], list[int]] = {}
        """Values by topic, incarnation and seed."""
        self.doubtful: set[int] = set()
        """What was refused, if syncs fail: whether the next life finds it after all is not known."""
        self.handled: list[Any] = []
        self.cursor: Any = {}
        """The checkpoint: what was handled, and the cursor that belongs to it."""
        self.seen: list[Any] = []
        self.ranks: dict[int, Fabric] = {}
        self.inbox: Subscription | None = None
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        """All three join; the subscribers are there before anything is published."""
        for rank in (2, 0, 1):
            self.ranks[rank] = self.world.join(rank, host=f"host-{rank}", timeout_s=60)
        self.survivor = self.until_it_works(lambda: self.ranks[2].subscribe("work.*"))
        self.until_it_works(self.subscribe)
        self.world.until(self.is_confirmed, timeout_s=60)
        self.world.every(0.01, self.look, owner=self.ranks[2])

    def is_confirmed(self) -> bool:
        """Whether all publishers have confirmed, those included that `subscribe` took for dead."""
        open_ones = (fabric._engine.core.subscribing.subscriptions.values() for fabric in self.ranks.values())
        return not any(one.asked for some in open_ones for one in some)

    def until_it_works(self, action: Any) -> Any:
        for _ in range(50):
            try:
                return action()
            except SubscribeTimeoutError:
                self.counts["timeouts"] += 1
        raise AssertionError("it never works")

    def look(self) -> None:
        """The survivor reads along."""
        self.seen += [_entry(message) for message in self.survivor.drain()]

    def subscribe(self) -> None:
        """Go on from the checkpoint."""
        self.inbox = self.ranks[1].subscribe("work.*", name="worker", cursor=self.cursor)
        self.fresh: list[Any] = []

    # What may happen.

    def publish(self) -> None:
        """Some records; a refused one is not accepted."""
        topic, sync = self.rng.choice(TOPICS), "power" if self.end == "power" else "process"
        policy = "reliable" if self.end == "closed" else "durable"
        publisher = self.ranks[0].publisher(topic, policy=policy, sync=sync, when_full="fail")
        life = self.ranks[0]._engine.card.incarnation
        for _ in range(self.rng.randint(1, 8)):
            value, seed = next(self.numbers), self.rng.randrange(3)
            try:
                sequence = publisher.publish(value, seed=seed)
            except QueueFullError:
                self.counts["refused"] += 1
                self.doubtful |= {value} if self.sync_failures else set()
                continue
            lane = self.accepted.setdefault((topic, life, seed), [])
            assert sequence == len(lane), "a refused record uses no number"
            lane.append(value)

    def work(self) -> None:
        """Handle some, and perhaps save."""
        if self.inbox is None:
            return
        for count, message in enumerate(self.inbox.drain()):
            self.fresh.append(_entry(message))
            if count == self.rng.randint(0, 9):
                break
        if self.rng.random() < 0.6:
            self.save()

    def save(self) -> None:
        """One step: what was handled, and the cursor."""
        assert self.inbox is not None
        cursor = self.inbox.cursor()
        self.handled += self.fresh
        self.cursor, self.fresh = cursor, []
        self.inbox.commit(cursor)
        assert self.gaps(self.inbox) == []

    def gaps(self, inbox: Subscription) -> list[Any]:
        """Those that nothing excuses.

        A segment of which a sync failed may be damaged when the power is lost, too. Nothing in it counts any more, but
        recovery cannot know that, and so not be certain that nothing followed: an open gap.
        """
        is_excused = self.sync_failures > 0 and self.end == "power"
        return [gap for gap in inbox.gaps if gap.end is not None or not is_excused]

    def restart(self, rank: int, *, clean: bool = False, power: bool = False) -> None:
        """A new life."""
        if power:
            self.world.lose_power(f"host-{rank}")
        elif clean:
            self.world.stop(self.ranks[rank], timeout_s=0.5)
        else:
            self.world.kill(self.ranks[rank])
        self.counts["restarts"] += 1
        if rank == 1:
            self.inbox = None
        self.world.run(self.rng.choice([0.0, 0.05, 3.0]))
        self.ranks[rank] = self.world.join(rank, wait=False, host=f"host-{rank}")

    def act(self) -> None:
        """Something happens."""
        rng = self.rng
        (happens,) = rng.choices(
            (self.publish, self.work, self.restart_publisher, self.restart_worker, self.cut, self.heal),
            (35, 35, 8, 8, 7, 7),
        )
        happens()
        if self.inbox is None and rng.random() < 0.5:
            try:
                self.subscribe()
            except SubscribeTimeoutError:
                self.counts["timeouts"] += 1
        self.world.run(rng.random() * 0.2)

    def restart_publisher(self) -> None:
        """It dies, ends well, or loses its power."""
        clean = self.rng.random() < 0.3 or self.end == "closed"
        self.restart(0, clean=clean, power=self.end == "power")

    def restart_worker(self) -> None:
        """It dies, or ends well."""
        self.restart(1, clean=self.rng.random() < 0.3)

    def cut(self) -> None:
        """A link fails."""
        self.world.cut("rank-0", f"rank-{self.rng.choice([1, 2])}", both=self.rng.random() < 0.5)

    def heal(self) -> None:
        """All links work again."""
        for rank in (1, 2):
            self.world.heal("rank-0", f"rank-{rank}")

    def play(self, patience_s: float = 120.0) -> None:
        """All of it. `patience_s`: how long the rest may take to come, once the faults are over."""
        with self.world:
            self.begin()
            for _ in range(60):
                self.act()
            self.world.calm()
            if self.inbox is None:
                self.until_it_works(self.subscribe)
            self.publish()
            total = sum(map(len, self.accepted.values()))

            def is_over() -> bool:
                assert self.inbox is not None
                self.fresh += [_entry(message) for message in self.inbox.drain()]
                return all(len(self.certain(some)) >= total for some in (self.handled + self.fresh, self.seen))

            self.world.until(is_over, timeout_s=patience_s)
            self.save()
            self.judge()

    def certain(self, entries: list[Any]) -> list[Any]:
        """Without those that may come or not."""
        return [entry for entry in entries if entry[-1] not in self.doubtful]

    def judge(self) -> None:
        """Everything once, and in its lane's order, for both."""
        for who, found in (("worker", self.handled), ("survivor", self.seen)):
            entries = self.certain(found)
            assert len(set(found)) == len(found), f"{who}: some came twice"
            lanes: dict[tuple[str, int, int], list[int]] = {}
            order: dict[tuple[str, int], list[int]] = {}
            for topic, life, seed, value in entries:
                lanes.setdefault((topic, life, seed), []).append(value)
                order.setdefault((topic, seed), []).append(life)
            assert lanes == self.accepted, f"{who}: {_differences(lanes, self.accepted)}"
            assert all(lives == sorted(lives) for lives in order.values()), f"{who}: a newer life before an older"
        assert self.gaps(self.survivor) == []


def _entry(message: Any) -> tuple[str, int, int, int]:
    return message.topic, message.incarnation, message.seed, message.value


def _differences(found: dict[Any, list[int]], wanted: dict[Any, list[int]]) -> list[Any]:
    return [
        (lane, found.get(lane), wanted.get(lane))
        for lane in found.keys() | wanted.keys()
        if found.get(lane) != wanted.get(lane)
    ]


@pytest.mark.parametrize("end", ["killed", "power", "closed"])
@pytest.mark.timeout(20 + PER_BLOCK)
@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_accepted_record_is_handled_once_over_restarts(block: int, end: str) -> None:
    for seed in range(block * PER_BLOCK, (block + 1) * PER_BLOCK):
        job = Job(seed, end)
        try:
            job.play()
        except (AssertionError, FabricError) as error:
            raise AssertionError(f"seed {seed}: {error}") from error
