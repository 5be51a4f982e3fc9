"""Random worlds keep their promises; and a world itself behaves as it says."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from random import SystemRandom

import pytest

from fabric.errors import ConfigError, JoinTimeoutError, RequestError, WaitTimeoutError
from fabric.testing import Checker, FaultPlan, Violation, World
from tests.simulation.draw import DISK
from tests.simulation.play import play

ROOT = Path(__file__).parents[2]
KEPT = [
    int(line.split()[0])
    for line in (Path(__file__).parent / "seeds.txt").read_text().splitlines()
    if line[:1].isdigit()
]
SECONDS = float(os.environ.get("FABRIC_SIMULATION_SECONDS", "60"))


@pytest.mark.parametrize("seed", KEPT)
def test_a_seed_that_once_failed_passes(seed: int) -> None:
    play(seed)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
def test_worlds_that_nobody_has_seen_yet_keep_their_promises(capsys: pytest.CaptureFixture[str]) -> None:
    random, began, count = SystemRandom(), time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        seed = random.randrange(10**9) | random.choice([0, DISK])
        try:
            play(seed)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
            again = f"python -m tests.simulation.soak --first {seed} --seeds 1 --verbose"
            pytest.fail(f"seed {seed}: {error}\nTo see it again: {again}\nOnce it is mended, add it to seeds.txt.")
        count += 1
    with capsys.disabled():
        print(f"\n{count} new worlds")  # noqa: T201 - what was tried is worth knowing


@pytest.mark.parametrize("seed", KEPT[:3])
def test_the_same_seed_gives_the_same_history(seed: int) -> None:
    assert play(seed).digest == play(seed).digest


@pytest.mark.multiprocess
def test_the_same_seed_gives_the_same_history_in_another_process_with_other_hashes() -> None:
    code = f"from tests.simulation.play import play; print(play({KEPT[0]}).digest)"
    digests = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": salt, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        ).stdout
        for salt in ("1", "2")
    ]
    assert digests[0] == digests[1] != ""


def test_a_world_takes_no_time_but_its_own() -> None:
    began = time.monotonic()
    with World() as world:
        world.join(0)
        world.run(3600.0)
        assert world.now_s == 3601.0
    assert time.monotonic() - began < 30.0


def test_faults_do_not_cost_a_message() -> None:
    with World(seed=7, plan=FaultPlan(loss=0.3, duplication=0.2, delay_ms=5)) as world:
        trainer, reader = world.join(0), world.join(1)
        seen: list[int] = []
        reader.on("losses")(lambda message: seen.append(message.value))
        for step in range(100):
            trainer.publish("losses", step)
        trainer.flush()
        assert seen == list(range(100))
        Checker(world.history).judge()
        assert world.hub.statistics()["dropped_loss"] > 0


def test_a_killed_member_is_noticed_and_its_next_life_is_heard() -> None:
    with World(world_size=2) as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        trainer.publish("losses", 1)
        assert inbox.receive().value == 1
        world.kill(trainer)
        assert world.until(lambda: reader.peers["rank-0"].state == "dead")
        again = world.join(0)
        again.publish("losses", 2)
        message = inbox.receive()
        assert (message.value, message.incarnation > 0) == (2, True)
        assert world.members == (reader, again)


def test_a_cut_loses_all_of_one_direction_and_heals() -> None:
    with World() as world:
        asker, responder = world.join(0), world.join(1)
        responder.respond("double")(lambda request: 2 * request.value)
        world.cut(asker, responder, both=False)
        with pytest.raises(RequestError):
            asker.request("double", 4, to=1, timeout_s=1.0)
        world.heal(asker, responder)
        assert asker.request("double", 4, to=1).value == 8


def test_who_cannot_be_reached_cannot_be_joined() -> None:
    with World() as world:
        world.join(0)
        world.cut("rank-0", "rank-1")
        with pytest.raises(JoinTimeoutError, match="rank-0"):
            world.join(1, timeout_s=2.0)
        assert len(world.members) == 1
        with pytest.raises(ConfigError):
            world.join(2)


def test_f26_two_lives_of_one_member_leave_one() -> None:
    with World() as world:
        reader, zombie = world.join(1), world.join(0)
        reader.subscribe("losses")
        world.join(0)
        assert world.until(lambda: zombie._engine.fenced_by > 0)
        Checker(world.history).judge()


def test_tasks_run_while_somebody_waits_and_end_with_their_owner() -> None:
    with World() as world:
        member = world.join(0)
        ticks: list[float] = []
        world.every(0.5, lambda: ticks.append(world.now_s), owner=member)
        world.run(1.6)
        world.stop(member)
        world.run(5.0)
        assert ticks == [1.0, 1.5, 2.0, 2.5]


def test_mutual_requests_do_not_deadlock() -> None:
    with World(world_size=3) as world:
        members = [world.join(rank) for rank in range(3)]
        for rank, member in enumerate(members):
            member.respond("rank")(lambda request, rank=rank: rank)
            member.respond("next")(
                lambda request, member=member, rank=rank: member.request("rank", to=(rank + 1) % 3).value
            )
        assert members[0].request("next", to=1).value == 2
        assert {rank: reply.value for rank, reply in members[2].request_all("rank").items()} == {0: 0, 1: 1}  # type: ignore[union-attr]


def test_a_slow_reader_is_waited_for_in_the_worlds_time() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        trainer.publish("losses", 1)
        with pytest.raises(WaitTimeoutError):
            trainer.flush(timeout_s=2.0)
        world.every(0.1, lambda: list(inbox.drain()))
        trainer.flush(timeout_s=2.0)


def test_the_checker_sees_what_went_missing() -> None:
    with World() as world:
        trainer, reader = world.join(0), world.join(1)
        inbox = reader.subscribe("losses")
        for step in range(5):
            trainer.publish("losses", step)
        assert [message.value for message in inbox.receive_many(5)] == list(range(5))
        list(inbox.drain())
        world.run(1.0)
        Checker(world.history).judge()
        (book,) = world.history.subscriptions.values()
        (reading,) = book.readings.values()
        forgotten = reading.received.pop(2)
        with pytest.raises(Violation, match=r"I1.*2 was lost without a word"):
            Checker(world.history).judge()
        reading.received += [forgotten]
        with pytest.raises(Violation, match="I2"):
            Checker(world.history).judge()
        reading.received.sort()
        reading.received.append(reading.received[-1])
        with pytest.raises(Violation, match="I3"):
            Checker(world.history).judge()
        reading.received[3:] = [reading.received[3], reading.received[4]._replace(digest=0)]
        with pytest.raises(Violation, match="I4"):
            Checker(world.history).judge()


def test_the_example_in_the_front_door_runs() -> None:
    import fabric.testing

    text = fabric.testing.__doc__ or ""
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert "World(" in code
    exec(compile(code, "fabric.testing", "exec"), {})
