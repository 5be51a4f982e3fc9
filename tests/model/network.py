"""The links between the actors of the model: worse than ZeroMQ, on purpose."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, Protocol

from tests.model.words import Options

if TYPE_CHECKING:
    from tests.model.checker import Checker

Address = tuple[str, int]
"""Who, and in which of his lives: a connection ends with either of its ends."""


class Network:
    """One queue for all links. Until calm, any message may be lost, doubled, delayed and thereby overtaken.

    A cut link loses all. Control, push and bulk links are equally bad.
    """

    def __init__(self, rng: random.Random, options: Options) -> None:
        self.rng, self.options = rng, options
        self.queue: list[tuple[float, int, int, Address, Address, str, tuple[Any, ...]]] = []
        self.now, self.calm = 1.0, False
        self.cut: set[tuple[str, str]] = set()
        self.sent = self.lost = self.doubled = 0

    def send(self, source: Address, target: Address, kind: str, body: tuple[Any, ...]) -> None:
        self.sent += 1
        if not self.calm and ((source[0], target[0]) in self.cut or self.rng.random() < self.options.loss):
            self.lost += 1
            return
        copies = 2 if not self.calm and self.rng.random() < self.options.doubling else 1
        self.doubled += copies - 1
        for copy in range(copies):
            late = not self.calm and self.rng.random() < self.options.stragglers
            due = self.now + self.rng.expovariate(1 / self.options.delay) * (30 if late else 1)
            heappush(self.queue, (due, self.sent, copy, source, target, kind, body))

    def run(self, duration: float, deliver: Callable[[Address, Address, str, tuple[Any, ...]], None]) -> None:
        until = self.now + duration
        while self.queue and self.queue[0][0] <= until:
            self.now, _, _, source, target, kind, body = heappop(self.queue)
            deliver(source, target, kind, body)
        self.now = until


class World(Protocol):
    """What an actor sees of its world."""

    rng: random.Random
    options: Options
    network: Network
    checker: Checker
    counts: Counter[str]
    handler_is_broken: bool

    def addresses(self) -> list[Address]:
        """The subscribers that are up: the rendezvous."""


class Actor:
    """What publisher and subscriber share: a place on the network, the options, and a checker that looks on."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.up, self.life = world, name, False, 0
        self.options, self.network, self.check, self.counts = world.options, world.network, world.checker, world.counts

    @property
    def address(self) -> Address:
        return self.name, self.life

    def send(self, target: Address, kind: str, *body: object) -> None:
        self.network.send(self.address, target, kind, body)

    def tick(self) -> None:
        """Time passes."""
        raise NotImplementedError

    def receive(self, source: Address, kind: str, body: tuple[Any, ...]) -> None:
        getattr(self, "on_" + kind)(source, *body)
