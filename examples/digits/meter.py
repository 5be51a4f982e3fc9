"""Stop watch and order check: what the fabric costs a training step, and whether it kept its word."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["Meter", "Witness"]


class Meter:
    """Adds up the wall time inside its `with` blocks, in nanoseconds."""

    def __init__(self) -> None:
        self.spent_ns = 0
        self._since = 0

    def __enter__(self) -> Meter:
        self._since = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self.spent_ns += time.perf_counter_ns() - self._since


class Witness:
    """Hears everything that all ranks publish about layers and checks that each lane is dense and in order.

    A lane is one seed of one topic of one source: its sequences must be 0, 1, 2, ... without a hole.
    """

    def __init__(self, fabric: Any, meter: Meter) -> None:  # noqa: ANN401
        self._inbox, self._meter = fabric.subscribe("layers.**"), meter
        self._next: dict[tuple[Any, str, int], int] = {}
        self.received = self.healths = self.broken = 0

    @property
    def lanes(self) -> int:
        """Lanes seen."""
        return len(self._next)

    def take(self) -> int:
        """Check what is here, without waiting; how many messages it was."""
        with self._meter:
            messages = [
                (message.source, message.topic, message.seed, message.sequence) for message in self._inbox.drain()
            ]
        for message in messages:
            self._check(*message)
        return len(messages)

    def wait_for(self, total: int, *, timeout_s: float) -> int:
        """Take until so many messages came in all, or the time is over; how many are missing."""
        deadline = time.monotonic() + timeout_s
        while self.received < total and (left := deadline - time.monotonic()) > 0:
            try:
                message = self._inbox.receive(timeout_s=left)
            except TimeoutError:
                break
            self._check(message.source, message.topic, message.seed, message.sequence)
        # A message counts as handled at the next call; without it a rank that closes would wait for the last one.
        self._inbox.drain()
        return total - self.received

    def _check(self, source: Any, topic: str, seed: int, sequence: int) -> None:  # noqa: ANN401
        lane = (source, topic, seed)
        self.broken += sequence != self._next.get(lane, 0)
        self._next[lane] = sequence + 1
        self.received += 1
        self.healths += topic.endswith(".health")
