"""Owed retention that continues on disk, with real processes and real files."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fabric import FabricConfig, Publisher, join
from fabric.config import Liveness, Retention, Spill
from fabric.errors import FabricError, QueueFullError, SpillBrokenError, SpillFullError
from tests.harness.children import Parent, child, children, forget_peak, peak_bytes, resident_bytes
from tests.harness.figures import show
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

MIB = 1024 * 1024
MEMORY = Retention(owed_bytes_max=8 * MIB, kept_bytes_max=1 * MIB, publish_timeout_s=10.0)
RECORD = 4096


def config_of(directory: Path | str, **spill: int) -> FabricConfig:
    settings = Spill(directory=Path(directory), **{"free_bytes_min": 1, "segment_bytes": 4 * MIB, **spill})
    return replace(FabricConfig(), retention=MEMORY, spill=settings, liveness=Liveness(suspect_s=1.5))


def files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def listen(parent: Parent, spec: str, directory: str) -> None:
    """Says when the first record is here, then stops; later all that came."""
    with (
        join(config_of(directory), rank=1, world_size=2, rendezvous=spec) as fabric,
        fabric.subscribe("flow.**", acknowledge="auto") as inbox,
    ):
        first = inbox.receive(timeout_s=30)
        assert first.sequence == 0
        parent.say(first=True)
        parent.hear()
        lanes: dict[int, int] = {first.seed: 0}
        ordered, received = True, 1
        for message in inbox:
            ordered &= message.sequence == lanes.get(message.seed, -1) + 1
            lanes[message.seed] = message.sequence
            received += 1
        parent.say(received=received, ordered=ordered, gaps=len(inbox.gaps))


def publish_through_an_outage(parent: Parent, spec: str, directory: str, records: int) -> None:
    with join(config_of(directory), rank=0, world_size=2, rendezvous=spec) as fabric:
        publisher = fabric.publisher("flow.health")
        publisher.wait_for_subscribers(1, timeout_s=30)
        publisher.publish(bytes(RECORD))
        parent.hear()
        forget_peak()
        base, began, longest = resident_bytes(), time.monotonic(), 0.0
        for number in range(1, records):
            before = time.monotonic()
            publisher.publish(bytes(RECORD), seed=number % 4)
            longest = max(longest, time.monotonic() - before)
        seconds = time.monotonic() - began
        spilled = fabric.statistics()["bursts_spilled"]
        parent.say(grown=peak_bytes() - base, seconds=seconds, longest=longest, spilled=spilled)
        parent.hear()
        publisher.flush(timeout_s=60)
        parent.say(left=fabric.statistics()["bursts_loaded"])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_publisher_goes_on_through_an_outage_and_nothing_is_lost(tmp_path: Path) -> None:
    spec, disk, records = f"file://{tmp_path}/meeting", tmp_path / "disk", 30_000
    with children(
        child(publish_through_an_outage, spec=spec, directory=str(disk), records=records),
        child(listen, spec=spec, directory=str(disk)),
    ) as (publisher, victim):
        assert victim.hear()["first"]
        victim.signal(signal.SIGSTOP)
        publisher.tell()
        told = publisher.hear(120)
        size = sum(path.stat().st_size for path in files(disk))
        assert told["spilled"] * 60_000 > records * RECORD - 2 * MEMORY.owed_bytes_max
        assert size > records * RECORD - 2 * MEMORY.owed_bytes_max
        assert told["grown"] < (MEMORY.owed_bytes_max + MEMORY.kept_bytes_max) * 1.25 + 64 * MIB
        victim.signal(signal.SIGCONT)
        victim.tell()
        publisher.tell()
        assert publisher.hear(120)["left"] > 0
        heard = victim.hear(120)
        assert [publisher.exit_code(), victim.exit_code()] == [0, 0]
    assert heard == {"received": records, "ordered": True, "gaps": 0}
    assert files(disk) == [], "a log that nobody needs is removed"
    show(f"{size / MIB:.0f} MiB spilled in {told['seconds']:.1f} s, the longest publish {1e3 * told['longest']:.0f} ms")


def read_only_when_told(parent: Parent, spec: str, directory: str) -> None:
    with (
        join(config_of(directory), rank=1, world_size=2, rendezvous=spec) as fabric,
        fabric.subscribe("flow.**", acknowledge="manual") as inbox,
    ):
        parent.hear()
        values = []
        for message in inbox:
            message.acknowledge()
            values.append(int.from_bytes(message.value[:4], "little"))
        parent.say(values=values)


def publish_until_refused(publisher: Publisher, reason: type[Exception]) -> tuple[int, Exception]:
    """Until the disk is to blame; how many were taken, and its words. A disk that is busy only holds up."""
    taken = 0
    while taken < 100_000:
        try:
            publisher.publish(taken.to_bytes(4, "little") + bytes(RECORD))
            taken += 1
        except QueueFullError as error:
            if isinstance(error.__cause__, reason):
                return taken, error.__cause__
    raise AssertionError("the disk took everything")


def test_f31_a_full_spill_holds_the_publisher_back_and_takes_nothing(tmp_path: Path) -> None:
    spec, disk = f"file://{tmp_path}/meeting", tmp_path / "disk"
    small = config_of(disk, bytes_max=24 * MIB, segment_bytes=4 * MIB)
    small = replace(small, retention=replace(MEMORY, publish_timeout_s=0.3))
    with child(read_only_when_told, spec=spec, directory=str(disk)) as reader:
        with join(small, rank=0, world_size=2, rendezvous=spec) as fabric:
            publisher = fabric.publisher("flow.health", when_full="spill")
            publisher.wait_for_subscribers(1, timeout_s=30)
            reader.signal(signal.SIGSTOP)
            taken, refusal = publish_until_refused(publisher, SpillFullError)
            assert isinstance(refusal, SpillFullError)
            assert 16 * MIB < taken * RECORD < 48 * MIB
            assert sum(path.stat().st_size for path in files(disk)) <= 24 * MIB
            reader.signal(signal.SIGCONT)
            reader.tell()
            until(lambda: fabric.statistics()["bursts_spilled"] and _publishes(publisher, taken), timeout_s=20)
            publisher.flush(timeout_s=30)
        assert reader.hear(30)["values"] == list(range(taken + 1))
        assert reader.exit_code() == 0


def _publishes(publisher: Publisher, number: int) -> bool:
    try:
        publisher.publish(number.to_bytes(4, "little") + bytes(RECORD))
    except QueueFullError:
        return False
    return True


def test_f36_a_directory_that_others_may_enter_is_refused_and_said(tmp_path: Path) -> None:
    spec, disk = f"file://{tmp_path}/meeting", tmp_path / "disk"
    disk.mkdir(mode=0o755)
    disk.chmod(0o755)
    config = replace(config_of(disk), retention=replace(MEMORY, owed_bytes_max=1 * MIB, publish_timeout_s=0.3))
    with (
        child(read_only_when_told, spec=spec, directory=str(tmp_path / "other")) as reader,
        join(config, rank=0, world_size=2, rendezvous=spec) as fabric,
    ):
        publisher = fabric.publisher("flow.health")
        publisher.wait_for_subscribers(1, timeout_s=30)
        reader.signal(signal.SIGSTOP)
        _, refusal = publish_until_refused(publisher, FabricError)
        assert "0755" in str(refusal)
        assert files(disk) == []
        reader.signal(signal.SIGCONT)
        reader.tell()


def spill_fork_and_wait(parent: Parent, spec: str, directory: str) -> None:
    """A worker that outlives its parent, whose log it has inherited."""
    fabric = join(config_of(directory), rank=1, world_size=2, rendezvous=spec)
    publisher = fabric.publisher("flow.lost")
    publisher.wait_for_subscribers(1, timeout_s=30)
    for _ in range(8_000):
        publisher.publish(bytes(RECORD))
    until(lambda: fabric.statistics().get("bursts_spilled", 0) > 0, what="something is on disk")
    worker = os.fork()
    if not worker:
        os.close(0)
        signal.pause()
    parent.say(worker=worker)
    parent.hear()


def test_what_a_killed_member_left_is_removed_though_its_worker_lives(tmp_path: Path) -> None:
    spec, disk = f"file://{tmp_path}/meeting", tmp_path / "disk"
    with (
        child(spill_fork_and_wait, spec=spec, directory=str(disk)) as victim,
        join(config_of(disk), rank=0, world_size=2, rendezvous=spec) as fabric,
        fabric.subscribe("flow.**", acknowledge="manual") as inbox,
    ):
        inbox.receive(timeout_s=30)
        worker = victim.hear(60)["worker"]
        with join(config_of(disk)):
            assert files(disk), "its owner lives"
        victim.signal(signal.SIGKILL)
        victim.exit_code()
        os.kill(worker, 0)  # it is there
        with join(config_of(disk)):
            assert files(disk) == [], "found by the next member that begins"


def test_a_disk_that_cannot_be_used_is_tried_again(tmp_path: Path) -> None:
    spec, disk = f"file://{tmp_path}/meeting", tmp_path / "disk"
    config = replace(config_of(disk), retention=replace(MEMORY, owed_bytes_max=1 * MIB))
    with child(read_only_when_told, spec=spec, directory=str(tmp_path / "other")) as reader:
        with join(config, rank=0, world_size=2, rendezvous=spec) as fabric:
            publisher = fabric.publisher("flow.health")
            publisher.wait_for_subscribers(1, timeout_s=30)
            reader.signal(signal.SIGSTOP)
            disk.write_text("in the way")
            for number in range(150):
                publisher.publish(number.to_bytes(4, "little") + bytes(RECORD))
            until(lambda: fabric._engine.store.error is not None)
            assert not isinstance(fabric._engine.store.error, SpillBrokenError)
            disk.unlink()
            for number in range(150, 2_000):  # the first that finds no room waits until the disk is tried again
                publisher.publish(number.to_bytes(4, "little") + bytes(RECORD))
            assert fabric.statistics()["writes_failed"] >= 1
            reader.signal(signal.SIGCONT)
            reader.tell()
            publisher.flush(timeout_s=30)
        assert reader.hear(30)["values"] == list(range(2_000))
        assert reader.exit_code() == 0
