"""Members that share memory: what a test needs before it lends some."""

from __future__ import annotations

import ctypes
from typing import Any

from fabric import Fabric
from tests.harness.waiting import until

LARGE = (256, 1024)
"""1 MiB of float32."""

WARM = {"value": bytes(100_000), "seed": 99}
"""The first large value of a feed: with it a reader asks for a share of the memory."""


async def meet(face: Any, a: Any, b: Any, topic: str = "t", **options: Any) -> tuple[Any, Any]:
    """A publisher of one and a subscription of the other, which reads it in shared memory if there is any."""
    inbox, publisher = await b.subscribe(topic), a.publisher(topic, **options)
    await publisher.wait_for_subscribers(1, timeout_s=30)
    await publisher.publish(**WARM)
    assert (await inbox.receive(timeout_s=30)).seed == WARM["seed"]
    inbox.drain()
    await publisher.flush(timeout_s=30)
    engine, feed = getattr(a, "inner", a)._engine, getattr(publisher, "inner", publisher)
    if engine.config.arena.enabled:
        await face.until(lambda: is_shared(engine, getattr(feed, "_outbox", feed)))
    return inbox, publisher


def meet_alone(member: Fabric, **options: Any) -> tuple[Any, Any]:
    """As `meet`, of one member that reads itself."""
    inbox, publisher = member.subscribe("t"), member.publisher("t", **options)
    publisher.publish(**WARM)
    assert inbox.receive(timeout_s=30).seed == WARM["seed"]
    list(inbox.drain())
    until(lambda: is_shared(member._engine, publisher))
    return inbox, publisher


def is_shared(engine: Any, outbox: Any) -> bool:
    """Whether somebody reads this feed in shared memory."""
    return bool(engine.sharing._leases.shared_with(outbox.feed))


def poke(address: int, offset: int) -> None:
    """What an extension may do that kept an address."""
    ctypes.memset(address + offset, 0x55, 4)


def in_use(member: Fabric) -> Any:
    """Bytes in slots and in buffers."""
    member._engine.turn()
    return member.statistics()["arena_bytes_in_use"] + member._engine.pool.statistics().bytes_in_use
