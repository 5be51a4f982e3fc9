"""The subscriber's face, awaited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from fabric.aio.driving import LoopDriver, running_loop
from fabric.engine.inbox import Inbox
from fabric.errors import WrongThreadError
from fabric.message import Message
from fabric.subscription import Options, SubscriptionBase
from fabric.table import Table

__all__ = ["Subscription"]


class Subscription(SubscriptionBase):
    """What `Fabric.subscribe` returns. It belongs to the loop of its fabric, and to one task at a time.

    With `acknowledge="auto"` a message counts as handled when the next one is asked for; with `"manual"`, when
    `acknowledge()` or `reject()` is called on it or on a later one of its lane. A cancelled call takes no message.
    """

    def __init__(
        self, driver: LoopDriver, inbox: Inbox, pattern: str, options: Options, *, idle_timeout_s: float
    ) -> None:
        super().__init__(driver.engine, inbox, pattern, options, idle_timeout_s=idle_timeout_s)
        self._driver = driver
        self._user_task: asyncio.Task[Any] | None = None

    async def receive(self, *, timeout_s: float = 10.0, into: Any = None) -> Message:  # noqa: ANN401 - tensors
        """The next message; waits for it. Its value is copied into the tensors `into`, whole or not at all, if given.

        Raises `ReceiveTimeoutError`, `ClosedError` (also when all feeds are over), `BrokenError`, `WrongThreadError`,
        and with `into` `SchemaError`: then the message stays the next one.
        """
        self._enter()
        try:
            if self._hand is None or self._at + 1 >= len(self._hand.rows):  # once in a burst
                await self._driver.breathe()
            message = self._next()
            if message is None:
                message = await self._driver.run(self._waiting(timeout_s))
                assert message is not None, "nobody asked for an end"
            if into is not None:
                self._copy_into(message, into)
            return message
        finally:
            self._user.release()

    async def receive_many(self, n: int, *, timeout_s: float = 10.0) -> Table:
        """At least one and at most `n` messages; waits for the first. Raises as `receive`.

        All of them are in hand until the next call. A `Table` is a sequence of them, and has columns.
        """
        self._enter()
        try:
            if self._hand is None or self._at + 1 >= len(self._hand.rows):  # once in a burst
                await self._driver.breathe()
            table = self._gather(n) or self._gather(n, await self._driver.run(self._waiting(timeout_s)))
            assert table is not None, "nobody asked for an end"
            return table
        finally:
            self._user.release()

    def __aiter__(self) -> AsyncIterator[Message]:
        """All messages, until every feed is over; while none has begun, it waits for one.

        Raises `ReceiveTimeoutError` after `idle_timeout_s` without any.
        """
        self._require_open()
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Message]:
        while True:
            for message in self._messages():
                yield message
            self._enter()
            try:
                next_message = await self._driver.run(self._waiting(self._idle_timeout_s, ending=True))
            finally:
                self._user.release()
            if next_message is None:
                return
            yield next_message

    async def close(self) -> None:
        """Take nothing more. Publishers owe nothing more, unless it has a name. Twice is once."""
        self._close()

    async def unsubscribe(self) -> None:
        """Close, and end a subscription that has a name, as `Subscription.unsubscribe` of the synchronous face does."""
        self._close(forgotten=True)

    def _enter(self, *, settle: bool = True) -> None:
        if running_loop() is not self._driver.loop:
            self._driver.check()
        if self._user.locked():
            raise WrongThreadError(owner=_name_of(self._user_task), caller=_name_of(asyncio.current_task()))
        super()._enter(settle=settle)
        self._user_task = asyncio.current_task()

    async def __aenter__(self) -> Subscription:
        return self

    async def __aexit__(self, *details: object) -> None:
        await self.close()


def _name_of(task: asyncio.Task[Any] | None) -> str:
    return task.get_name() if task is not None else "a callback of the loop"
