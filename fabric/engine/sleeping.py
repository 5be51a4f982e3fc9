"""Who drives: waiting threads, asleep on the transport's descriptors in between; else a background thread.

A sleeper has an epoll over the transport's descriptors and an eventfd of its own. Whoever handled something looks
whether those who sleep now have what they wait for, and signals them. libzmq's descriptors are edge-triggered: a
turn ends only when the transport said that nothing is left, so the next arrival makes an edge.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable

from fabric.engine.loop import Engine
from transports import TransportClosedError

__all__ = ["Sleeper", "ThreadedWaits"]

MS = 1_000_000
PARKED_LOOK_NS = 50 * MS
"""While others wait, and so drive, the background thread only looks whether they still do."""
ATTENDED_NS = 20 * MS
"""A thread that took a burst within this time still drives: below a marker's period, above a scheduler's slice."""
RELIEF_NS = 20 * MS
"""A training thread that drove within this time needs no help; four times the pause, and less than a marker's
period."""
PATIENCE_NS = 1000 * MS
"""A patient waiter looks by itself this often."""


class Sleeper:
    """One thread's place to sleep."""

    def __init__(self, engine: Engine) -> None:
        # First: it raises `TransportClosedError`, and then there is nothing to undo.
        descriptors = [*engine.transport.descriptors(), *engine.sharing.descriptors()]
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        for descriptor in (self._event, *descriptors):
            self._epoll.register(descriptor, select.EPOLLIN)
        self.is_over: Callable[[], bool] = lambda: False
        self.until_ns = 0
        """When it will wake up by itself; 0 while it is awake."""

    def sleep(self, engine: Engine, deadline_ns: int) -> bool:
        """Until a descriptor is readable, a signal, the deadline, or until something is due.

        Returns whether it was a signal and nothing else.
        """
        until_ns = self.until_ns = min(deadline_ns, engine.due_ns)
        # Looked at again once it is known that we sleep: who changes either first looks whether we do only afterwards.
        left_ns = min(until_ns, engine.due_ns) - engine.clock()
        woken: list[tuple[int, int]] = []
        if left_ns > 0 and not self.is_over():
            woken = self._epoll.poll(left_ns / 1e9 + 20e-6)  # a little more: waking early helps nobody
            for descriptor, _ in woken:
                if descriptor == self._event:
                    self.reset()
        self.until_ns = 0
        return len(woken) == 1 and woken[0][0] == self._event

    def signal(self) -> None:
        """Wake up, from any thread."""
        os.eventfd_write(self._event, 1)

    def is_stirred(self) -> bool:
        """Whether a descriptor is readable now."""
        return bool(self._epoll.poll(0))

    def reset(self) -> None:
        """Forget old signals."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return

    def close(self) -> None:
        """Give the descriptors back."""
        self._epoll.close()
        os.close(self._event)


class _Nap:
    """A place to sleep that only a signal interrupts."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def sleep(self, nanoseconds: int) -> None:
        """For so long, or until `signal`."""
        self._woken.wait(nanoseconds / 1e9)
        self._woken.clear()

    def signal(self) -> None:
        """End the nap."""
        self._woken.set()


class ThreadedWaits:
    """Waits for real threads. `training` slows the background thread down to one turn in `training_pause_ms`."""

    def __init__(self) -> None:
        self.training = False
        self._lock = threading.Lock()
        self._idle: list[Sleeper] = []
        self._waiting: list[Sleeper] = []
        self._loops: list[Sleeper] = []
        """Those of the waiting that are event loops."""
        self._patient: dict[_Nap, Callable[[], bool]] = {}
        self._left_ns = self._attended_ns = 0
        self._nap = _Nap()
        self._background: Sleeper | None = None
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._closing = self._parked = False

    def start(self, engine: Engine) -> None:
        """Begin to drive in the background."""
        self._engine = engine
        engine.on_progress = self._progress
        self._background = Sleeper(engine)
        self._thread = threading.Thread(target=self._run, name=f"fabric-{engine.card.name}", daemon=True)
        self._thread.start()

    # Waiting threads.

    def until(self, engine: Engine, is_over: Callable[[], bool], deadline_ns: int, *, patient: bool = False) -> None:
        """Drive and sleep in turn until it is over.

        A `patient` waiter leaves driving to a training thread, while there is one.
        """
        while patient and self.training and not is_over() and engine.clock() < deadline_ns:
            self._sit_out(engine, is_over, deadline_ns)
        try:
            sleeper = self._enter(engine, is_over)
        except TransportClosedError:
            return  # another thread closed the fabric just now: the engine says so
        try:
            while not is_over() and engine.clock() < deadline_ns:
                if patient and self.training:
                    return
                if not engine.restless and sleeper.sleep(engine, deadline_ns) and is_over():
                    return  # and nothing has arrived: another thread brought it, and a turn would bring nothing
                engine.turn()
        finally:
            self._leave(engine, sleeper)

    def _sit_out(self, engine: Engine, is_over: Callable[[], bool], deadline_ns: int) -> None:
        """Sleep until whoever drives sees that it is over; the sockets are not our business."""
        nap = _Nap()
        with self._lock:
            self._patient[nap] = is_over
        try:
            if not is_over():
                nap.sleep(min(deadline_ns - engine.clock(), PATIENCE_NS))
        finally:
            with self._lock:
                del self._patient[nap]

    def _enter(self, engine: Engine, is_over: Callable[[], bool]) -> Sleeper:
        with self._lock:
            if self._idle:
                return self._wait_with(self._idle.pop(), is_over)
        with engine.lock:  # under which the transport closes: its descriptors are nobody else's by now
            sleeper = Sleeper(engine)
        with self._lock:
            return self._wait_with(sleeper, is_over)

    def _wait_with(self, sleeper: Sleeper, is_over: Callable[[], bool]) -> Sleeper:
        sleeper.is_over = is_over
        self._waiting.append(sleeper)
        return sleeper

    def _leave(self, engine: Engine, sleeper: Sleeper) -> None:
        with self._lock:
            self._waiting.remove(sleeper)
            if self._closing:
                sleeper.close()
            else:
                self._idle.append(sleeper)
        self._left(engine)

    def _left(self, engine: Engine) -> None:
        last = not self._waiting
        self._left_ns = engine.clock()
        if last and self._background is not None and self._background.until_ns > self._left_ns + PARKED_LOOK_NS // 10:
            self._background.signal()
        if last and self._parked:
            self._nap.signal()

    # Event loops.

    def attach(self, loop: Sleeper) -> None:
        """An event loop drives from now on, as a waiting thread would, and is woken as one."""
        with self._lock:
            self._waiting.append(loop)
            self._loops.append(loop)

    def detach(self, engine: Engine, loop: Sleeper) -> None:
        """It does so no longer. Twice is once."""
        with self._lock:
            if loop not in self._loops:
                return
            self._waiting.remove(loop)
            self._loops.remove(loop)
        self._left(engine)
        self._nap.signal()

    def _stand_in(self, engine: Engine) -> None:
        """A loop may be busy with something else for long: what is due or has arrived does not wait for it."""
        now = engine.clock()
        if now - engine.turned_ns > RELIEF_NS and (
            engine.due_ns <= now or any(loop.is_stirred() for loop in list(self._loops))
        ):
            engine.turn()

    def _progress(self) -> None:
        for sleeper in list(self._waiting):
            if sleeper.until_ns and sleeper.is_over():
                sleeper.signal()
        for nap, is_over in list(self._patient.items()):
            if is_over():
                nap.signal()

    def attended(self, engine: Engine) -> None:
        """A thread in the middle of a stream of messages: it will be back, unless it is descheduled for longer."""
        self._attended_ns = engine.clock()

    def submitted(self, engine: Engine) -> None:
        """What is due moved: wake who would sleep past it. A training thread comes by itself, with its next step."""
        if self.training:
            return
        background = [self._background] if self._background is not None else []
        for sleeper in [*self._waiting, *background]:
            if sleeper.until_ns > engine.due_ns:
                sleeper.signal()
                return

    # The background thread.

    def _run(self) -> None:
        engine, sleeper = self._engine, self._background
        assert engine is not None and sleeper is not None
        work = engine.config.work
        while not self._closing and engine.broken is None:
            now = engine.clock()
            resume_ns = max(self._left_ns + int(work.parked_ms * MS), self._attended_ns + ATTENDED_NS)
            if self._waiting:
                # Whoever leaves last says so, and we look again a little later; not where waiters come and go.
                self._parked = now >= resume_ns
                if self._waiting:
                    self._nap.sleep(self._parked_ns() if self._parked or self._loops else resume_ns - now)
                self._parked = False
                if self._loops and not self._closing:
                    self._stand_in(engine)
            elif now < resume_ns:
                self._nap.sleep(resume_ns - now)
            elif self.training:
                self._relieve(engine, now)
            elif not engine.turn():
                sleeper.sleep(engine, engine.due_ns)

    def _parked_ns(self) -> int:
        return RELIEF_NS if self._loops else PARKED_LOOK_NS

    def _relieve(self, engine: Engine, now: int) -> None:
        """In a process that trains.

        Drive only if the training thread has not for a while, and then at most once in a pause.
        """
        wait_ns = engine.turned_ns + RELIEF_NS - now
        if wait_ns <= 0:
            engine.turn()
            wait_ns = int(engine.config.work.training_pause_ms * MS)
        self._nap.sleep(wait_ns)

    def close(self) -> None:
        """End the background thread and wake everybody."""
        self._closing = True
        self._nap.signal()
        if self._background is not None:
            self._background.signal()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2.0)
        with self._lock:
            for sleeper in self._waiting:
                sleeper.signal()
            for sleeper in self._idle:
                sleeper.close()
            self._idle.clear()
        if self._background is not None:
            self._background.close()
            self._background = None

    def abandon(self) -> None:
        """In a forked child: the thread is not here; give the descriptors of the parent back."""
        self._closing = True
        for sleeper in [*self._idle, *self._waiting, *([self._background] if self._background is not None else [])]:
            sleeper.close()
        self._idle, self._waiting, self._background, self._thread = [], [], None, None
        self._lock = threading.Lock()
