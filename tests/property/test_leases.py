"""A slot is reused only when no reader looks at it, and in the end always, whatever is lost and whoever begins anew."""

from __future__ import annotations

import random
from collections import Counter, deque
from typing import Any

import pytest

from fabric.config import Arena, FabricConfig
from fabric.core.holding import Holding
from fabric.core.leases import Leases
from fabric.core.members import MS, Context, Peer
from fabric.core.sharing import (
    ArenaReached,
    FreeSlots,
    ReaderGone,
    RefuseReader,
    SlotsForgotten,
    SlotsReleased,
)
from fabric.core.wire import Kind, decode_control
from tests.harness.pair import card

FEEDS = (7, 8)
SIZE = 1000


class Inbound:
    """All that is asked of what a subscription knows of a feed."""

    def __init__(self, floor: int, *, best_effort: bool = False) -> None:
        self.floor, self.best_effort = floor, best_effort


class Feed:
    """All that is asked of one that is published."""

    end = 0


class Reader:
    """A member that reads, and what its application looks at."""

    def __init__(self, incarnation: int, config: FabricConfig) -> None:
        self.context = Context(card("b", incarnation), config)
        self.holding = Holding(self.context)
        self.holding.on_reached(ArenaReached("a", 1))
        self.follows: dict[int, list[Inbound]] = {feed: [] for feed in FEEDS}
        self.views: Counter[tuple[int, int]] = Counter()
        self.begins: dict[int, int] = {}
        """Where it began to follow each feed: it is given nothing from before."""


class Game:
    """One publisher `a`, one reader `b` in life after life, and links that lose frames and let them overtake."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.config = FabricConfig(arena=Arena(bytes_max=40 * SIZE))
        self.now = MS
        self.context = Context(card("a"), self.config)
        by_id: Any = {feed: Feed() for feed in FEEDS}
        self.feeds: dict[int, Feed] = by_id
        self.leases = Leases(self.context, by_id)
        self.retained: set[tuple[int, int]] = set()
        self.slots: set[tuple[int, int]] = set()
        """Not reused yet."""
        self.lives = [Reader(1, self.config)]
        self.dead: Reader | None = None
        """The last that died, of which frames may still be under way."""
        self.links: dict[str, deque[Any]] = {"a": deque(), "b": deque()}
        self.loss = self.rng.choice([0.0, 0.2, 0.6])
        self.disorder = self.rng.choice([0.0, 0.5])
        self.refused = 0

    @property
    def reader(self) -> Reader:
        return self.lives[-1]

    # The two ends.

    def sort(self, context: Context, to: str, sender: Any) -> None:
        """Carry out what a core wants."""
        for command in context.commands:
            if isinstance(command, FreeSlots):
                for slot in command.slots:
                    assert slot in self.slots and slot not in self.retained
                    assert not any(life.views[slot] for life in self.lives), f"{slot} is looked at"
                    self.slots.discard(slot)
            elif isinstance(command, RefuseReader):
                self.refused += 1
            elif hasattr(command, "frame") and self.rng.random() >= self.loss:
                self.links[to].append((sender, decode_control(command.frame)))
        context.commands.clear()

    def settle(self) -> None:
        self.sort(self.context, "b", None)
        for life in self.lives:
            self.sort(life.context, "a", life)

    def carry(self, least: int = 0) -> None:
        """Some frames arrive."""
        for name, link in self.links.items():
            for _ in range(self.rng.randint(min(least, len(link)), len(link))):
                if self.rng.random() < self.disorder:
                    link.rotate(self.rng.randint(0, len(link)))
                sender, message = link.popleft()
                if name == "a" and sender in (self.reader, self.dead):  # of another life nothing is taken any more
                    peer = Peer(sender.context.card, self.now)
                    self.leases.on_holds(peer, *message.fields)
                elif name == "b" and message.kind is Kind.LEASED:
                    self.reader.holding.on_leased(*message.fields)
                elif name == "b":
                    self.reader.holding.on_recall("a", *message.fields)

    # What happens.

    def publish(self) -> None:
        feed = self.rng.choice(FEEDS)
        slot = feed, self.feeds[feed].end
        self.feeds[feed].end += 1
        self.retained.add(slot)
        self.slots.add(slot)

    def forget(self) -> None:
        """Retention lets go, whether or not somebody has read it."""
        gone = [slot for slot in self.retained if self.rng.random() < 0.3]
        self.retained -= set(gone)
        self.leases.on_forgotten(SlotsForgotten([(*slot, SIZE) for slot in gone]))

    def follow(self) -> None:
        """A subscription begins, perhaps among what is kept."""
        feed = self.rng.choice(FEEDS)
        oldest = min((offset for at, offset in self.retained if at == feed), default=self.feeds[feed].end)
        self.reader.follows[feed].append(
            Inbound(self.rng.randint(oldest, self.feeds[feed].end), best_effort=self.rng.random() < 0.5)
        )

    def unfollow(self) -> None:
        feed = self.rng.choice(FEEDS)
        inbounds = self.reader.follows[feed]
        if inbounds:
            inbounds.remove(self.rng.choice(inbounds))
            if not inbounds:
                self.reader.holding.end(feed)
                self.reader.follows[feed] = []

    def read(self) -> None:
        """What is retained is delivered, and looked at: from the floor of a subscription on."""
        reader = self.reader
        for feed, inbounds in reader.follows.items():
            for inbound in inbounds:
                reader.holding.begin(feed, "a", inbounds)
                for offset in range(inbound.floor, min(self.feeds[feed].end, inbound.floor + 5)):
                    if (feed, offset) in self.slots and reader.holding.may_read(feed, offset):
                        reader.holding.read(feed, offset)
                        reader.views[feed, offset] += 1

    def handle(self) -> None:
        """Floors rise."""
        for feed, inbounds in self.reader.follows.items():
            for inbound in inbounds:
                inbound.floor = self.rng.randint(inbound.floor, max(inbound.floor, self.feeds[feed].end))
            self.reader.holding.touch(feed)

    def drop(self) -> None:
        """Views die."""
        for life in self.lives:
            dead = [slot for slot, count in life.views.items() for _ in range(count) if self.rng.random() < 0.4]
            for slot in dead:
                life.views[slot] -= 1
            life.holding.on_released(SlotsReleased([(*slot, SIZE) for slot in dead]))

    def begin_anew(self) -> None:
        """A new life in the same process: what the old one handed out is still looked at."""
        if len(self.lives) < 3:
            old = self.reader
            self.leases.leave(Peer(old.context.card, self.now))
            self.lives.append(Reader(self.reader.context.incarnation + 1000, self.config))

    def die(self) -> None:
        """The process of all lives ends."""
        for life in self.lives:
            life.views.clear()
            self.leases.on_gone(ReaderGone("b", life.context.incarnation))
        self.links["b"].clear()
        self.dead = self.reader
        self.lives = [Reader(self.reader.context.incarnation + 1000, self.config)]

    def tick(self, *ms: int) -> None:
        self.now += self.rng.choice(ms or (5, 50, 1100)) * MS
        for context in (self.context, *(life.context for life in self.lives)):
            context.now = self.now
        self.leases.tick()
        self.reader.holding.tick()

    def play(self, steps: int) -> None:
        often = [self.publish, self.publish, self.read, self.handle, self.drop, self.carry, self.carry, self.tick]
        seldom = [self.forget, self.forget, self.follow, self.unfollow, self.begin_anew, self.die]
        self.follow()
        for _ in range(steps):
            self.rng.choice(often if self.rng.random() < 0.8 else seldom)()
            self.settle()
            self.leases.check_invariants()
            self.reader.holding.check_invariants()
        self.end()

    def end(self) -> None:
        """Everybody lets go, and nothing is lost but that, and the first question for it: all is free in the end."""
        self.loss = 1.0
        self.leases.on_forgotten(SlotsForgotten([(*slot, SIZE) for slot in self.retained]))
        self.retained.clear()
        for feed in FEEDS:
            self.reader.follows[feed].clear()
            self.reader.holding.end(feed)
        for _ in range(2):
            self.drop()
        while any(count for life in self.lives for count in life.views.values()):
            self.drop()
        for life in self.lives[:-1]:
            self.leases.on_gone(ReaderGone("b", life.context.incarnation))
        self.tick(1100)
        self.settle()
        self.loss = 0.0
        for _ in range(6):
            self.settle()
            self.carry(least=10**6)
            self.tick(1100)
        self.settle()
        assert not self.slots, f"{sorted(self.slots)} are never used again"


@pytest.mark.parametrize("block", range(5))
def test_no_slot_is_reused_that_is_looked_at_and_none_is_lost(block: int) -> None:
    for seed in range(block * 200, block * 200 + 200):
        Game(seed).play(150)
