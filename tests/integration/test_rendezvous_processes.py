"""Real processes meet: under torchrun, with a store that rank 0 hosts, and in a shared directory after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fabric.rendezvous import find, open_rendezvous
from tests.harness.cards import a_card
from tests.meta.source import ROOT

# A rank of its own: its first argument says what comes first, the fabric or torch's process group.
RANK = """
import json, os, sys, time
import fabric.rendezvous as room
from fabric.rendezvous import Card

identity = room.open_rendezvous().identity
first = sys.argv[1] == "fabric"

def group():
    import torch, torch.distributed as distributed
    distributed.init_process_group("gloo")
    ones = torch.ones(1)
    distributed.all_reduce(ones)
    return ones.item()

def meet():
    place = room.open_rendezvous()
    card = Card(job=identity.job, name=f"rank-{identity.rank}", rank=identity.rank, world_size=identity.world_size,
                incarnation=time.time_ns(), host=room.this_host(), pid=os.getpid(), version=1,
                endpoints=("ipc://a", "ipc://b", "ipc://c"))
    cards = place.meet(card, timeout_s=40)
    assert place.refresh() == cards
    assert card in cards
    return place, cards

if not first:
    total = group()
place, cards = meet()
if len(sys.argv) > 2 and identity.restart_count == 0:
    if identity.rank == 1:
        os._exit(3)
    while True:  # until torchrun ends us; blocked inside torch we would not see its signal if a handler is installed
        time.sleep(1)
if first:
    total = group()
assert total == identity.world_size
import torch.distributed as distributed
place.close()
distributed.destroy_process_group()
told = {"rank": identity.rank, "restarts": identity.restart_count, "job": identity.job,
        "met": [[card.rank, card.pid] for card in cards]}
# One write a line: the ranks share this pipe.
os.write(1, (json.dumps(told) + "\\n").encode())
"""

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def running(*arguments: str, **more: Any) -> Iterator[subprocess.Popen[str]]:
    """A process that is gone, with all that it started, when the block ends."""
    with subprocess.Popen(arguments, text=True, start_new_session=True, **more) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def torchrun(tmp_path: Path, *options: str, arguments: tuple[str, ...]) -> list[dict[str, Any]]:
    pytest.importorskip("torch.distributed", reason="torchrun comes with torch")
    script = tmp_path / "rank.py"
    script.write_text(RANK, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        *options,
        str(script),
        *arguments,
    ]
    with running(*command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate(timeout=55)
    assert process.returncode == 0, err
    return sorted(
        (json.loads(line) for line in out.splitlines() if line.startswith("{")), key=lambda told: told["rank"]
    )


def check_met(told: list[dict[str, Any]], restarts: int) -> None:
    assert [(rank["rank"], rank["restarts"]) for rank in told] == [(0, restarts), (1, restarts)]
    assert told[0]["met"] == told[1]["met"]
    assert [rank for rank, _ in told[0]["met"]] == [0, 1]
    assert told[0]["job"] == told[1]["job"] != "none"


@pytest.mark.torch
def test_ranks_of_torchrun_meet_after_their_process_group(tmp_path: Path) -> None:
    check_met(torchrun(tmp_path, "--standalone", arguments=("group",)), restarts=0)


@pytest.mark.torch
def test_ranks_meet_before_their_process_group_and_after_a_rank_died_themselves_only(tmp_path: Path) -> None:
    told = torchrun(tmp_path, "--standalone", "--max-restarts", "1", arguments=("fabric", "die"))
    check_met(told, restarts=1)


MEMBER = textwrap.dedent(
    """
    import json, os, sys
    import fabric.rendezvous as room
    from fabric.rendezvous import Card

    spec, rank, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    place = room.open_rendezvous(spec, rank=rank, world_size=2, job="training")
    card = Card(job="training", name=f"rank-{rank}", rank=rank, world_size=2, incarnation=incarnation,
                host=room.this_host(), pid=os.getpid(), version=1, endpoints=("ipc://a", "ipc://b", "ipc://c"))
    room.announce(card)
    cards = place.meet(card, timeout_s=30)
    for line in sys.stdin:
        print(json.dumps([[card.rank, card.incarnation] for card in cards]), flush=True)
        cards = place.refresh()
    place.close()
    room.withdraw(card)
    """
)


def member(spec: str, rank: int, incarnation: int, runtime: Path) -> Any:
    return running(
        sys.executable,
        "-c",
        MEMBER,
        spec,
        str(rank),
        str(incarnation),
        env=environment(XDG_RUNTIME_DIR=str(runtime)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ask(process: subprocess.Popen[str]) -> list[list[int]]:
    pipe_in, pipe_out = process.stdin, process.stdout
    assert pipe_in is not None
    assert pipe_out is not None
    pipe_in.write("\n")
    pipe_in.flush()
    answer = json.loads(pipe_out.readline())
    assert isinstance(answer, list)
    return answer


def leave(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.torch
def test_a_rank_that_hosts_the_store_and_leaves_at_once_is_still_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables without torchrun, as other launchers set them. This process is rank 0; the system chose its port."""
    distributed = pytest.importorskip("torch.distributed", reason="the store is torch's")
    store = distributed.TCPStore("localhost", 0, is_master=True, multi_tenant=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    child = running(
        *(sys.executable, "-c", MEMBER, "env", "1", "1"),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child as other:
        place = open_rendezvous(rank=0, world_size=2, job="training")
        cards = place.meet(a_card(0), timeout_s=40)
        assert [(card.rank, card.pid) for card in cards] == [(0, os.getpid()), (1, other.pid)]
        del store
        place.close()
        assert ask(other) == [[0, 1], [1, 1]]
        assert leave(other) == 0


def test_a_killed_member_comes_back_and_is_seen_by_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    spec = f"file://{tmp_path}/cards"
    with member(spec, 0, 1, runtime) as stays:
        with member(spec, 1, 1, runtime) as killed:
            assert ask(stays) == ask(killed) == [[0, 1], [1, 1]]
            assert [card.pid for card in find("training")] == [stays.pid, killed.pid]
            killed.kill()
            killed.wait(timeout=30)
        assert [card.pid for card in find("training")] == [stays.pid]
        with member(spec, 1, 2, runtime) as back:
            assert ask(back) == [[0, 1], [1, 2]]
            ask(stays)
            assert ask(stays) == [[0, 1], [1, 2]]
            assert leave(back) == 0
        assert leave(stays) == 0
    assert list((tmp_path / "cards").iterdir()) == [], "the last to leave tidies up"
    assert find() == []
