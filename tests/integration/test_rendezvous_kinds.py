"""Every way in: a shared directory, a tcp address, one process, torchrun; and observers that come and go."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, join, observe
from fabric.errors import JoinTimeoutError, RendezvousError, RequestError, RequestTimeoutError
from fabric.rendezvous import find
from tests.harness.children import Parent, child, children
from tests.harness.waiting import until
from tests.integration.test_rendezvous_processes import environment, running

pytestmark = [pytest.mark.multiprocess]

JOB = "kinds"
TALK = 20


def talk(fabric: Fabric) -> dict[str, Any]:
    """Every rank publishes and hears all others; then each asks its neighbour."""
    ranks = range(fabric.world_size)
    fabric.respond("who")(lambda request: fabric.name)
    with fabric.subscribe("talk.*") as inbox:
        publisher = fabric.publisher(f"talk.of-{fabric.rank}")
        publisher.wait_for_subscribers(fabric.world_size - 1, timeout_s=30)
        for number in range(TALK):
            publisher.publish(number, seed=number % 2)
        heard: dict[str, list[int]] = {f"rank-{rank}": [] for rank in ranks}
        for _ in range(TALK * fabric.world_size):
            message = inbox.receive(timeout_s=30)
            heard[message.source].append(message.value)
        assert list(inbox.drain()) == []  # whoever asks for the next one has handled the last
        publisher.flush(timeout_s=30)
        neighbour = (fabric.rank + 1) % fabric.world_size if fabric.rank is not None else 0
        answer = fabric.request("who", to=neighbour, timeout_s=30).value if fabric.world_size > 1 else fabric.name
        gaps = inbox.gaps_total
    return {
        "rank": fabric.rank,
        "world_size": fabric.world_size,
        "exact": heard == {f"rank-{rank}": list(range(TALK)) for rank in ranks},
        "answer": answer,
        "gaps": gaps,
        "peers": sorted(fabric.peers),
    }


def expected(world_size: int) -> list[dict[str, Any]]:
    names = [f"rank-{rank}" for rank in range(world_size)]
    return [
        {
            "rank": rank,
            "world_size": world_size,
            "exact": True,
            "answer": names[(rank + 1) % world_size],
            "gaps": 0,
            "peers": [name for name in names if name != names[rank]],
        }
        for rank in range(world_size)
    ]


def enter_and_talk(parent: Parent, rank: int, world_size: int, spec: str, listen: str) -> None:
    config = FabricConfig(listen=listen)
    with join(config, rank=rank, world_size=world_size, rendezvous=spec, job=JOB) as fabric:
        parent.say(**talk(fabric))
        parent.hear()
    parent.say(left=True)


def meet(world_size: int, spec: str, listens: list[str]) -> None:
    """All ranks in processes of their own; what they tell is exact."""
    ranks = [
        child(enter_and_talk, rank=rank, world_size=world_size, spec=spec, listen=listens[rank])
        for rank in range(world_size)
    ]
    with children(*ranks) as everybody:
        assert [one.hear(60) for one in everybody] == expected(world_size)
        for one in everybody:
            one.tell()
        assert [one.hear() for one in everybody] == [{"left": True}] * world_size
        assert [one.exit_code() for one in everybody] == [0] * world_size
    assert find(JOB) == []


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_meet_in_a_shared_directory(tmp_path: Path, world_size: int) -> None:
    meet(world_size, f"file://{tmp_path}/cards", ["ipc"] * world_size)


def test_ranks_that_listen_on_tcp_meet_in_a_shared_directory(tmp_path: Path) -> None:
    meet(3, f"file://{tmp_path}/cards", ["tcp://127.0.0.1"] * 3)


def test_ranks_on_ipc_and_tcp_meet_each_other(tmp_path: Path) -> None:
    meet(3, f"file://{tmp_path}/cards", ["ipc", "tcp://127.0.0.1", "ipc"])


@pytest.fixture
def address() -> Iterator[str]:
    """An address that nobody else gets: the port is ours, and its member binds it too, since nobody listens yet."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{held.getsockname()[1]}"


def test_ranks_meet_at_the_control_address_of_rank_0(address: str) -> None:
    meet(3, address, [address, "tcp://127.0.0.1", "tcp://127.0.0.1"])


def join_here(spec: str, world_size: int) -> list[Fabric]:
    """All ranks as members of this process."""
    members: dict[int, Fabric] = {}

    def enter(rank: int) -> None:
        members[rank] = join(rank=rank, world_size=world_size, rendezvous=spec, job=JOB)

    threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=40)
    return [members[rank] for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 4])
def test_members_of_one_process_meet_in_memory(tmp_path: Path, world_size: int) -> None:
    members = join_here(f"memory://{tmp_path}", world_size)
    told: dict[int, dict[str, Any]] = {}
    threads = [
        threading.Thread(target=lambda fabric=fabric: told.update({fabric.rank: talk(fabric)})) for fabric in members
    ]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=50)
    for fabric in members:
        assert fabric.close().balanced
    assert [told[rank] for rank in range(world_size)] == expected(world_size)


def test_without_anything_a_program_is_alone() -> None:
    with join() as fabric:
        assert (fabric.rank, fabric.world_size, fabric.name, fabric.peers) == (0, 1, "rank-0", {})
        assert talk(fabric)["exact"]


# torchrun.


def under_torchrun() -> None:
    """A rank as a user writes it: everything is in the environment."""
    with join() as fabric, fabric.subscribe("done.*") as done:
        told = talk(fabric) | {"job": fabric.job}
        publisher = fabric.publisher(f"done.rank-{fabric.rank}")
        publisher.wait_for_subscribers(fabric.world_size - 1, timeout_s=30)
        publisher.publish(True)
        for _ in range(fabric.world_size):  # who leaves early answers nobody
            done.receive(timeout_s=30)
    os.write(1, (json.dumps(told) + "\n").encode())  # one write a line: the ranks share this pipe


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_ranks_of_torchrun_join_without_arguments() -> None:
    """Two; one and four of them run the example of the README."""
    world_size = 2
    pytest.importorskip("torch.distributed", reason="torchrun comes with torch")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)),
        *("--no-python", sys.executable, "-c", f"from {__name__} import under_torchrun; under_torchrun()"),
    ]
    with running(*command, env=environment(), stdout=-1, stderr=-1) as process:
        out, err = process.communicate(timeout=80)
    assert process.returncode == 0, err
    told = sorted((json.loads(line) for line in out.splitlines() if line.startswith("{")), key=lambda one: one["rank"])
    jobs = {one.pop("job") for one in told}
    assert told == expected(world_size)
    assert len(jobs) == 1


# Missing ranks.


def test_ranks_that_do_not_come_are_named_by_those_in_a_directory(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}/cards"
    late = child(enter_and_talk, rank=2, world_size=4, spec=spec, listen="ipc")
    with late:
        until(lambda: list(tmp_path.glob("cards/*/rank-2.json")), timeout_s=20, what="the card of rank 2")
        with pytest.raises(JoinTimeoutError, match=r"rank 1, 3\b") as caught:
            join(rank=0, world_size=4, rendezvous=spec, job=JOB, timeout_s=0.3)
        assert "2" not in caught.value.fields["state"].partition("missing")[2]
    assert find(JOB) == [], "who did not come in has put up no card"


def test_ranks_that_do_not_come_to_an_address_are_named(address: str) -> None:
    config = FabricConfig(listen=address)
    with pytest.raises(JoinTimeoutError, match="missing: rank 1, 2"):
        join(config, rank=0, world_size=3, rendezvous=address, job=JOB, timeout_s=0.3)
    with pytest.raises(JoinTimeoutError, match=r"did not answer; missing: rank 0, 2"):
        join(
            replace(config, listen="tcp://127.0.0.1"), rank=1, world_size=3, rendezvous=address, job=JOB, timeout_s=0.3
        )


# Observers.


@pytest.fixture
def running_pair(tmp_path: Path) -> Iterator[list[Fabric]]:
    members = join_here(f"memory://{tmp_path}", 2)
    try:
        yield members
    finally:
        for fabric in members:
            fabric.close(timeout_s=1)


def watch(parent: Parent, name: str, address: str | None, delivery: str | None) -> None:
    """An observer in a process of its own, with what it was told first."""
    fabric = observe(JOB, name=name, address=address)
    inbox = fabric.subscribe("talk.**", delivery=delivery)
    fabric.respond("who")(lambda request: fabric.name)
    parent.say(rank=fabric.rank, world_size=fabric.world_size, job=fabric.job, peers=sorted(fabric.peers))
    heard = [
        [message.source, message.offset, message.value] for message in (inbox.receive(timeout_s=30) for _ in range(3))
    ]
    assert list(inbox.drain()) == []
    parent.say(heard=heard, answer=fabric.request("who", to=0).value)
    parent.hear()
    fabric.close()


@pytest.mark.parametrize("delivery", [None, "reliable"])
def test_an_observer_comes_and_goes_and_delays_nobody(running_pair: list[Fabric], delivery: str | None) -> None:
    zero, one = running_pair
    zero.respond("who")(lambda request: zero.name)
    publisher = one.publisher("talk.of-1")
    for life in range(2):
        with child(watch, name="dashboard", address=None, delivery=delivery) as watcher:
            told = watcher.hear()
            assert told == {"rank": None, "world_size": 2, "job": JOB, "peers": ["rank-0", "rank-1"]}
            for member in running_pair:
                assert member.peers["dashboard"].rank is None
                assert member.peers["dashboard"].state in ("joined", "up")
            assert publisher.handled_by(0) == ({} if delivery is None else {"dashboard": life > 0}), "who is owed"
            first = publisher.next
            for number in range(3):
                publisher.publish(number)
            assert watcher.hear() == {
                "heard": [["rank-1", first + number, number] for number in range(3)],
                "answer": "rank-0",
            }
            assert one.request("who", to="dashboard").value == "dashboard"
            if delivery is None:
                publisher.wait_for_subscribers(0, timeout_s=1)
            publisher.flush(timeout_s=10)
            watcher.tell()
            assert watcher.exit_code() == 0
        until(lambda: {member.peers["dashboard"].state for member in running_pair} == {"left"}, what="goodbye")
        assert publisher.handled_by(0) == {}


def test_an_observer_that_was_killed_is_owed_nothing_and_its_name_is_free_again(running_pair: list[Fabric]) -> None:
    zero, one = running_pair
    zero.respond("who")(lambda request: zero.name)
    publisher = one.publisher("talk.of-1")
    for _ in range(2):
        with child(watch, name="dashboard", address=None, delivery=None) as watcher:
            assert watcher.hear()["job"] == JOB
            for number in range(3):
                publisher.publish(number)
            assert [value for _, _, value in watcher.hear()["heard"]] == [0, 1, 2]
            watcher.signal(9)
            watcher.exit_code()
        publisher.publish(b"to nobody")
        publisher.flush(timeout_s=10)


@pytest.mark.parametrize("asked", [0, 1])
def test_an_observer_finds_a_job_at_the_control_address_of_any_member(tmp_path: Path, asked: int) -> None:
    spec = f"file://{tmp_path}/cards"
    ranks = [child(enter_and_talk, rank=rank, world_size=2, spec=spec, listen="tcp://127.0.0.1") for rank in (0, 1)]
    with children(*ranks) as everybody:
        assert [one.hear(60) for one in everybody] == expected(2)
        addresses = {card.rank: card.endpoints[1] for card in find(JOB)}
        with observe(JOB, name="watcher", address=addresses[asked]) as fabric:
            assert (fabric.rank, fabric.world_size, sorted(fabric.peers)) == (None, 2, ["rank-0", "rank-1"])
            assert [fabric.request("who", to=rank).value for rank in (0, 1)] == ["rank-0", "rank-1"]
            answers = fabric.request_all("who")
            assert {rank: reply.value for rank, reply in answers.items() if not isinstance(reply, Exception)} == {
                0: "rank-0",
                1: "rank-1",
            }
        for one in everybody:
            one.tell()
            assert one.hear() == {"left": True}


def test_a_request_to_a_member_that_has_left_fails_at_once(running_pair: list[Fabric]) -> None:
    zero, one = running_pair
    one.close()
    until(lambda: zero.peers["rank-1"].state == "left", what="goodbye")
    with pytest.raises(RequestError, match="rank-1 left or died") as caught:
        zero.request("who", to=1, timeout_s=50)
    assert not isinstance(caught.value, RequestTimeoutError)
    assert isinstance(zero.request_all("who", timeout_s=50)[1], RequestError)


def test_an_observer_must_name_its_job_where_there_are_two(tmp_path: Path) -> None:
    with join(rank=0, world_size=1, job="first"), join(rank=0, world_size=1, job="second"):
        with pytest.raises(RendezvousError, match=r"found 2 jobs on this host: first, second"):
            observe(name="watcher")
        with observe("second", name="watcher") as fabric:
            assert fabric.job == "second"
