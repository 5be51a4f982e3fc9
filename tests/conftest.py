"""What every test gets: a private runtime directory, no launcher's variables, and a search for what it left behind."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.harness.leaks import Snapshot

# A test run is the same every time; `make fuzz` looks for what no run has tried yet.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=20_000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("default")

# What torchrun sets. A suite that is itself started by a launcher must not join that job.
LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_USE_AGENT_STORE",
)

_GRACE_S = 5.0


@pytest.fixture(autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Members with a job have state; no test meets that of another."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.getbasetemp() / f"state-{next(_states)}"))


_states = itertools.count()


def pytest_collection_finish() -> None:
    """What is there now stays to the end: no search for garbage has to look at thousands of tests, and at torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def runtime_directory() -> Iterator[Path]:
    """A short private directory for cards and ipc sockets: a socket's path may have 107 bytes, pytest's are longer."""
    root = Path(tempfile.mkdtemp(prefix="tf-"))
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(root)
    yield root
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks for a method that nobody has hears so soon, not after two seconds."""
    monkeypatch.setattr("fabric.engine.dispatch.GRACE_NS", 50_000_000)


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """A test that leaves a thread of the fabric or a descriptor of its kinds behind fails."""
    before = Snapshot()
    yield
    deadline = time.monotonic() + _GRACE_S
    pause = threading.Event()
    while left := before.left():
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: {', '.join(left)}", pytrace=False)
        gc.collect()  # a failed test keeps its objects in its traceback for a while
        pause.wait(0.01)
