"""One publisher identity, one to three subscribers, one source of chance: faults, then calm, then the verdict."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from typing import Any

from tests.model.application import Application
from tests.model.checker import Checker
from tests.model.network import Address, Network
from tests.model.publisher import Directory, Publisher
from tests.model.words import Violation, draw_options, draw_profile

STEPS = 150
ROUNDS = 800
"""After the last fault all is settled within so many."""


class ModelWorld:
    """Draws the options, lets chance act, then lets the faults stop and asks whether everything settles."""

    def __init__(
        self, seed: int, publisher: type[Publisher] = Publisher, subscriber: type[Application] = Application
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.options = draw_options(rng)
        self.counts: Counter[str] = Counter()
        self.zombies: list[Publisher] = []
        self.subscribers: list[Application] = []
        self.network = Network(rng, self.options)
        self.checker = Checker(self, self.options)
        self.publisher_class, self.directories = publisher, 0
        self.handler_is_broken, self.lull, self.digest = True, False, 0
        self.new_publisher()
        for number in range(self.options.subscribers):
            one = subscriber(self, f"S{number}", draw_profile(rng, self.options))
            self.subscribers.append(one)
            self.boot(one)

    def new_publisher(self) -> None:
        self.directories += 1
        self.publisher = self.publisher_class(self, Directory(self.directories))
        self.publisher.start()

    def boot(self, subscriber: Application, *, lose_cursor: bool = False) -> None:
        """Who is there already is met before anything is subscribed to."""
        met = self.publisher.up and self.rng.random() < 0.7
        subscriber.boot(self.publisher.life if met else 0, lose_cursor=lose_cursor)

    def addresses(self) -> list[Address]:
        return [subscriber.address for subscriber in self.subscribers if subscriber.up]

    def deliver(self, source: Address, target: Address, kind: str, body: tuple[Any, ...]) -> None:
        for actor in (self.publisher, *self.zombies, *self.subscribers):
            if actor.address == target and actor.up:
                actor.receive(source, kind, body)
                return

    def random_lanes(self) -> list[int]:
        return [self.rng.randrange(self.options.lanes) for _ in range(self.rng.randint(1, self.options.burst))]

    def step(self) -> None:
        rng, options = self.rng, self.options
        if self.publisher.up and not self.lull and rng.random() < options.rate:
            self.publisher.publish(self.random_lanes())
        self.haunt()
        getattr(self, rng.choices(list(options.faults), list(options.faults.values()))[0])()
        for actor in (self.publisher, *self.subscribers):
            if actor.up and rng.random() < 0.5:
                actor.tick()
        for subscriber in self.subscribers:
            if subscriber.up and rng.random() < subscriber.profile.pace:
                subscriber.work()
        self.network.run(rng.random(), self.deliver)
        if self.publisher.up:
            self.checker.retention(self.publisher)

    def haunt(self) -> None:
        for zombie in self.zombies:
            if self.rng.random() < 0.3:
                zombie.publish(self.random_lanes())
                zombie.tick()

    # Faults.

    def nothing(self) -> None:
        """Most steps go well."""

    def stop_publisher(self) -> None:
        if self.publisher.up:
            how = self.rng.choice(self.options.stops)
            self.counts["fault: publisher " + how] += 1
            self.publisher.stop(how)
            for address in self.addresses() if how == "kill" else ():
                if self.rng.random() < self.options.obituaries:
                    self.publisher.send(address, "died")
        if not self.publisher.up and self.rng.random() < 0.6:
            self.next_life()

    def next_life(self) -> None:
        self.publisher = self.publisher_class(self, self.publisher.directory)
        self.publisher.start()
        self.checker.restarted(self.publisher)

    def replace_publisher(self) -> None:
        """The identity starts elsewhere with an empty state directory. If the old process lives, it is a zombie now."""
        self.counts["fault: publisher replaced"] += 1
        self.network.now += 1e-3  # the clock has moved on since the last start
        self.checker.replaced(self.publisher)
        if self.publisher.up:
            self.zombies.append(self.publisher)
        self.new_publisher()

    def corrupt(self) -> None:
        feed = self.rng.choice(list(self.publisher.feeds.values()))
        readable = [offset for offset in feed.records if offset < feed.stored]
        if readable:
            self.counts["fault: record corrupted"] += 1
            offset = self.rng.choice(readable)
            del feed.records[offset]
            self.checker.removed((feed.incarnation, offset), "corrupt")

    def sync(self) -> None:
        if self.options.level != "power":
            self.publisher.feed.synced = max(self.publisher.feed.synced, self.publisher.feed.stored)

    def stop_subscriber(self) -> None:
        subscriber = self.rng.choice(self.subscribers)
        if subscriber.up:
            self.counts["fault: subscriber killed"] += 1
            subscriber.up = False
        if self.rng.random() < 0.6:
            lose = self.rng.random() < self.options.lose_cursor
            self.counts["fault: cursor lost"] += bool(lose and subscriber.saved)
            self.boot(subscriber, lose_cursor=lose)

    def cut(self) -> None:
        self.counts["fault: link cut or healed"] += 1
        name = self.rng.choice(self.subscribers).name
        links = [("P", name), (name, "P")]
        self.network.cut ^= set(links if self.rng.random() < 0.6 else [self.rng.choice(links)])

    def repair_handler(self) -> None:
        self.handler_is_broken = not self.handler_is_broken

    # After the last fault.

    def is_settled(self) -> bool:
        life, end = self.publisher.life, self.publisher.feed.end
        return self.checker.is_fenced() and all(
            (one.incarnation, one.floor) == (life, end)
            and not one.hold
            and not one.hand
            and self.publisher.is_open(one.address)
            and self.publisher.registrations[one.name].positions == {life: end}
            and not (self.options.redrive and one.waiting())
            for one in self.subscribers
        )

    def settle(self) -> None:
        """I9: within a bounded number of rounds all is settled, acknowledged and redriven, and zombies are fenced."""
        for _ in range(ROUNDS):
            if self.is_settled():
                return
            for zombie in self.zombies:
                zombie.publish([0])
            for actor in (self.publisher, *self.zombies, *self.subscribers):
                actor.tick()
            for subscriber in self.subscribers:
                for _ in range(4):
                    subscriber.work()
            self.network.run(4 * self.options.delay, self.deliver)
        where = [(one.name, one.cursor(), one.known, one.over, one.fin) for one in self.subscribers]
        raise Violation("LIVENESS" if self.checker.is_fenced() else "FENCING", where)

    def run(self) -> int:
        """Returns a digest of the history."""
        for step in range(STEPS):
            self.lull = step >= STEPS - self.options.lull
            self.step()
        self.network.calm, self.network.cut = True, set()
        if not self.publisher.up:
            self.next_life()
        for subscriber in self.subscribers:
            if not subscriber.up:
                self.boot(subscriber)
        self.settle()
        self.checker.require(self.publisher.publish([0]), "LIVENESS", "all is acknowledged, and still there is no room")
        self.settle()
        for subscriber in self.subscribers:
            self.checker.history(subscriber)
        self.count()
        history = [(one.delivered, one.gaps, one.open_gaps, one.life) for one in self.subscribers]
        self.digest = zlib.crc32(repr(history).encode())
        return self.digest

    def count(self) -> None:
        network = self.network
        self.counts.update({"messages sent": network.sent, "messages lost": network.lost})
        self.counts.update({"messages doubled": network.doubled, "records published": len(self.checker.truth)})
        for one in self.subscribers:
            self.counts.update({"records handled": len(one.delivered), "offsets in gaps": len(one.gaps)})
            self.counts["open gaps"] += len(one.open_gaps)
