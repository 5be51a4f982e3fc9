"""Members in processes of their own: a test starts functions of its module in fresh interpreters and talks to them.

Every message is one line of JSON, on the child's standard input and output. A child is gone, whatever state it is in,
when its `with` block ends; one that lost its parent ends with the next thing that it wants to hear.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
HEAR_S = 40.0


class Parent:
    """The test, as its child sees it."""

    def __init__(self) -> None:
        self._buffer = b""
        self._out = os.dup(1)
        os.dup2(2, 1)  # what a library prints is no message

    def say(self, **facts: Any) -> None:
        """Tell the test."""
        os.write(self._out, json.dumps(facts).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """What the test says next."""
        while b"\n" not in self._buffer:
            data = os.read(0, 65536)
            if not data:
                os._exit(90)  # the test is gone
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        heard = json.loads(line)
        assert isinstance(heard, dict)
        return heard

    def spoke(self) -> bool:
        """Whether there is something to hear."""
        return b"\n" in self._buffer or bool(select.select([0], [], [], 0)[0])


class Child:
    """A process that runs one function: `function(parent, **arguments)`."""

    def __init__(
        self,
        function: Callable[..., None],
        arguments: dict[str, Any],
        environment: dict[str, str],
        flags: tuple[str, ...],
    ) -> None:
        where = f"{function.__module__}:{function.__name__}"
        command = [sys.executable, *flags, "-m", __name__, where, json.dumps(arguments)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        self.name = function.__name__
        self._buffer = b""
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True, bufsize=0
        )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def tell(self, **facts: Any) -> None:
        """Say something to it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(facts).encode() + b"\n")

    def hear(self, timeout_s: float = HEAR_S) -> dict[str, Any]:
        """What it says next."""
        out, deadline = self._process.stdout, time.monotonic() + timeout_s
        assert out is not None
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{self.name} said nothing within {timeout_s:g} s"
            data = os.read(out.fileno(), 1 << 20)
            assert data, f"{self.name} ended with {self._process.wait(timeout_s)} and said no more"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        heard = json.loads(line)
        assert isinstance(heard, dict)
        return heard

    def signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        os.kill(self.pid, number)

    def exit_code(self, timeout_s: float = HEAR_S) -> int:
        """Wait for its end."""
        return self._process.wait(timeout_s)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):  # all that it started, too; its group is its own
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(HEAR_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def child(
    function: Callable[..., None],
    *,
    env: dict[str, str] | None = None,
    flags: tuple[str, ...] = ("-W", "error"),
    **arguments: Any,
) -> Child:
    """Start a child; use it as a context manager."""
    return Child(function, arguments, env or {}, flags)


@contextlib.contextmanager
def children(*started: Child) -> Iterator[tuple[Child, ...]]:
    """Several children, all gone when the block ends."""
    with contextlib.ExitStack() as stack:
        for one in started:
            stack.enter_context(one)
        yield started


def resident_bytes(pid: int | None = None) -> int:
    """The resident memory of a process."""
    return _status("VmRSS:", pid)


def peak_bytes(pid: int | None = None) -> int:
    """The most that a process had resident since `forget_peak`."""
    return _status("VmHWM:", pid)


def forget_peak(pid: int | None = None) -> None:
    """Count the peak anew from here (proc(5), clear_refs); where that is refused it is older, and no less."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid or 'self'}/clear_refs").write_text("5", encoding="ascii")


def _status(key: str, pid: int | None) -> int:
    lines = Path(f"/proc/{pid or 'self'}/status").read_text(encoding="ascii").splitlines()
    (line,) = [line for line in lines if line.startswith(key)]
    return int(line.split()[1]) * 1024


def _main() -> None:
    module, _, name = sys.argv[1].partition(":")
    function = getattr(importlib.import_module(module), name)
    function(Parent(), **json.loads(sys.argv[2]))


if __name__ == "__main__":
    _main()
