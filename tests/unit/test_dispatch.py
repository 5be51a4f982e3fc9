"""What handlers have to do, before anybody runs them."""

from __future__ import annotations

from collections.abc import Callable

from fabric.config import FabricConfig, Handlers, Work
from fabric.core.events import Card, ExecuteRequest
from fabric.engine.dispatch import Dispatcher
from fabric.engine.loop import Engine
from transports import MemoryHub, MemoryTransport


class NoWaits:
    """Nobody waits."""

    def until(self, engine: Engine, is_over: Callable[[], bool], deadline_ns: int, *, patient: bool = False) -> None:
        """At once."""

    def submitted(self, engine: Engine) -> None:
        """Nobody sees to it."""

    def attended(self, engine: Engine) -> None:
        """Nobody else would."""

    def close(self) -> None:
        """Nothing sleeps here."""


def engine_of(name: str) -> Engine:
    transport = MemoryTransport(MemoryHub(seed=1, clock=lambda: 1), name)
    where = transport.endpoints
    card = Card(
        name=name,
        rank=0,
        world_size=1,
        job="j",
        host="h",
        pid=1,
        version=1,
        incarnation=1,
        endpoints=(where.data, where.control, where.bulk),
    )
    config = FabricConfig(work=Work(handlers=Handlers.STEP))
    return Engine(card, config, transport, lambda: 1, NoWaits())


def request(number: int, priority: int = 1) -> ExecuteRequest:
    return ExecuteRequest("rank-1", 1, number, "m", priority, 10**12, 0, b"", b"", None)


def test_a_request_that_came_before_there_was_a_dispatcher_is_run() -> None:
    engine = engine_of("rank-0")
    engine.on_request(request(1), None)
    engine.on_request(request(2), None)
    dispatcher = Dispatcher(engine)
    engine.on_request(request(3), None)
    ran: list[str] = []
    dispatcher.respond("m", lambda asked: ran.append(asked.method))
    while dispatcher.run_one():
        pass
    assert ran == ["m"] * 3


def test_requests_of_the_same_priority_run_in_the_order_in_which_they_came() -> None:
    engine = engine_of("rank-0")
    dispatcher = Dispatcher(engine)
    asked: list[int] = []
    dispatcher.respond("m", lambda request: asked.append(request.deadline_ns))
    for number, priority in enumerate((1, 2, 0, 1, 0)):
        engine.on_request(ExecuteRequest("rank-1", 1, number, "m", priority, number, 0, b"", b"", None), None)
    while dispatcher.run_one():
        pass
    assert asked == [2, 4, 0, 3, 1]
