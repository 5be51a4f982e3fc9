"""Guards against plain models of them: whatever the order of calls, outcomes, times and chance."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fabric.core.guards import Breaker, BreakerState, Bucket, Budget, Retry, chance_of

S = 1_000_000_000
PAUSES = st.integers(0, 3 * S)


@given(st.integers(1, S), st.integers(0, 5 * S), st.lists(st.floats(0, 1), max_size=40), st.integers(0, 2**62))
def test_a_wait_is_drawn_from_zero_to_a_ceiling_that_doubles(
    first_ns: int, more_ns: int, chances: list[float], now_ns: int
) -> None:
    retry = Retry(first_ns, first_ns + more_ns)
    for attempt, chance in enumerate(chances):
        ceiling_ns = min(first_ns * 2**attempt, first_ns + more_ns)
        assert retry.wait_ns == ceiling_ns
        retry = retry.after(now_ns, chance)
        assert now_ns <= retry.due_ns <= now_ns + ceiling_ns
        assert retry.due_ns == now_ns + int(ceiling_ns * chance)


@given(st.integers(1, S), st.integers(0, S))
def test_without_chance_the_wait_is_whole_and_one_that_is_postponed_does_not_grow(first_ns: int, now_ns: int) -> None:
    retry = Retry(first_ns, 4 * first_ns)
    assert retry.postponed(now_ns) == (first_ns, 4 * first_ns, now_ns + first_ns, 0)
    waits = []
    for _ in range(4):
        retry = retry.after(now_ns)
        waits.append(retry.due_ns - now_ns)
    assert waits == [first_ns, 2 * first_ns, 4 * first_ns, 4 * first_ns]


@given(st.integers(1, S), st.integers(0, 5 * S), st.lists(st.floats(0, 1), max_size=40))
def test_the_first_wait_for_an_answer_is_whole_and_none_is_shorter(
    least_ns: int, more_ns: int, chances: list[float]
) -> None:
    retry = Retry.beyond(least_ns, least_ns + more_ns)
    for attempt, chance in enumerate(chances):
        ceiling_ns = retry.wait_ns
        retry = retry.after(0, chance)
        assert least_ns <= retry.due_ns <= ceiling_ns
        assert attempt or retry.due_ns == least_ns
        assert retry.postponed(0).least_ns == retry.rested().least_ns == least_ns


def test_chance_follows_from_who_draws_and_how_often() -> None:
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # splitmix64.c of Vigna, seed 0
    assert [int(chance_of(0, n) * 2**53) for n in (1, 2, 3)] == [word >> 11 for word in reference]
    drawn = [chance_of(seed, n) for seed in range(100) for n in range(100)]
    assert len(set(drawn)) == 10_000 and min(drawn) >= 0 and max(drawn) < 1
    tenths = [sum(n <= 10 * each < n + 1 for each in drawn) for n in range(10)]
    assert min(tenths) > 900 and max(tenths) < 1100


@given(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), st.integers(0, 5), st.lists(st.booleans(), max_size=200))
def test_retries_are_at_most_a_share_of_the_calls_beyond_the_reserve(
    share: float, reserve: int, retries: list[bool]
) -> None:
    budget, calls, spent = Budget(share, reserve), 0, 0
    for is_retry in retries:
        if is_retry:
            granted = budget.retry()
            assert (granted is None) is (budget.left == 0)
            spent += granted is not None
            budget = granted or budget
        else:
            budget, calls = budget.call(), calls + 1
        assert 0 <= budget.left <= reserve
        assert spent <= reserve + share * calls


def test_a_long_calm_saves_up_no_more_than_the_reserve() -> None:
    budget = Budget(0.5, 3)
    for _ in range(1000):
        budget = budget.call()
    spent = 0
    while (granted := budget.retry()) is not None:
        budget, spent = granted, spent + 1
    assert spent == 3
    assert budget.call().retry() is None
    assert budget.call().call().retry() is not None


@given(
    st.floats(0.001, 1e6),
    st.integers(1, 50),
    st.lists(st.tuples(PAUSES, st.integers(1, 60)), max_size=60),
)
def test_a_bucket_lets_through_its_burst_and_its_rate_and_not_one_more(
    rate_per_s: float, burst: int, asked: list[tuple[int, int]]
) -> None:
    bucket, now_ns, taken = Bucket(rate_per_s, burst, 0), 0, 0
    for pause_ns, n in asked:
        now_ns += pause_ns
        there, wait_ns = bucket.level(now_ns), bucket.wait_ns(n, now_ns)
        got = bucket.take(n, now_ns)
        assert 0 <= there <= burst
        assert (got is not None) is (n <= there)
        assert (wait_ns == 0) is (min(n, burst) <= there)
        assert bucket.level(now_ns + wait_ns) >= min(n, burst)
        assert not wait_ns or bucket.level(now_ns + wait_ns - 1) < min(n, burst)
        if got is not None:
            assert got.level(now_ns) == there - n
            bucket, taken = got, taken + n
        assert taken <= burst + rate_per_s * now_ns / S


@given(st.integers(0, 10 * S), st.integers(1, 5))
def test_a_clock_that_goes_back_gives_a_bucket_nothing(back_ns: int, n: int) -> None:
    bucket = Bucket(10.0, 5, 20 * S).take(n, 20 * S)
    assert bucket is not None
    before = 20 * S - back_ns
    assert bucket.level(before) == 5 - n
    assert bucket.wait_ns(5, before) == back_ns + n * S // 10
    again = bucket.take(5 - n, before) if n < 5 else bucket
    assert again is not None
    assert again.level(20 * S) == 0


STEPS = st.lists(st.tuples(st.sampled_from(["admit", "succeed", "fail", "give up"]), PAUSES, st.integers(0, 9)))


@given(st.integers(1, 3), st.integers(1, 4 * S), STEPS)
def test_a_breaker_does_what_its_three_states_say(
    failures_max: int, rest_ns: int, steps: list[tuple[str, int, int]]
) -> None:
    breaker, now_ns, tickets, probes = Breaker(failures_max, rest_ns), 0, [0], set[int]()
    for what, pause_ns, pick in steps:
        now_ns, before = now_ns + pause_ns, breaker
        ticket = tickets[-1 - pick % len(tickets)]
        if what == "admit":
            breaker, got = breaker.admit(now_ns)
            rested = now_ns - before.changed_ns >= rest_ns
            assert (got is not None) is (before.state is BreakerState.CLOSED or rested)
            if got is not None:
                tickets.append(got)
            if before.state is not BreakerState.CLOSED and got is not None:
                assert got not in probes, "each probe has a ticket of its own"
                probes.add(got)
            continue
        step = {"succeed": breaker.succeed, "fail": breaker.fail, "give up": breaker.give_up}[what]
        breaker = step(ticket, now_ns)
        assert breaker == _expected(before, what, ticket == before.ticket, now_ns)
        assert 0 <= breaker.failures < failures_max


def _expected(before: Breaker, what: str, counts: bool, now_ns: int) -> Breaker:
    """The table of transitions, written another way."""
    common = (before.failures_max, before.rest_ns)
    opened = Breaker(*common, BreakerState.OPEN, 0, now_ns, before.ticket + 1)
    if not counts or before.state is BreakerState.OPEN:
        return before
    if before.state is BreakerState.HALF_OPEN:
        closed = Breaker(*common, BreakerState.CLOSED, 0, now_ns, before.ticket + 1)
        rested = Breaker(*common, BreakerState.OPEN, 0, now_ns - before.rest_ns, before.ticket + 1)
        return {"succeed": closed, "fail": opened, "give up": rested}[what]
    if what == "fail" and before.failures + 1 == before.failures_max:
        return opened
    failures = {"succeed": 0, "fail": before.failures + 1, "give up": before.failures}[what]
    return Breaker(*common, BreakerState.CLOSED, failures, before.changed_ns, before.ticket)
