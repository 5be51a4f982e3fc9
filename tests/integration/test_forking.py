"""A process that forks after `join`: its child is refused everything and disturbs nothing (DESIGN section 6)."""

from __future__ import annotations

import atexit
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric import Fabric, FabricConfig, Message, Request, Subscription, join
from fabric.config import Liveness
from fabric.errors import WrongProcessError
from fabric.rendezvous import find
from tests.harness.children import Parent, child, children
from tests.harness.waiting import until

pytestmark = [pytest.mark.multiprocess]

JOB = "forking"
PUBLISHED = 20


def public_calls(fabric: Fabric, inbox: Subscription) -> dict[str, Callable[[], object]]:
    """Every public call that does something."""
    publisher = fabric.publisher("words.child")
    iterator = iter(inbox)
    return {
        "fabric.publish": lambda: fabric.publish("words.child", 1),
        "fabric.publish of a new topic": lambda: fabric.publish("words.never", 1),
        "fabric.publisher": lambda: fabric.publisher("words.new"),
        "fabric.subscribe": lambda: fabric.subscribe("words.**"),
        "fabric.on": lambda: fabric.on("words.**")(print),
        "fabric.respond": lambda: fabric.respond("other")(print),
        "fabric.request": lambda: fabric.request("double", 1, to=0),
        "fabric.request_all": lambda: fabric.request_all("double", 1),
        "fabric.step": lambda: fabric.step(1),
        "fabric.serve": lambda: fabric.serve(1),
        "fabric.flush": lambda: fabric.flush(),
        "fabric.close": lambda: fabric.close(),
        "publisher.publish": lambda: publisher.publish(1),
        "publisher.publish of bytes": lambda: publisher.publish(b"some"),
        "publisher.publish of much": lambda: publisher.publish(bytes(200_000)),
        "publisher.publish_many": lambda: publisher.publish_many([b"a", b"b"], seeds=[0, 0]),
        "publisher.loan": lambda: publisher.loan(4, "float32"),
        "publisher.wait_for_subscribers": lambda: publisher.wait_for_subscribers(1),
        "publisher.flush": lambda: publisher.flush(),
        "inbox.receive": lambda: inbox.receive(),
        "inbox.receive_many": lambda: inbox.receive_many(2),
        "inbox.drain": lambda: inbox.drain(),
        "inbox.__iter__": lambda: iter(inbox),
        "a running iteration": lambda: next(iterator),
        "inbox.cursor": lambda: inbox.cursor(),
    }


def outcomes(calls: dict[str, Callable[[], object]]) -> list[str]:
    """What was not refused, and how."""
    wrong = []
    for name, call in calls.items():
        try:
            call()
            wrong.append(f"{name}: accepted")
        except WrongProcessError as error:
            if (error.fields["opened_in"], error.fields["used_in"]) != (os.getppid(), os.getpid()):
                wrong.append(f"{name}: {error}")
        except Exception as error:  # noqa: BLE001 - whatever else it is, the test names it
            wrong.append(f"{name}: {type(error).__name__} {error}")
    return wrong


def in_a_fork(work: Callable[[], Any], end: Callable[[int], Any]) -> tuple[list[str], int]:
    """Run `work` in a forked child; its list, and the exit code of the child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        code = 3
        try:
            os.close(reading)
            os.write(writing, "\n".join(work()).encode())
            os.close(writing)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            end(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read().splitlines()
    _, status = os.waitpid(pid, 0)
    return told, os.waitstatus_to_exitcode(status)


def fork_again_and_again(parent: Parent, spec: str) -> None:
    """A rank that publishes, forks children of each kind, and publishes on."""
    with join(rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric:
        mine = fabric.subscribe("words.**")

        @fabric.respond("double")
        def double(request: Request) -> int:
            return 2 * request.value

        @fabric.on("nothing.ever")
        def never(message: Message) -> None:
            raise AssertionError(message)

        publisher = fabric.publisher("words.parent")
        publisher.wait_for_subscribers(1, timeout_s=20)
        calls = public_calls(fabric, mine)
        forks = []
        for number in range(PUBLISHED):
            publisher.publish(number)
            if number % 5 == 2:  # with a record in the open burst
                forks.append(in_a_fork(lambda: outcomes(calls), os._exit))
            elif number % 5 == 4:  # a child that ends as programs do: close, exit handlers, the interpreter's own
                forks.append(in_a_fork(list, run_exit_handlers))
        received = [mine.receive().value for _ in range(PUBLISHED)]
        publisher.flush(timeout_s=20)
        parent.say(
            forks=forks, received=received, files=[card.pid == os.getpid() for card in find(JOB) if card.rank == 1]
        )
        parent.hear()
        fabric.close()


def run_exit_handlers(code: int) -> None:
    """End as a program does that closes nothing."""
    atexit._run_exitfuncs()
    os._exit(code)


def listen(parent: Parent, spec: str) -> None:
    with join(rank=0, world_size=2, rendezvous=spec, job=JOB) as fabric, fabric.subscribe("words.**") as inbox:
        received = [inbox.receive(timeout_s=30).value for _ in range(PUBLISHED)]
        answer = fabric.request("double", 21, to=1).value
        parent.say(received=received, answer=answer, state=fabric.peers["rank-1"].state, gaps=len(inbox.gaps))
        assert list(inbox) == []
        parent.say(state=fabric.peers["rank-1"].state)


@pytest.mark.timeout(90)
def test_f55_a_forked_child_is_refused_everything_and_its_parent_goes_on(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with children(child(fork_again_and_again, spec=spec), child(listen, spec=spec)) as (forking, listening):
        told = forking.hear(60)
        heard = listening.hear()
        forking.tell()
        assert forking.exit_code() == 0
        assert listening.hear() == {"state": "left"}
        assert listening.exit_code() == 0
    assert told["forks"] == [[[], 0]] * 8
    assert told["received"] == list(range(PUBLISHED))
    assert told["files"] == [True], "the card is still there"
    assert heard == {"received": list(range(PUBLISHED)), "answer": 42, "state": heard["state"], "gaps": 0}
    assert heard["state"] in ("joined", "up")


def exit_in_a_fork(parent: Parent, spec: str) -> None:
    """The fork ends as a whole program does: `sys.exit` through the `with` block of the fabric."""
    with join(rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric:
        publisher = fabric.publisher("words.parent")
        publisher.wait_for_subscribers(1, timeout_s=20)
        pid = os.fork()
        if not pid:
            sys.exit(5)
        _, status = os.waitpid(pid, 0)
        for number in range(PUBLISHED):
            publisher.publish(number)
        parent.say(code=os.waitstatus_to_exitcode(status), cards=len(find(JOB)))
        fabric.respond("double")(lambda request: 2 * request.value)
        parent.hear()


@pytest.mark.timeout(60)
def test_f55_a_fork_that_ends_through_the_with_block_takes_nothing_of_its_parent_along(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with children(child(exit_in_a_fork, spec=spec), child(listen, spec=spec)) as (forking, listening):
        assert forking.hear(60) == {"code": 5, "cards": 2}
        heard = listening.hear()
        assert (heard["received"], heard["answer"]) == (list(range(PUBLISHED)), 42)
        forking.tell()
        assert [forking.exit_code(), listening.exit_code()] == [0, 0]


def fork_and_be_killed(parent: Parent, spec: str) -> None:
    fabric = join(rank=1, world_size=2, rendezvous=spec, job=JOB)
    fabric.publisher("words.parent").wait_for_subscribers(1, timeout_s=20)
    pid = os.fork()
    if not pid:
        os.close(0)
        os.read(reading_end(), 1)  # for ever: a worker that outlives its parent
    parent.say(worker=pid)
    parent.hear()


def reading_end() -> int:
    """Of a pipe that nobody writes to."""
    reading, _ = os.pipe()
    return reading


def test_f55_a_worker_that_outlives_its_killed_parent_does_not_keep_it_alive_for_its_peers(tmp_path: Path) -> None:
    spec = f"file://{tmp_path}"
    with child(fork_and_be_killed, spec=spec) as forking:
        watchful = replace(FabricConfig(), liveness=Liveness(suspect_s=1.5))
        entered = join(watchful, rank=0, world_size=2, rendezvous=spec, job=JOB)
        with entered as fabric, fabric.subscribe("words.**") as inbox:
            worker = forking.hear()["worker"]
            until(lambda: inbox.joined, what="rank 0 knows the feed that is to end")
            forking.signal(9)
            forking.exit_code()
            os.kill(worker, 0)  # it is there
            assert list(inbox) == []
            assert [(gap.first, gap.end) for gap in inbox.gaps] == [(0, None)]
            assert fabric.peers["rank-1"].state == "dead"


def load_data(parent: Parent, spec: str) -> None:
    from torch.utils.data import DataLoader, Dataset

    with join(rank=1, world_size=2, rendezvous=spec, job=JOB) as fabric:
        fabric.respond("double")(lambda request: 2 * request.value)
        publisher = fabric.publisher("words.parent")
        publisher.wait_for_subscribers(1, timeout_s=20)

        class Numbers(Dataset[int]):
            """Each item is -1 if the worker was refused, as it must be."""

            def __len__(self) -> int:
                return 4 * PUBLISHED

            def __getitem__(self, index: int) -> int:
                try:
                    fabric.publish("words.parent", 1000 + index)
                except WrongProcessError:
                    return -1
                return index

        batches = []
        for number, batch in enumerate(DataLoader(Numbers(), batch_size=4, num_workers=2)):
            batches.append(batch.tolist())
            publisher.publish(number)
        parent.say(refused=batches == [[-1] * 4] * PUBLISHED, cards=len(find(JOB)))
        parent.hear()


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_f55_the_workers_of_a_data_loader_disturb_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.data", reason="the loader is torch's")
    spec = f"file://{tmp_path}"
    loading = child(load_data, flags=(), spec=spec)
    with children(loading, child(listen, spec=spec)) as (loader, listening):
        assert loader.hear(60) == {"refused": True, "cards": 2}
        heard = listening.hear()
        assert (heard["received"], heard["answer"], heard["gaps"]) == (list(range(PUBLISHED)), 42, 0)
        loader.tell()
        assert listening.hear() == {"state": "left"}
        assert [loader.exit_code(), listening.exit_code()] == [0, 0]
