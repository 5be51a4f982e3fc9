"""What only the asynchronous face has: its loop, its tasks, cancelling. What both faces do is in `test_parity`."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

from fabric import FabricConfig, aio
from fabric.aio import handlers
from fabric.config import Delivery, Retention, Start
from fabric.core.events import ExecuteRequest, SubscriptionOpened
from fabric.entering import Entry
from fabric.errors import (
    ClosedError,
    JoinTimeoutError,
    ReceiveTimeoutError,
    RequestError,
    SubscribeTimeoutError,
    WrongThreadError,
)
from tests.harness.faces import rendezvous
from tests.harness.looping import looped, rest, true

CONFIG = FabricConfig(install_signal_handler=False)
SMALL = replace(CONFIG, retention=Retention(owed_bytes_max=256 * 1024, publish_timeout_s=10.0))
UNCONFIRMED = replace(CONFIG, subscribe_timeout_s=0.2)

variable = contextvars.ContextVar("variable", default="nobody's")


# Cancelling.


@looped()
async def test_a_cancelled_receive_loses_nothing(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t")
    taken: list[int] = []
    for number in range(20):
        waiting = asyncio.create_task(inbox.receive())
        for _ in range(number % 4):
            await rest()
        await a.publish("t", number)
        for _ in range(number % 7):
            await rest()
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            taken.append((await waiting).value)
    while len(taken) < 20:
        taken.append((await inbox.receive(timeout_s=5)).value)
    assert taken == list(range(20))


@looped()
async def test_a_receive_may_be_given_up_by_wait_for(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(inbox.receive(timeout_s=60), 0.05)
    await a.publish("t", 1)
    assert (await inbox.receive()).value == 1
    with pytest.raises(ReceiveTimeoutError):
        await inbox.receive(timeout_s=0.01)


@looped()
async def test_a_cancelled_request_is_abandoned(a: aio.Fabric, b: aio.Fabric) -> None:
    began, gate = asyncio.Event(), asyncio.Event()

    @b.respond("wait")
    async def wait(request: aio.Request) -> str:
        began.set()
        await gate.wait()
        return "late"

    waiting = asyncio.create_task(a.request("wait", to=1, timeout_s=30))
    await began.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert a._requests._waiting == {}
    assert a._engine.core.exchange.next_deadline_ns() is None
    gate.set()
    assert (await a.request("wait", to=1)).value == "late"


@looped()
async def test_a_cancelled_subscribe_takes_its_subscription_back(a: aio.Fabric, b: aio.Fabric) -> None:
    with a._engine.lock:  # nobody drives `a`, which so confirms nothing
        waiting = asyncio.create_task(b.subscribe("t"))
        await rest()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert b._engine.inboxes == {}
    await true(lambda: not b._engine.core.subscribing.subscriptions)


def test_a_cancelled_join_leaves() -> None:
    async def main() -> None:
        joining = asyncio.create_task(aio.join(CONFIG, rank=0, world_size=2, rendezvous=rendezvous(), timeout_s=1.0))
        await true(lambda: any(thread.name.startswith("fabric-blocking") for thread in threading.enumerate()))
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining

    asyncio.run(main())  # what it left behind is looked for after every test


def test_a_join_that_ends_after_it_was_cancelled_gives_its_member_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up, gate = threading.Event(), threading.Event()

    class Given:
        def give_up(self) -> None:
            given_up.set()

    def enter(*_: Any) -> Given:
        gate.wait(10)
        return Given()

    monkeypatch.setattr(aio, "enter_rank", enter)
    monkeypatch.setattr(Entry, "give_up", Given.give_up)

    async def main() -> None:
        joining = asyncio.create_task(aio.join())
        await rest()
        joining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await joining
        gate.set()

    asyncio.run(main())
    assert given_up.wait(10)


def test_a_join_that_meets_nobody_says_who_is_missing() -> None:
    with pytest.raises(JoinTimeoutError):
        asyncio.run(aio.join(CONFIG, rank=0, world_size=2, rendezvous=rendezvous(), timeout_s=0.2))  # type: ignore[arg-type]  # a coroutine


# The loop.


@looped()
async def test_another_thread_or_loop_is_refused(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox, publisher = await b.subscribe("t"), b.publisher("t")
    calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        inbox.receive,
        lambda: inbox.receive_many(1),
        lambda: b.publish("t", 1),
        lambda: publisher.publish(1),
        lambda: publisher.publish_many([1], seeds=[0]),
        lambda: b.request("m", to=0),
        lambda: b.subscribe("u"),
        b.flush,
        b.close,
    ]
    refused: list[str] = []

    def elsewhere() -> None:
        for call in calls:
            with pytest.raises(WrongThreadError) as caught:
                asyncio.run(call())
            refused.append(caught.value.fields["caller"])
        with pytest.raises(WrongThreadError):
            inbox.drain()

    thread = threading.Thread(target=elsewhere, name="elsewhere")
    thread.start()
    await true(lambda: not thread.is_alive())
    thread.join()
    assert refused == ["elsewhere"] * len(calls)
    assert publisher.next == 0


@looped()
async def test_a_subscription_serves_one_task_at_a_time(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t")
    first = asyncio.create_task(inbox.receive())
    await rest()
    with pytest.raises(WrongThreadError, match=f"in use by thread {first.get_name()}, not "):
        await inbox.receive()
    await a.publish("t", 1)
    assert (await first).value == 1


@looped(config=SMALL)
async def test_a_publish_that_waits_for_room_does_not_hold_up_the_loop(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher = a.publisher("t", when_full="block")

    async def publish_all() -> None:
        for _ in range(200):
            await publisher.publish(b"x" * 4096)

    publishing = asyncio.create_task(publish_all())
    await true(lambda: a._engine.counts["publish_waited"] > 0)
    assert not publishing.done()
    for _ in range(200):
        (await inbox.receive()).acknowledge()
    await publishing
    assert publisher.next == 200


@looped()
async def test_who_never_has_to_wait_lets_others_run(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox, other = await b.subscribe("t"), 0

    async def count() -> None:
        nonlocal other
        while True:
            other += 1
            await rest()

    counting = asyncio.create_task(count())
    for _ in range(20_000):
        await a.publish("t", b"x" * 64)
    while_publishing = other
    for _ in range(20_000):
        await inbox.receive()
    assert while_publishing > 3
    assert other > while_publishing + 3
    counting.cancel()


@looped()
async def test_a_loop_that_is_busy_does_not_silence_its_member(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await a.subscribe("t")
    waiting = asyncio.create_task(inbox.receive(timeout_s=30))
    await rest()
    assert a._driver.until_ns, "the loop drives, so the background thread is parked"
    # The plain face blocks this loop; `a` has to confirm all the same.
    confirmed = b._engine.until(lambda: bool(b.peers["rank-0"].silent_s < 0.5), 5.0)
    number = next(b._numbers)
    subscribing = b._engine.core.subscribing
    b._engine.submit(opened(number))
    assert confirmed
    assert b._engine.until(lambda: number in subscribing.subscriptions and not subscribing.unconfirmed(number), 10.0)
    await b.publish("t", 1)
    assert (await waiting).value == 1
    await inbox.close()


def opened(number: int) -> Any:
    return SubscriptionOpened(number, "u", Start.LIVE, Delivery.RELIABLE, None)


@looped()
async def test_a_signal_of_another_thread_wakes_the_loop_once(a: aio.Fabric, b: aio.Fabric) -> None:
    waiting = asyncio.create_task((await a.subscribe("t")).receive())
    await rest()
    thread = threading.Thread(target=a._driver.signal)
    thread.start()
    thread.join()
    assert a._driver.is_stirred()
    await true(lambda: not a._driver.is_stirred())
    waiting.cancel()


@looped()
async def test_the_background_drives_again_when_nobody_waits(a: aio.Fabric, b: aio.Fabric) -> None:
    await a.subscribe("t")
    await true(lambda: not a._driver._watching)
    inbox = await a.subscribe("u")
    await b.publish("u", 1)
    await true(lambda: len(inbox._inbox.items) == 1)
    await inbox.close()


def test_a_fabric_outlives_its_loop_and_leaves_at_exit() -> None:
    where = rendezvous()

    async def main(rank: int) -> aio.Fabric:
        member = await aio.join(CONFIG, rank=rank, world_size=1, rendezvous=where)
        await member.subscribe("t")
        await member.publish("t", 1)
        return member

    member = asyncio.run(main(0))
    with pytest.raises(WrongThreadError):
        asyncio.run(member.close())  # type: ignore[arg-type]  # a coroutine
    member._membership.on_exit()  # type: ignore[attr-defined]  # what the end of the process calls
    assert member._engine.closed


@looped()
async def test_an_observer_comes_and_goes(a: aio.Fabric, b: aio.Fabric) -> None:
    async with await aio.observe(a.job, name="eye", config=CONFIG) as eye:
        inbox = await eye.subscribe("t", delivery="reliable")
        await a.publish("t", 5)
        assert (await inbox.receive()).value == 5
        assert eye.rank is None
    assert await eye.close() == await eye.close()


@looped()
async def test_a_block_that_fails_closes_its_member(a: aio.Fabric, b: aio.Fabric) -> None:
    with pytest.raises(ZeroDivisionError):
        async with b:
            raise ZeroDivisionError
    with pytest.raises(ClosedError):
        await b.publish("t", 1)


@looped()
async def test_closing_a_subscription_ends_the_wait_of_another_task(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t")
    waiting = asyncio.create_task(inbox.receive(timeout_s=30))
    await rest(0.01)
    await inbox.close()
    with pytest.raises(ClosedError):
        await waiting


# Handlers.


@looped()
async def test_lanes_run_side_by_side_and_each_in_order(a: aio.Fabric, b: aio.Fabric) -> None:
    gates = {seed: asyncio.Event() for seed in range(3)}
    began: list[tuple[int, int]] = []

    @b.on("t")
    async def handle(message: aio.Message) -> None:
        began.append((message.seed, message.sequence))
        await gates[message.seed].wait()

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for number in range(9):
        await publisher.publish(number, seed=number % 3)
    await true(lambda: len(began) == 3)
    assert sorted(began) == [(0, 0), (1, 0), (2, 0)]
    gates[1].set()
    await true(lambda: len(began) == 5)
    assert [entry for entry in began if entry[0] == 1] == [(1, 0), (1, 1), (1, 2)]
    gates[0].set()
    gates[2].set()
    await publisher.flush()
    assert len(began) == 9


@looped()
async def test_only_so_many_handlers_run_at_once(a: aio.Fabric, b: aio.Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers, "TASKS_MAX", 2)
    running = most = 0

    @b.on("t")
    async def handle(message: aio.Message) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await rest()
        running -= 1

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for number in range(30):
        await publisher.publish(number, seed=number)
    await publisher.flush()
    assert most == 2


@looped()
async def test_a_handler_may_use_its_fabric_and_even_close_it(a: aio.Fabric, b: aio.Fabric) -> None:
    closed = asyncio.Event()

    @b.on("t")
    async def handle(message: aio.Message) -> None:
        await b.publish("echo", message.value)
        if message.value == "end":
            await b.close(timeout_s=0.5)
            closed.set()

    inbox = await a.subscribe("echo")
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish("one")
    assert (await inbox.receive()).value == "one"
    await publisher.publish("end")
    assert [message.value async for message in inbox] == ["end"]
    await closed.wait()


@looped()
async def test_handlers_do_not_see_the_context_of_who_happens_to_wait(a: aio.Fabric, b: aio.Fabric) -> None:
    seen: list[str] = []
    b.respond("plain")(lambda request: seen.append(variable.get()))

    @b.respond("task")
    async def respond(request: aio.Request) -> None:
        seen.append(variable.get())

    variable.set("of the test")
    for number, method in enumerate(("plain", "task")):
        b._engine.on_request(ExecuteRequest("rank-0", 1, number, method, 1, 10**18, 0, b"", b"", None), None)
    b._dispatcher.run_some()  # as in a turn that somebody takes who waits in this context
    await true(lambda: len(seen) == 2)
    assert seen == ["nobody's", "nobody's"]


@looped()
async def test_a_close_cancels_handlers_that_do_not_end(a: aio.Fabric, b: aio.Fabric) -> None:
    cancelled = asyncio.Event()

    @b.on("t")
    async def handle(message: aio.Message) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish(1)
    await true(lambda: b._dispatcher._tasks)
    await b.close(timeout_s=0.2)
    await cancelled.wait()
    assert list(b.dead_letters) == []


@looped()
async def test_a_handler_that_cancels_itself_has_failed(a: aio.Fabric, b: aio.Fabric) -> None:
    @b.on("t", attempts=1)
    async def handle(message: aio.Message) -> None:
        raise asyncio.CancelledError

    @b.respond("m")
    async def respond(request: aio.Request) -> None:
        raise asyncio.CancelledError

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish(1)
    await publisher.flush()
    assert [letter.detail for letter in b.dead_letters] == ["CancelledError: "]
    with pytest.raises(RequestError, match="CancelledError"):
        await a.request("m", to=1)


@looped()
async def test_after_on_the_next_call_waits_until_members_confirmed(a: aio.Fabric, b: aio.Fabric) -> None:
    seen: list[int] = []
    b.on("t")(lambda message: seen.append(message.value))
    assert b._opened
    await b.publish("ready", 1)
    assert b._opened == []
    publisher = a.publisher("t")
    await publisher.publish(5)
    await publisher.flush()
    assert publisher.handled_by(0) == {"rank-1": True}
    assert seen == [5]


@looped(config=UNCONFIRMED)
async def test_what_on_could_not_do_is_raised_by_the_next_call(a: aio.Fabric, b: aio.Fabric) -> None:
    with a._engine.lock:  # nobody drives `a`, which so confirms nothing
        b.on("t")(print)
        with pytest.raises(SubscribeTimeoutError):
            await b.publish("u", 1)
    await b.publish("u", 1)
