"""Requests, handlers and the end, on both faces; messages are in `test_parity`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fabric import DeadLetter, PeerInfo, Reply, aio
from fabric.config import Handlers, Work
from fabric.errors import (
    ClosedError,
    ConfigError,
    RemoteFailureError,
    RequestTimeoutError,
    UnknownPeerError,
    WaitTimeoutError,
)
from tests.harness.faces import DEFAULT, played

STEP = replace(DEFAULT, work=Work(handlers=Handlers.STEP))


# Requests.


@played(ranks=3)
async def test_a_request_is_answered_and_all_may_be_asked_at_once(face: Any, a: Any, b: Any, c: Any) -> None:
    for member in (b, c):

        @member.respond("double")
        async def double(request: Any) -> Any:
            return request.value * 2

    reply = await a.request("double", 21, to=1)
    assert (type(reply), reply.value, reply.source) == (Reply, 42, "rank-1")
    replies = await a.request_all("double", 4)
    assert {rank: answer.value for rank, answer in replies.items()} == {1: 8, 2: 8}
    one = await a.request_all("double", 5, to=[2, 9])
    assert one[2].value == 10
    assert isinstance(one[9], UnknownPeerError)
    large = np.arange(1 << 16, dtype=np.int64)
    assert np.array_equal((await a.request("double", large, to="rank-2", priority="high")).value, large * 2)


@played()
async def test_a_plain_function_responds_too(face: Any, a: Any, b: Any) -> None:
    b.respond("plain")(lambda request: request.value + 1)
    assert (await a.request("plain", 1, to=1)).value == 2


@pytest.mark.usefixtures("short_grace")
@played()
async def test_a_request_that_fails_says_why(face: Any, a: Any, b: Any) -> None:
    @b.respond("fail")
    async def fail(request: Any) -> Any:
        raise ValueError("no such layer")

    @b.respond("odd")
    async def odd(request: Any) -> Any:
        return object()

    with pytest.raises(RemoteFailureError, match="rank-1 failed: ValueError: no such layer"):
        await a.request("fail", to=1)
    with pytest.raises(RemoteFailureError, match="UnsupportedValueError"):
        await a.request("odd", to=1)
    with pytest.raises(RemoteFailureError, match="no handler for 'unknown'"):
        await a.request("unknown", to=1)
    with pytest.raises(UnknownPeerError):
        await a.request("fail", to=7)
    with pytest.raises(ConfigError):
        await a.request("fail", to=1, priority="urgent")


@played(config=STEP)
async def test_a_request_that_nobody_serves_times_out(face: Any, a: Any, b: Any) -> None:
    b.respond("slow")(lambda request: 1)
    accepted = False
    while not accepted:  # it says so when a request is repeated: on a busy machine not always in time
        with pytest.raises(RequestTimeoutError) as caught:
            await a.request("slow", to=1, timeout_s=0.3)
        accepted = caught.value.fields["accepted"]


@played(config=STEP)
async def test_step_handlers_run_in_step_and_serve_and_while_a_request_waits(face: Any, a: Any, b: Any) -> None:
    ran: list[str] = []

    @b.respond("ask")
    async def ask(request: Any) -> Any:
        return (await b.request("back", to=0)).value + 1

    @a.respond("back")
    async def back(request: Any) -> Any:
        ran.append("back")
        return 1

    serving = face.later(b.serve(1.0))
    assert (await a.request("ask", to=1)).value == 2
    await serving
    assert ran == ["back"]

    @b.on("t")
    async def handle(message: Any) -> None:
        ran.append(message.value)

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    await publisher.publish("one")
    with pytest.raises(WaitTimeoutError):
        await publisher.flush(timeout_s=0.2)
    await b.step(1)
    await publisher.flush()
    assert ran == ["back", "one"]


# Handlers.


@played()
async def test_a_handler_gets_each_lane_in_order(face: Any, a: Any, b: Any) -> None:
    seen: dict[int, list[int]] = {}

    @b.on("t")
    async def handle(message: Any) -> None:
        seen.setdefault(message.seed, []).append(message.value)

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for number in range(100):
        await publisher.publish(number, seed=number % 4)
    await publisher.flush()
    assert seen == {seed: list(range(seed, 100, 4)) for seed in range(4)}


@played()
async def test_f67_a_handler_that_fails_is_tried_again_while_its_lane_waits(face: Any, a: Any, b: Any) -> None:
    seen: list[tuple[int, int, int]] = []

    @b.on("t")
    async def handle(message: Any) -> None:
        seen.append((message.seed, message.value, message.attempt))
        if message.value == 0 and message.attempt < 3:
            raise RuntimeError("not yet")

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for number in range(4):
        await publisher.publish(number, seed=number % 2)
    await publisher.flush()
    assert [entry for entry in seen if entry[0] == 0] == [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 2, 1)]
    assert [entry for entry in seen if entry[0] == 1] == [(1, 1, 1), (1, 3, 1)]
    assert list(b.dead_letters) == []


@played()
async def test_f66_a_handler_that_keeps_failing_makes_a_dead_letter(face: Any, a: Any, b: Any) -> None:
    seen: list[int] = []

    @b.on("t", attempts=2)
    async def handle(message: Any) -> None:
        if message.value == "bad":
            raise ValueError("bad value")
        seen.append(message.value)

    publisher = a.publisher("t")
    await publisher.wait_for_subscribers(1)
    for value in (1, "bad", 2):
        await publisher.publish(value)
    await publisher.flush()
    assert seen == [1, 2]
    (letter,) = b.dead_letters
    assert isinstance(letter, DeadLetter | aio.DeadLetter)
    assert (letter.topic, letter.sequence, letter.attempts, letter.detail) == ("t", 1, 2, "ValueError: bad value")
    assert b.statistics()["dead_letters"] == 1
    with pytest.raises(ConfigError):
        b.on("t", attempts=0)


# The end.


@played()
async def test_a_close_lets_what_is_owed_be_fetched_and_reports_it(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")
    await a.publish("t", 1)
    closing = face.later(a.close())
    assert [message.value async for message in inbox] == [1]
    report = await closing
    assert (report.balanced, report.unacknowledged) == (True, {})
    assert await a.close() == report


@played()
async def test_a_close_says_what_was_not_acknowledged(face: Any, a: Any, b: Any) -> None:
    await b.subscribe("t", acknowledge="manual")
    await a.publish("t", 1)
    await a.publish("t", 2)
    report = await a.close(timeout_s=0.3)
    assert not report.balanced
    ((reader, behind),) = report.unacknowledged["t"].items()
    assert (reader, behind) == ("rank-1", (0, 2))


@played()
async def test_after_a_close_everything_is_refused(face: Any, a: Any, b: Any) -> None:
    inbox, publisher = await b.subscribe("t"), b.publisher("u")
    await inbox.close()
    with pytest.raises(ClosedError, match="the subscription to t"):
        await inbox.receive()
    other = await b.subscribe("v")
    await b.close()
    for call in (
        lambda: other.receive(),
        lambda: b.publish("u", 1),
        lambda: publisher.publish(1),
        lambda: publisher.flush(),
        lambda: b.subscribe("w"),
        lambda: b.request("m", to=0),
    ):
        with pytest.raises(ClosedError):
            await call()
    with pytest.raises(ClosedError):
        b.on("x")(print)
    with pytest.raises(ClosedError):
        b.respond("x")(print)


@played()
async def test_a_close_ends_the_wait_of_another(face: Any, a: Any, b: Any) -> None:
    inbox = await b.subscribe("t")

    async def receive() -> str:
        with pytest.raises(ClosedError):
            await inbox.receive(timeout_s=20)
        return "closed"

    receiving = face.later(receive())
    await a.publish("u", 1)
    await b.close()
    assert await receiving == "closed"


@played()
async def test_who_is_here(face: Any, a: Any, b: Any) -> None:
    assert (a.rank, a.world_size, a.name, list(a.peers)) == (0, 2, "rank-0", ["rank-1"])
    peer = a.peers["rank-1"]
    assert (type(peer), peer.rank, peer.state in ("joined", "up")) == (PeerInfo, 1, True)
    assert a.job == b.job
