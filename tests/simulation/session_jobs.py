"""Little jobs with state: sessions of a named subscription without a cursor, and power that fails before a sync."""

from __future__ import annotations

import itertools
from dataclasses import replace
from random import Random
from typing import Any

from fabric.client import Fabric
from fabric.config import FabricConfig, Liveness, Spill
from fabric.subscription import Subscription
from fabric.testing import DiskPlan, World
from transports import FaultPlan

TOPICS = ("work.a", "work.b")
CONFIG = FabricConfig(
    subscribe_timeout_s=2.0,
    liveness=Liveness(suspect_s=0.5, down_s=2.0),
    spill=Spill(segment_bytes=4096, bytes_max=1 << 22, free_bytes_min=1),
)
Entry = tuple[str, int, int, int]
"""Topic, incarnation, seed and value."""


class Sessions:
    """A publisher of durable topics and a reader without a cursor: both come and go.

    While all ends are good, every record is handled once. With `rough` ends, which may damage what the publisher wrote
    of its readers, none is passed over; what was handled may come again, or be told as a gap.
    """

    def __init__(self, seed: int, *, rough: bool) -> None:
        rng = self.rng = Random(seed)
        self.rough, self.numbers = rough, itertools.count()
        disk = DiskPlan(delay_ms=rng.choice([0.0, 5.0, 100.0]))
        plan = FaultPlan(delay_ms=rng.choice([0.0, 1.0, 20.0]))
        self.world = World(seed, plan=plan, disk=disk, config=CONFIG, world_size=2, state=True)
        self.accepted: list[Entry] = []
        self.seen: list[Entry] = []
        self.inbox: Subscription | None = None

    def play(self) -> None:
        """All of it."""
        with self.world:
            self.trainer, self.worker = self._join(0), self._join(1)
            self._subscribe()
            for _ in range(25):
                self._act()
            self._go_on()
            self.world.until(lambda: self._look() or len(set(self.seen)) >= len(self.accepted), timeout_s=30)
            self.world.run(1)
            self._look()
            self._judge()

    def _join(self, rank: int) -> Fabric:
        joined = self.world.join(rank, host=f"host-{rank}", timeout_s=60)
        self.world.run(0.3)  # the others know it, too: `subscribe` waits for those who are known to be there
        return joined

    def _subscribe(self) -> None:
        self.inbox = self.worker.subscribe("work.*", name="worker")

    def _act(self) -> None:
        actions = (self._publish, self._work, self._leave, self._restart_trainer, self._restart_worker, self._forget)
        (happens,) = self.rng.choices(actions, (40, 30, 10, 12, 10, 4))
        happens()
        if self.inbox is None and self.rng.random() < 0.4:
            self._subscribe()

    def _publish(self) -> None:
        topic = self.rng.choice(TOPICS)
        publisher, life = self.trainer.publisher(topic, policy="durable"), self.trainer._engine.card.incarnation
        for _ in range(self.rng.randint(1, 5)):
            value, seed = next(self.numbers), self.rng.randrange(3)
            publisher.publish(value, seed=seed)
            self.accepted.append((topic, life, seed, value))

    def _look(self) -> bool:
        """Handle all that is there."""
        for message in self.inbox.drain() if self.inbox is not None else ():
            self.seen.append((message.topic, message.incarnation, message.seed, message.value))
        return False

    def _work(self) -> None:
        self.world.run(self.rng.random())
        self._look()

    def _leave(self) -> None:
        """The session ends."""
        if self.inbox is not None:
            self._rest()
            inbox, self.inbox = self.inbox, None
            inbox.close()
            self._rest()

    def _rest(self) -> None:
        """Good ends wait: a publisher knows floors alone, and a goodbye may overtake the acknowledgement before it."""
        if not self.rough or self.rng.random() < 0.5:
            self.world.run(1)
            self._look()
            self.world.run(0.3)

    def _restart_trainer(self) -> None:
        self._rest()
        if self.rough:
            self.world.kill(self.trainer)
            if self.rng.random() < 0.4:
                self._damage()
        else:
            self.world.stop(self.trainer, timeout_s=0.5)
        self.trainer = self._join(0)
        if self.rough:
            self._go_on()

    def _damage(self) -> None:
        """What the publisher wrote of its readers cannot be read any more."""
        self.world._disks["rank-0"].content("/state/rank-0/registrations")[3] ^= 1

    def _restart_worker(self) -> None:
        self._rest()
        self.inbox = None
        self.world.kill(self.worker) if self.rough else self.world.stop(self.worker)
        self._rest()
        self.worker = self._join(1)

    def _forget(self) -> None:
        """It wants nothing any more, and its publisher dies: the next life owes it nothing either."""
        if self.inbox is None:
            return
        self._go_on()
        self.world.until(lambda: self._look() or len(set(self.seen)) >= len(self.accepted), timeout_s=30)
        self.world.run(0.3)  # an answer that is on its way would make it stay owed
        self.inbox.unsubscribe()
        self.inbox = None
        self.world.run(1)
        self.world.kill(self.trainer)
        self.trainer = self._join(0)
        left = [one for one in self.trainer._engine.core.publishing.registrations if one.name == "worker"]
        assert not left, "it is owed what it does not want any more"
        self._subscribe()

    def _go_on(self) -> None:
        if self.inbox is None:
            self._subscribe()

    def _judge(self) -> None:
        assert set(self.seen) == set(self.accepted), f"missing: {sorted(set(self.accepted) - set(self.seen))}"
        if not self.rough:
            assert len(self.seen) == len(self.accepted), "some came twice"
            assert self.inbox is not None and self.inbox.gaps == ()
        first = list(dict.fromkeys(self.seen))
        for topic, seed in itertools.product(TOPICS, range(3)):
            values = [entry[3] for entry in first if (entry[0], entry[2]) == (topic, seed)]
            assert values == sorted(values), f"{topic} {seed}: {values}"


class PowerLoss:
    """Power fails under durable topics that do not sync: what is gone is said to be gone, and no more than that."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = Random(seed)
        disk = DiskPlan(delay_ms=rng.choice([0.0, 20.0]))
        plan = FaultPlan(loss=0.4, delay_ms=20.0)
        config = replace(CONFIG, subscribe_timeout_s=60.0)
        self.world = World(seed, plan=plan, disk=disk, config=config, world_size=2, state=True)
        self.numbers = itertools.count()

    def play(self) -> None:
        """All of it."""
        accepted: dict[int, int] = {}
        with self.world:
            trainer, reader = (self.world.join(rank, host=f"host-{rank}", timeout_s=60) for rank in (0, 1))
            inbox = reader.subscribe("t", name="reader")
            seen: list[Any] = []
            self.world.every(0.01, lambda: seen.extend(message.value for message in inbox.drain()), owner=reader)
            for _ in range(10):
                life, publisher = trainer._engine.card.incarnation, trainer.publisher("t", policy="durable")
                for _ in range(self.rng.randint(1, 6)):
                    value = next(self.numbers)
                    publisher.publish(value)
                    accepted[value] = life
                if self.rng.random() < 0.5:
                    self.world.run(1)
                self.world.lose_power("host-0")
                trainer = self.world.join(0, host="host-0", timeout_s=60)
            self.world.calm()
            self.world.run(5)
            assert seen == sorted(set(seen)), "each once, in order"
            told = {gap.incarnation for gap in inbox.gaps}
            known = {accepted[value] for value in seen}  # of others the reader may never have heard
            lost = {life for value, life in accepted.items() if value not in set(seen)} & known
            assert lost <= told, f"lost without a word: of {lost - told}"


class Ends:
    """A publisher of one topic ends again and again while its reader, on the same host, lacks some of it.

    Of a reliable topic the goodbye has to arrive: without it the reader sees a death, after which nothing is left.
    """

    def __init__(self, seed: int) -> None:
        rng = self.rng = Random(seed)
        self.policy = rng.choice(["durable", "reliable"])
        loss = rng.choice([0.0, 0.2]) if self.policy == "durable" else 0.0
        plan = FaultPlan(loss=loss, delay_ms=rng.choice([0.0, 5.0]))
        self.world = World(seed, plan=plan, config=CONFIG, world_size=2, state=True)
        self.accepted: list[int] = []

    def play(self) -> None:
        """All of it."""
        with self.world as world:
            self.trainer, reader = world.join(0, timeout_s=60), world.join(1, timeout_s=60)
            world.run(1)
            inbox = reader.subscribe("t", name="reader")
            seen: list[int] = []
            world.every(0.01, lambda: seen.extend(message.value for message in inbox.drain()), owner=reader)
            for _ in range(8):
                self._live()
            world.calm()
            world.until(lambda: len(seen) >= len(self.accepted), timeout_s=20)
            assert seen == self.accepted, f"missing: {sorted(set(self.accepted) - set(seen))}"
            assert inbox.gaps == ()

    def _live(self) -> None:
        """One life: some of what it publishes does not arrive, and it ends."""
        world, rng = self.world, self.rng
        if rng.random() < 0.6:
            world.cut("rank-0", "rank-1", both=rng.random() < 0.3)
        publisher = self.trainer.publisher("t", policy=self.policy)
        for _ in range(rng.randint(0, 6)):
            publisher.publish(len(self.accepted))
            self.accepted.append(len(self.accepted))
        world.run(rng.choice([0.0, 0.02, 0.3]))
        if self.policy == "reliable" or rng.random() < 0.7:
            world.heal("rank-0", "rank-1")
        if self.policy == "durable" and rng.random() < 0.6:
            world.kill(self.trainer)
        else:
            world.stop(self.trainer, timeout_s=rng.choice([0.0, 0.02, 0.5]))
        world.run(rng.choice([0.05, 0.1, 3.0]))  # a goodbye may take 5 ms, and would be overtaken by the next life
        world.heal("rank-0", "rank-1")
        self.trainer = world.join(0, wait=rng.random() < 0.5, timeout_s=60)
