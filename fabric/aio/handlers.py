"""Handlers on an event loop: coroutine functions as tasks, plain functions at once.

Each lane runs in order, different lanes run side by side. Retries and dead letters are the dispatcher's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from heapq import heappop
from typing import Any, TypeVar

from fabric.aio.driving import SLICE_NS, LoopDriver
from fabric.core import events
from fabric.engine.dispatch import Dispatcher
from fabric.engine.handler import Handler, Job, Lane
from fabric.engine.steps import Wait

__all__ = ["TaskDispatcher"]

T = TypeVar("T")
TASKS_MAX = 256
"""Coroutines of handlers that run at once; messages and requests beyond wait where they are, which bounds them."""
FOREVER_S = 3600.0


class TaskDispatcher(Dispatcher):
    """All handlers of one member, on its loop. In `step` mode they begin only inside `serving`."""

    def __init__(self, driver: LoopDriver) -> None:
        super().__init__(driver.engine)
        self._outcomes = (Exception,)
        self._driver = driver
        self._tasks: set[asyncio.Task[Any]] = set()
        self._serving = 0
        self._context = contextvars.copy_context()
        """What handlers run in: not in the context of whoever happens to wait when their message comes."""
        driver.run_handlers = self.run_some

    def _start(self) -> None:
        self._driver.serve()

    def _on_unclaimed(self) -> None:
        """The driver may be another thread: a loop that serves nothing yet looks when it next does."""

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Step handlers begin in here."""
        self._serving += 1
        self._driver.wake()
        try:
            yield
        finally:
            self._serving -= 1

    async def settle_down(self) -> None:
        """Until nothing runs and nothing is left to run now."""
        with self.serving():
            current = {asyncio.current_task()}
            await self._driver.until(Wait(lambda: not self._tasks - current and not self.has_work(), FOREVER_S))

    # Beginning.

    def run_some(self) -> int | None:
        """Begin what there is to run, for a while; returns when the next retry is due. Called after every turn."""
        if self._closing.is_set() or not (self.threaded or self._serving):
            return None
        end_ns = self.engine.clock() + SLICE_NS
        while len(self._tasks) < TASKS_MAX and self.run_one():
            if self.engine.clock() > end_ns:
                self._driver.wake()
                break
        return self.due_ns() if len(self._tasks) < TASKS_MAX else None  # else the next that ends wakes us

    def run_one(self) -> bool:
        """Begin one handler for one message or request."""
        return self._run_next()

    def _advance(self, handler: Handler) -> bool:
        job = self._take(handler)
        if job is None:
            return False
        handler.blocked[job.message.lane] = deque([job])
        self._run_lane(handler, job.message.lane)
        return True

    def _retry(self, handler: Handler) -> bool:
        if not handler.retries or handler.retries[0][0] > self.engine.clock():
            return False
        self._run_lane(handler, heappop(handler.retries)[2])
        return True

    def _run_lane(self, handler: Handler, lane: Lane) -> None:
        """Run what waits in a lane, one after the other, as far as it ends at once."""
        waiting = handler.blocked[lane]
        while waiting and not self._closing.is_set():
            job = waiting[0]
            admitted = self._admit(handler, job)
            if admitted is not None:
                if not admitted:
                    return
                waiting.popleft()
                continue
            result, error = self._run_handler(handler.function, job.message)
            if error is None and asyncio.iscoroutine(result):
                self._begin(result, partial(self._on_handled, handler, job))
                return
            if not self._end(handler, job, error):
                return
        if not waiting:
            del handler.blocked[lane]

    def _end(self, handler: Handler, job: Job, error: BaseException | None) -> bool:
        """Whether the lane goes on."""
        settled = self._settle(handler, job, error)
        if settled:
            handler.blocked[job.message.lane].popleft()
        self._driver.wake()  # what was settled leaves with the next turn
        return settled

    def _answer(self, execute: events.ExecuteRequest, payload: memoryview | None) -> None:
        result, error = self._run_handler(self._respond_to, (execute, payload))
        if error is None and asyncio.iscoroutine(result):
            self._begin(result, partial(self._on_answered, execute))
        else:
            self._reply(execute, result, error)

    def _run_handler(self, function: Callable[[Any], Any], argument: object) -> tuple[Any, BaseException | None]:
        return self._context.copy().run(super()._run_handler, function, argument)

    # Tasks.

    def _begin(self, coroutine: Coroutine[Any, Any, Any], then: Callable[[asyncio.Task[Any]], None]) -> None:
        task = self._driver.loop.create_task(coroutine, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(then)

    def _on_handled(self, handler: Handler, job: Job, task: asyncio.Task[Any]) -> None:
        error = _error_of(task)
        if (error is None or not self._closing.is_set()) and self._end(handler, job, error):
            self._run_lane(handler, job.message.lane)

    def _on_answered(self, execute: events.ExecuteRequest, task: asyncio.Task[Any]) -> None:
        error = _error_of(task)
        if not self.engine.closed:
            self._reply(execute, None if error is not None else task.result(), error)
        self._driver.wake()

    # The end.

    async def shut(self, timeout_s: float, but: asyncio.Task[Any] | None) -> None:
        """Begin no handler any more; wait for those that run, `but` the one that closes, then cancel them.

        What they had in hand is not handled.
        """
        self._closing.set()
        running = self._tasks - {but}
        if running:
            _, late = await asyncio.wait(running, timeout=timeout_s)
            for task in late:
                task.cancel()


def _error_of(task: asyncio.Task[Any]) -> BaseException | None:
    return asyncio.CancelledError() if task.cancelled() else task.exception()
