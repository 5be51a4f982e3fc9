"""The process around a member: what a signal does to the thread that drives."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from fabric.engine.loop import Engine
from fabric.engine.process import install_sigterm
from tests.harness.waiting import until


@pytest.mark.skipif(sys.gettrace() is not None, reason="coverage has a SIGTERM handler of its own")
def test_f56_a_signal_in_the_midst_of_an_event_waits_for_its_end() -> None:
    """Nothing of the event is left out; then the signal comes."""
    engine = object.__new__(Engine)
    done: list[str] = []

    def work() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: done.append("looked") or len(done) > 3)
        done.append("all of it")
        return 1

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    restore = install_sigterm()
    try:
        with pytest.raises(SystemExit) as caught:
            assert engine.guarded(work) == 1
            assert done[-1] == "all of it"
            until(lambda: False, timeout_s=10)
        assert caught.value.code == 143
    finally:
        restore()
        left = signal.signal(signal.SIGTERM, before)
    assert left is signal.SIG_DFL
