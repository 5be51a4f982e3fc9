"""A device that exists only for tests: its copies finish when the test says so, and fail when the test says so."""

from __future__ import annotations

from collections import deque
from typing import Any

from fabric.payloads import own
from fabric.payloads.plans import LEAVES, Leaf, Source, load_tensors, register_leaf
from fabric.payloads.schema import TENSOR
from fabric.payloads.staging import DeviceQueue, Pending, StagingError, wait_until

__all__ = ["FakeDeviceQueue", "OnFakeDevice"]


class OnFakeDevice:
    """A torch tensor on the CPU that passes for one on a device. It travels as the tensor that it wraps."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Any) -> None:  # noqa: ANN401 - a torch tensor; this file does not load torch
        self.tensor = tensor


def _source_of(tensor: object, where: str = "value") -> Source:
    load_tensors()
    return LEAVES[type(tensor)].source(tensor, where)


class _FakeSource(Source):
    """The elements of a tensor on the fake device."""

    __slots__ = ("value",)

    on_device = True

    def __init__(self, value: OnFakeDevice, inner: Source) -> None:
        self.value, self.code, self.shape, self.nbytes = value, inner.code, inner.shape, inner.nbytes

    def write(self, target: memoryview, offset: int) -> None:
        _source_of(self.value.tensor).write(target, offset)

    def start(self, target: memoryview, offset: int, queue: DeviceQueue) -> Pending | None:
        if self.nbytes == 0:
            return None
        return queue.copy(self.value, target[offset : offset + self.nbytes])


def _fake_source(value: OnFakeDevice, where: str) -> Source:
    return _FakeSource(value, _source_of(value.tensor, where))


def _fake_identity(value: OnFakeDevice) -> object:
    return OnFakeDevice, LEAVES[type(value.tensor)].identity(value.tensor)


class _FakePending:
    """One copy of the fake queue."""

    __slots__ = ("_queue", "done", "failure", "snapshot", "target")

    def __init__(self, queue: FakeDeviceQueue, snapshot: Source, target: memoryview) -> None:
        self._queue, self.snapshot, self.target = queue, snapshot, target
        self.done = False
        self.failure: str | None = None

    def poll(self) -> bool:
        if self.failure is not None:
            raise StagingError(self.failure)
        return self.done

    def wait(self, *, timeout_s: float = 30.0) -> None:
        if self._queue.finish_on_wait:
            self._queue.finish()
        wait_until(self.poll, timeout_s)


class FakeDeviceQueue:
    """Copies that finish in order and only by `finish` or `fail`; as on a stream, none overtakes another.

    The snapshot is taken in `copy`, as the real queue takes it on the device: what the test does to the tensor later
    does not arrive. The target is written in `finish`. `finish_on_wait`: a `wait()` finishes everything, as time
    would.
    """

    def __init__(self, *, finish_on_wait: bool = True) -> None:
        self.finish_on_wait = finish_on_wait
        self.started = 0
        self._under_way: deque[_FakePending] = deque()
        self._refusal: str | None = None
        if OnFakeDevice not in LEAVES:
            register_leaf(OnFakeDevice, Leaf(TENSOR, _fake_source, _fake_identity))

    def copy(self, tensor: OnFakeDevice, target: memoryview) -> Pending:
        """Start a copy. Raises `StagingError` if the test asked for it with `refuse_next`."""
        refusal, self._refusal = self._refusal, None
        if refusal is not None:
            raise StagingError(refusal)
        pending = _FakePending(self, _source_of(own(tensor.tensor)), target)
        self._under_way.append(pending)
        self.started += 1
        return pending

    @property
    def under_way(self) -> int:
        """Copies that were started and neither finished nor failed."""
        return len(self._under_way)

    def finish(self, count: int | None = None) -> int:
        """Finish the `count` oldest copies, or all; returns how many."""
        number = self.under_way if count is None else min(count, self.under_way)
        for _ in range(number):
            pending = self._under_way.popleft()
            pending.snapshot.write(pending.target, 0)
            pending.done = True
        return number

    def fail(self, reason: str = "the fake device failed") -> None:
        """Fail the oldest copy; half of its target is written, as a real failure may leave it."""
        pending = self._under_way.popleft()
        half = len(pending.target) // 2
        pending.target[:half] = b"\xee" * half
        pending.failure = reason

    def refuse_next(self, reason: str = "the fake device refused") -> None:
        """Let the next `copy` raise."""
        self._refusal = reason
