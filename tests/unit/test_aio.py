"""What only the asynchronous face has: its loop, its tasks, cancelling. What both faces do is in `test_parity`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest

import fabric
from fabric import FabricConfig, aio
from fabric.aio import handlers
from fabric.config import Retention
from fabric.errors import (
    ClosedError,
    JoinTimeoutError,
    ReceiveTimeoutError,
    RequestError,
    SubscribeTimeoutError,
    WrongThreadError,
)
from fabric.joining import Entry
from tests.harness.faces import rendezvous

CONFIG = FabricConfig(install_signal_handler=False)
SMALL = replace(CONFIG, retention=Retention(owed_bytes_max=256 * 1024, publish_timeout_s=10.0))
UNCONFIRMED = replace(CONFIG, subscribe_timeout_s=0.2)

Scenario = Callable[..., Coroutine[Any, Any, None]]


def looped(ranks: int = 2, config: FabricConfig = CONFIG) -> Callable[[Scenario], Callable[[], None]]:
    """Run a scenario on a loop, with a member for each rank; they are closed at the end."""

    def decorate(scenario: Scenario) -> Callable[[], None]:
        async def main(*arguments: Any) -> None:
            where = rendezvous()
            async with contextlib.AsyncExitStack() as stack:
                joins = [aio.join(config, rank=rank, world_size=ranks, rendezvous=where) for rank in range(ranks)]
                members = [await stack.enter_async_context(member) for member in await asyncio.gather(*joins)]
                await asyncio.wait_for(scenario(*members, *arguments), 40)

        @functools.wraps(scenario)
        def test(**fixtures: Any) -> None:
            asyncio.run(main(*fixtures.values()))

        parameters = list(inspect.signature(scenario).parameters.values())[ranks:]
        test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what pytest reads
        return test

    return decorate


async def true(condition: Callable[[], object]) -> None:
    """Until a condition holds."""
    for _ in range(4000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it did not come true")


# The names.

CLASSES = ("Fabric", "Publisher", "Subscription")
NOT_AWAITED = {"publisher", "on", "respond", "drain", "cursor", "handled_by", "statistics", "close_at_exit"}
INSIDE = {"publisher_class", "subscription_class"}
OUTBOX = {"abandon", "close_burst", "close_if_due", "has_left", "shut"}
"""What the engine asks of a publisher; the asynchronous one keeps its outbox to itself."""


def public(kind: type) -> dict[str, Any]:
    return {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_")}


def test_the_asynchronous_face_has_the_same_names() -> None:
    assert sorted(aio.__all__) == sorted(fabric.__all__)


@pytest.mark.parametrize("name", CLASSES)
def test_each_method_has_the_same_signature_and_is_awaited(name: str) -> None:
    theirs = public(getattr(aio, name))
    for member, value in public(getattr(fabric, name)).items():
        if member in INSIDE or (name == "Publisher" and member in OUTBOX):
            continue
        assert member in theirs, f"aio.{name}.{member} is missing"
        if not callable(value):
            continue
        assert parameters(theirs[member]) == parameters(value), f"{name}.{member}"
        awaited = inspect.iscoroutinefunction(theirs[member])
        assert awaited is (member not in NOT_AWAITED), f"{name}.{member}"


@pytest.mark.parametrize("name", ["join", "observe"])
def test_entering_takes_the_same_parameters(name: str) -> None:
    assert parameters(getattr(aio, name)) == parameters(getattr(fabric, name))
    assert inspect.iscoroutinefunction(getattr(aio, name))


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_the_same_attributes_are_there() -> None:
    for attribute in ("topic", "policy", "when_full", "next"):
        assert isinstance(getattr(aio.Publisher, attribute), property)
    assert aio.Subscription.__aiter__
    assert aio.Message is fabric.Message


# Cancelling.


@looped()
async def test_a_cancelled_receive_loses_nothing(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t")
    taken: list[int] = []
    for number in range(20):
        waiting = asyncio.create_task(inbox.receive())
        for _ in range(number % 4):
            await asyncio.sleep(0)
        await a.publish("t", number)
        for _ in range(number % 7):
            await asyncio.sleep(0)
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
    waiting = asyncio.create_task(b.subscribe("t"))
    await asyncio.sleep(0)
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
        await asyncio.sleep(0)
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
    await asyncio.sleep(0)
    with pytest.raises(WrongThreadError):
        await inbox.receive()
    await a.publish("t", 1)
    assert (await first).value == 1


@looped(config=SMALL)
async def test_a_publish_that_waits_for_room_does_not_hold_up_the_loop(a: aio.Fabric, b: aio.Fabric) -> None:
    inbox = await b.subscribe("t", acknowledge="manual")
    publisher = a.publisher("t")

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
            await asyncio.sleep(0)

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
    await asyncio.sleep(0)
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


def opened(number: int) -> Any:
    from fabric.config import Delivery, Start
    from fabric.core.events import SubscriptionOpened

    return SubscriptionOpened(number, "u", Start.LIVE, Delivery.RELIABLE, None)


@looped()
async def test_the_background_drives_again_when_nobody_waits(a: aio.Fabric, b: aio.Fabric) -> None:
    await a.subscribe("t")
    await true(lambda: not a._driver._watching)
    inbox = await a.subscribe("u")
    await b.publish("u", 1)
    await true(lambda: len(inbox._inbox.items) == 1)


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
    member.close_at_exit()
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
        await asyncio.sleep(0)
        running -= 1

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for number in range(30):
        await publisher.publish(number, seed=number)
    await publisher.flush()
    assert most == 2


@looped()
async def test_a_handler_may_use_its_fabric_and_even_close_it(a: aio.Fabric, b: aio.Fabric) -> None:
    @b.on("t")
    async def handle(message: aio.Message) -> None:
        await b.publish("echo", message.value)
        if message.value == "end":
            assert (await b.close(timeout_s=0.5)).waited_s < 5

    inbox = await a.subscribe("echo")
    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish("one")
    assert (await inbox.receive()).value == "one"
    await publisher.publish("end")
    assert [message.value async for message in inbox] == ["end"]


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
    assert b.dead_letters == ()


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
    await b.publish("ready", 1)
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
