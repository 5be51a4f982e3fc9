"""A fuse for one handler: when all that it is given dies of one reason, it gets nothing for a while.

Then the fault lies with the handler, or with what it needs, and not with the messages; they wait where they are owed
instead of filling the store of dead letters. A breaker of the core may take its place one day.
"""

from __future__ import annotations

from fabric.config import Letters

__all__ = ["Fuse"]

S = 1_000_000_000


class Fuse:
    """Counts deaths of one reason that no success interrupts. Time is an argument, in nanoseconds."""

    __slots__ = ("_deaths", "_max", "_pause_ns", "_reason", "until_ns")

    def __init__(self, limits: Letters) -> None:
        self._max, self._pause_ns = limits.same_reason_max, int(limits.pause_s * S)
        self._reason, self._deaths = "", 0
        self.until_ns = 0
        """It is blown until then."""

    def hold(self) -> None:
        """A message was handled."""
        self._deaths = 0

    def burn(self, reason: str, now_ns: int) -> bool:
        """A message died; whether the fuse blows with it. After the pause the next death blows it again."""
        self._deaths = self._deaths + 1 if reason == self._reason else 1
        self._reason = reason
        if self._deaths < self._max or now_ns < self.until_ns:
            return False
        self.until_ns = now_ns + self._pause_ns
        return True
