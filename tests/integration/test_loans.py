"""Loans: written in place, published as they are, and nobody writes to them afterwards."""

from __future__ import annotations

import os
import threading
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import FabricConfig, join
from fabric.config import Arena, Inboxes, Retention
from fabric.engine import loans
from fabric.errors import (
    ClosedError,
    ConfigError,
    PayloadTooLargeError,
    QueueFullError,
    SeedError,
    UnsupportedValueError,
    WrongProcessError,
    WrongThreadError,
)
from tests.harness.children import Parent, child
from tests.harness.faces import DEFAULT, played
from tests.harness.lending import LARGE, in_use, meet, meet_alone

torch = pytest.importorskip("torch", reason="what is lent is a tensor, mostly")

pytestmark = pytest.mark.torch

SOCKETS = replace(DEFAULT, arena=Arena(enabled=False))


def refuse(*_: Any) -> Any:
    raise AssertionError("it was copied")


@played()
async def test_a_large_value_is_read_where_it_was_written(face: Any, a: Any, b: Any) -> None:
    inbox, publisher = await meet(face, a, b)
    await publisher.publish(1, seed=5)
    mapped = b.statistics()["arena_mapped"]
    loan = publisher.loan(LARGE, torch.float32, seed=5, metadata={"step": 3})
    patched, loans.fill = loans.fill, refuse
    try:
        async with loan as tensor:
            assert (tensor.shape, tensor.dtype, loan.sequence) == (LARGE, torch.float32, None)
            address = tensor.data_ptr()
            tensor.copy_(torch.arange(256 * 1024.0).view(LARGE))
    finally:
        loans.fill = patched
    assert (loan.sequence, tensor.shape, loan.value) == (1, (0,), None)
    first, second = [await inbox.receive(timeout_s=10) for _ in range(2)]
    assert (first.value, second.seed, second.sequence, second.metadata) == (1, 5, 1, {"step": 3})
    assert torch.equal(second.value, torch.arange(256 * 1024.0).view(LARGE))
    assert "loans_copied" not in a.statistics()
    assert b.statistics()["arena_mapped"] == mapped + 1
    del first, second
    async with publisher.loan(LARGE, torch.float32) as again:
        again.fill_(2)
        assert again.data_ptr() != address, "history is kept"


@played(config=SOCKETS)
async def test_without_shared_memory_it_is_the_same(face: Any, a: Any, b: Any) -> None:
    inbox, publisher = await meet(face, a, b)
    async with publisher.loan(LARGE, "int16", seed=1) as array:
        array[:] = 7
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 8
    assert array.shape == (0,)
    message = await inbox.receive(timeout_s=10)
    assert (message.value.dtype, message.value.shape) == (np.int16, LARGE)
    assert (message.value == 7).all()


@played()
async def test_a_small_or_empty_value_travels_as_ever(face: Any, a: Any, b: Any) -> None:
    inbox, publisher = await meet(face, a, b)
    for shape in ((), (3,), (2, 0, 5)):
        async with publisher.loan(shape, torch.bfloat16) as tensor:
            tensor.fill_(1.5)
        message = await inbox.receive(timeout_s=10)
        assert torch.equal(message.value, torch.full(shape, 1.5, dtype=torch.bfloat16))


@pytest.mark.parametrize("policy", ["latest", "lossy"])
def test_every_policy_lends(policy: str) -> None:
    with join(config=DEFAULT) as member:
        inbox, publisher = member.subscribe("t"), member.publisher("t", policy=policy)
        for number in range(3):
            with publisher.loan(LARGE, torch.float32, seed=2) as tensor:
                tensor.fill_(number)
            assert (inbox.receive(timeout_s=10).value == number).all()


@pytest.mark.parametrize("size", [8, 300_000])
def test_a_durable_topic_lends(size: int, tmp_path: Path) -> None:
    config = replace(DEFAULT, retention=Retention(publish_timeout_s=10))
    with join(config, rank=0, world_size=1, state_directory=tmp_path / "state") as member:
        inbox, publisher = member.subscribe("t"), member.publisher("t", policy="durable")
        loan = publisher.loan(size, "u1", seed=4)
        with loan as array:
            array[:] = 9
        message = inbox.receive(timeout_s=10)
        assert (loan.sequence, message.seed, message.value.tobytes()) == (0, 4, b"\x09" * size)
        with publisher.loan(size, "u1") as array:
            array[:] = 3
            view = array[:4]
        view[:] = 1
        assert inbox.receive(timeout_s=10).value.tobytes() == b"\x03" * size
        assert member.statistics()["loans_copied"] == 1


@pytest.mark.parametrize("size", [10, 300_000])
def test_an_exception_publishes_nothing(size: int) -> None:
    with join(config=DEFAULT) as member:
        inbox, publisher = meet_alone(member)
        used = in_use(member)
        with pytest.raises(ZeroDivisionError), publisher.loan(size, torch.uint8) as tensor:
            assert in_use(member) > used
            tensor[:] = 1 // 0
        assert (tensor.shape, publisher.next, in_use(member)) == ((0,), 1, used)
        with pytest.raises(ZeroDivisionError), publisher.loan(size, torch.uint8) as tensor:
            view = tensor[:1]
            tensor[:] = 1 // 0
        assert publisher.publish(b"next") == 0
        assert inbox.receive(timeout_s=10).value == b"next"
        view.fill_(1)
        assert "loans_copied" not in member.statistics()


# What is refused.


@played(ranks=1)
async def test_a_loan_is_for_one_block(face: Any, a: Any) -> None:
    publisher = a.publisher("t")
    loan = publisher.loan(3, "f4")
    async with loan:
        with pytest.raises(ClosedError, match="entered before"):
            await loan.__aenter__()
    with pytest.raises(ClosedError, match="entered before"):
        await loan.__aenter__()
    assert publisher.next == 1


@played(config=replace(DEFAULT, inboxes=Inboxes(payload_bytes_max=1 << 20)))
async def test_what_cannot_be_lent_is_refused_at_once(face: Any, a: Any, b: Any) -> None:
    publisher = a.publisher("t")
    with pytest.raises(UnsupportedValueError):
        publisher.loan(3, torch.quint8)
    with pytest.raises(UnsupportedValueError):
        publisher.loan((3, -1), "f4")
    with pytest.raises(PayloadTooLargeError):
        publisher.loan(1 << 20, "u1")
    with pytest.raises(SeedError):
        publisher.loan(3, "f4", seed=-1)
    with pytest.raises(ConfigError, match="guard"):
        a.publisher("t", guard="strict")
    with pytest.raises(ConfigError, match="none of off, sample, strict"):
        a.publisher("u", guard="always")


@played()
async def test_a_publisher_that_is_closed_takes_nothing(face: Any, a: Any, b: Any) -> None:
    publisher = a.publisher("t")
    loan = publisher.loan(LARGE, "f4")
    with pytest.raises(ClosedError):
        async with loan:
            await a.close(timeout_s=1)
    assert (loan.sequence, loan.value, publisher.next) == (None, None, 0)
    with pytest.raises(ClosedError):
        publisher.loan(3, "f4")


FULL = replace(DEFAULT, retention=Retention(owed_bytes_max=1_200_000, publish_timeout_s=0.05))


@played(config=FULL)
async def test_a_refused_loan_took_nothing(face: Any, a: Any, b: Any) -> None:
    for when_full in ("fail", "block"):
        inbox, publisher = await meet(face, a, b, topic=when_full, when_full=when_full)
        async with publisher.loan(LARGE, "f4") as array:
            array[:] = 1
        loan = publisher.loan(LARGE, "f4")
        with pytest.raises(QueueFullError):
            async with loan as array:
                array[:] = 2
        assert (loan.sequence, publisher.next, array.shape) == (None, 2, (0,))
        message = await inbox.receive(timeout_s=10)
        assert (message.value == 1).all()
        del message
        inbox.drain()
        await publisher.flush(timeout_s=10)
        async with publisher.loan(LARGE, "f4") as array:
            array[:] = 3
        assert ((await inbox.receive(timeout_s=10)).value == 3).all()
        inbox.drain()
        await publisher.flush(timeout_s=10)


def test_the_thread_that_entered_leaves() -> None:
    with join(config=DEFAULT) as member:
        loan = member.publisher("t").loan(LARGE, "f4")
        loan.__enter__()
        seen: list[BaseException] = []

        def leave() -> None:
            try:
                loan.__exit__(None, None, None)
            except WrongThreadError as error:
                seen.append(error)

        thread = threading.Thread(target=leave, name="other")
        thread.start()
        thread.join()
        assert [error.fields for error in seen] == [{"owner": "MainThread", "caller": "other"}]  # type: ignore[attr-defined]
        loan.__exit__(None, None, None)
        assert loan.sequence == 0


# Into memory that is there.


def test_a_value_in_shared_memory_is_copied_once_into_what_is_given() -> None:
    with join(config=DEFAULT) as member:
        inbox, publisher = meet_alone(member)
        with publisher.loan((4, *LARGE), "f4") as array:
            array[:] = 4
        into = np.zeros((4, *LARGE), np.float32)
        tracemalloc.start()
        try:
            message = inbox.receive(timeout_s=10, into=into)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert (into == 4).all()
        assert message.value is into
        assert peak < into.nbytes // 4, "no other room was made for it"


# Processes.


def forks_inside(parent: Parent, *, size: int) -> None:
    with join(FabricConfig(install_signal_handler=False)) as member:
        inbox, publisher = meet_alone(member)
        loan = publisher.loan(size, torch.uint8)
        tensor = loan.__enter__()
        tensor.fill_(3)
        pid = os.fork()
        if not pid:
            code = 1
            try:
                loan.__exit__(None, None, None)
            except WrongProcessError:
                code = 7 if tensor.shape == (0,) else 2
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        loan.__exit__(None, None, None)
        parent.say(code=code, value=int(inbox.receive(timeout_s=10).value.sum()))


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [100, 300_000])
def test_a_forked_child_gives_nothing(size: int) -> None:
    with child(forks_inside, size=size, flags=()) as one:
        assert one.hear() == {"code": 7, "value": 3 * size}
