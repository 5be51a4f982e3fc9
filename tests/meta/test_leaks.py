"""The search for what a test left behind finds it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

from tests.harness.leaks import Snapshot


def test_an_open_descriptor_is_found_until_it_is_closed(tmp_path: Path) -> None:
    before = Snapshot()
    event, (one, other) = os.eventfd(0), socket.socketpair()
    with (tmp_path / "segment").open("wb") as segment:
        kinds = sorted(name.split(" of ", 1)[1].split("[")[0] for name in before.left())
        assert kinds == [str(tmp_path / "segment"), "anon_inode:", "socket:", "socket:"]
        segment.flush()
    os.close(event)
    one.close()
    other.close()
    assert before.left() == []


def test_a_running_thread_of_the_fabric_is_found_until_it_ends() -> None:
    before, stop = Snapshot(), threading.Event()
    ours = threading.Thread(target=stop.wait, name="fabric-engine", daemon=True)
    theirs = threading.Thread(target=stop.wait, name="library", daemon=True)
    ours.start()
    theirs.start()
    assert before.left() == ["thread fabric-engine"]
    stop.set()
    ours.join()
    theirs.join()
    assert before.left() == []
