"""The asynchronous face: the names of `fabric`, awaited.

    from fabric import aio

    async with await aio.join() as fabric:
        inbox = await fabric.subscribe("layers.**.health")
        await fabric.publish("layers.0.health", tensor, seed=17)
        async for message in inbox:
            print(message.source, message.sequence, message.value.mean())

A fabric belongs to the event loop that it was made on, which drives it while somebody waits. `inbox.drain()` stays a
plain iterator, since it never waits. `fabric.on` and `fabric.respond` take coroutine functions and plain ones.
"""

from __future__ import annotations

import os

from fabric.aio.client import Fabric, in_thread
from fabric.aio.letters import DeadLetter, DeadLetters
from fabric.aio.publisher import Publisher
from fabric.aio.subscription import Subscription
from fabric.config import FabricConfig
from fabric.engine.inbox import Gap
from fabric.entering import Entry
from fabric.errors import FabricError
from fabric.joining import enter_job, enter_orphan, enter_rank
from fabric.letters import RedriveReport
from fabric.member import CloseReport, PeerInfo
from fabric.message import Message, Reply, Request
from fabric.observe.ledger import Ledger
from fabric.payloads import register
from fabric.storage.orphans import Orphan

__all__ = [
    "CloseReport",
    "DeadLetter",
    "DeadLetters",
    "Fabric",
    "FabricConfig",
    "FabricError",
    "Gap",
    "Ledger",
    "Message",
    "Orphan",
    "PeerInfo",
    "Publisher",
    "RedriveReport",
    "Reply",
    "Request",
    "Subscription",
    "adopt",
    "join",
    "observe",
    "register",
]


async def join(
    config: FabricConfig | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    rendezvous: str | None = None,
    job: str | None = None,
    state_directory: str | os.PathLike[str] | None = None,
    timeout_s: float = 60.0,
) -> Fabric:
    """Enter the fabric as a rank, as `fabric.join` does. The other ranks are met on a thread; cancelling leaves."""
    entry = await in_thread(
        lambda: enter_rank(config, rank, world_size, rendezvous, job, state_directory, timeout_s), Entry.give_up
    )
    return _seat(entry)


async def observe(
    job: str | None = None,
    *,
    name: str,
    address: str | None = None,
    config: FabricConfig | None = None,
    timeout_s: float = 10.0,
) -> Fabric:
    """Enter a running job without a rank, as `fabric.observe` does."""
    return _seat(await in_thread(lambda: enter_job(job, name, address, config, timeout_s), Entry.give_up))


async def adopt(
    by: Fabric, name: str, *, state_directory: str | os.PathLike[str] | None = None, timeout_s: float = 10.0
) -> Fabric:
    """Take the place of a member that does not come back, as `fabric.adopt` does."""
    return _seat(await in_thread(lambda: enter_orphan(by, name, state_directory, timeout_s), Entry.give_up))


def _seat(entry: Entry) -> Fabric:
    fabric = Fabric(entry.engine, entry.waits, entry.membership)
    entry.hand_over(fabric.close_at_exit)
    return fabric
