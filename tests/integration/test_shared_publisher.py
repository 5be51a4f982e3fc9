"""One publisher under several threads, and under signals: numbers stay dense, and nobody waits for ever."""

from __future__ import annotations

import signal
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator

import pytest

from fabric import Fabric, FabricConfig, join
from fabric.config import BURST_BYTES_MAX, Work
from fabric.core.wire import RECORD_BYTES
from fabric.engine.outbox import ROW
from fabric.publisher import Publisher

THREADS, EACH, MANY, SEEDS = 4, 10_000, 80, 3
INTERRUPTS = 100


@pytest.fixture
def alone() -> Iterator[Fabric]:
    with join(FabricConfig(work=Work(burst_age_ms=1000.0)), rank=0, world_size=1) as fabric:
        yield fabric


Told = dict[bytes, tuple[int, int]]
"""Seed and sequence of each value."""


def publish_in_every_way(publisher: Publisher, mine: int, told: Told) -> None:
    for number in range(EACH):
        value, seed = b"%d:%d" % (mine, number), number % SEEDS
        if number % 100 == 0:
            values = [b"%d:%d:%d" % (mine, number, other) for other in range(MANY)]
            seeds = [other % SEEDS for other in range(MANY)]
            told |= zip(values, zip(seeds, publisher.publish_many(values, seeds=seeds), strict=True), strict=True)
        if number % 7 == 0:
            told[value] = seed, publisher.publish(value, seed=seed, metadata={"n": number})
        else:
            told[value] = seed, publisher.publish(value, seed=seed)


def watch_sizes(publisher: Publisher) -> list[tuple[int, int]]:
    """What each burst is said to take when it is closed, and what it takes."""
    sizes: list[tuple[int, int]] = []
    close = publisher._close

    def close_and_look() -> None:
        noted = sum(map(len, publisher.metadata.values()))
        sizes.append((publisher.size, noted + sum(len(body) + RECORD_BYTES for body in publisher.rows[4::ROW])))
        close()

    publisher._close = close_and_look  # type: ignore[method-assign]
    return sizes


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns in the middle of everything."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless")
def test_threads_that_share_a_publisher_get_dense_numbers_in_the_order_of_arrival(alone: Fabric) -> None:
    inbox, publisher = alone.subscribe("t"), alone.publisher("t", when_full="block")
    sizes = watch_sizes(publisher)
    told: list[Told] = [{} for _ in range(THREADS)]
    threads = [threading.Thread(target=publish_in_every_way, args=(publisher, n, told[n])) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    arrived: Told = {}
    lanes: dict[int, int] = defaultdict(int)
    for _ in range(THREADS * (EACH + MANY * EACH // 100)):
        message = inbox.receive(timeout_s=30)
        assert message.sequence == lanes[message.seed]
        lanes[message.seed] += 1
        arrived[message.value] = message.seed, message.sequence
    for thread in threads:
        thread.join(timeout=30)
    assert [size for size, actual in sizes if size != actual] == []
    assert arrived == {value: where for mine in told for value, where in mine.items()}


class Interrupted(Exception):
    """What the handler raises."""


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer would be interrupted, too, and holds a lock itself")
def test_a_signal_between_any_two_instructions_of_a_publish_leaves_whole_numbers(alone: Fabric) -> None:
    inbox, publisher = alone.subscribe("t"), alone.publisher("t", when_full="block")
    armed, interrupts, number, expected = False, 0, 0, -1

    def on_alarm(*_: object) -> None:
        nonlocal interrupts
        if armed:
            interrupts += 1
            raise Interrupted

    before = signal.signal(signal.SIGVTALRM, on_alarm)  # the other alarm belongs to the timeouts of tests
    signal.setitimer(signal.ITIMER_VIRTUAL, 0.0003, 0.0003)
    returned: dict[int, int] = {}
    try:
        while interrupts < INTERRUPTS:
            if publisher.size > BURST_BYTES_MAX // 2:  # what follows the fast path is not interrupted here
                publisher.close_burst()
                expected = publisher.publish(b"%d" % number)
                returned[number] = expected
                number += 1
            try:
                armed = True
                returned[number] = publisher.publish(b"%d" % number)
                armed = False
            except Interrupted:
                armed = False
            number += 1
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    publisher.close_burst()
    last = publisher.publish(b"last")
    publisher.close_burst()
    arrived: dict[int, bytes] = {}
    while len(arrived) <= last:
        message = inbox.receive(timeout_s=30)
        assert message.sequence == len(arrived)
        arrived[message.sequence] = message.value
    assert arrived.pop(last) == b"last"
    values = [int(value) for value in arrived.values()]
    assert values == sorted(set(values)), "each at most once, in order"
    assert {sequence: int(arrived[sequence]) for sequence in returned.values()} == {
        sequence: value for value, sequence in returned.items()
    }
