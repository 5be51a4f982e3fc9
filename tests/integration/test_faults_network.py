"""Rows of the fault catalogue (ARCHITECTURE.md) that take a network: tcp on the loopback of a namespace of its own.

Each scene is one process that has left the network of this host before it opens a socket, with two members in it. What
`ss` and `tc` do there, nobody else sees; with the process the namespace is gone.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, Subscription, join
from fabric.config import Liveness
from tests.harness.children import Parent, child
from tests.harness.waiting import until

CLONE_NEWNET = 0x40000000
WATCHFUL = replace(
    FabricConfig(), listen="tcp://127.0.0.1", liveness=Liveness(heartbeat_ms=100, suspect_s=1.5, down_s=2.0)
)
SEEDS, EACH, RESETS = 3, 100, 10


def reason_to_skip() -> str | None:
    """Why there can be no such network here."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [tool for tool in ("ip", "ss", "tc", "unshare") if not shutil.which(tool)]
    if missing:
        return f"needs {', '.join(missing)}"
    tried = subprocess.run(["unshare", "--net", "ip", "link", "set", "lo", "up"], capture_output=True, check=False)
    return "may make no network namespaces here" if tried.returncode else None


SKIPPED = reason_to_skip()
pytestmark = [
    pytest.mark.multiprocess,
    pytest.mark.skipif(SKIPPED is not None, reason=f"network namespaces: {SKIPPED}"),
]


def run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def members() -> tuple[Fabric, Fabric]:
    """Two members in a network of their own."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    run("ip", "link", "set", "lo", "up")
    with ThreadPoolExecutor(2) as pool:
        ranks = pool.map(lambda rank: join(WATCHFUL, rank=rank, world_size=2, rendezvous="memory://here"), (0, 1))
        ours, theirs = ranks
    return ours, theirs


def publish(ours: Fabric, count: int) -> None:
    publisher = ours.publisher("words.all")
    for _ in range(count):
        publisher.publish(publisher.next, seed=publisher.next % SEEDS)


def received(inbox: Subscription, count: int) -> dict[str, Any]:
    """What is told of so many messages."""
    values = [inbox.receive(timeout_s=20).value for _ in range(count)]
    assert list(inbox.drain()) == []
    return {
        "exact": sorted(values) == list(range(count)),
        "ordered": lanes_are_ordered(values),
        "gaps": len(inbox.gaps),
    }


def lanes_are_ordered(values: list[int]) -> bool:
    return all(lane == sorted(lane) for lane in ([v for v in values if v % SEEDS == seed] for seed in range(SEEDS)))


def states(ours: Fabric, theirs: Fabric) -> set[str]:
    return {ours.peers["rank-1"].state, theirs.peers["rank-0"].state}


WHOLE = {"exact": True, "ordered": True, "gaps": 0}


def reset_again_and_again(parent: Parent) -> None:
    ours, theirs = members()
    with ours, theirs, theirs.subscribe("words.**") as inbox:
        parent.say(kills=kill_all())
        for _ in range(RESETS):
            publish(ours, EACH)
            until(kill_all, what="connections to kill")
        publish(ours, EACH)
        parent.say(**received(inbox, (RESETS + 1) * EACH))


def kill_all() -> int:
    """Reset all connections; how many there were."""
    return len(run("ss", "--no-header", "--kill", "--tcp", "state", "established").splitlines())


def test_f13_resets_lose_double_and_turn_round_nothing() -> None:
    with child(reset_again_and_again) as scene:
        if not scene.hear()["kills"]:
            pytest.skip("this kernel resets no connections for ss")
        assert scene.hear() == WHOLE
        assert scene.exit_code() == 0


def lose_everything_for_a_while(parent: Parent) -> None:
    ours, theirs = members()
    with ours, theirs, theirs.subscribe("words.**") as inbox:
        publish(ours, EACH)
        lives = [ours.peers["rank-1"].incarnation, theirs.peers["rank-0"].incarnation]
        run("tc", "qdisc", "add", "dev", "lo", "root", "bfifo", "limit", "1")  # no packet is so small
        publish(ours, EACH)
        until(lambda: states(ours, theirs) == {"down"}, what="both know")
        publish(ours, EACH)
        run("tc", "qdisc", "del", "dev", "lo", "root")
        told = received(inbox, 3 * EACH)
        until(lambda: states(ours, theirs) == {"up"}, what="both are there")
        same = lives == [ours.peers["rank-1"].incarnation, theirs.peers["rank-0"].incarnation]
        parent.say(**told, same=same)


def test_f14_both_ends_of_a_dead_connection_notice_and_go_on_when_it_lives() -> None:
    with child(lose_everything_for_a_while) as scene:
        assert scene.hear() == {**WHOLE, "same": True}
        assert scene.exit_code() == 0


LARGE = bytes(range(256)) * (4 * 1024 * 4)
"""4 MiB: two seconds at 2 MB/s, longer than the silence that makes a peer suspect."""


def send_a_large_value_through_a_thin_link(parent: Parent) -> None:
    ours, theirs = members()
    with ours, theirs, theirs.subscribe("values.**") as inbox:
        run(
            *("tc", "qdisc", "add", "dev", "lo", "root", "tbf"), *("rate", "16mbit", "burst", "128kb", "limit", "256kb")
        )
        seen: set[str] = set()
        ours.publish("values.all", LARGE)
        with ThreadPoolExecutor(1) as pool:
            receiving = pool.submit(lambda: bytes(inbox.receive(timeout_s=30).value) == LARGE)

            def is_here() -> bool:
                seen.update(states(ours, theirs))
                return receiving.done()

            until(is_here, timeout_s=30, what="the value")
        run("tc", "qdisc", "del", "dev", "lo", "root")
        assert list(inbox.drain()) == []
        parent.say(exact=receiving.result(), silent=sorted(seen - {"joined", "up"}), looked=len(seen) > 0)


def test_f15_a_long_value_on_a_thin_link_silences_nobody() -> None:
    with child(send_a_large_value_through_a_thin_link) as scene:
        assert scene.hear() == {"exact": True, "silent": [], "looked": True}
        assert scene.exit_code() == 0
