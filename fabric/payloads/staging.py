"""Values on a device: copies that are started at publish and finish later.

A device copy is asynchronous. `Plan.start(target, queue)` writes what the processor can reach, hands the rest to a
`DeviceQueue`, and returns a `Pending`; the record is numbered at once and leaves when the `Pending` is done.

**The contract of a queue.** `copy` takes a *snapshot*: the bytes that arrive are those that the caller's stream
computes by the work it was given before `copy`, whatever it is given afterwards. `target` is written at some time
until `poll()` first returns True, and never after; until then it must be neither read nor reused. A failed copy
raises `StagingError` from `poll()` and `wait()`, every time, and what `target` holds is then undefined. The real
queue is `fabric.payloads.tensors.CudaQueue`; `fabric.testing.devices.FakeDeviceQueue` passes the same tests.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

from fabric.errors import PayloadError, WaitTimeoutError
from fabric.payloads.pool import BufferPool

WAIT_TIMEOUT_S: Final = 30.0
"""Bound of `Pending.wait`, in seconds."""

_POLL_PERIOD_S: Final = 50e-6


class StagingError(PayloadError):
    """A copy from a device failed; the record is lost at its source."""


class Pending(Protocol):
    """Copies under way."""

    def poll(self) -> bool:
        """Whether all is done. Raises `StagingError` when a copy failed."""

    def wait(self, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until all is done. Raises `StagingError`, or `WaitTimeoutError` after `timeout_s` seconds."""


class DeviceQueue(Protocol):
    """Copies tensors from a device into host memory, in order."""

    def copy(self, tensor: Any, target: memoryview) -> Pending:  # noqa: ANN401 - torch's, or a fake's
        """Start to copy the elements of `tensor`, in C order, into `target`, which has exactly their size.

        Raises `StagingError` when the copy cannot be started.
        """


class CopiesPending:
    """Several copies under way as one."""

    __slots__ = ("_pending",)

    def __init__(self, pending: Sequence[Pending]) -> None:
        self._pending = list(pending)

    def poll(self) -> bool:
        """Whether all are done. Raises `StagingError` as soon as one failed and none is under way any more.

        The error waits for the others because the target is theirs until they are done.
        """
        failure: StagingError | None = None
        remaining: list[Pending] = []
        failed: list[Pending] = []
        for one in self._pending:
            try:
                if not one.poll():
                    remaining.append(one)
            except StagingError as error:
                failure = failure or error
                failed.append(one)
        self._pending = failed + remaining
        if failure is not None and not remaining:
            raise failure
        return not self._pending

    def wait(self, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Wait until all are done. Raises `StagingError`, or `WaitTimeoutError` after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        for one in tuple(self._pending):
            with contextlib.suppress(StagingError):  # `poll` raises it when the others are done
                one.wait(timeout_s=max(0.0, deadline - time.monotonic()))
        self.poll()


class Failed:
    """A copy that could not be started."""

    __slots__ = ("_error",)

    def __init__(self, error: StagingError) -> None:
        self._error = error

    def poll(self) -> bool:
        """Raise the error."""
        raise self._error

    def wait(self, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Raise the error."""
        raise self._error


class Done:
    """Nothing is under way."""

    __slots__ = ()

    def poll(self) -> bool:
        """True."""
        return True

    def wait(self, *, timeout_s: float = WAIT_TIMEOUT_S) -> None:
        """Return at once."""


class Startable(Protocol):
    """A `Plan`."""

    def start(self, target: memoryview, queue: DeviceQueue) -> Pending | None:
        """See `Plan.start`."""


def stage(plan: Startable, target: memoryview, queue: DeviceQueue) -> Pending:
    """Write the plan into `target`: what the processor can reach now, the rest through `queue`."""
    return plan.start(target, queue) or Done()


def wait_until(
    done: Callable[[], bool],
    timeout_s: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Poll until `done()`. Raises `WaitTimeoutError` after `timeout_s` seconds."""
    began = clock()
    while not done():
        waited = clock() - began
        if waited >= timeout_s:
            raise WaitTimeoutError("a copy from a device did not finish", waited_s=waited, state="under way")
        pause(_POLL_PERIOD_S)


def cuda_queue() -> DeviceQueue:
    """The queue of copies from CUDA devices; needs torch and a CUDA device."""
    queue: DeviceQueue = import_module("fabric.payloads.tensors").CudaQueue()
    return queue


def pinned_pool(bytes_max: int) -> BufferPool:
    """A pool of page-locked host buffers for copies from CUDA devices; needs torch and a CUDA device.

    `bytes_max` bounds the idle buffers, in bytes. Page-locked memory is dear to allocate, so give it room.
    """
    return BufferPool(bytes_max, allocate=import_module("fabric.payloads.tensors").allocate_pinned)
