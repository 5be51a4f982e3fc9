"""Values on a device through the public face, with a fake device under the contract of the real one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fabric
from fabric.errors import ConfigError
from fabric.payloads import BufferPool

torch = pytest.importorskip("torch", reason="values on a device are tensors")
devices = pytest.importorskip("fabric.testing.devices")

pytestmark = pytest.mark.torch


@pytest.fixture
def alone() -> Iterator[tuple[fabric.Fabric, devices.FakeDeviceQueue]]:
    with fabric.join() as member:
        queue = devices.FakeDeviceQueue(finish_on_wait=False)
        staging = member._engine.devices
        staging.queue, staging.pool = queue, BufferPool(1 << 20)
        yield member, queue


def test_a_value_on_a_device_leaves_when_its_copy_is_done(
    alone: tuple[fabric.Fabric, devices.FakeDeviceQueue],
) -> None:
    """It is numbered at once; what follows in the feed waits behind it; a lane of its own is handed over in order."""
    member, queue = alone
    inbox = member.subscribe("a.b")
    assert member.publish("a.b", devices.OnFakeDevice(torch.arange(4)), seed=1) == 0
    assert member.publish("a.b", 7, seed=1) == 1
    member.step(0)
    assert list(inbox.drain()) == []
    queue.finish(1)
    first, second = inbox.receive(timeout_s=5), inbox.receive(timeout_s=5)
    assert (first.sequence, first.value.tolist()) == (0, [0, 1, 2, 3])
    assert (second.sequence, second.value) == (1, 7)


def test_a_failed_copy_is_settled_as_lost_at_its_source(
    alone: tuple[fabric.Fabric, devices.FakeDeviceQueue],
) -> None:
    member, queue = alone
    inbox = member.subscribe("a.b")
    member.publish("a.b", devices.OnFakeDevice(torch.arange(4)), seed=1)
    queue.fail()
    member.publish("a.b", 8, seed=1)
    message = inbox.receive(timeout_s=5)
    assert (message.sequence, message.value) == (1, 8)
    assert list(inbox.drain()) == []
    member.step(1)
    list(inbox.drain())
    counted = member.statistics()
    assert (counted["copies_failed"], counted["lost_at_source"], counted["handled"]) == (1, 1, 1)


def test_what_this_member_cannot_have_is_said() -> None:
    with fabric.join() as member, pytest.raises(ConfigError, match="there is no state"):
        member.publisher("a.b", policy="durable")
