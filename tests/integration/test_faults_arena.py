"""Rows of the fault catalogue (ARCHITECTURE.md) that concern shared memory, with real processes."""

from __future__ import annotations

import contextlib
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

from fabric import Fabric, FabricConfig, Publisher, join
from fabric.config import Arena, Liveness, Retention
from tests.harness.children import Child, Parent, child
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

zmq.Frame(b"x" * 65536, copy=False, track=True)
# pyzmq starts a collector for frames that are sent without a copy, once in a process: before a test looks for leaks.

MIB = 1024 * 1024
SMALL = FabricConfig(
    arena=Arena(bytes_max=16 * MIB),
    retention=Retention(kept_bytes_max=1),
    liveness=Liveness(heartbeat_ms=100, suspect_s=0.5, down_s=1.0),
)
"""Sixteen values or less: one that is held too long is missed soon."""


def value(number: int) -> np.ndarray[Any, Any]:
    """A million bytes that no other value has."""
    return np.full(1_000_000, number % 251, np.uint8)


def digest(array: np.ndarray[Any, Any]) -> str:
    return hashlib.sha256(array).hexdigest()


def count(fabric: Fabric, name: str) -> int:
    return fabric.statistics().get(name, 0)


def memories() -> list[str]:
    """The segments of which this process has a descriptor."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the listing itself
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [target for target in found if "memfd:tensor-fabric" in target]


# The other process.


def read(parent: Parent, spec: str) -> None:
    """Holds as many values as it is told, and says what became of them."""
    held: list[np.ndarray[Any, Any]] = []
    with join(SMALL, rank=1, world_size=2, rendezvous=spec) as fabric, fabric.subscribe("t") as inbox:
        parent.say(ready=True)
        while asked := parent.hear():
            if asked.get("die"):
                os._exit(0)
            held = held[asked.get("drop", 0) :]
            for _ in range(asked.get("take", 0)):
                message = inbox.receive(timeout_s=20)
                assert int(message.value[0]) == int(message.value[-1])
                if len(held) < asked.get("hold", 0):
                    held.append(message.value)
                number = message.sequence
                del message
            inbox.drain()
            facts = {"mapped": count(fabric, "arena_mapped"), "fetched": count(fabric, "slots_fetched")}
            parent.say(digests=[digest(array) for array in held], number=number if asked.get("take") else 0, **facts)
    parent.say(digests=[digest(array) for array in held])  # after its fabric is closed
    parent.hear()
    parent.say(digests=[digest(array) for array in held])


def publish(parent: Parent, spec: str) -> None:
    """Publishes as many values as it is told."""
    with join(SMALL, rank=1, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("t", when_full="block")
        publisher.wait_for_subscribers(1, timeout_s=20)
        number = 0
        while asked := parent.hear():
            for _ in range(asked["publish"]):
                publisher.publish(value(number))
                number += 1
            publisher.flush(timeout_s=20)
            parent.say(**{name: found for name, found in fabric.statistics().items() if name.startswith("arena_")})


@contextmanager
def writing(tmp_path: Path, config: FabricConfig = SMALL) -> Iterator[tuple[Fabric, Publisher, Child]]:
    """We publish, a child reads."""
    spec = f"file://{tmp_path}"
    with child(read, spec=spec) as reader, join(config, rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("t", when_full="block")
        reader.hear()
        publisher.wait_for_subscribers(1, timeout_s=20)
        yield fabric, publisher, reader


def exchange(publisher: Publisher, reader: Child, numbers: range, **asked: int) -> dict[str, Any]:
    """These values, and what the reader says of them."""
    reader.tell(take=len(numbers), **asked)
    for number in numbers:
        publisher.publish(value(number))
    return reader.hear()


# The tests.


def test_values_are_looked_at_where_they_lie_and_slots_are_used_again(tmp_path: Path) -> None:
    with writing(tmp_path) as (fabric, publisher, reader):
        exchange(publisher, reader, range(3))  # which are fetched: the lease is on its way
        said = exchange(publisher, reader, range(3, 103))
        assert said["mapped"] >= 50
        assert count(fabric, "arena_reused") >= 30
        assert count(fabric, "arena_bytes_committed") <= SMALL.arena.bytes_max
        publisher.flush(timeout_s=20)


def test_f60_what_a_reader_holds_never_changes_and_others_go_by_socket(tmp_path: Path) -> None:
    with writing(tmp_path) as (fabric, publisher, reader):
        exchange(publisher, reader, range(5))
        said = exchange(publisher, reader, range(5, 17), hold=12)
        wanted = [digest(value(number)) for number in range(5, 17)]
        assert said["digests"] == wanted
        said = exchange(publisher, reader, range(17, 117), hold=12)
        assert said["digests"] == wanted
        assert count(fabric, "arena_fallback_full") > 0
        assert exchange(publisher, reader, range(117, 120), drop=12, hold=0)["digests"] == []
        before = said["mapped"]
        until(lambda: exchange(publisher, reader, range(5))["mapped"] > before + 5, what="the arena in use again")


def test_f60_a_stopped_reader_finds_its_bytes_unchanged(tmp_path: Path) -> None:
    with writing(tmp_path) as (_, publisher, reader):
        exchange(publisher, reader, range(5))
        wanted = exchange(publisher, reader, range(5, 9), hold=4)["digests"]
        reader.signal(signal.SIGSTOP)
        for number in range(9, 60):
            publisher.publish(value(number))
        reader.signal(signal.SIGCONT)
        reader.tell(take=51)
        assert reader.hear()["digests"] == wanted == [digest(value(number)) for number in range(5, 9)]


def test_f59_the_slots_of_a_killed_reader_are_free_at_once(tmp_path: Path) -> None:
    with writing(tmp_path, replace(SMALL, liveness=Liveness())) as (fabric, publisher, reader):
        exchange(publisher, reader, range(5))
        exchange(publisher, reader, range(5, 17), hold=12)
        assert count(fabric, "arena_bytes_in_use") >= 12_000_000
        reader.signal(signal.SIGKILL)  # who is silent for 4 s would be suspected, and then found dead
        until(lambda: count(fabric, "arena_bytes_in_use") <= MIB, timeout_s=3, what="all slots free")
        assert count(fabric, "arena_readers") == 0


def test_f63_a_reader_that_ended_and_is_not_waited_for_is_dead(tmp_path: Path) -> None:
    with writing(tmp_path, replace(SMALL, liveness=Liveness())) as (fabric, publisher, reader):
        exchange(publisher, reader, range(5), hold=3)
        reader.tell(die=True)  # by itself; its parent, this test, does not wait for it: it stays a zombie
        until(lambda: Path(f"/proc/{reader.pid}/stat").read_text(encoding="ascii").split()[2] == "Z", what="a zombie")
        until(lambda: fabric.peers["rank-1"].state == "dead", timeout_s=3, what="its death known")


def test_f58_what_a_killed_writer_left_in_our_hands_stays(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with (
        child(publish, spec=spec) as writer,
        join(SMALL, rank=0, world_size=2, rendezvous=spec) as fabric,
        fabric.subscribe("t") as inbox,
    ):
        held = []
        for _ in range(2):
            writer.tell(publish=4)
            held += [inbox.receive(timeout_s=20).value for _ in range(4)]
            inbox.drain()  # so that they count as handled
            writer.hear()
        assert count(fabric, "arena_mapped") >= 4
        writer.signal(signal.SIGKILL)
        until(lambda: fabric.peers["rank-1"].state in ("dead", "down"), what="the death known")
        assert [digest(array) for array in held] == [digest(value(number)) for number in range(8)]


def test_what_is_held_over_a_close_stays_and_its_writer_goes_on(tmp_path: Path) -> None:
    with writing(tmp_path) as (fabric, publisher, reader):
        exchange(publisher, reader, range(5))
        wanted = exchange(publisher, reader, range(5, 11), hold=6)["digests"]
        reader.tell()  # it closes, and keeps what it has
        assert reader.hear()["digests"] == wanted
        own = fabric.subscribe("t")
        for number in range(40):
            publisher.publish(value(number + 100))
            assert int(own.receive(timeout_s=20).value[0]) == (number + 100) % 251
        reader.tell(end=True)
        assert reader.hear()["digests"] == wanted


def test_f62_without_memory_values_go_by_socket_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(28, "no space left")

    with writing(tmp_path, SMALL) as (fabric, publisher, reader):
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        with caplog.at_level(logging.WARNING, logger="fabric.arena"):
            exchange(publisher, reader, range(3))
            said = exchange(publisher, reader, range(3, 20))
        assert said["mapped"] == 0
        assert count(fabric, "arena_fallback_no_memory") > 5
        assert len(caplog.records) == 1
        monkeypatch.undo()
        assert exchange(publisher, reader, range(20, 40))["mapped"] > 10


def test_a_forked_child_leaves_our_memory_alone(tmp_path: Path) -> None:
    with writing(tmp_path) as (_, publisher, reader):
        exchange(publisher, reader, range(3))
        exchange(publisher, reader, range(3, 10))
        assert memories()
        pid = os.fork()
        if not pid:
            os._exit(len(memories()))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert exchange(publisher, reader, range(10, 30))["mapped"] >= 20


def test_an_arena_leaves_no_file_and_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with writing(tmp_path) as (_, publisher, reader):
        exchange(publisher, reader, range(10))
        reader.signal(signal.SIGKILL)
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_can_be_turned_off(tmp_path: Path) -> None:
    with writing(tmp_path, replace(SMALL, arena=Arena(enabled=False))) as (fabric, publisher, reader):
        assert exchange(publisher, reader, range(5))["mapped"] == 0
        assert not [name for name in fabric.statistics() if name.startswith("arena_")]


def test_f38_a_bit_that_flips_in_a_slot_is_never_delivered() -> None:
    spec = f"memory://arena-{os.getpid()}"
    with join(SMALL, rank=0, world_size=1, rendezvous=spec) as fabric, fabric.subscribe("t") as inbox:
        publisher = fabric.publisher("t")
        for number in range(3):
            publisher.publish(value(number))
            assert int(inbox.receive(timeout_s=5).value[0]) == number
        engine = fabric._engine
        with engine.lock:  # nobody looks at it meanwhile
            publisher.publish(value(3))
            sharing: Any = engine.sharing
            place = list(sharing._slots.values())[-1]
            segment = sharing._arena.segments[place.segment]
            segment.memory[segment.start + place.slot * segment.slot_bytes] ^= 1
        publisher.publish(value(4))
        assert int(inbox.receive(timeout_s=5).value[0]) == 4
        (gap,) = inbox.gaps
        assert (gap.first, gap.end, gap.reason) == (3, 4, "corrupt_at_source")
        assert count(fabric, "slots_corrupt") == 1
