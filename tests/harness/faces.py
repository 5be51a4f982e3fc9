"""Both faces behind one: a scenario awaits everything, and runs on either.

On the synchronous face each awaited call is the plain call, and a scenario is a coroutine that never waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import pytest
import zmq

import fabric
from fabric import FabricConfig, aio
from fabric.publisher import Loan

_names = itertools.count()

zmq.Frame(b"x" * 65536, copy=False, track=True)
# pyzmq starts a collector for frames that are sent without a copy, once in a process: before a test looks for leaks.


class Face(Protocol):
    """One of the two faces."""

    name: str

    def play(self, scenario: Callable[..., Coroutine[Any, Any, None]], ranks: int, config: FabricConfig) -> None:
        """Run a scenario: `scenario(face, *members)`, a member for each rank, closed at the end."""

    def later(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """Run a part of a scenario beside it; what is awaited is its result."""


def rendezvous() -> str:
    """A meeting place of this test alone."""
    return f"memory://parity-{os.getpid()}-{next(_names)}"


# The synchronous face.


def finish(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a scenario waited for something that is not of the face")


def plain(function: Callable[[Any], Coroutine[Any, Any, Any]]) -> Callable[[Any], Any]:
    """A coroutine function that never waits, as a plain function."""
    return lambda argument: finish(function(argument))


PLAIN_NAMES = {
    "publisher",
    "loan",
    "on",
    "respond",
    "drain",
    "cursor",
    "handled_by",
    "statistics",
    "acknowledge",
    "reject",
}
"""What is not awaited on either face."""


class Awaited:
    """An object of the synchronous face: its methods return what can be awaited."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        if not callable(value):
            return value
        if name in ("on", "respond"):
            return lambda *arguments, **options: _decorator(value(*arguments, **options))
        if name in PLAIN_NAMES:
            return lambda *arguments, **options: _wrapped(value(*arguments, **options))

        async def call(*arguments: Any, **options: Any) -> Any:
            return _wrapped(value(*arguments, **options))

        return call

    async def __aiter__(self) -> AsyncIterator[Any]:
        for message in self.inner:
            yield message

    async def __aenter__(self) -> Awaited:
        self.inner.__enter__()
        return self

    async def __aexit__(self, *details: Any) -> None:
        self.inner.__exit__(*details)


class AwaitedLoan:
    """A loan of the synchronous face."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def __aenter__(self) -> Any:
        return self.inner.__enter__()

    async def __aexit__(self, *details: Any) -> None:
        self.inner.__exit__(*details)


def _wrapped(value: Any) -> Any:
    if isinstance(value, Loan):
        return AwaitedLoan(value)
    return Awaited(value) if isinstance(value, fabric.Publisher | fabric.Subscription) else value


def _decorator(decorate: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def both(function: Any) -> Any:
        decorate(plain(function) if inspect.iscoroutinefunction(function) else function)
        return function

    return both


class _Later:
    """A part of a scenario on a thread."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __await__(self) -> Iterator[Any]:
        return iter(()) if False else _given(self._future.result(timeout=30))


def _given(value: Any) -> Any:
    yield from ()
    return value


class SyncFace:
    """The synchronous face."""

    name = "sync"

    def play(self, scenario: Callable[..., Coroutine[Any, Any, None]], ranks: int, config: FabricConfig) -> None:
        """As `Face.play`."""
        where = rendezvous()
        with contextlib.ExitStack() as stack:
            self._pool = stack.enter_context(ThreadPoolExecutor(8))
            joins = [
                self._pool.submit(fabric.join, config, rank=rank, world_size=ranks, rendezvous=where)
                for rank in range(ranks)
            ]
            members = [stack.enter_context(join.result(timeout=30)) for join in joins]
            finish(scenario(self, *map(Awaited, members)))

    def later(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """As `Face.later`."""
        return _Later(self._pool.submit(finish, coroutine))

    async def until(self, condition: Callable[[], object]) -> None:
        """Until a condition holds."""
        pause = threading.Event()
        for _ in range(4000):
            if condition():
                return
            pause.wait(0.005)
        raise AssertionError("it did not come true")


class AioFace:
    """The asynchronous face."""

    name = "aio"

    def play(self, scenario: Callable[..., Coroutine[Any, Any, None]], ranks: int, config: FabricConfig) -> None:
        """As `Face.play`."""

        async def main() -> None:
            where = rendezvous()
            async with contextlib.AsyncExitStack() as stack:
                joins = [aio.join(config, rank=rank, world_size=ranks, rendezvous=where) for rank in range(ranks)]
                members = [await stack.enter_async_context(member) for member in await asyncio.gather(*joins)]
                await scenario(self, *members)

        asyncio.run(main(), debug=False)

    def later(self, coroutine: Coroutine[Any, Any, Any]) -> Awaitable[Any]:
        """As `Face.later`."""
        return asyncio.get_running_loop().create_task(coroutine)

    async def until(self, condition: Callable[[], object]) -> None:
        """Until a condition holds."""
        for _ in range(4000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it did not come true")


FACES: tuple[Any, ...] = (SyncFace(), AioFace())


Scenario = Callable[..., Coroutine[Any, Any, None]]
DEFAULT = FabricConfig(install_signal_handler=False)


def played(ranks: int = 2, config: FabricConfig = DEFAULT) -> Callable[[Scenario], Callable[[Any], None]]:
    """Run a scenario on both faces."""

    def decorate(scenario: Scenario) -> Callable[[Any], None]:
        @pytest.mark.parametrize("face", FACES, ids=lambda face: face.name)
        def test(face: Any) -> None:
            face.play(scenario, ranks, config)

        # Not `functools.wraps`: pytest would look for the scenario's parameters.
        test.__name__, test.__doc__ = scenario.__name__, scenario.__doc__
        return test

    return decorate
