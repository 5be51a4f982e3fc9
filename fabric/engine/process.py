"""The process around a member: leaving, fork, SIGTERM, interpreter exit, and proof of a peer's death."""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Protocol

from fabric.core.events import Card
from fabric.engine.loop import Engine
from fabric.engine.sleeping import ThreadedWaits
from fabric.rendezvous.lives import Life

__all__ = ["Membership", "ProcessMembership"]

log = logging.getLogger("fabric.process")

_members: weakref.WeakSet[ProcessMembership] = weakref.WeakSet()
AGAIN_S = 0.005
"""A turn takes 0.2 ms."""
LINGER_S = 0.5
"""What was handed to the sockets may leave for so long after a close: the goodbye."""


class Membership(Protocol):
    """What a `Fabric` has to give back when it leaves."""

    state_directory: Path | None
    """The one that the user named; there may be state without."""

    def mark_training(self, step: int) -> None:
        """This process trains."""

    def close(self) -> None:
        """Leave."""


class ProcessMembership:
    """Membership of a real process.

    `leave` are the steps that undo what `join` did, run in order, each whatever the others do.
    """

    def __init__(self, engine: Engine, waits: ThreadedWaits, leave: list[Callable[[], None]]) -> None:
        self._engine, self._waits, self._leave = engine, waits, leave
        self._closed = False
        self._lives: dict[str, tuple[int, Life | None]] = {}
        self.step: int | None = None
        self.state_directory: Path | None = None
        """The one that the user named; there may be state without."""
        self.on_exit: Callable[[], object] = self.close
        engine.probe = self._is_dead
        _members.add(self)

    def mark_training(self, step: int) -> None:
        """From now on the background thread keeps out of the way."""
        self.step = step
        self._waits.training = True

    def remember(self, card: Card) -> None:
        """Note which life of a process of this host a peer is, so that its death can be proven later."""
        if card.host == self._engine.card.host:
            self._lives[card.name] = card.incarnation, Life.of(card.pid)

    def _is_dead(self, card: Card) -> bool:
        incarnation, life = self._lives.get(card.name, (0, None))
        return incarnation == card.incarnation and life is not None and Life.of(card.pid) != life

    def close(self) -> None:
        """Leave: the background ends, the sockets close, and what `join` put up is taken down."""
        if self._closed:
            return
        self._closed = True
        self._waits.close()
        self._engine.close(LINGER_S)
        for step in self._leave:
            step()
        _members.discard(self)

    def abandon(self) -> None:
        """In a forked child: refuse everything, give inherited descriptors back, touch nothing that the parent uses."""
        self._closed = True
        engine = self._engine
        engine.abandon(os.getpid())
        self._waits.abandon()


def _after_fork_in_child() -> None:
    for member in list(_members):
        member.abandon()
    _members.clear()


def _at_exit() -> None:
    for member in list(_members):
        member.on_exit()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_exit)


def _is_driving(frame: FrameType | None) -> bool:
    """Whether this stack is in the midst of an event: an exception there would leave the core with half of it."""
    while frame is not None:
        if frame.f_code is Engine.guarded.__code__:
            return True
        frame = frame.f_back
    return False


def install_signals() -> Callable[[], None]:
    """Turn SIGTERM into `SystemExit(143)`, so that `with` blocks close; returns what restores the defaults.

    Ctrl-C stays `KeyboardInterrupt`. Either, if it interrupts the handling of an event, comes again after that. Only
    over the default actions, and only in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    restorers = [_install(signal.SIGTERM, signal.SIG_DFL, _exit), _install(signal.SIGINT, _INTERRUPT, _INTERRUPT)]

    def restore() -> None:
        for each in restorers:
            each()

    return restore


_INTERRUPT = signal.default_int_handler


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


Action = Callable[[int, FrameType | None], object]


def _install(number: int, default: Action | signal.Handlers, action: Action) -> Callable[[], None]:
    if signal.getsignal(number) is not default:
        return lambda: None

    def take(number: int, frame: FrameType | None) -> None:
        if _is_driving(frame):
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))
            again.daemon = True
            again.start()
            return
        action(number, frame)

    def restore() -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(number) is take:
            signal.signal(number, default)

    signal.signal(number, take)
    return restore
