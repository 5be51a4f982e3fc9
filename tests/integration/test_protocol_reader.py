"""PROTOCOL.md is enough: a reader that was written from the page alone takes part in a real fabric."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric.rendezvous import find
from tests.harness.page import (
    ADDRESSED,
    HEARTBEAT,
    REGISTER,
    Record,
    decode_data,
    decode_message,
    encode_message,
)
from tests.harness.reader import Reader
from tests.harness.waiting import until
from tests.meta.source import ROOT

JOB = "protocol-reader"
SEEDS, STEPS, LARGE = 4, 200, 1024 * 1024 // 4
MEMBER = f"""
import json, sys, threading
import numpy as np
from fabric import FabricConfig, join
from fabric.config import Work

begun, finished = threading.Event(), threading.Event()
steady = FabricConfig(work=Work(burst_age_ms=1000.0))  # a burst holds ten steps, however long they take
with join(steady, rank=0, world_size=1, job={JOB!r}) as fabric:
    fabric.respond("begin")(lambda request: begun.set())
    fabric.respond("finish")(lambda request: [finished.set(), request.value][1])
    fabric.respond("large")(lambda request: np.arange(50_000))
    fabric.respond("fail")(lambda request: 1 // 0)
    health = fabric.publisher("layers.0.health")
    values = fabric.publisher("values")
    health.wait_for_subscribers(1, timeout_s=20)
    fabric.subscribe("commands.**")  # the reader has to confirm it
    assert begun.wait(20)
    for step in range({STEPS}):
        health.publish(np.full((2, 3), step, np.float32), seed=step % {SEEDS}, metadata={{"step": step}})
        if step % 10 == 9:
            fabric.step(step)  # a burst leaves
    for value in (b"bytes", "text", -1, 2**70, 1.5, np.float64(0.25), None, True,
                  {{"a": [1, (2, "b")], 7: np.arange(5), "big": 2**80, "long": bytes(5000)}},
                  np.arange({LARGE}, dtype=np.uint32)):
        values.publish(value)
    if len(sys.argv) > 1:
        import torch
        tied = torch.arange(6.0).reshape(2, 3).t()
        values.publish(tied)
        values.publish({{"one": tied, "two": tied}})
        values.publish(torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    health.flush(timeout_s=30)
    values.flush(timeout_s=30)
    handled = health.handled_by({STEPS} - 1)
    finished.wait(30)
    report = fabric.close()
print(json.dumps([handled, report.balanced]))
"""

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]


@contextmanager
def a_member(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Any]]:
    """A process with one member, and its card; gone when the block ends."""
    command = [sys.executable, "-W", "error", "-c", MEMBER, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield process, until(lambda: find(JOB), timeout_s=20, what="the member's card")[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def met(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], Reader]]:
    """A member, and a reader that has said hello to it."""
    with a_member(*getattr(request, "param", ())) as (process, card):
        reader = Reader(JOB, "reader", data=card.endpoints[0], control=card.endpoints[1], bulk=card.endpoints[2])
        try:
            reader.hello()
            assert (reader.peer, reader.peer_incarnation) == (card.name, card.incarnation)
            yield process, reader
        finally:
            reader.close()


def finish(process: subprocess.Popen[str], reader: Reader) -> None:
    """End the member; it must have been acknowledged in full, and name its feeds' ends."""
    assert reader.request("finish", "enough") == "enough"
    ends = reader.await_bye()
    assert sorted(ends) == sorted([feed.feed, feed.floor, True] for feed in reader.feeds.values())
    told, _ = process.communicate(timeout=20)
    assert json.loads(told) == [{"reader": True}, True]
    assert process.returncode == 0


@pytest.mark.parametrize("file", ["page.py", "reader.py"])
def test_the_reader_knows_nothing_of_the_library(file: str) -> None:
    module = ast.parse((ROOT / "tests/harness" / file).read_text(encoding="utf-8"))
    found = [node for node in ast.walk(module) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in found if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in found if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in names - {"tests.harness.page"}} - sys.stdlib_module_names
    assert outside <= {"msgpack", "numpy", "xxhash", "zmq"}


def test_a_reader_of_the_page_receives_repairs_fetches_and_acknowledges(
    met: tuple[subprocess.Popen[str], Reader],
) -> None:
    process, reader = met
    assert [card[0] for card in reader.roster()] == ["rank-0", "reader"]
    reader.lose = lambda record: record.metadata.get("step") in (57, 58, 150)

    feeds = {feed.topic: feed for feed in reader.register(1, "**")}
    assert set(feeds) == {"layers.0.health", "values"}
    for feed in feeds.values():
        reader.follow(feed)
    health, values = feeds["layers.0.health"], feeds["values"]
    assert reader.request("begin", "now") is None

    reader.receive_to(health, STEPS)
    assert set(range(50, 60)) | set(range(150, 160)) <= set(reader.lost), "the bursts of ten steps were lost"
    assert set(reader.lost) <= set(reader.repaired)
    check_lanes(health.lanes())
    for offset, record in health.records.items():
        array = reader.value(health, record)
        assert record.metadata == {"step": offset}
        assert (array.dtype, array.shape, set(array.flat)) == (np.float32, (2, 3), {float(offset)})

    reader.receive_to(values, 10)
    check_values(reader, [values.records[offset] for offset in range(10)])
    large = reader.request("large", "please")
    assert np.array_equal(large, np.arange(50_000))
    assert reader.request("fail", "please")[0] == "ZeroDivisionError"
    assert reader.request("nothing", "please")[0] == "LookupError"

    for feed in feeds.values():
        reader.acknowledge(1, feed)
    finish(process, reader)
    assert REGISTER in reader.heard, "it was asked to confirm a subscription"


def check_lanes(lanes: dict[int, list[Record]]) -> None:
    """Every record of every lane is there, each behind its predecessor."""
    assert set(lanes) == set(range(SEEDS))
    for seed, records in lanes.items():
        assert [record.sequence for record in records] == list(range(STEPS // SEEDS))
        assert [record.offset for record in records] == list(range(seed, STEPS, SEEDS))
        assert [record.previous for record in records] == [-1, *range(seed, STEPS - SEEDS, SEEDS)]


def check_values(reader: Reader, records: list[Record]) -> None:
    values = next(feed for feed in reader.feeds.values() if feed.topic == "values")
    *small, tree, large = [reader.value(values, record) for record in records]
    assert small == [b"bytes", "text", -1, 2**70, 1.5, 0.25, None, True]
    array = tree.pop(7)
    assert array.tolist() == [0, 1, 2, 3, 4]
    assert array.dtype == np.int64
    assert tree == {"a": [1, (2, "b")], "big": 2**80, "long": bytes(5000)}
    assert records[-1].kind & ADDRESSED, "1 MiB is addressed, not pushed"
    assert np.array_equal(large, np.arange(LARGE, dtype=np.uint32))


@pytest.mark.torch
@pytest.mark.parametrize("met", [("torch",)], indirect=True)
def test_a_reader_without_torch_decodes_tensors(met: tuple[subprocess.Popen[str], Reader]) -> None:
    pytest.importorskip("torch", reason="the member publishes tensors")
    process, reader = met
    feeds = {feed.topic: feed for feed in reader.register(9, "**", start="retained")}
    health, values = feeds["layers.0.health"], feeds["values"]
    for feed in (health, values):
        reader.follow(feed)
    assert reader.request("begin", "now") is None
    reader.receive_to(values, 13)
    reader.receive_to(health, STEPS)
    tensor, tied, bfloat16 = [reader.value(values, values.records[offset]) for offset in (10, 11, 12)]
    assert tensor.tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert tied["one"] is tied["two"]
    assert tied["one"].tolist() == tensor.tolist()
    assert bfloat16.tolist() == [0x3F80, 0xC000]
    assert HEARTBEAT in reader.heard, "a tail that nobody acknowledged is told"
    for feed in (health, values):
        reader.acknowledge(9, feed)
    finish(process, reader)


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "data").glob("*.bin")), ids=lambda path: path.stem)
def test_the_page_describes_the_golden_frames(path: Path) -> None:
    frame = path.read_bytes()
    if path.stem.startswith("data_"):
        data = decode_data(frame)
        assert (data.nonces is not None) == (path.stem == "data_marker")
        assert len(data.records) == data.end - data.first
    else:
        message = decode_message(frame)
        assert encode_message(message.kind, message.source, message.incarnation, *message.fields) == frame


def test_the_page_names_every_kind_of_message() -> None:
    """The table of section 4 and the code agree."""
    from fabric.core.fields import FIELDS

    page = Path(ROOT / "PROTOCOL.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:4] for line in page.splitlines() if line.startswith("| ") and line.count("|") == 4]
    told = {
        name.strip(): int(number) for number, name, _ in rows if name.strip().isupper() and number.strip().isdigit()
    }
    assert {kind.name: int(kind) for kind in FIELDS}.items() <= told.items()
