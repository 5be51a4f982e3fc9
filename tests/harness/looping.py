"""Scenarios on an event loop, with members of the asynchronous face."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

from fabric import FabricConfig, aio
from tests.harness.faces import DEFAULT, rendezvous

Scenario = Callable[..., Coroutine[Any, Any, None]]


def looped(ranks: int = 2, config: FabricConfig = DEFAULT) -> Callable[[Scenario], Callable[[], None]]:
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
        await rest(0.005)
    raise AssertionError("it did not come true")


async def rest(seconds: float = 0.0) -> None:
    """Let others run: one round of the loop, or for so long."""
    await asyncio.sleep(seconds)
