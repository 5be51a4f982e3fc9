"""The guards that users share among threads: their steps are atomic, and their outcomes count once."""

from __future__ import annotations

import contextlib
import select
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from fabric.errors import CircuitOpenError, ConfigError
from fabric.guards import Breaker, BreakerState, CircuitBreaker, RetrySchedule, TokenBucket
from tests.harness.waiting import until

S = 1_000_000_000
THREADS = 8
ROUNDS = 60
TURNS = 20
"""How often whoever reads the clock lets others run."""


class Clock:
    """Time that a test sets; reading it lets other threads run, so that what is not atomic is torn apart."""

    def __init__(self) -> None:
        self.now_ns = 0

    def __call__(self) -> int:
        for _ in range(TURNS):
            select.select([], [], [], 0)
        return self.now_ns


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(pool: ThreadPoolExecutor, function: object) -> list[object]:
    """What each of all threads got, which began at the same time."""
    barrier = threading.Barrier(THREADS)

    def run() -> object:
        barrier.wait(10)
        assert callable(function)
        return function()

    return [future.result(10) for future in [pool.submit(run) for _ in range(THREADS)]]


def probes(breaker: CircuitBreaker, clock: Clock) -> int:
    """The most probes that were let through at once, in many rounds of failing and resting."""
    most = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            clock.now_ns += 10 * S
            tickets = [ticket for ticket in together(pool, breaker.admit) if ticket is not None]
            most = max(most, len(tickets))
            for ticket in tickets:
                assert isinstance(ticket, int)
                breaker.fail(ticket)
    return most


def opened(clock: Clock) -> CircuitBreaker:
    breaker = CircuitBreaker(failures=1, rest_s=10.0, clock=clock)
    ticket = breaker.admit()
    assert ticket is not None
    breaker.fail(ticket)
    return breaker


def test_of_many_threads_exactly_one_is_the_probe() -> None:
    clock = Clock()
    assert probes(opened(clock), clock) == 1


def test_without_its_lock_a_breaker_is_caught_by_the_same_hammer() -> None:
    clock = Clock()
    breaker = opened(clock)
    breaker._lock = contextlib.nullcontext()  # type: ignore[assignment]
    until(lambda: probes(breaker, clock) > 1)


def failures_counted(breaker: CircuitBreaker) -> int:
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            together(pool, lambda: breaker.fail(0))
    return breaker.snapshot.failures


def test_of_the_failures_of_many_threads_none_is_lost() -> None:
    assert failures_counted(CircuitBreaker(failures=10**6, clock=Clock())) == THREADS * ROUNDS

    def is_torn() -> bool:
        breaker = CircuitBreaker(failures=10**6, clock=Clock())
        breaker._lock = contextlib.nullcontext()  # type: ignore[assignment]
        return failures_counted(breaker) < THREADS * ROUNDS

    until(is_torn)


def tokens_taken(bucket: TokenBucket) -> int:
    with ThreadPoolExecutor(THREADS) as pool:
        return sum(map(bool, [got for _ in range(ROUNDS) for got in together(pool, bucket.take)]))


def test_many_threads_take_no_token_twice() -> None:
    assert tokens_taken(TokenBucket(1.0, burst=300, clock=Clock())) == 300

    def is_torn() -> bool:
        bucket = TokenBucket(1.0, burst=300, clock=Clock())
        bucket._lock = contextlib.nullcontext()  # type: ignore[assignment]
        return tokens_taken(bucket) > 300

    until(is_torn)


def test_a_guarded_call_that_raises_is_a_failure_and_an_open_breaker_refuses() -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=2, rest_s=5.0, clock=clock)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), breaker.guard():
            raise ZeroDivisionError
    assert repr(breaker) == "CircuitBreaker(open, failures=0)"
    with pytest.raises(CircuitOpenError, match="the circuit breaker is open"), breaker.guard():
        pytest.fail("it was let through")
    clock.now_ns = 5 * S
    with breaker.guard():
        assert breaker.snapshot.state is BreakerState.HALF_OPEN
        with pytest.raises(CircuitOpenError, match="half_open"), breaker.guard():
            pytest.fail("a second probe")
    assert breaker.snapshot.state is BreakerState.CLOSED


def test_an_interrupt_is_no_outcome_and_gives_the_probe_back() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now_ns = 10 * S
    with pytest.raises(KeyboardInterrupt), breaker.guard():
        raise KeyboardInterrupt
    with breaker.guard():
        pass
    assert breaker.snapshot.state is BreakerState.CLOSED


def test_what_began_before_a_breaker_opened_does_not_decide_about_it() -> None:
    clock = Clock()
    breaker = CircuitBreaker(failures=1, rest_s=10.0, clock=clock)
    early, late = breaker.admit(), breaker.admit()
    assert early is not None
    assert late is not None
    breaker.fail(early)
    breaker.succeed(late)
    assert breaker.snapshot.state is BreakerState.OPEN


def test_failures_of_several_reasons_do_not_add_up() -> None:
    breaker = Breaker(3, 10)
    for reason in ("a", "a", "b", "b"):
        breaker = breaker.fail(0, 0, reason)
    assert (breaker.state, breaker.failures, breaker.reason, breaker.due_ns) == (BreakerState.CLOSED, 2, "b", 0)
    breaker = breaker.succeed(0, 0).fail(0, 0, "b").fail(0, 0, "b")
    assert breaker.state is BreakerState.CLOSED
    breaker = breaker.fail(0, 5, "b")
    assert (breaker.state, breaker.reason, breaker.due_ns) == (BreakerState.OPEN, "b", 15)
    assert breaker.admit(14) == (breaker, None)
    breaker, ticket = breaker.admit(15)
    assert ticket is not None and breaker.admit(24)[1] is None, "one probe"
    undecided = breaker.give_up(ticket, 20)
    assert (undecided.state, undecided.due_ns) == (BreakerState.OPEN, 20)
    breaker = breaker.fail(ticket, 30, "another")
    assert (breaker.state, breaker.reason, breaker.due_ns) == (BreakerState.OPEN, "another", 40)


def test_a_probe_that_is_never_heard_of_gives_its_place_to_another() -> None:
    clock = Clock()
    breaker = opened(clock)
    clock.now_ns = 10 * S
    lost = breaker.admit()
    assert lost is not None
    assert breaker.admit() is None
    clock.now_ns = 20 * S
    probe = breaker.admit()
    assert probe not in (None, lost)
    breaker.succeed(lost)
    assert breaker.snapshot.state is BreakerState.HALF_OPEN


def test_a_bucket_says_how_long_to_wait() -> None:
    clock = Clock()
    bucket = TokenBucket(2.0, burst=3, clock=clock)
    assert bucket.take(3)
    assert not bucket.take()
    assert bucket.wait_s() == 0.5
    assert repr(bucket) == "TokenBucket(2.0/s, level=0)"
    clock.now_ns = S
    assert (bucket.take(2), bucket.wait_s(10)) == (True, 1.5)
    assert bucket.snapshot.at_ns == S


def test_a_schedule_waits_with_full_jitter_and_ends_with_its_attempts() -> None:
    chances = iter([0.5, 1.0, 0.25])
    schedule = RetrySchedule(first_s=1.0, max_s=3.0, attempts=4, chance=lambda: next(chances))
    assert list(schedule.attempts()) == [0.0, 0.5, 2.0, 0.75]
    assert schedule.snapshot.left == 7
    assert repr(schedule) == "RetrySchedule(attempts=4, left=7)"


def test_when_everything_fails_retries_are_a_share_of_the_calls() -> None:
    schedule = RetrySchedule(attempts=5, share=0.1, reserve=10)
    tries = sum(len(list(schedule.attempts())) for _ in range(1000))
    assert tries - 1000 <= 10 + 100


@pytest.mark.parametrize(
    "make",
    [
        lambda: CircuitBreaker(failures=0),
        lambda: CircuitBreaker(rest_s=0),
        lambda: TokenBucket(0.0),
        lambda: TokenBucket(1.0, burst=0),
        lambda: TokenBucket(1.0).take(0),
        lambda: RetrySchedule(first_s=0.0),
        lambda: RetrySchedule(first_s=2.0, max_s=1.0),
        lambda: RetrySchedule(attempts=0),
        lambda: RetrySchedule(share=1.5),
        lambda: RetrySchedule(reserve=-1),
    ],
)
def test_what_is_impossible_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(ConfigError):
        make()
