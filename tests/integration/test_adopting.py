"""What a member left that does not come back: listed, and served by another one under its name."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, Orphan, adopt, aio, join, observe
from fabric.config import Liveness, Spill
from fabric.errors import (
    ClosedError,
    ConfigError,
    JoinTimeoutError,
    SpillLockedError,
    StateDirectoryError,
    WaitTimeoutError,
)
from tests.harness.children import Parent, child
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

CONFIG = FabricConfig(liveness=Liveness(heartbeat_ms=200, suspect_s=0.8), spill=Spill(segment_bytes=1 << 20))
COUNT = 500


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    directory.mkdir(mode=0o700)
    return directory


def enter(state: Path, rank: int) -> Fabric:
    where = f"file://{state.parent}/meeting"
    return join(CONFIG, rank=rank, world_size=2, rendezvous=where, state_directory=state, timeout_s=30)


def publish_and_wait(parent: Parent, state: str) -> None:
    """Rank 0: a durable topic of which the other rank takes some, and then a kill."""
    with enter(Path(state), 0) as fabric:
        publisher = fabric.publisher("work", policy="durable")
        publisher.wait_for_subscribers(1, timeout_s=30)
        fabric.subscribe("work", name="later").close()
        publisher.publish_many(list(range(COUNT)), seeds=[0] * COUNT)
        parent.say(published=COUNT)
        parent.hear()


@contextmanager
def orphaned(state: Path) -> Iterator[tuple[Fabric, Any, list[Any]]]:
    """Rank 1, its subscription, and the messages that it had when rank 0 was killed."""
    with child(publish_and_wait, state=str(state)) as victim, enter(state, 1) as fabric:
        inbox = fabric.subscribe("work", name="worker")
        first = [inbox.receive(timeout_s=30) for _ in range(10)]
        victim.hear()
        assert fabric.orphans() == []
        victim.signal(signal.SIGKILL)
        victim.exit_code()
        yield fabric, inbox, first


def test_what_a_dead_member_left_is_listed_and_served_in_order(state: Path) -> None:
    with orphaned(state) as (fabric, inbox, messages):
        (orphan,) = fabric.orphans()
        assert orphan == Orphan("rank-0", orphan.bytes)
        assert orphan.bytes > 0
        with adopt(fabric, "rank-0") as past:
            assert (past.name, past.rank, past.job) == ("rank-0", None, fabric.job)
            assert fabric.orphans() == []
            messages += [inbox.receive(timeout_s=30) for _ in range(COUNT - 10)]
            list(inbox.drain())  # which says that the last is handled
            past.flush(timeout_s=30)
        assert [message.value for message in messages] == list(range(COUNT))
        assert len({message.incarnation for message in messages}) == 1
        assert {message.source for message in messages} == {"rank-0"}
        assert inbox.gaps == ()


def test_what_is_owed_to_nobody_any_more_is_removed_and_what_is_owed_stays(state: Path) -> None:
    with orphaned(state) as (fabric, inbox, messages):
        with adopt(fabric, "rank-0") as past:
            messages += [inbox.receive(timeout_s=30) for _ in range(COUNT - 10)]
            list(inbox.drain())
            past.flush(timeout_s=30)
        (left,) = fabric.orphans()
        assert left.name == "rank-0", "it owes the same to a subscription of its own, which nobody has open"
        with adopt(fabric, "rank-0") as past:
            past.subscribe("work", name="later", delivery="reliable").unsubscribe()
        assert fabric.orphans() == []
    assert len(list(state.glob("member-*"))) == 1, "ours"


def test_what_is_not_fetched_yet_is_an_orphan_again(state: Path) -> None:
    with orphaned(state) as (fabric, inbox, messages):
        with adopt(fabric, "rank-0") as past:
            with pytest.raises(WaitTimeoutError, match="earlier lives"):
                past.flush(timeout_s=0.2)  # nobody takes anything
            past.close(timeout_s=0.2)
        assert [orphan.name for orphan in fabric.orphans()] == ["rank-0"]
        with adopt(fabric, "rank-0"):
            messages += [inbox.receive(timeout_s=30) for _ in range(COUNT - 10)]
            list(inbox.drain())
        assert [message.value for message in messages] == list(range(COUNT))


def test_who_comes_back_after_all_begins_anew(state: Path) -> None:
    with orphaned(state) as (fabric, inbox, messages):
        with adopt(fabric, "rank-0") as past:
            messages += [inbox.receive(timeout_s=30) for _ in range(COUNT - 10)]
            list(inbox.drain())
            past.flush(timeout_s=30)
            with pytest.raises(SpillLockedError):  # while its place is taken
                back_in_its_place(state)
        with enter(state, 0) as back:
            back.publisher("work", policy="durable").publish("new")
            found: list[Any] = []
            until(lambda: found.extend(inbox.drain()) or found, what="its first record")
            message = found[0]
            assert (message.value, message.sequence) == ("new", 0)
            assert message.incarnation > messages[-1].incarnation
        assert inbox.gaps == ()


def back_in_its_place(state: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fabric.entering.TAKEOVER_S", 0.05)
        enter(state, 0)


def test_an_observer_adopts_and_finds_the_dead_letters(state: Path) -> None:
    with join(rank=0, world_size=1, job="alone", state_directory=state) as fabric:

        @fabric.on("work", attempts=1)
        def handle(message: Any) -> None:
            raise ValueError("no")

        fabric.publisher("work", policy="durable").publish(bytes(3_000_000))
        until(lambda: len(fabric.dead_letters) == 1, what="the letter")
    with join(rank=0, world_size=1, job="alone") as fabric, observe("alone", name="operator") as operator:
        with pytest.raises(ConfigError, match="is here itself"):
            adopt(operator, "rank-0", state_directory=state)
        fabric.close()
        until(lambda: operator.peers["rank-0"].state == "left", what="its goodbye")
        assert [orphan.name for orphan in operator.orphans(state_directory=state)] == ["rank-0"]
        with adopt(operator, "rank-0", state_directory=state) as past:
            (letter,) = past.dead_letters
            assert letter.topic == "work" and letter.value() == bytes(3_000_000), "its value lies in the log"
        assert [orphan.name for orphan in operator.orphans(state_directory=state)] == ["rank-0"], "it has a letter"
        with adopt(operator, "rank-0", state_directory=state) as past:
            assert past.dead_letters.discard(past.dead_letters) == 1
        assert operator.orphans(state_directory=state) == [] and not list(state.glob("member-*"))


def test_bad_names_second_adopters_and_the_closed_are_refused(state: Path, tmp_path: Path) -> None:
    with orphaned(state) as (fabric, _, _):
        for name in ("rank-7", "", "../rank-0", "rank-0\0"):
            with pytest.raises(StateDirectoryError, match="there is no state"):
                adopt(fabric, name)
        with pytest.raises(ConfigError, match="is here itself"):
            adopt(fabric, "rank-1")
        assert fabric.orphans(state_directory=tmp_path / "nowhere") == []
        assert not (tmp_path / "nowhere").exists()
        with adopt(fabric, "rank-0") as past:
            until(lambda: fabric.peers["rank-0"].state in ("joined", "up"), what="the adopted")
            with pytest.raises(ConfigError, match="is here itself"):
                adopt(fabric, "rank-0")
            past.close(timeout_s=0.2)
    with pytest.raises(ClosedError):
        adopt(fabric, "rank-0")


def test_a_live_member_of_another_process_is_no_orphan(state: Path) -> None:
    with child(publish_and_wait, state=str(state)) as other, enter(state, 1) as fabric:
        fabric.subscribe("work", name="worker")
        other.hear()
        assert fabric.orphans() == []
        with pytest.raises(ConfigError, match="is here itself"):
            adopt(fabric, "rank-0")
        other.signal(signal.SIGKILL)  # rather than wait for what nobody fetches
        other.exit_code()


def test_a_damaged_or_foreign_directory_is_left_out(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    with orphaned(state) as (fabric, _, _):
        (state / "member-0000").mkdir(mode=0o700)
        (state / "member-1111").mkdir(mode=0o755)
        (state / "member-2222").write_text("a file")
        (state / "else").mkdir()
        assert [orphan.name for orphan in fabric.orphans()] == ["rank-0"]


def test_nobody_answers_and_the_state_is_an_orphan_as_before(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with orphaned(state) as (fabric, _, _):
        with pytest.raises(JoinTimeoutError):
            adopt(fabric, "rank-0", timeout_s=0.0)
        assert [orphan.name for orphan in fabric.orphans()] == ["rank-0"]


def test_the_asynchronous_face_adopts(state: Path) -> None:
    async def play(where: str) -> list[Any]:
        async with await aio.join(
            CONFIG, rank=1, world_size=2, rendezvous=where, state_directory=state, timeout_s=30
        ) as fabric:
            inbox = await fabric.subscribe("work", name="worker")
            loop = asyncio.get_running_loop()
            values = [(await inbox.receive(timeout_s=30)).value for _ in range(10)]
            await loop.run_in_executor(None, kill)
            assert [orphan.name for orphan in fabric.orphans()] == ["rank-0"]
            async with await aio.adopt(fabric, "rank-0") as past:
                values += [(await inbox.receive(timeout_s=30)).value for _ in range(COUNT - 10)]
                list(inbox.drain())
                await past.flush(timeout_s=30)
            return values

    with child(publish_and_wait, state=str(state)) as victim:

        def kill() -> None:
            victim.hear()
            victim.signal(signal.SIGKILL)
            victim.exit_code()

        assert asyncio.run(play(f"file://{state.parent}/meeting")) == list(range(COUNT))
    assert threading.active_count() < 20
