"""Guards for your own calls: a circuit breaker, a token bucket, a retry schedule. Make one for each peer or topic.

    from collections import defaultdict
    from fabric.guards import CircuitBreaker

    breakers = defaultdict(CircuitBreaker)          # by peer
    with breakers["rank-3"].guard():                # raises CircuitOpenError while rank-3 is left alone
        fabric.request("evaluate", to=3)

Each may be shared by threads; its `snapshot` is an immutable value that shows its state at one moment. The rules are
in `fabric.core.guards`, without a clock, a lock or chance.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType

from fabric.core.guards import Breaker, BreakerState, Bucket, Budget, Retry
from fabric.errors import CircuitOpenError, ConfigError

__all__ = ["Breaker", "BreakerState", "Bucket", "Budget", "CircuitBreaker", "RetrySchedule", "TokenBucket"]

S = 1_000_000_000


class CircuitBreaker:
    """Leaves alone what keeps failing.

    After `failures` failures in a row (default 5) it is open: calls are refused for `rest_s` seconds (default 10).
    Then one call, the probe, is let through and decides: closed again, or open for another rest. `clock` gives
    monotonic nanoseconds. Raises `ConfigError` for anything not positive.
    """

    def __init__(
        self, *, failures: int = 5, rest_s: float = 10.0, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        _require(failures >= 1, "failures")
        _require(rest_s > 0, "rest_s")
        self._clock, self._lock = clock, threading.Lock()
        self._breaker = Breaker(failures, int(rest_s * S))

    @property
    def snapshot(self) -> Breaker:
        """Its state at this moment."""
        return self._breaker

    def admit(self) -> int | None:
        """A ticket for one call, or None: it is not let through. Tell its outcome to `succeed` or `fail`."""
        with self._lock:
            self._breaker, ticket = self._breaker.admit(self._clock())
        return ticket

    def succeed(self, ticket: int) -> None:
        """The call with this ticket went well."""
        with self._lock:
            self._breaker = self._breaker.succeed(ticket, self._clock())

    def fail(self, ticket: int) -> None:
        """The call with this ticket failed."""
        with self._lock:
            self._breaker = self._breaker.fail(ticket, self._clock())

    def give_up(self, ticket: int) -> None:
        """The call with this ticket ended without an outcome: it was interrupted."""
        with self._lock:
            self._breaker = self._breaker.give_up(ticket, self._clock())

    def guard(self) -> AbstractContextManager[None]:
        """Around one call: an exception that leaves the block is its failure, and goes on.

        Entering raises `CircuitOpenError` if the call is not let through. What is no `Exception`, an interrupt or a
        cancellation, is no outcome.
        """
        return _Guard(self)

    def __repr__(self) -> str:
        return f"CircuitBreaker({self.snapshot.state.value}, failures={self.snapshot.failures})"


class _Guard(AbstractContextManager[None]):
    """One call through a breaker."""

    def __init__(self, breaker: CircuitBreaker) -> None:
        self._breaker = breaker
        self._ticket = 0

    def __enter__(self) -> None:
        ticket = self._breaker.admit()
        if ticket is None:
            state = self._breaker.snapshot
            raise CircuitOpenError(state=state.state.value)
        self._ticket = ticket

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._breaker.succeed(self._ticket)
        elif issubclass(kind, Exception):
            self._breaker.fail(self._ticket)
        else:
            self._breaker.give_up(self._ticket)


class TokenBucket:
    """Lets `rate_per_s` through in the long run and at most `burst` at once.

    `clock` gives monotonic nanoseconds. Raises `ConfigError` for a rate below 0.001 or a burst below 1.
    """

    def __init__(self, rate_per_s: float, *, burst: int = 1, clock: Callable[[], int] = time.monotonic_ns) -> None:
        _require(rate_per_s >= 0.001, "rate_per_s")
        _require(burst >= 1, "burst")
        self._clock, self._lock = clock, threading.Lock()
        self._bucket = Bucket(rate_per_s, burst, clock())

    @property
    def snapshot(self) -> Bucket:
        """Its state at this moment."""
        return self._bucket

    def take(self, n: int = 1) -> bool:
        """Whether `n` may go through now; if so, they did. Never waits. Raises `ConfigError` if `n` is below 1."""
        _require(n >= 1, "n")
        with self._lock:
            bucket = self._bucket.take(n, self._clock())
            if bucket is not None:
                self._bucket = bucket
        return bucket is not None

    def wait_s(self, n: int = 1) -> float:
        """Seconds until `n` could go through, if nobody else took any; 0: now."""
        return self._bucket.wait_ns(n, self._clock()) / S

    def __repr__(self) -> str:
        return f"TokenBucket({self._bucket.rate_per_s}/s, level={self._bucket.level(self._clock())})"


class RetrySchedule:
    """When to try a failed call again: full jitter, a doubling ceiling, and a budget that all its calls share.

    A call is tried `attempts` times at most (default 5). Before the n-th retry it waits for a time drawn from 0 to
    `first_s * 2**(n - 1)` seconds, at most `max_s` (defaults 0.1 and 10). Of all calls at most `share` (default a
    tenth) are tried again, beyond a `reserve` (default 10) that calm times fill up: when everything fails, retries do
    not multiply the load. `chance` gives numbers from 0 to 1. Raises `ConfigError` for anything impossible.
    """

    def __init__(
        self,
        *,
        first_s: float = 0.1,
        max_s: float = 10.0,
        attempts: int = 5,
        share: float = 0.1,
        reserve: int = 10,
        chance: Callable[[], float] = random.random,
    ) -> None:
        _require(0 < first_s <= max_s, "first_s")
        _require(attempts >= 1, "attempts")
        _require(0 <= share <= 1, "share")
        _require(reserve >= 0, "reserve")
        self._first, self._attempts, self._chance = Retry(int(first_s * S), int(max_s * S)), attempts, chance
        self._lock, self._budget = threading.Lock(), Budget(share, reserve)

    @property
    def snapshot(self) -> Budget:
        """The state of its budget at this moment."""
        return self._budget

    def attempts(self) -> Iterator[float]:
        """One call: the seconds to wait before each of its attempts, 0 before the first.

        Leave the loop when an attempt went well; it ends when attempts or budget are used up.
        """
        with self._lock:
            self._budget = self._budget.call()
        retry = self._first
        yield 0.0
        for _ in range(self._attempts - 1):
            with self._lock:
                budget = self._budget.retry()
                if budget is None:
                    return
                self._budget = budget
            retry = retry.after(0, self._chance())
            yield retry.due_ns / S

    def __repr__(self) -> str:
        return f"RetrySchedule(attempts={self._attempts}, left={self._budget.left})"


def _require(holds: bool, field: str) -> None:
    if not holds:
        raise ConfigError("impossible", field=field)
