"""Large values between processes of one host: read where they lie, never changed, never lost, whoever dies."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from fabric import Fabric, FabricConfig, Message, Subscription, join
from fabric.config import Arena, Retention
from fabric.errors import WrongProcessError
from tests.harness.children import Child, Parent, child
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

KIB = 1024
MIB = 1024 * KIB
TOPIC = "big.values"


@pytest.fixture(autouse=True, scope="module")
def collector() -> None:
    """Pyzmq's, which sees to messages that are sent without a copy: once begun it stays, with a context of its own."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as a, context.socket(zmq.PAIR) as b:
        a.bind("inproc://warm")
        b.connect("inproc://warm")
        b.send(bytes(200_000), copy=False)
        a.recv()


def config_of(bytes_max: int, **changed: Any) -> FabricConfig:
    kept = Retention(kept_bytes_max=MIB)  # or the arena would be full of what is kept
    return replace(FabricConfig(), arena=Arena(bytes_max=bytes_max), retention=kept, **changed)


def value(number: int, size: int = MIB) -> Any:
    """Something that no other number has."""
    return np.random.default_rng(number).integers(0, 256, size, np.uint8)


def sum_of(value: Any) -> str:
    """Of the bytes of a value, whatever it is."""
    if isinstance(value, dict):
        return " ".join(f"{key}:{sum_of(value[key])}" for key in sorted(value))
    if type(value).__module__ == "torch":
        import torch

        value = value.clone().view(torch.uint8).numpy()
    return hashlib.blake2b(value if isinstance(value, bytes) else np.ascontiguousarray(value).tobytes()).hexdigest()


class Reading:
    """A member in a child, which does what it is told."""

    def __init__(self, fabric: Fabric, inbox: Subscription) -> None:
        self.fabric, self.inbox = fabric, inbox
        self.held: list[Message] = []

    def receive(self, count: int = 1) -> dict[str, Any]:
        """Read, and let go."""
        return {"sums": [sum_of(self.inbox.receive(timeout_s=20).value) for _ in range(count)]}

    def hold(self, count: int = 1) -> dict[str, Any]:
        """Read, and go on looking at it."""
        self.held += [self.inbox.receive(timeout_s=20) for _ in range(count)]
        return self.look()

    def look(self) -> dict[str, Any]:
        """What is held."""
        return {"sums": [sum_of(message.value) for message in self.held]}

    def drop(self) -> dict[str, Any]:
        """Let go of all of it; what was received last is kept by its subscription."""
        self.held.clear()
        gc.collect()
        return {}

    def statistics(self) -> dict[str, Any]:
        """Of this member."""
        return {key: count for key, count in self.fabric.statistics().items() if key.startswith("arena")}

    def close(self) -> dict[str, Any]:
        """Leave; what is held stays held."""
        self.fabric.close()
        return {}

    def write(self, how: str) -> dict[str, Any]:
        """Into a value in place."""
        value = self.held[0].value
        if how == "ctypes":
            address = np.asarray(value).__array_interface__["data"][0]
            ctypes.memset(address, 0, 1)
        try:
            value[0] = 1
        except (ValueError, RuntimeError) as error:
            return {"refused": type(error).__name__}
        return {"refused": ""}

    def fork(self) -> dict[str, Any]:
        """A child that does nothing but end, by way of the collector."""
        pid = os.fork()
        if not pid:
            memfds = [name for name in descriptors() if "tensor-fabric" in name]
            with contextlib.suppress(WrongProcessError):
                self.fabric.close()
            self.held.clear()
            gc.collect()
            os._exit(2 if memfds else 0)
        return {"code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}


def descriptors() -> list[str]:
    """What the open descriptors of this process are."""
    return [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)]


def _is_open(name: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{name}")


def read(parent: Parent, spec: str, bytes_max: int = 64 * MIB, host: str = "", listen: str = "") -> None:
    """Rank 1."""
    if host:
        import fabric.entering

        fabric.entering.this_host = lambda: host
    config = config_of(bytes_max, **({"listen": listen} if listen else {}))
    with join(config, rank=1, world_size=2, rendezvous=spec) as member, member.subscribe("big.**") as inbox:
        reading = Reading(member, inbox)
        parent.say(ready=True)
        while "do" in (heard := parent.hear()):
            parent.say(**getattr(reading, heard.pop("do"))(**heard))


def ask(reader: Child, do: str, **arguments: Any) -> dict[str, Any]:
    reader.tell(do=do, **arguments)
    return reader.hear()


@contextmanager
def enter(spec: str, bytes_max: int = 64 * MIB, listen: str = "") -> Iterator[Fabric]:
    config = config_of(bytes_max, **({"listen": listen} if listen else {}))
    fabric = join(config, rank=0, world_size=2, rendezvous=spec)
    try:
        yield fabric
    finally:
        fabric.close(timeout_s=0.1)  # the child waits for us, and settles nothing more


def lead_in(fabric: Fabric, reader: Child) -> None:
    """Until the reader looks at what is published: the first values come by socket, while it asks for the lease."""
    assert reader.hear() == {"ready": True}
    for _ in range(50):
        fabric.publish(TOPIC, value(0, 100 * KIB))
        ask(reader, "receive")
        if ask(reader, "statistics").get("arena_mapped"):
            return
    raise AssertionError("nothing is ever mapped")


def in_use(fabric: Fabric) -> int:
    return int(fabric.statistics()["arena_bytes_in_use"])


# What arrives.


@pytest.mark.torch
@pytest.mark.parametrize("listen", ["", "tcp://127.0.0.1"])
def test_values_of_all_kinds_are_looked_at_where_they_lie(tmp_path: Path, listen: str) -> None:
    import torch

    spec = f"file://{tmp_path}"
    with child(read, spec=spec, listen=listen) as reader, enter(spec, listen=listen) as fabric:
        lead_in(fabric, reader)
        before = ask(reader, "statistics")["arena_mapped"]
        values: list[Any] = [value(size, size) for size in (65_536, 65_537, 100_001, MIB, 3 * MIB + 1)]
        values += [value(7, 256 * KIB).view(dtype) for dtype in (np.float32, np.int64, np.complex128, np.float16)]
        values += [torch.from_numpy(value(8, 256 * KIB)).view(dtype) for dtype in (torch.bfloat16, torch.float64)]
        values += [bytes(value(9, 200 * KIB)), {"a": value(10, 70 * KIB), "b": torch.from_numpy(value(11, 80 * KIB))}]
        for one in values:
            fabric.publish(TOPIC, one)
        assert ask(reader, "receive", count=len(values))["sums"] == [sum_of(one) for one in values]
        counts = ask(reader, "statistics")
        assert counts["arena_mapped"] - before == len(values)
        assert counts["arena_stale"] == counts["arena_out_of_bounds"] == 0


def test_members_of_other_hosts_read_by_socket(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(read, spec=spec, host="elsewhere") as reader, enter(spec) as fabric:
        reader.hear()
        for number in range(4):
            fabric.publish(TOPIC, value(number))
            assert ask(reader, "receive")["sums"] == [sum_of(value(number))]
        assert ask(reader, "statistics")["arena_mapped"] == 0
        assert in_use(fabric) == 0


# Who holds.


def test_what_is_held_never_changes_and_the_rest_comes_by_socket(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(read, spec=spec) as reader, enter(spec, bytes_max=8 * MIB) as fabric:
        lead_in(fabric, reader)
        for number in range(20):
            fabric.publish(TOPIC, value(number))
            held = ask(reader, "hold")["sums"]
        expected = [sum_of(value(number)) for number in range(20)]
        assert held == expected
        assert fabric.statistics()["arena_fallback_full"] > 0
        for number in range(20):
            fabric.publish(TOPIC, value(100 + number))
        assert ask(reader, "receive", count=20)["sums"] == [sum_of(value(100 + number)) for number in range(20)]
        assert ask(reader, "look")["sums"] == expected
        ask(reader, "drop")
        until(lambda: in_use(fabric) <= 2 * MIB, what="what is let go of is free")
        assert ask(reader, "fork") == {"code": 0}

        # It leaves, and looks on; the publisher goes on as if it had not held anything, and may not use its slots.
        fabric.publish(TOPIC, value(50))
        ask(reader, "hold")
        ask(reader, "close")
        for number in range(30):
            fabric.publish(TOPIC, value(200 + number))
        fabric.flush(timeout_s=20)
        assert ask(reader, "look")["sums"] == [sum_of(value(50))]
        reader.tell(end=True)
        assert reader.exit_code() == 0
        until(lambda: in_use(fabric) == 0, what="its process has ended")


def test_who_is_stopped_delays_nobody_and_who_is_killed_holds_nothing(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(read, spec=spec) as reader, enter(spec, bytes_max=8 * MIB) as fabric:
        lead_in(fabric, reader)
        with fabric.subscribe("big.**") as inbox:
            fabric.publish(TOPIC, value(1))
            held = ask(reader, "hold")["sums"]
            reader.signal(signal.SIGSTOP)
            for number in range(2, 22):
                fabric.publish(TOPIC, value(number))
            # (The first of them was published before, by chance of the order in which subscriptions are confirmed.)
            seen = [sum_of(inbox.receive(timeout_s=20).value) for _ in range(21)]
            assert seen == [sum_of(value(number)) for number in range(1, 22)]
            reader.signal(signal.SIGCONT)
            assert ask(reader, "hold", count=20)["sums"] == held + seen[1:]
            assert in_use(fabric) > 0
            reader.signal(signal.SIGKILL)
            reader.exit_code()
            until(lambda: not [*inbox.drain()] and fabric.peers["rank-1"].state == "dead", timeout_s=20)
        fabric.flush(timeout_s=20)
        until(lambda: in_use(fabric) <= 2 * MIB, what="the dead hold nothing")
        before = fabric.statistics()["arena_reused"]
        fabric.publish(TOPIC, value(3))
        assert fabric.statistics()["arena_reused"] >= before


# Publishers.


def write(parent: Parent, spec: str, fails: bool = False) -> None:
    """Rank 1 publishes what it is told to."""
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fabric.arena").addHandler(handler)
    with join(config_of(64 * MIB), rank=1, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher(TOPIC)
        publisher.wait_for_subscribers(1, timeout_s=20)
        if fails:
            os.posix_fallocate = _no_space  # type: ignore[assignment]
        parent.say(ready=True)
        while "number" in (heard := parent.hear()):
            if heard.get("fork"):
                pid = os.fork()
                if not pid:
                    with contextlib.suppress(WrongProcessError):
                        fabric.close()
                    os._exit(0)
                os.waitpid(pid, 0)
            publisher.publish(value(heard["number"]))
            parent.say(warnings=warnings, **{key: n for key, n in fabric.statistics().items() if "arena" in key})
        fabric.close(timeout_s=0.1)  # who reads it keeps what it has


def _no_space(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("ends", ["killed", "closed"])
def test_views_outlive_their_publisher(tmp_path: Path, ends: str) -> None:
    spec = f"file://{tmp_path}"
    with child(write, spec=spec) as writer, enter(spec) as fabric, fabric.subscribe("big.**") as inbox:
        writer.hear()
        held = []
        while fabric.statistics().get("arena_mapped", 0) < 3:
            number = len(held)
            writer.tell(number=number, fork=number == 1)
            writer.hear()
            held.append(inbox.receive(timeout_s=20))
            assert number < 50, "nothing is ever mapped"
        arrays = [message.value for message in held]
        if ends == "killed":
            writer.signal(signal.SIGKILL)
        else:
            writer.tell(end=True)
        assert writer.exit_code() == (-9 if ends == "killed" else 0)
        until(lambda: fabric.peers["rank-1"].state in ("dead", "left"), timeout_s=20)
        assert [sum_of(array) for array in arrays] == [sum_of(value(number)) for number in range(len(held))]


def test_without_memory_all_comes_by_socket_with_one_warning(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(write, spec=spec, fails=True) as writer, enter(spec) as fabric, fabric.subscribe("big.**") as inbox:
        writer.hear()
        for number in range(8):
            writer.tell(number=number)
            told = writer.hear()
            assert sum_of(inbox.receive(timeout_s=20).value) == sum_of(value(number))
        assert told["arena_fallback_no_memory"] > 0
        assert len(told["warnings"]) == 1 and "no more shared memory" in told["warnings"][0]
        assert fabric.statistics()["arena_mapped"] == 0
        writer.tell(end=True)
        assert writer.exit_code() == 0


# Writing where one only reads.


@pytest.mark.torch
@pytest.mark.parametrize("how", ["numpy", "torch"])
def test_an_in_place_write_on_a_received_view(tmp_path: Path, how: str) -> None:
    import torch

    spec = f"file://{tmp_path}"
    with child(read, spec=spec) as reader, enter(spec) as fabric:
        lead_in(fabric, reader)
        published = value(1) if how == "numpy" else torch.from_numpy(value(1))
        fabric.publish(TOPIC, published)
        ask(reader, "hold")
        assert ask(reader, "write", how=how) == {"refused": "ValueError" if how == "numpy" else "RuntimeError"}
        assert ask(reader, "look")["sums"] == [sum_of(published)]
        if how == "numpy":
            reader.tell(do="write", how="ctypes")
            assert reader.exit_code() == -signal.SIGSEGV, "the memory itself is read-only"
