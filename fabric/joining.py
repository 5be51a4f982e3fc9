"""Entering a fabric: `join` for ranks, `observe` for others."""

from __future__ import annotations

import os
import time
from pathlib import Path

from fabric.client import Fabric
from fabric.config import FabricConfig
from fabric.engine.dispatch import Dispatcher
from fabric.entering import Entry
from fabric.errors import ConfigError, RendezvousError, shortened
from fabric.rendezvous import Card, find, open_rendezvous, this_host

__all__ = ["enter_job", "enter_rank", "join", "observe"]


def join(
    config: FabricConfig | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    rendezvous: str | None = None,
    job: str | None = None,
    state_directory: str | os.PathLike[str] | None = None,
    timeout_s: float = 60.0,
) -> Fabric:
    """Enter the fabric as a rank. Returns when all ranks are met and know each other's subscriptions.

    Under torchrun everything is in the environment (`rendezvous="env"`). Else give `rank` and `world_size`, and
    where to meet: `"file:///shared/dir"`, `"tcp://host:port"` (any member's control address) or `"memory://name"`
    (one process). Without any of it you are alone.

    A rank has state, which outlives it, if `state_directory` is given (private, 0700, on a disk of this host; made if
    it is not there) or else `job`, under whose name it then lies in this user's state directory. Durable topics and
    named subscriptions need it. A rank that joins again with the same state serves what its last life left.

    Raises `JoinTimeoutError` naming the missing ranks, `VersionMismatchError`, `RendezvousError`, `ConfigError`, and
    for a `state_directory` that is given `StateDirectoryError`, `SpillLockedError` if its owner lives, and
    `SpillBrokenError`.
    """
    return _seat(enter_rank(config, rank, world_size, rendezvous, job, state_directory, timeout_s))


def enter_rank(
    config: FabricConfig | None,
    rank: int | None,
    world_size: int | None,
    rendezvous: str | None,
    job: str | None,
    state_directory: str | os.PathLike[str] | None,
    timeout_s: float,
) -> Entry:
    """All of `join` but for the face; its parameters."""
    began = time.monotonic()
    entry = Entry(config or FabricConfig())
    try:
        meeting = open_rendezvous(
            rendezvous, rank=rank, world_size=world_size, job=job, ask=entry.ask, roster=entry.roster
        )
        identity = meeting.identity
        if state_directory is not None or job is not None:
            directory = None if state_directory is None else Path(state_directory)
            entry.take_state(directory, identity.job, f"rank-{identity.rank}")
        entry.open(f"rank-{identity.rank}", identity.rank, identity.world_size, identity.job)
        entry.leave.append(meeting.close)
        cards = meeting.meet(entry.card, timeout_s=timeout_s)
        entry.greet(cards, began + timeout_s)
        return entry
    except BaseException:
        entry.give_up()
        raise


def observe(
    job: str | None = None,
    *,
    name: str,
    address: str | None = None,
    config: FabricConfig | None = None,
    timeout_s: float = 10.0,
) -> Fabric:
    """Enter a running job without a rank.

    It is found on this host by the members' cards, elsewhere by the control address of any member. An observer comes
    and goes. Its subscriptions are best effort unless they say `delivery="reliable"`. Raises
    `RendezvousError` if no job, or more than one, is found, and `JoinTimeoutError`.
    """
    return _seat(enter_job(job, name, address, config, timeout_s))


def enter_job(job: str | None, name: str, address: str | None, config: FabricConfig | None, timeout_s: float) -> Entry:
    """All of `observe` but for the face; its parameters."""
    deadline = time.monotonic() + timeout_s
    entry = Entry(config or FabricConfig())
    try:
        if address is None:
            cards = _the_job(job, entry.config)
            entry.open(name, None, cards[0].world_size, cards[0].job)
        else:
            if job is None:
                raise ConfigError("an address needs the name of its job", field="job")
            entry.open(name, None, 1, job)
            cards = entry.look_in(address, timeout_s)
        entry.greet(cards, deadline)
        return entry
    except BaseException:
        entry.give_up()
        raise


def _seat(entry: Entry) -> Fabric:
    fabric = Fabric(entry.engine, Dispatcher(entry.engine), entry.membership)
    entry.hand_over(lambda: fabric.close(timeout_s=1.0))
    return fabric


def _the_job(job: str | None, config: FabricConfig) -> list[Card]:
    cards = find(job, host=this_host(), directory=config.runtime_directory)
    jobs = sorted({card.job for card in cards})
    if len(jobs) != 1:
        raise RendezvousError(
            f"found {len(jobs)} jobs on this host: {shortened(jobs)}" + (f", looked for {job}" if job else "")
        )
    return [card for card in cards if card.job == jobs[0]]
