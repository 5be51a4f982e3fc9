"""One subscriber stops for a while: others notice nothing, the publisher stays within its bound, and it catches up."""

from __future__ import annotations

import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import FabricConfig, Message, join
from fabric.config import BURST_BYTES_MAX, Liveness, Retention
from tests.harness.children import Child, Parent, child, children, forget_peak, peak_bytes, resident_bytes
from tests.harness.figures import show, soak
from tests.harness.waiting import until
from transports.base import SocketLimits

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

MIB = 1024 * 1024
QUEUE = SocketLimits().data_frames * BURST_BYTES_MAX
BEFORE_S = 1.5
"""How long everybody listens before one stops."""
WATCHFUL = replace(FabricConfig(), liveness=Liveness(suspect_s=1.5, down_s=3.0))
"""Who stops for 4 s is suspect first, then down; by default he would be after 4 and 10 s."""
CONFIGS = {
    "block": replace(WATCHFUL, retention=Retention(owed_bytes_max=128 * MIB, kept_bytes_max=8 * MIB)),
    "drop_oldest": replace(WATCHFUL, retention=Retention(owed_bytes_max=4 * MIB, kept_bytes_max=1 * MIB)),
}
TOPIC = "flow.health"


def publish_until_told(parent: Parent, spec: str, when_full: str, a_second: int, size: int) -> None:
    """Records that carry the time; when it is told, the last of them, and the end."""
    config = CONFIGS[when_full]
    with join(config, rank=0, world_size=3, rendezvous=spec) as fabric:
        publisher = fabric.publisher(TOPIC, when_full=when_full)
        publisher.wait_for_subscribers(2, timeout_s=30)
        forget_peak()
        base, began, sent = resident_bytes(), time.monotonic(), 0
        longest_ns = 0
        parent.say(flows=True)
        filling = bytes(size - 8)
        while not parent.spoke():
            now = time.monotonic_ns()
            publisher.publish(now.to_bytes(8, "little") + filling, seed=sent % 4)
            longest_ns = max(longest_ns, time.monotonic_ns() - now)
            sent += 1
            time.sleep(max(0.0, began + sent / a_second - time.monotonic()))
        grown = peak_bytes() - base
        retention = config.retention
        limit = (QUEUE + retention.owed_bytes_max + retention.kept_bytes_max) * 5 // 4 + 64 * MIB
        publisher.flush(timeout_s=30)
        parent.say(
            sent=sent,
            grown=grown,
            limit=limit,
            longest_ms=longest_ns / 1e6,
            dropped=fabric.statistics().get("dropped_oldest", 0),
        )
        fabric.close()


def delay_us(message: Message) -> float:
    return (time.monotonic_ns() - int.from_bytes(message.value[:8], "little")) / 1e3


def listen(parent: Parent, spec: str, rank: int, when_full: str) -> None:
    """Everything until the feed ends; between two words of the parent, the delays."""
    with join(CONFIGS[when_full], rank=rank, world_size=3, rendezvous=spec) as fabric:
        delays: list[float] = []
        offsets: list[int] = []
        lanes: dict[int, list[int]] = {}
        with fabric.subscribe("flow.**") as inbox:
            for message in inbox:
                delays.append(delay_us(message))
                offsets.append(message.offset)
                lanes.setdefault(message.seed, []).append(message.sequence)
                if len(offsets) % 32 == 1 and parent.spoke():
                    parent.hear()
                    parent.say(
                        median_us=statistics.median(delays),
                        p99_us=statistics.quantiles(delays, n=100)[98],
                        count=len(delays),
                    )
                    delays.clear()
            parent.say(
                joined=inbox.joined["rank-0", TOPIC],
                received=ranges(offsets),
                gaps=[(gap.first, gap.end, gap.reason) for gap in inbox.gaps],
                gaps_total=inbox.gaps_total,
                ordered=all(lane == sorted(set(lane)) for lane in lanes.values()),
                once=len(set(offsets)) == len(offsets),
            )


def ranges(offsets: list[int]) -> list[tuple[int, int]]:
    """Runs of offsets, sorted."""
    runs: list[tuple[int, int]] = []
    for offset in sorted(offsets):
        if runs and runs[-1][1] == offset:
            runs[-1] = (runs[-1][0], offset + 1)
        else:
            runs.append((offset, offset + 1))
    return runs


def ask(listener: Child) -> dict[str, Any]:
    listener.tell()
    return listener.hear()


def stop_one(
    tmp_path: Path, when_full: str, stopped_s: float, *, a_second: int, size: int
) -> dict[str, dict[str, Any]]:
    spec = f"file://{tmp_path}"
    with children(
        child(publish_until_told, spec=spec, when_full=when_full, a_second=a_second, size=size),
        child(listen, spec=spec, rank=1, when_full=when_full),
        child(listen, spec=spec, rank=2, when_full=when_full),
    ) as (publisher, victim, other):
        assert publisher.hear()["flows"]
        pass_time(BEFORE_S)
        before = ask(other)
        victim.signal(signal.SIGSTOP)
        pass_time(stopped_s)
        meanwhile = ask(other)
        victim.signal(signal.SIGCONT)
        pass_time(1.0)
        publisher.tell()
        told = {"sent": publisher.hear(60), "victim": victim.hear(60), "other": other.hear(60)}
        assert [one.exit_code() for one in (publisher, victim, other)] == [0, 0, 0]
    show(f"{when_full}, stopped for {stopped_s:g} s: before {before}, meanwhile {meanwhile}, {told}"[:2000])
    return told | {"before": before, "meanwhile": meanwhile}


def pass_time(seconds: float) -> None:
    """The subject of these tests is a time that passes while others work."""
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end, timeout_s=seconds + 10, what="time")


def check_all(told: dict[str, dict[str, Any]], who: str) -> None:
    """Received and gaps are everything from the join offset on, and no offset is both."""
    heard = told[who]
    assert heard["ordered"]
    assert heard["once"]
    assert heard["gaps_total"] == len(heard["gaps"])
    parts = sorted([*heard["received"], *([first, end] for first, end, _ in heard["gaps"])])
    assert [begin for begin, _ in parts] == [heard["joined"], *(end for _, end in parts[:-1])]
    assert parts[-1][1] == told["sent"]["sent"]


def check_others(told: dict[str, dict[str, Any]]) -> None:
    sent = told["sent"]
    assert sent["grown"] <= sent["limit"]
    assert told["meanwhile"]["median_us"] <= 3 * told["before"]["median_us"]
    assert told["other"]["received"] == [[told["other"]["joined"], sent["sent"]]]
    check_all(told, "other")


def check_catches_up_without_a_gap(told: dict[str, dict[str, Any]]) -> None:
    check_others(told)
    check_all(told, "victim")
    assert told["victim"]["gaps"] == []


def check_exact_gap(told: dict[str, dict[str, Any]]) -> None:
    check_others(told)
    check_all(told, "victim")
    lost = sum(end - first for first, end, _ in told["victim"]["gaps"])
    assert {reason for _, _, reason in told["victim"]["gaps"]} == {"gap"}
    assert 0 < lost <= told["sent"]["dropped"]


STEADY = {"a_second": 2000, "size": 1024}
FAST = {"a_second": 2000, "size": 8192}
"""16 MB a second: more than may be owed within a third of a second."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """Two jobs at once: most of their time passes in silence."""
    with ThreadPoolExecutor(2) as pool:
        jobs = {
            when_full: pool.submit(stop_one, tmp_path_factory.mktemp(when_full), when_full, 4.0, **rate)
            for when_full, rate in (("block", STEADY), ("drop_oldest", FAST))
        }
    return {when_full: job.result() for when_full, job in jobs.items()}


@pytest.mark.timeout(90)
def test_f08_a_subscriber_that_was_stopped_catches_up_without_a_gap_and_disturbs_nobody(both: dict[str, Any]) -> None:
    check_catches_up_without_a_gap(both["block"])


@pytest.mark.timeout(90)
def test_f08_where_the_oldest_is_dropped_a_stopped_subscriber_learns_exactly_what_it_missed(
    both: dict[str, Any],
) -> None:
    check_exact_gap(both["drop_oldest"])


@soak
@pytest.mark.timeout(120)
def test_a_subscriber_that_was_stopped_for_20_s_catches_up_without_a_gap(tmp_path: Path) -> None:
    check_catches_up_without_a_gap(stop_one(tmp_path, "block", 20.0, **STEADY))


@soak
@pytest.mark.timeout(120)
def test_where_the_oldest_is_dropped_20_s_leave_the_exact_gap(tmp_path: Path) -> None:
    check_exact_gap(stop_one(tmp_path, "drop_oldest", 20.0, **FAST))
