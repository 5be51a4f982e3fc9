"""Who may still write to a value that was published, what comes of it, and what the guard says."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import join
from fabric.config import Retention
from fabric.engine import outbox
from fabric.errors import MutationError
from tests.harness.children import Parent, child
from tests.harness.faces import DEFAULT
from tests.harness.lending import LARGE, WARM, in_use, is_shared, meet_alone, poke
from tests.harness.waiting import until

torch = pytest.importorskip("torch", reason="what is lent is a tensor, mostly")

pytestmark = pytest.mark.torch

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
        told = [record.levelname for record in caplog.records if "test_mutations.py:" in record.getMessage()]
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


# The guard, beyond loans.


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
            assert bool(raised) is ("test_mutations.py:" in raised) is (guard == "strict")
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
