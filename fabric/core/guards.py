"""Guards: when to try again, when to stop trying, how much to let through.

All of them are immutable values: time and chance are arguments, a step gives the next value, and the value itself is
the state that can be looked at. Units are nanoseconds. Who shares one among threads holds a lock round each step:
`fabric.guards` does. The core's own repetitions are a `Retry`, its chance a number that follows from who it is and how
often it has drawn one (`chance_of`): the same history has the same waits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

__all__ = ["Breaker", "BreakerState", "Bucket", "Budget", "Retry", "chance_of"]

S = 1_000_000_000
MILLION = 1_000_000
_WORD = 2**64 - 1


def chance_of(seed: int, n: int) -> float:
    """The n-th number from 0 to 1 of a seed: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    word = (seed + n * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return ((word ^ (word >> 31)) >> 11) / 2**53


class Retry(NamedTuple):
    """When something is to be tried again. The wait doubles with each attempt up to `max_ns`."""

    wait_ns: int
    """The longest that the next wait can be: at first the shortest wait of the schedule."""
    max_ns: int
    due_ns: int = 0
    """When the next attempt is due; 0: at once."""
    least_ns: int = 0
    """What an answer needs: chance never makes a wait shorter."""

    @classmethod
    def beyond(cls, least_ns: int, max_ns: int, due_ns: int = 0) -> Retry:
        """Of a question that may be on its way: its first wait is whole, and none is shorter."""
        return cls(least_ns, max_ns, due_ns, least_ns)

    def postponed(self, now_ns: int) -> Retry:
        """The next attempt waits as long again, though none is made now."""
        return self._replace(due_ns=now_ns + self.wait_ns)

    def rested(self) -> Retry:
        """Nothing is under way; the next attempt is made at once."""
        return self._replace(due_ns=0)

    def after(self, now_ns: int, chance: float = 1.0) -> Retry:
        """An attempt is made now. The next is due after `chance` of the wait: drawn from 0 to 1, that is full jitter.

        Without chance it is the whole wait.
        """
        wait_ns = self.wait_ns if chance == 1.0 else max(self.least_ns, int(self.wait_ns * chance))
        return Retry(min(2 * self.wait_ns, self.max_ns), self.max_ns, now_ns + wait_ns, self.least_ns)


@dataclass(frozen=True, slots=True)
class Budget:
    """How many retries are allowed: at most `reserve`, and `share` of the calls.

    What a long calm saves up is bounded by the reserve: ten thousand calls that went well are no licence for a storm.
    """

    share: float
    """Retries for each call; 0.1 is one for ten."""
    reserve: int
    """The most that can be saved up, and what there is at first."""
    saved: int = -1
    """In millionths of a retry, so that the sum is exact; negative: the whole reserve."""

    @property
    def left(self) -> int:
        """Retries that are allowed now."""
        return self._millionths // MILLION

    @property
    def _millionths(self) -> int:
        return self.reserve * MILLION if self.saved < 0 else self.saved

    def call(self) -> Budget:
        """A call is made for the first time."""
        most = self.reserve * MILLION
        if not 0 <= self.saved < most:  # fast path: a full reserve earns nothing
            return self
        return replace(self, saved=min(most, self.saved + int(self.share * MILLION)))

    def retry(self) -> Budget | None:
        """A call is tried again; None if that is not allowed."""
        return replace(self, saved=self._millionths - MILLION) if self._millionths >= MILLION else None


class BreakerState(StrEnum):
    """Whether a circuit breaker lets calls through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    """One call, the probe, is under way; it decides."""


@dataclass(frozen=True, slots=True)
class Breaker:
    """A circuit breaker: after `failures_max` failures in a row nothing is let through for `rest_ns`; then one probe.

    An admitted call has a ticket, and its outcome counts only while the breaker has not changed its state since: what
    began before a breaker opened says nothing about what is now. A probe of which nothing is heard for `rest_ns` gives
    its place to another one.
    """

    failures_max: int
    rest_ns: int
    state: BreakerState = BreakerState.CLOSED
    failures: int = 0
    """In a row, while it is closed."""
    changed_ns: int = 0
    """When it came into this state."""
    ticket: int = 0
    """The ticket of those who are admitted in this state."""
    reason: str = ""
    """Of the latest failure. Failures of several reasons do not add up."""

    @property
    def due_ns(self) -> int:
        """From when on somebody may be let through; 0: always."""
        return 0 if self.state is BreakerState.CLOSED else self.changed_ns + self.rest_ns

    def admit(self, now_ns: int) -> tuple[Breaker, int | None]:
        """The breaker after somebody asked to be let through, and his ticket; None: he is not."""
        if self.state is BreakerState.CLOSED:
            return self, self.ticket
        if now_ns < self.due_ns:
            return self, None
        probing = self._become(BreakerState.HALF_OPEN, now_ns)
        return probing, probing.ticket

    def succeed(self, ticket: int, now_ns: int) -> Breaker:
        """The call with this ticket went well."""
        if ticket != self.ticket or self.state is BreakerState.OPEN:
            return self
        if self.state is BreakerState.HALF_OPEN:
            return self._become(BreakerState.CLOSED, now_ns)
        return replace(self, failures=0) if self.failures else self

    def fail(self, ticket: int, now_ns: int, reason: str = "") -> Breaker:
        """The call with this ticket failed, for a reason; a probe decides whatever the reason is."""
        if ticket != self.ticket or self.state is BreakerState.OPEN:
            return self
        failures = self.failures + 1 if reason == self.reason else 1
        if self.state is BreakerState.HALF_OPEN or failures >= self.failures_max:
            return self._become(BreakerState.OPEN, now_ns, reason)
        return replace(self, failures=failures, reason=reason)

    def give_up(self, ticket: int, now_ns: int) -> Breaker:
        """The call with this ticket ended without an outcome: if it was the probe, the next may be one at once."""
        if ticket != self.ticket or self.state is not BreakerState.HALF_OPEN:
            return self
        return self._become(BreakerState.OPEN, now_ns - self.rest_ns)

    def _become(self, state: BreakerState, now_ns: int, reason: str = "") -> Breaker:
        return replace(self, state=state, failures=0, changed_ns=now_ns, ticket=self.ticket + 1, reason=reason)


@dataclass(frozen=True, slots=True)
class Bucket:
    """A token bucket: at most `burst` at once, and `rate_per_s` in the long run.

    A clock that goes back is taken to stand still.
    """

    rate_per_s: float
    burst: int
    at_ns: int
    """Up to when the level is reckoned."""
    missing: int = 0
    """To full, in tokens times 10**15: thousandths of tokens a second and nanoseconds make that exact."""

    def level(self, now_ns: int) -> int:
        """The tokens that are there."""
        return (self.burst * _TOKEN - self._missing(now_ns)) // _TOKEN

    def _missing(self, now_ns: int) -> int:
        return max(0, self.missing - max(0, now_ns - self.at_ns) * self._milli_rate * 1000)

    @property
    def _milli_rate(self) -> int:
        return max(1, int(self.rate_per_s * 1000))

    def take(self, n: int, now_ns: int) -> Bucket | None:
        """The bucket without `n` tokens; None if there are fewer."""
        missing = self._missing(now_ns) + n * _TOKEN
        if missing > self.burst * _TOKEN:
            return None
        return replace(self, at_ns=max(self.at_ns, now_ns), missing=missing)

    def wait_ns(self, n: int, now_ns: int) -> int:
        """How long until `n` tokens are there, if nobody takes any; of more than `burst`, until it is full."""
        lacking = self._missing(now_ns) + min(n, self.burst) * _TOKEN - self.burst * _TOKEN
        return max(0, -(-lacking // (self._milli_rate * 1000))) + max(0, self.at_ns - now_ns) * (lacking > 0)


_TOKEN = S * MILLION
