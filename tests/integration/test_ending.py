"""How members end: by themselves, by signals, by SIGKILL; what peers see of it, and that nobody waits for ever."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import CloseReport, Fabric, FabricConfig, Message, join
from fabric.config import Liveness, Retention, Work
from fabric.errors import ClosedError
from fabric.rendezvous import find
from tests.harness.children import Parent, child
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

MIB = 1024 * 1024
WATCHFUL = replace(FabricConfig(), liveness=Liveness(heartbeat_ms=200, suspect_s=0.8, down_s=3.0))
"""Death is asked for after 0.8 s of silence instead of 4."""
JOB = "ending"


# Ends that a member brings about itself. Each publishes a few records first; none of them may be lost.


def leave_by(parent: Parent, spec: str, how: str) -> None:
    config = replace(WATCHFUL, work=Work(handlers="step")) if how == "exit_in_step_handler" else WATCHFUL
    fabric = join(config, rank=1, world_size=2, rendezvous=spec, job=JOB)
    fabric.publisher("words.last").wait_for_subscribers(1, timeout_s=20)
    for number in range(10):
        fabric.publish("words.last", number)
    WAYS[how](parent, fabric)


def by_exception(parent: Parent, fabric: Fabric) -> None:
    with fabric:
        raise ArithmeticError("the loss is not a number")


def by_signal(parent: Parent, fabric: Fabric) -> None:
    with fabric:
        parent.say(ready=True)
        fabric.subscribe("nothing.ever").receive(timeout_s=60)


def by_signal_outside_with(parent: Parent, fabric: Fabric) -> None:
    parent.say(ready=True)
    while True:
        time.sleep(0.1)  # short: a signal between the interpreter's last look and its sleep is seen only after it


def by_exit_without_close(parent: Parent, fabric: Fabric) -> None:
    return


def by_exit_in_step_handler(parent: Parent, fabric: Fabric) -> None:
    @fabric.respond("end")
    def end(request: object) -> None:
        sys.exit(7)

    parent.say(ready=True)
    with fabric:
        fabric.serve(60)


def by_close_in_handler(parent: Parent, fabric: Fabric) -> None:
    done = threading.Event()

    @fabric.respond("end")
    def end(request: object) -> None:
        fabric.close(timeout_s=2)
        done.set()

    parent.say(ready=True)
    assert done.wait(30)


untraced = pytest.mark.skipif(
    sys.gettrace() is not None,
    reason="coverage has a SIGTERM handler of its own, and ours goes over the default one only",
)
WAYS: dict[str, Callable[[Parent, Fabric], None]] = {
    "exception": by_exception,
    "signal": by_signal,
    "signal_outside_with": by_signal_outside_with,
    "exit_without_close": by_exit_without_close,
    "exit_in_step_handler": by_exit_in_step_handler,
    "close_in_handler": by_close_in_handler,
}


def see_off(
    tmp_path: Path, how: str, act: Callable[[Any, Fabric], None] = lambda leaver, fabric: None, *, quiet: bool = False
) -> int:
    """Join a member that leaves, look at what is seen of it; returns its exit code."""
    spec = f"file://{tmp_path}"
    with child(leave_by, spec=spec, how=how) as leaver:
        with join(WATCHFUL, rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric:
            with fabric.subscribe("words.**") as inbox:
                act(leaver, fabric)
                assert [message.value for message in inbox] == list(range(10)), "ends when the feed is over"
                assert inbox.gaps == (), "its end is known"
            assert fabric.peers["rank-1"].state == "left"
        code = leaver.exit_code()
    assert find(JOB) == [], "its card is withdrawn"
    return code


def test_an_exception_in_the_with_block_closes_cleanly(tmp_path: Path) -> None:
    assert see_off(tmp_path, "exception") == 1


def signalled(number: int) -> Callable[[Any, Fabric], None]:
    def act(leaver: Any, fabric: Fabric) -> None:
        leaver.hear()
        leaver.signal(number)

    return act


def test_sigint_closes_cleanly(tmp_path: Path) -> None:
    assert see_off(tmp_path, "signal", signalled(signal.SIGINT)) == -signal.SIGINT


@untraced
def test_sigterm_closes_cleanly_and_exits_with_143(tmp_path: Path) -> None:
    assert see_off(tmp_path, "signal", signalled(signal.SIGTERM)) == 143


@untraced
def test_sigterm_closes_a_fabric_that_nobody_closes(tmp_path: Path) -> None:
    assert see_off(tmp_path, "signal_outside_with", signalled(signal.SIGTERM)) == 143


def test_the_end_of_the_program_closes_a_fabric_that_nobody_closes(tmp_path: Path) -> None:
    assert see_off(tmp_path, "exit_without_close") == 0


def asked_to_end(leaver: Any, fabric: Fabric) -> None:
    leaver.hear()
    threading.Thread(target=lambda: ask_to_end(fabric)).start()


def ask_to_end(fabric: Fabric) -> None:
    try:
        fabric.request("end", to=1, timeout_s=30)
    except Exception as error:  # noqa: BLE001 - it is gone before it answers
        assert "left" in str(error) or isinstance(error, ClosedError), error


def test_sys_exit_in_a_step_handler_ends_the_program_cleanly(tmp_path: Path) -> None:
    assert see_off(tmp_path, "exit_in_step_handler", asked_to_end) == 7


def test_a_handler_may_close_its_fabric(tmp_path: Path) -> None:
    assert see_off(tmp_path, "close_in_handler", asked_to_end) == 0


def exit_in_a_handler_thread(parent: Parent, spec: str) -> None:
    with join(WATCHFUL, rank=1, world_size=2, rendezvous=spec) as fabric:
        handled = []

        @fabric.on("words.**", attempts=2)
        def leave(message: Message) -> None:
            if message.value == 0:
                sys.exit(7)
            handled.append(message.value)

        parent.say(ready=True)
        parent.hear()
        parent.say(
            handled=handled,
            letters=[(letter.sequence, letter.reason, letter.attempts) for letter in fabric.dead_letters],
        )


def test_sys_exit_in_a_handler_thread_is_a_failed_attempt_and_others_are_handled(tmp_path: Path) -> None:
    """It cannot end the program from there; it must not end the thread in silence."""
    spec = f"file://{tmp_path}"
    with (
        child(exit_in_a_handler_thread, spec=spec) as reader,
        join(WATCHFUL, rank=0, world_size=2, rendezvous=spec) as fabric,
    ):
        assert reader.hear()["ready"]
        for number in range(3):
            fabric.publish("words.last", number, seed=number)
        fabric.flush(timeout_s=10)
        reader.tell()
        assert reader.hear() == {"handled": [1, 2], "letters": [[0, "handler_exhausted", 2]]}
        assert reader.exit_code() == 0


# SIGKILL.


def publish_and_wait(parent: Parent, spec: str, first: int, unread: bool = False) -> None:
    fabric = join(WATCHFUL, rank=1, world_size=2, rendezvous=spec, job=JOB)
    publisher = fabric.publisher("words.last")
    publisher.wait_for_subscribers(1, timeout_s=20)
    for number in range(first, first + 100):
        publisher.publish(number, seed=number % 3)
    if unread:
        fabric.publish("signs.all", "out")  # after them on the same sockets
    else:
        publisher.flush(timeout_s=20)
    parent.say(flushed=not unread)
    parent.hear()
    fabric.close()


def test_when_a_publisher_is_killed_iteration_ends_with_an_open_gap(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with (
        child(publish_and_wait, spec=spec, first=0) as victim,
        join(WATCHFUL, rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric,
    ):
        with fabric.subscribe("words.**") as inbox:
            received = [inbox.receive().value for _ in range(100)]
            list(inbox.drain())
            assert victim.hear()["flushed"]
            incarnation = fabric.peers["rank-1"].incarnation
            victim.signal(signal.SIGKILL)
            victim.exit_code()
            assert list(inbox) == [], "nothing more, and an end"
            assert received == list(range(100))
            (gap,) = inbox.gaps
            assert (gap.source, gap.topic, gap.incarnation) == ("rank-1", "words.last", incarnation)
            assert (gap.first, gap.end, gap.reason) == (100, None, "gap")
        assert fabric.peers["rank-1"].state == "dead"


SMALL = replace(WATCHFUL, retention=Retention(owed_bytes_max=2 * MIB, kept_bytes_max=1 * MIB, publish_timeout_s=20.0))


def subscribe_and_stall(parent: Parent, spec: str) -> None:
    fabric = join(WATCHFUL, rank=1, world_size=2, rendezvous=spec)
    inbox = fabric.subscribe("flow.**")
    parent.say(at=inbox.receive().offset)
    parent.hear()


def test_a_killed_subscriber_blocks_its_publisher_only_until_its_death_is_proven(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(subscribe_and_stall, spec=spec) as victim, join(SMALL, rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("flow.health", when_full="block")
        publisher.wait_for_subscribers(1, timeout_s=20)
        publisher.publish(b"the first")
        assert victim.hear() == {"at": 0}
        victim.signal(signal.SIGKILL)
        victim.exit_code()
        for _ in range(8 * 16):  # four times what may be owed; QueueFullError would end the test
            publisher.publish(bytes(60_000))
        assert fabric.peers["rank-1"].state == "dead"
        assert fabric.statistics()["publish_waited"] > 0, "it was never held back: nothing was shown"
        assert publisher.handled_by(0) == {}, "the dead are owed nothing"
        report = fabric.close()
        assert (report.balanced, report.unacknowledged) == (True, {})


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_a_rank_that_comes_back_is_heard_to_its_old_end_and_then_from_sequence_0(tmp_path: Path, end: str) -> None:
    spec = f"file://{tmp_path}"
    with LateJoin(spec) as entering:
        with child(publish_and_wait, spec=spec, first=0) as old:
            fabric = entering()
            inbox = fabric.subscribe("words.**")
            first = take(inbox, 100)
            assert old.hear() == {"flushed": True}
            if end == "killed":
                old.signal(signal.SIGKILL)
            else:
                old.tell()
            old.exit_code()
            before = fabric.peers["rank-1"].incarnation
        with child(publish_and_wait, spec=spec, first=1000) as new:
            second = take(inbox, 100)
            list(inbox.drain())
            assert new.hear() == {"flushed": True}
            after = fabric.peers["rank-1"].incarnation
            new.tell()
            assert new.exit_code() == 0
        assert [value for value, _, _ in first] == list(range(100))
        assert [value for value, _, _ in second] == list(range(1000, 1100))
        assert {incarnation for _, incarnation, _ in first} == {before}
        assert {incarnation for _, incarnation, _ in second} == {after}
        assert before < after
        for part, start in ((first, 0), (second, 1000)):
            for seed in range(3):
                lane = [sequence for value, _, sequence in part if value % 3 == seed]
                assert lane == list(range(len(lane))), (start, seed)
        gaps = [(gap.incarnation, gap.first, gap.end) for gap in inbox.gaps]
        assert gaps == ([(before, 100, None)] if end == "killed" else [])


def test_a_life_that_ended_unread_is_read_before_the_one_that_follows(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with LateJoin(spec) as entering:
        with child(publish_and_wait, spec=spec, first=0, unread=True) as old:
            fabric = entering()
            signs, inbox = fabric.subscribe("signs.**"), fabric.subscribe("words.**")
            assert old.hear() == {"flushed": False}
            assert signs.receive(timeout_s=20).value == "out"
            before = fabric.peers["rank-1"].incarnation
            old.signal(signal.SIGKILL)
            old.exit_code()
        with child(publish_and_wait, spec=spec, first=1000, unread=True) as new:
            assert new.hear() == {"flushed": False}
            after = fabric.peers["rank-1"].incarnation
            taken = take(inbox, 200)
            new.tell()
        values = [value for value, _, _ in taken]
        assert values == [*range(100), *range(1000, 1100)]
        assert [incarnation for _, incarnation, _ in taken] == [before] * 100 + [after] * 100
        assert [(gap.incarnation, gap.first, gap.end) for gap in inbox.gaps] == [(before, 100, None)]


def take(inbox: Any, count: int) -> list[tuple[int, int, int]]:
    """So many messages, also from feeds that begin after all others have ended."""
    taken: list[tuple[int, int, int]] = []

    def is_enough() -> bool:
        taken.extend((message.value, message.incarnation, message.sequence) for message in inbox.drain())
        return len(taken) >= count

    until(is_enough, timeout_s=30, what=f"{count} messages")
    return taken


class LateJoin:
    """Rank 0 joins when it is called: both ranks have to be there at once. It is closed at the end."""

    def __init__(self, spec: str) -> None:
        self._spec, self._fabric = spec, None

    def __enter__(self) -> Callable[[], Fabric]:
        return self._join

    def _join(self) -> Fabric:
        self._fabric = join(WATCHFUL, rank=0, world_size=2, rendezvous=self._spec, job=JOB)
        return self._fabric

    def __exit__(self, *details: object) -> None:
        if self._fabric is not None:
            self._fabric.close(timeout_s=1)


# Closing.


def test_close_ends_in_time_though_a_peer_is_stopped_and_says_what_is_owed(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(subscribe_and_stall, spec=spec) as stopped:
        fabric = join(rank=0, world_size=2, rendezvous=spec)
        publisher = fabric.publisher("flow.health", when_full="block")
        publisher.wait_for_subscribers(1, timeout_s=20)
        publisher.publish(b"the first")
        assert stopped.hear() == {"at": 0}
        stopped.signal(signal.SIGSTOP)
        for _ in range(100):
            publisher.publish(bytes(200_000))
        reports: list[CloseReport] = []
        closing = threading.Thread(target=lambda: reports.append(fabric.close(timeout_s=0.5)))
        closing.start()
        closing.join(timeout=8)
        assert not closing.is_alive(), "0.5 s to settle, 0.5 s for goodbyes, and libzmq's second"
        (report,) = reports
        assert not report.balanced
        assert report.unacknowledged["flow.health"]["rank-1"][1] == 101
        assert fabric.close() is report
        stopped.signal(signal.SIGCONT)


def test_after_close_everything_says_closed(tmp_path: Path) -> None:
    fabric = join(rank=0, world_size=1)
    publisher, inbox = fabric.publisher("words.last"), fabric.subscribe("words.**")
    assert publisher.publish(1) == 0
    report = fabric.close()
    assert fabric.close() is report
    calls: list[Callable[[], object]] = [
        lambda: publisher.publish(1),
        lambda: publisher.publish(bytes(100_000)),
        lambda: publisher.publish_many([b"a"], seeds=[1]),
        lambda: publisher.wait_for_subscribers(1),
        lambda: publisher.flush(),
        lambda: fabric.publish("words.last", 1),
        lambda: fabric.publish("words.new", 1),
        lambda: fabric.publisher("words.newer"),
        lambda: fabric.subscribe("words.**"),
        lambda: fabric.on("words.**")(print),
        lambda: fabric.respond("method")(print),
        lambda: fabric.request("method", to=0),
        lambda: fabric.step(1),
        lambda: inbox.receive(),
        lambda: inbox.receive_many(2),
        lambda: inbox.drain(),
        lambda: iter(inbox),
        lambda: inbox.cursor(),
    ]
    for number, call in enumerate(calls):
        try:
            call()
        except ClosedError:
            continue
        pytest.fail(f"call {number} did not say so")
    inbox.close()
    fabric.serve(10)
    assert fabric.name == "rank-0"
    assert isinstance(fabric.statistics(), dict)
    assert fabric.dead_letters == ()
