"""The one contract on every transport."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.transport_contract import TransportContract
from tests.conformance.worlds import SMALL, World, collect, send_soon
from transports.base import Link, SocketLimits
from transports.memory import FaultPlan, MemoryHub, MemoryTransport
from transports.zeromq import ZeroMQTransport


@pytest.fixture(scope="module", autouse=True)
def zero_copy_thread() -> None:
    """Pyzmq keeps a thread and its descriptors from the first zero-copy frame on; they are no leak of a test."""
    member = ZeroMQTransport(name="warm")
    member.connect("warm", member.endpoints)
    send_soon(member, "warm", Link.BULK, [b"h", bytes(100_000)])
    collect(member, 1)
    member.close(0)


class TestMemory(TransportContract):
    @pytest.fixture
    def world(self) -> Iterator[World]:
        yield from memory_world(FaultPlan())

    @pytest.fixture
    def small_world(self) -> Iterator[World]:
        yield from memory_world(FaultPlan(data_frames=8, control_frames=8, bulk_frames=4))


class TestIpc(TransportContract):
    @pytest.fixture
    def directory(self, runtime_directory: Path) -> Path:
        return runtime_directory / "sockets"

    @pytest.fixture
    def world(self, directory: Path) -> Iterator[World]:
        yield from socket_world("ipc", directory)

    @pytest.fixture
    def small_world(self, directory: Path) -> Iterator[World]:
        yield from socket_world("ipc", directory, SMALL)


class TestTcp(TransportContract):
    @pytest.fixture
    def world(self) -> Iterator[World]:
        yield from socket_world("tcp://127.0.0.1", None)

    @pytest.fixture
    def small_world(self) -> Iterator[World]:
        yield from socket_world("tcp://127.0.0.1", None, SMALL)


def memory_world(plan: FaultPlan) -> Iterator[World]:
    hub = MemoryHub(plan=plan)
    world = World(lambda name, _limits: MemoryTransport(hub, name))
    yield world
    world.close()


def socket_world(listen: str, directory: Path | None, limits: SocketLimits | None = None) -> Iterator[World]:
    world = World(
        lambda name, limits: ZeroMQTransport(listen=listen, directory=directory, name=name, limits=limits), limits
    )
    yield world
    world.close()
    assert directory is None or list(directory.iterdir()) == []
