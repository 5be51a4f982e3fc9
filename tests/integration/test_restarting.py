"""Members that die and begin again: durable topics, cursors, and the state that outlives a process."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, Gap, join
from fabric.config import Liveness, Spill
from fabric.errors import ConfigError, QueueFullError, SpillFullError, SpillLockedError, StateDirectoryError
from tests.harness.children import Parent, child
from tests.harness.figures import show
from tests.harness.lives import Round
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

MIB = 1 << 20
ROUNDS = 200 if os.environ.get("TENSOR_FABRIC_SOAK") else 5
CONFIG = FabricConfig(
    liveness=Liveness(heartbeat_ms=200, suspect_s=0.8), spill=Spill(segment_bytes=MIB, bytes_max=64 * MIB)
)


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_f02_publisher_and_subscriber_are_killed_and_every_record_is_handled_once(tmp_path: Path, seed: int) -> None:
    happened = Round(tmp_path / "round", seed).play()
    assert happened["killed"] >= 3
    show(f"round {seed}: {happened}")


def test_a_round_that_is_synced_to_the_disk(tmp_path: Path) -> None:
    happened = Round(tmp_path / "round", 1, total=1_000, kills=2, sync="power").play()
    assert happened["killed"] >= 2


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def alone(state: Path, config: FabricConfig = CONFIG) -> Fabric:
    return join(config, rank=0, world_size=1, state_directory=state)


def take(inbox: Any, count: int) -> list[Any]:
    return [inbox.receive(timeout_s=10) for _ in range(count)]


# The state.


def test_without_state_a_durable_topic_is_refused_and_with_a_job_it_has_it() -> None:
    with join(rank=0, world_size=1) as fabric, pytest.raises(ConfigError, match="give join a job that stays the same"):
        fabric.publisher("a", policy="durable")
    with join(rank=0, world_size=1, job="training") as fabric:
        assert fabric.publisher("a", policy="durable").publish(1) == 0


def test_a_job_that_owes_nothing_leaves_nothing_behind() -> None:
    base = Path(os.environ["XDG_STATE_HOME"]) / "tensor-fabric"
    with join(rank=0, world_size=1, job="training") as fabric, fabric.subscribe("a") as inbox:
        fabric.publisher("a", policy="durable").publish(1)
        assert take(inbox, 1)[0].value == 1
        assert list(base.glob("job-*/member-*/life"))
    assert list(base.glob("job-*/member-*")) == []


def test_a_job_that_owes_something_keeps_it(state: Path) -> None:
    with join(rank=0, world_size=1, job="training") as fabric:
        fabric.subscribe("a", name="later").close()
        fabric.publisher("a", policy="durable").publish(1)
    with join(rank=0, world_size=1, job="training") as fabric:
        assert take(fabric.subscribe("a", name="later"), 1)[0].value == 1


def test_f36_a_state_directory_that_others_may_enter_is_refused(state: Path) -> None:
    state.chmod(0o755)
    with pytest.raises(StateDirectoryError, match="0755"):
        alone(state)


def test_f26_state_has_one_owner_at_a_time(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric.entering.TAKEOVER_S", 0.05)
    with alone(state), pytest.raises(SpillLockedError):
        alone(state)
    alone(state).close()


def test_a_member_whose_state_is_taken_goes_on_without_unless_it_named_a_directory() -> None:
    with join(rank=0, world_size=1, job="training"), join(rank=0, world_size=1, job="training") as second:
        assert second.publish("a", 1) == 0
        with pytest.raises(ConfigError, match="in use"):
            second.publisher("b", policy="durable")


# Durable topics.


def test_f07_what_is_published_survives_its_publisher_and_begins_where_the_cursor_stands(state: Path) -> None:
    with alone(state) as fabric:
        inbox = fabric.subscribe("jobs.**", name="worker", cursor={})
        publisher = fabric.publisher("jobs.a", policy="durable")
        assert publisher.publish_many(list(range(10)), seeds=[n % 2 for n in range(10)]) == [
            0,
            0,
            1,
            1,
            2,
            2,
            3,
            3,
            4,
            4,
        ]
        assert [message.value for message in take(inbox, 4)] == [0, 1, 2, 3]
        saved = inbox.cursor()
        take(inbox, 3)
        first_life = fabric._engine.card.incarnation
    with alone(state) as fabric:
        fabric.publisher("jobs.a", policy="durable").publish("new")
        inbox = fabric.subscribe("jobs.**", name="worker", cursor=saved)
        messages = take(inbox, 7)
        assert [message.value for message in messages] == [4, 5, 6, 7, 8, 9, "new"]
        assert {message.incarnation for message in messages[:6]} == {first_life}
        assert inbox.gaps == ()


def test_values_of_any_size_are_durable(state: Path) -> None:
    large = os.urandom(3 * MIB)
    with alone(state) as fabric:
        fabric.subscribe("a", name="later").close()
        publisher = fabric.publisher("a", policy="durable")
        assert publisher.publish(large, metadata={"step": 1}) == 0
        assert publisher.publish_many([b"small", large, 7], seeds=[1, 1, 1]) == [0, 1, 2]
    with alone(state) as fabric:
        messages = {
            (message.seed, message.sequence): message for message in take(fabric.subscribe("a", name="later"), 4)
        }
        assert [messages[1, sequence].value for sequence in range(3)] == [b"small", large, 7]
        assert (messages[0, 0].value, messages[0, 0].metadata) == (large, {"step": 1})


def test_a_full_log_takes_nothing_and_uses_no_number(state: Path) -> None:
    small = replace(CONFIG, spill=Spill(segment_bytes=MIB, bytes_max=4 * MIB, free_bytes_min=1))
    with alone(state, small) as fabric:
        inbox = fabric.subscribe("a", name="worker", cursor={})
        publisher = fabric.publisher("a", policy="durable", when_full="fail")
        sequences = []
        with pytest.raises(QueueFullError) as caught:
            while len(sequences) < 1_000:
                sequences.append(publisher.publish(bytes(10_000), seed=len(sequences) % 3))
        assert isinstance(caught.value.__cause__, SpillFullError)
        with pytest.raises(QueueFullError):
            publisher.publish(bytes(MIB), seed=5)
        received = take(inbox, len(sequences))
        assert [message.sequence for message in received] == sequences
        inbox.commit(inbox.cursor())
        until(lambda: _takes(publisher), what="room that was given back is used")
        message = inbox.receive(timeout_s=10)
        assert (message.sequence, message.offset) == (len(sequences) // 3 + (len(sequences) % 3 > 1), len(sequences))


def test_a_large_value_that_waits_for_room_on_disk_is_taken_once_there_is_some(state: Path) -> None:
    small = replace(CONFIG, spill=Spill(segment_bytes=MIB, bytes_max=4 * MIB, free_bytes_min=1))
    with alone(state, small) as fabric:
        inbox = fabric.subscribe("a", name="worker", cursor={})
        publisher = fabric.publisher("a", policy="durable")
        taken = [publisher.publish(bytes(MIB)), publisher.publish(bytes(MIB))]
        late = threading.Thread(target=lambda: taken.append(publisher.publish(bytes(2 * MIB))))
        late.start()
        until(lambda: fabric.statistics().get("durable_refused", 0) > 1, what="it is refused, and tried again")
        take(inbox, 2)
        inbox.commit(inbox.cursor())
        late.join(20)
        assert taken == [0, 1, 2]
        assert len(inbox.receive(timeout_s=10).value) == 2 * MIB


def _takes(publisher: Any) -> bool:
    try:
        publisher.publish(b"again", seed=1)
    except QueueFullError:
        return False
    return True


# Named subscriptions.


def test_a_named_subscription_goes_on_where_it_stood_until_it_is_ended(state: Path) -> None:
    with alone(state) as fabric:
        publisher = fabric.publisher("a", policy="durable")
        inbox = fabric.subscribe("a", name="worker")
        publisher.publish(1)
        assert take(inbox, 1)[0].value == 1
        assert list(inbox.drain()) == [], "which says that it is handled"
        inbox.close()
        publisher.publish(2)
        publisher.publish(3)
        again = fabric.subscribe("a", name="worker")
        assert [message.value for message in take(again, 2)] == [2, 3]
        again.unsubscribe()
        publisher.publish(4)
        assert publisher.publish(5) == 4
        assert list(fabric.subscribe("a", name="worker").drain()) == []


@pytest.mark.parametrize("when_full", ["spill", "block"])
def test_a_close_leaves_what_a_reliable_topic_owes_to_the_next_life(state: Path, when_full: str) -> None:
    values = [*range(99), b"large" * 100_000]
    with alone(state) as fabric:
        fabric.subscribe("a", name="later").close()
        fabric.publisher("a", when_full=when_full).publish_many(values, seeds=[0] * 100)
        life = fabric._engine.card.incarnation
    with alone(state) as fabric:
        fabric.publisher("a", when_full=when_full).publish("new")
        inbox = fabric.subscribe("a", name="later")
        messages = take(inbox, 101)
        assert [message.value for message in messages] == [*values, "new"]
        assert {message.incarnation for message in messages[:100]} == {life}
        assert inbox.gaps == ()


def test_nobody_waits_for_a_subscription_that_nobody_has_open(state: Path) -> None:
    with alone(state) as fabric:
        fabric.subscribe("a", name="worker").close()
        fabric.publisher("a", policy="durable").publish(1)
        fabric.flush(timeout_s=5)
        assert fabric.close().balanced


# Damage.


@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_f34_a_damaged_record_is_a_gap_and_its_neighbours_are_delivered(state: Path, where: str) -> None:
    with alone(state) as fabric:
        fabric.subscribe("a", name="later").close()
        publisher = fabric.publisher("a", policy="durable")
        for number in range(9):
            publisher.publish(b"record %d " % number + bytes(5_000))
        life = fabric._engine.card.incarnation
    (segment,) = state.glob("member-*/seg-*.log")
    content = bytearray(segment.read_bytes())
    hurt = {"first": 0, "middle": 4, "last": 8}[where]
    content[content.find(b"record %d " % hurt) + 20] ^= 0x10
    segment.write_bytes(content)
    with alone(state) as fabric:
        inbox = fabric.subscribe("a", name="later")
        values = [message.value[:8] for message in take(inbox, 8)]
        assert values == [b"record %d" % number for number in range(9) if number != hurt]
        until(lambda: inbox.drain() and inbox.gaps, what="the gap")
        assert inbox.gaps == (Gap("rank-0", "a", life, hurt, hurt + 1, "gap"),)


def test_f34_damaged_registrations_lose_nobody_anything(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    with alone(state) as fabric:
        fabric.subscribe("a", name="later").close()
        fabric.publisher("a", policy="durable").publish_many(list(range(9)), seeds=[0] * 9)
    (path,) = state.glob("member-*/registrations")
    path.write_bytes(path.read_bytes()[:-20])
    with alone(state) as fabric:
        assert "who is owed what cannot be read" in caplog.text
        inbox = fabric.subscribe("a", name="later")
        assert [message.value for message in take(inbox, 9)] == list(range(9))
        assert inbox.gaps == ()


def test_who_removes_the_state_of_a_member_that_lives_is_heard(state: Path) -> None:
    with alone(state) as fabric:
        publisher = fabric.publisher("a", policy="durable", when_full="fail")
        fabric.subscribe("a", name="later").close()
        publisher.publish(1)
        shutil.rmtree(*state.glob("member-*"))
        with pytest.raises(QueueFullError) as caught:
            publisher.publish(2)
        assert "somebody removed it" in str(caught.value.__cause__)
        fabric.close(timeout_s=0.5)


def test_f27_state_that_is_lost_is_an_open_gap_where_the_subscriber_stood(state: Path) -> None:
    with alone(state) as fabric:
        inbox = fabric.subscribe("a", name="worker", cursor={})
        publisher = fabric.publisher("a", policy="durable")
        for number in range(5):
            publisher.publish(number)
        take(inbox, 3)
        saved, life = inbox.cursor(), fabric._engine.card.incarnation
    shutil.rmtree(*state.glob("member-*"))
    with alone(state) as fabric:
        fabric.publisher("a", policy="durable").publish("new")
        inbox = fabric.subscribe("a", name="worker", cursor=saved, start="retained")
        until(lambda: list(inbox.drain()) or len(inbox.gaps) == 2, what="the gaps")
        new = fabric._engine.card.incarnation  # what it published before anybody was known to be owed it is not kept
        assert inbox.gaps == (Gap("rank-0", "a", life, 3, None, "gap"), Gap("rank-0", "a", new, 0, 1, "gap"))


# A worker that outlives its parent.


def publish_fork_and_wait(parent: Parent, state: str) -> None:
    fabric = alone(Path(state))
    fabric.subscribe("a", name="later").close()
    publisher = fabric.publisher("a", policy="durable")
    for number in range(100):
        publisher.publish(number)
    worker = os.fork()
    if not worker:
        os.close(0)
        signal.pause()
    parent.say(worker=worker)
    parent.hear()


def test_f55_a_successor_is_live_though_a_worker_of_the_killed_lives_on(state: Path) -> None:
    with child(publish_fork_and_wait, state=str(state)) as victim:
        worker = victim.hear()["worker"]
        victim.signal(signal.SIGKILL)
        victim.exit_code()
        os.kill(worker, 0)
        began = time.monotonic()
        with alone(state) as fabric:
            inbox = fabric.subscribe("a", name="later")
            assert inbox.receive(timeout_s=10).value == 0
            show(f"live {1e3 * (time.monotonic() - began):.0f} ms after the kill")
            assert [message.value for message in take(inbox, 99)] == list(range(1, 100))
        os.kill(worker, signal.SIGKILL)
