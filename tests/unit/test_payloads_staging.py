"""Values on a device: one contract for the real queue and the fake one, and what only the fake can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from fabric import payloads
from fabric.errors import UnsupportedValueError, WaitTimeoutError
from fabric.payloads.staging import StagingError, pinned_pool, stage, wait_until
from fabric.testing.devices import FakeDeviceQueue, OnFakeDevice

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

LIMIT = 1 << 30


class Device(NamedTuple):
    queue: Any
    put: Callable[[Any], Any]
    overwrite: Callable[[Any], None]
    take: Callable[[int], payloads.PooledBuffer]


def fake_device() -> Device:
    pool = payloads.BufferPool(1 << 24)
    return Device(FakeDeviceQueue(), OnFakeDevice, lambda value: value.tensor.fill_(77), pool.take)


def cuda_device(**options: int) -> Device:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    queue = payloads.decoders.tensors().CudaQueue(**options)
    return Device(queue, lambda tensor: tensor.cuda(), lambda value: value.fill_(77), pinned_pool(1 << 28).take)


MAKERS = {"fake": fake_device, "cuda": cuda_device, "cuda, too large": lambda: cuda_device(duplicate_bytes_max=0)}


@pytest.fixture(params=MAKERS)
def device(request: pytest.FixtureRequest) -> Device:
    return MAKERS[request.param]()


def staged(device: Device, value: Any, change: Callable[[], None] = lambda: None) -> Any:
    made = payloads.plan(value, limit=LIMIT)
    buffer = device.take(made.size)
    assert made.on_device
    pending = made.start(buffer.view, device.queue)
    change()
    assert pending is not None
    pending.wait()
    assert pending.poll()
    return payloads.decode(made.kind, memoryview(bytes(buffer.view)))


TENSORS = {
    "float32": lambda: torch.arange(24.0).reshape(4, 6),
    "transposed": lambda: torch.arange(24.0).reshape(4, 6).t(),
    "bfloat16": lambda: torch.arange(5).bfloat16(),
    "float8": lambda: torch.arange(5).float().to(torch.float8_e5m2),
    "conjugate": lambda: torch.tensor([1 + 2j, 3j]).conj(),
    "0-d": lambda: torch.tensor(5),
    "large": lambda: torch.arange(1 << 20),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_on_a_device_arrives(device: Device, name: str) -> None:
    tensor = TENSORS[name]()
    for sent in (device.put(tensor), [device.put(tensor), "text", np.ones(3)]):
        back = staged(device, sent)
        back = back[0] if isinstance(back, list) else back
        assert back.dtype == tensor.dtype
        assert payloads.own(back).tolist() == tensor.tolist()


def test_what_the_caller_does_later_does_not_arrive(device: Device) -> None:
    value = device.put(torch.ones(1 << 20))
    back = staged(device, value, lambda: device.overwrite(value))
    assert (back.min().item(), back.max().item()) == (1.0, 1.0)


def test_tied_tensors_on_a_device_are_copied_once(device: Device) -> None:
    value = device.put(torch.ones(1000))
    made = payloads.plan({"a": value, "b": value}, limit=LIMIT)
    assert made.size < 4400
    back = staged(device, {"a": value, "b": value})
    assert back["a"] is back["b"]


def test_an_empty_tensor_on_a_device_needs_no_copy(device: Device) -> None:
    made = payloads.plan(device.put(torch.empty(0, 3)), limit=LIMIT)
    buffer = device.take(made.size)
    assert made.start(buffer.view, device.queue) is None
    assert payloads.decode(made.kind, memoryview(bytes(buffer.view))).shape == (0, 3)


def test_a_plan_on_a_device_can_be_written_at_once(device: Device) -> None:
    for value in (device.put(torch.ones(3)), [device.put(torch.ones(3))]):
        made = payloads.plan(value, limit=LIMIT)
        assert "tensor([1., 1., 1.])" in str(payloads.decode(made.kind, memoryview(made.tobytes())).__repr__())


def test_a_value_on_the_host_is_complete_at_once(device: Device) -> None:
    for value in (b"bytes", 5, [1, 2], np.ones(3), torch.ones(3), {"a": torch.ones(3)}):
        made = payloads.plan(value, limit=LIMIT)
        buffer = device.take(made.size)
        assert not made.on_device
        assert made.start(buffer.view, device.queue) is None
        assert bytes(buffer.view) == made.tobytes()
        assert stage(made, buffer.view, device.queue).poll()


def fake_start(value: Any, queue: FakeDeviceQueue) -> tuple[bytearray, Any, int]:
    made = payloads.plan(value, limit=LIMIT)
    target = bytearray(b"\xee" * made.size)
    return target, made.start(memoryview(target), queue), made.kind


def test_the_target_is_untouched_until_the_copy_is_done() -> None:
    queue = FakeDeviceQueue()
    target, pending, kind = fake_start(OnFakeDevice(torch.ones(4)), queue)
    assert not pending.poll()
    assert target[16:] == b"\xee" * 16
    assert queue.finish() == 1
    assert pending.poll()
    assert payloads.decode(kind, memoryview(target)).tolist() == [1.0] * 4


def test_copies_finish_in_order_and_a_tree_waits_for_all() -> None:
    queue = FakeDeviceQueue()
    _, pending, _ = fake_start([OnFakeDevice(torch.ones(4)), OnFakeDevice(torch.zeros(4))], queue)
    assert queue.under_way == 2
    queue.finish(1)
    assert not pending.poll()
    queue.finish(1)
    assert pending.poll()


def test_a_failed_copy_raises_every_time() -> None:
    queue = FakeDeviceQueue()
    _, pending, _ = fake_start(OnFakeDevice(torch.ones(4)), queue)
    queue.fail("ecc error")
    for ask in (pending.poll, pending.poll, pending.wait):
        with pytest.raises(StagingError, match="ecc error"):
            ask()


def test_a_failure_in_a_tree_is_told_when_no_copy_is_under_way_any_more() -> None:
    queue = FakeDeviceQueue()
    _, pending, _ = fake_start([OnFakeDevice(torch.ones(4)), OnFakeDevice(torch.zeros(4))], queue)
    queue.fail()
    assert not pending.poll()
    queue.finish()
    for _ in range(2):
        with pytest.raises(StagingError, match="failed"):
            pending.poll()


def test_a_copy_that_cannot_start_fails_alone_at_once_and_in_a_tree_after_the_others() -> None:
    queue = FakeDeviceQueue()
    queue.refuse_next()
    with pytest.raises(StagingError, match="refused"):
        fake_start(OnFakeDevice(torch.ones(4)), queue)
    queue.refuse_next()
    _, pending, _ = fake_start([OnFakeDevice(torch.ones(4)), OnFakeDevice(torch.zeros(4))], queue)
    assert not pending.poll()
    queue.finish()
    with pytest.raises(StagingError, match="refused"):
        pending.wait()


def test_a_wait_is_bounded() -> None:
    now = iter(range(100))
    pauses: list[float] = []
    with pytest.raises(WaitTimeoutError, match="within 3 s"):
        wait_until(lambda: False, 3, clock=lambda: float(next(now)), pause=pauses.append)
    assert len(pauses) == 2
    queue = FakeDeviceQueue(finish_on_wait=False)
    _, pending, _ = fake_start(OnFakeDevice(torch.ones(4)), queue)
    with pytest.raises(WaitTimeoutError):
        pending.wait(timeout_s=0.0)


def test_what_no_device_should_hold_is_refused_on_the_fake_too() -> None:
    FakeDeviceQueue()
    with pytest.raises(UnsupportedValueError, match=r"to_dense|layout"):
        payloads.plan(OnFakeDevice(torch.eye(2).to_sparse()), limit=LIMIT)
