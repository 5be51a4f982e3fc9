"""Driving an engine from an event loop: its turns are callbacks, its waiters are futures.

To the engine the loop is one more sleeper. The loop watches its descriptor, an epoll over the transport's and an
eventfd; what is due is a timer of the loop; after each turn those who wait are asked whether it is over for them. While
somebody waits here the background thread is parked, and stands in only if the loop is busy for long.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from fabric.engine.loop import Engine
from fabric.engine.sleeping import Sleeper, ThreadedWaits
from fabric.engine.steps import Steps, Wait
from fabric.errors import FabricError, WrongThreadError

__all__ = ["LoopDriver", "running_loop"]

T = TypeVar("T")
running_loop = asyncio._get_running_loop
"""The loop of this thread, or None; `get_running_loop` raises instead."""
S = 1_000_000_000
SLICE_NS = 1_000_000
"""Who never has to wait lets other tasks run after this."""


class _Waiter:
    """A task that waits."""

    __slots__ = ("deadline_ns", "future", "is_over")

    def __init__(self, is_over: Callable[[], bool], deadline_ns: int, future: asyncio.Future[None]) -> None:
        self.is_over, self.deadline_ns, self.future = is_over, deadline_ns, future


class LoopDriver(Sleeper):
    """One engine on one event loop: the one that runs when it is made."""

    def __init__(self, engine: Engine, waits: ThreadedWaits) -> None:
        super().__init__(engine)
        self.engine, self.loop = engine, asyncio.get_running_loop()
        self.run_handlers: Callable[[], int | None] = lambda: None
        """Start what handlers have to do; returns when something is due, None if nothing is."""
        self.serving = False
        """Whether handlers may have work at any time, so that the loop has to drive always."""
        self._waits = waits
        self._thread = threading.get_ident()
        self._owner = threading.current_thread().name
        self._waiters: list[_Waiter] = []
        self._watching = self._signalled = self._closed = False
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_ns = self._breath_ns = self._left_ns = 0
        self.is_over = self._is_wanted

    # Waiting.

    def check(self) -> None:
        """Raise `WrongThreadError` unless our loop runs on this thread."""
        if running_loop() is not self.loop:
            raise WrongThreadError(owner=self._owner, caller=threading.current_thread().name)

    async def run(self, steps: Steps[T]) -> T:
        """Run an operation, waiting on the loop; its errors go through the operation. A cancelled one is closed."""
        try:
            wait = next(steps)
            while True:
                try:
                    came = await self.until(wait)
                except FabricError as error:
                    wait = steps.throw(error)
                else:
                    wait = steps.send(came)
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            steps.close()

    async def until(self, wait: Wait) -> bool:
        """Wait until it is over; False if it did not come within the time.

        What came is not taken here, so that cancelling loses nothing.
        """
        self.check()
        engine = self.engine
        engine.require_open()
        if wait.is_over():
            return True
        engine.flush()
        self._watch()
        deadline_ns = engine.clock() + int(wait.timeout_s * S)
        waiter = _Waiter(wait.is_over, deadline_ns, self.loop.create_future())
        self._waiters.append(waiter)
        try:
            self._turn()
            if waiter.future.done():
                await self.breathe()
            else:
                await waiter.future
                self._breath_ns = engine.clock()
        finally:
            self._waiters.remove(waiter)
            self._left_ns = engine.clock()
        if wait.is_over():
            return True
        engine.require_open()
        return False

    async def breathe(self) -> None:
        """Let other tasks run if this one had its share."""
        now = self.engine.clock()
        if now - self._breath_ns > SLICE_NS:
            self._breath_ns = now
            await asyncio.sleep(0)

    # Driving.

    def serve(self) -> None:
        """There are handlers now: drive always."""
        self.serving = True
        self._watch()
        self.wake()

    def wake(self) -> None:
        """Take a turn with the next round of the loop. On its thread."""
        if self._soon is None and not self._closed and not self.loop.is_closed():
            self._soon = self.loop.call_soon(self._on_soon)

    def signal(self) -> None:
        """Wake up, from any thread."""
        if self._closed or threading.get_ident() == self._thread:
            self.wake()
            return
        super().signal()
        self._signalled = True  # after it: a signal that is seen too early only wakes us twice

    def _is_wanted(self) -> bool:
        """Asked by whoever drives while we sleep, on any thread."""
        engine = self.engine
        if self.serving or engine.broken is not None or engine.closed:
            return True
        return any(waiter.is_over() for waiter in tuple(self._waiters))

    def _watch(self) -> None:
        if not self._watching and not self._closed:
            self._watching = True
            self.loop.add_reader(self._epoll.fileno(), self._on_ready)
            self._waits.attach(self)

    def _unwatch(self) -> None:
        if self._watching:
            self._watching = False
            if not self.loop.is_closed():
                self.loop.remove_reader(self._epoll.fileno())
            self._waits.detach(self.engine, self)

    def _on_ready(self) -> None:
        if self._signalled:
            self._signalled = False
            self.reset()
        self._turn()

    def _on_soon(self) -> None:
        self._soon = None
        self._turn()

    def _on_timer(self) -> None:
        self._timer = None
        if self._waiters or self.serving or self.engine.clock() - self._left_ns < SLICE_NS:
            self._turn()
        else:
            self._unwatch()  # nobody waited for a while: the background thread drives again

    def _turn(self) -> None:
        """A turn, and what it brought about. Not in one go with the next: the loop has other things to do."""
        if self._closed:
            return
        self.until_ns = 0
        self.engine.turn()
        engine, due_ns = self.engine, self.run_handlers()
        ended = engine.broken is not None or engine.closed
        if not ended:
            self._arm_by(engine.due_ns if due_ns is None else min(due_ns, engine.due_ns))
        # All that follows is looked at once it is known that we sleep: who changes it on another thread wakes us.
        self._resolve(ended)
        if not ended and (engine.restless or engine.due_ns < self.until_ns):
            self.wake()

    def _resolve(self, ended: bool) -> None:
        now = self.engine.clock()
        for waiter in self._waiters:
            if waiter.future.done():
                continue
            if ended or waiter.deadline_ns <= now or waiter.is_over():
                waiter.future.set_result(None)
            else:
                self._arm_by(waiter.deadline_ns)

    def _arm_by(self, due_ns: int) -> None:
        """Have a timer that fires then, or earlier: to wake too early costs less than a new timer each time."""
        if self._timer is not None:
            if self._timer_ns <= due_ns:
                self.until_ns = self._timer_ns
                return
            self._timer.cancel()
        delay_s = max(0, due_ns - self.engine.clock()) / S
        self._timer, self._timer_ns = self.loop.call_later(delay_s, self._on_timer), due_ns
        self.until_ns = due_ns

    def finish(self) -> None:
        """The engine is closed: tell all who wait, and give everything back. Twice is once."""
        if self._closed:
            return
        self._unwatch()
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()
        if not self.loop.is_closed():
            self._resolve(ended=True)
        self.close()

    def close(self) -> None:
        """Give the descriptors back. Twice is once."""
        if not self._closed:
            self._closed = True
            super().close()
