"""One handler: what waits in its lanes, when it is tried again, and the breaker that leaves it alone.

When all that it is given dies of one reason, the fault lies with the handler, or with what it needs, and not with the
messages: the breaker opens, and they wait where they are owed instead of filling the store of dead letters.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from fabric.core.guards import Breaker
from fabric.engine.inbox import Hand, Inbox
from fabric.message import Message, TriedMessage

__all__ = ["Handler", "Job", "Lane"]

Lane = tuple[str, str, int, bool]
"""Source, topic and seed, and whether it is that of letters which come again."""


class Job(NamedTuple):
    """A message to be handled, and its place in a hand."""

    message: TriedMessage
    hand: Hand
    position: int


class Handler:
    """One function on one pattern.

    `name`: what its letters are kept under. `blocked`: lanes whose first message runs, waits for its next attempt, or
    becomes a letter just now.
    """

    __slots__ = (
        "attempts",
        "blocked",
        "breaker",
        "crowded",
        "function",
        "hand",
        "inbox",
        "name",
        "parks",
        "position",
        "retries",
    )

    def __init__(
        self,
        function: Callable[[Message], object],
        inbox: Inbox,
        name: str,
        attempts: int,
        *,
        parks: bool,
        breaker: Breaker,
    ) -> None:
        self.function, self.inbox, self.name, self.attempts = function, inbox, name, attempts
        self.parks, self.breaker = parks, breaker
        self.blocked: dict[Lane, deque[Job]] = {}
        self.crowded: deque[Lane] = deque()
        """Blocked lanes that wait for the breaker, or until letters may wait for the store again."""
        self.retries: list[tuple[int, int, Lane]] = []
        self.hand: Hand | None = None
        self.position = 0

    def due_ns(self) -> int | None:
        """When the next attempt is due, or the breaker lets one through."""
        due_ns = self.retries[0][0] if self.retries else None
        if self.breaker.due_ns and (self.hand is not None or self.inbox.items or due_ns is not None or self.crowded):
            return max(due_ns or 0, self.breaker.due_ns)
        return due_ns

    def has_work(self, now: int, room: int) -> bool:
        """Whether there is something to run now, if so many more letters may wait for the store."""
        if now < self.breaker.due_ns:
            return False
        if self.hand is not None or self.inbox.items or (self.crowded and room > 0):
            return True
        return bool(self.retries and self.retries[0][0] <= now)
