"""Loans: written in place, published as they are, and nobody writes to them afterwards."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import Fabric, FabricConfig, join
from fabric.config import Arena, Inboxes, Retention
from fabric.engine import loans, outbox
from fabric.errors import (
    ClosedError,
    ConfigError,
    MutationError,
    PayloadTooLargeError,
    QueueFullError,
    SeedError,
    UnsupportedValueError,
    WrongProcessError,
    WrongThreadError,
)
from tests.harness.children import Parent, child
from tests.harness.faces import DEFAULT, played
from tests.harness.waiting import until

torch = pytest.importorskip("torch", reason="what is lent is a tensor, mostly")

pytestmark = pytest.mark.torch

LARGE = (256, 1024)
"""1 MiB of float32."""
SOCKETS = replace(DEFAULT, arena=Arena(enabled=False))


WARM = {"value": bytes(100_000), "seed": 99}
"""The first large value of a feed: with it a reader asks for a share of the memory."""


async def meet(face: Any, a: Any, b: Any, topic: str = "t", **options: Any) -> tuple[Any, Any]:
    """A publisher of one and a subscription of the other, which reads it in shared memory if there is any."""
    inbox, publisher = await b.subscribe(topic), a.publisher(topic, **options)
    await publisher.wait_for_subscribers(1, timeout_s=30)
    await publisher.publish(**WARM)
    assert (await inbox.receive(timeout_s=30)).seed == WARM["seed"]
    inbox.drain()
    await publisher.flush(timeout_s=30)
    engine, feed = getattr(a, "inner", a)._engine, getattr(publisher, "inner", publisher)
    if engine.config.arena.enabled:
        await face.until(lambda: is_shared(engine, getattr(feed, "_outbox", feed)))
    return inbox, publisher


def meet_alone(member: Fabric, **options: Any) -> tuple[Any, Any]:
    """As `meet`, of one member that reads itself."""
    inbox, publisher = member.subscribe("t"), member.publisher("t", **options)
    publisher.publish(**WARM)
    assert inbox.receive(timeout_s=30).seed == WARM["seed"]
    list(inbox.drain())
    until(lambda: is_shared(member._engine, publisher))
    return inbox, publisher


def is_shared(engine: Any, outbox: Any) -> bool:
    """Whether somebody reads this feed in shared memory."""
    return bool(engine.sharing._leases.shared_with(outbox.feed))


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


def in_use(member: Fabric) -> Any:
    """Bytes in slots and in buffers."""
    member._engine.turn()
    return member.statistics()["arena_bytes_in_use"] + member._engine.pool.statistics().bytes_in_use


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


# What outlives its loan.

WAYS: dict[str, Callable[[Any], Any]] = {
    "a view": lambda tensor: tensor[:2],
    "a variable": lambda tensor: tensor,
    "an array": lambda tensor: tensor.numpy(),
    "detached": lambda tensor: tensor.detach(),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guard", ["off", "sample", "strict"])
def test_what_refers_to_a_loan_afterwards_changes_nothing(
    guard: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "fabric.guard")
    with join(config=DEFAULT) as member:
        inbox, publisher = meet_alone(member, guard=guard)
        alias = lend_and_keep(publisher, WAYS[way], guard)
        alias[:] = 66
        if guard != "strict":
            message = inbox.receive(timeout_s=10)
            assert (message.value == 5).all()
            alias[:] = 67
            assert (message.value == 5).all()
            del message
        for number in range(8):  # none of these is where the alias still writes
            with publisher.loan(LARGE, torch.float32) as tensor:
                tensor.fill_(number)
            alias[:] = 68
            assert (inbox.receive(timeout_s=10).value == number).all()
        copied = member.statistics().get("loans_copied", 0)
        assert (copied, publisher.next) == ((0, 9) if guard == "strict" else (1, 10))
        told = [record.levelname for record in caplog.records if "test_loans.py:" in record.getMessage()]
        assert told == {"off": ["DEBUG"], "sample": ["WARNING"], "strict": []}[guard]


def lend_and_keep(publisher: Any, way: Callable[[Any], Any], guard: str) -> Any:
    loan = publisher.loan(LARGE, torch.float32, seed=3)
    try:
        with loan as tensor:
            tensor.fill_(5)
            alias = way(tensor)
    except MutationError as error:
        assert guard == "strict"
        assert (error.fields["topic"], error.fields["seed"]) == ("t", 3)
        assert error.fields["line"].startswith(f"{__file__}:")
    else:
        assert guard != "strict"
        assert loan.sequence == 0
    return alias


def test_a_slot_comes_back_when_the_last_view_of_its_loan_is_gone() -> None:
    config = replace(DEFAULT, retention=Retention(kept_bytes_max=1))
    with join(config) as member:
        inbox, publisher = meet_alone(member)
        with publisher.loan(LARGE, torch.float32) as tensor:
            view = tensor[0]
        inbox.receive(timeout_s=10)
        list(inbox.drain())
        gc.collect()
        until(lambda: in_use(member) < 3 << 20)
        assert in_use(member) >= 1 << 20, "the view has it"
        assert tensor.shape == LARGE, "and what it is a view of was not emptied under it"
        del view, tensor
        until(lambda: not in_use(member))


def test_a_line_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with join(config=DEFAULT) as member:
        publisher = member.publisher("t", guard="sample")
        kept = []
        for _ in range(3):
            with publisher.loan(LARGE, torch.float32) as tensor:
                kept.append(tensor[0])
        assert member.statistics()["loans_copied"] == 3
        assert len([record for record in caplog.records if record.name == "fabric.guard"]) == 1


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


# The guard, beyond loans.


def poke(address: int, offset: int) -> None:
    """What an extension may do that kept an address."""
    ctypes.memset(address + offset, 0x55, 4)


@pytest.mark.parametrize(("guard", "offset", "found"), [("off", 0, 0), ("sample", 0, 1), ("strict", 500_000, 1)])
def test_the_guard_finds_what_was_changed_by_its_address(
    guard: str, offset: int, found: int, caplog: pytest.LogCaptureFixture
) -> None:
    with join(config=replace(DEFAULT, retention=Retention(kept_bytes_max=1))) as member:
        inbox, publisher = meet_alone(member, guard=guard)
        for change in (False, True):
            with publisher.loan(LARGE, "f4", seed=6) as array:
                array[:] = 0
                address = array.__array_interface__["data"][0]
            message = inbox.receive(timeout_s=10)
            if change:
                poke(address, offset)
            del message
            list(inbox.drain())
            publisher.flush()
        member._engine.attend()
        member._engine.attend()
    assert member._engine.counts["mutations_found"] == found
    told = [record.getMessage() for record in caplog.records if record.name == "fabric.guard"]
    assert len(told) == found
    assert all(f"t, seed 6, published at {__file__}:" in line for line in told)


def test_the_guard_finds_a_value_that_changes_while_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = outbox.fill

    def hasty(engine: Any, planned: Any, feed: Any) -> Any:
        filled = fill(engine, planned, feed)
        value[700] += 1  # another thread
        return filled

    value = np.zeros(LARGE[0] * LARGE[1], np.float32)
    with join(config=DEFAULT) as member:
        inbox = member.subscribe("**")
        strict, sample = member.publisher("strict", guard="strict"), member.publisher("sample", guard="sample")
        strict.publish(value)
        monkeypatch.setattr(outbox, "fill", hasty)
        with pytest.raises(MutationError, match="while it was copied") as caught:
            strict.publish(value, seed=1)
        assert caught.value.fields["line"].startswith(f"{__file__}:")
        assert strict.next == 1
        sample.publish(value)
        assert member.statistics()["mutations_found"] == 2
        assert [inbox.receive(timeout_s=10).value[700] for _ in range(2)] == [0, 1]


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


def lender(parent: Parent, *, where: str) -> None:
    """Lends, keeps a view, and writes to it afterwards; once the value is there, by its address, too."""
    with join(DEFAULT, rank=0, world_size=2, rendezvous=where, job="loans") as member:
        counts = member._engine.counts
        for guard in ("off", "sample", "strict"):
            publisher = member.publisher(guard, guard=guard)
            publisher.wait_for_subscribers(1, timeout_s=30)
            publisher.publish(**WARM)
            until(lambda publisher=publisher: is_shared(member._engine, publisher), timeout_s=30)
            raised = ""
            try:
                with publisher.loan(LARGE, torch.float32) as tensor:
                    tensor.fill_(5)
                    view = tensor[0]
            except MutationError as error:
                raised = str(error)
            view.fill_(66)
            parent.say(raised=raised)
            with publisher.loan(LARGE, torch.float32) as tensor:
                tensor.fill_(6)
                address = tensor.data_ptr()
            parent.hear()
            view.fill_(67)
            poke(address, 100)
            parent.say(changed=True)
            parent.hear()
        publisher.flush(timeout_s=20)
    parent.say(found=counts["mutations_found"], copied=counts["loans_copied"])


@pytest.mark.multiprocess
def test_an_in_place_write_after_a_loan_reaches_nobody(tmp_path: Path) -> None:
    """A view that survived writes to memory that nobody else has. An address is beyond all of this: it is found."""
    where = f"file://{tmp_path}"
    with (
        child(lender, where=where) as other,
        join(DEFAULT, rank=1, world_size=2, rendezvous=where, job="loans") as member,
    ):
        inbox = member.subscribe("*")
        for guard in ("off", "sample", "strict"):
            assert inbox.receive(timeout_s=30).seed == WARM["seed"]
            raised = other.hear()["raised"]
            assert bool(raised) is ("test_loans.py:" in raised) is (guard == "strict")
            mapped = member.statistics()["arena_mapped"]
            messages = [inbox.receive(timeout_s=20) for _ in range(1 if raised else 2)]
            assert member.statistics()["arena_mapped"] == mapped + len(messages), "all are read in shared memory"
            assert [float(message.value.sum()) / 2**18 for message in messages] == ([6] if raised else [5, 6])
            other.tell(go=True)
            assert other.hear()["changed"]
            assert raised or (messages[0].value == 5).all()
            assert not (messages[-1].value == 6).all(), "who has the address may write: the reader sees it"
            del messages
            list(inbox.drain())
            other.tell(go=True)
        assert other.hear() == {"found": 2, "copied": 2}


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
