"""The process around a member: what a signal does to the thread that drives."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from fabric.engine.loop import Engine
from fabric.engine.process import install_signals
from fabric.errors import BrokenError
from tests.harness.waiting import until


@pytest.mark.parametrize(
    ("number", "default", "raised"),
    [
        pytest.param(
            signal.SIGTERM,
            signal.SIG_DFL,
            SystemExit,
            marks=pytest.mark.skipif(sys.gettrace() is not None, reason="coverage has a SIGTERM handler of its own"),
        ),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_f56_a_signal_in_the_midst_of_an_event_waits_for_its_end(
    number: int, default: signal.Handlers, raised: type[BaseException]
) -> None:
    """Nothing of the event is left out; then the signal comes."""
    engine = object.__new__(Engine)
    done: list[str] = []

    def work() -> int:
        os.kill(os.getpid(), number)
        until(lambda: done.append("looked") or len(done) > 3)
        done.append("all of it")
        return 1

    before = signal.signal(number, default)
    restore = install_signals()
    try:
        with pytest.raises(raised) as caught:
            assert engine.guarded(work) == 1
            assert done[-1] == "all of it"
            until(lambda: False, timeout_s=10)
        assert raised is KeyboardInterrupt or caught.value.args == (143,)
    finally:
        restore()
        left = signal.signal(number, before)
    assert left is default


def test_handlers_of_the_program_are_left_alone() -> None:
    mine = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        restore = install_signals()
        ours = signal.getsignal(signal.SIGINT)
        restore()
        assert signal.getsignal(signal.SIGINT) is ours
    finally:
        signal.signal(signal.SIGINT, mine)


def test_what_a_handler_of_the_program_raises_amid_an_event_breaks_the_fabric_and_says_so() -> None:
    """Half of the event is done: going on would count it as all."""

    class Enough(BaseException):
        pass

    def work() -> int:
        raise Enough

    engine = object.__new__(Engine)
    engine.broken, engine.forked_in, engine.closed, engine.on_progress = None, 0, False, lambda: None
    with pytest.raises(Enough):
        engine.guarded(work)
    with pytest.raises(BrokenError, match="the fabric broke: Enough"):
        engine.require_open()
