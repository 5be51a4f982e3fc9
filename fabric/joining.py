"""Entering a fabric: `join` for ranks, `observe` for others, `adopt` for one that does not come back."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fabric.client import Fabric
from fabric.config import FabricConfig
from fabric.engine.dispatch import Dispatcher
from fabric.entering import Entry
from fabric.errors import ConfigError, RendezvousError, shortened
from fabric.member import Member
from fabric.rendezvous import Card, find, open_rendezvous, this_host

__all__ = ["adopt", "enter_job", "enter_orphan", "enter_rank", "join", "observe"]


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


def adopt(
    by: Fabric, name: str, *, state_directory: str | os.PathLike[str] | None = None, timeout_s: float = 10.0
) -> Fabric:
    """Take the place of a member that does not come back, and serve what it left (see `Fabric.orphans`).

    Returns that member in a new life, in this process: subscribers are served what they are owed under its name, in
    order. `flush` returns when those that are here have it all, and closing it removes the state then, unless there are
    dead letters or absent subscriptions that are owed something. Should the member come back after all, it begins anew.

    Args:
        by: A member of the job, a rank or an observer; it gives the settings.
        name: Of the member, such as `rank-3`.
        state_directory: That of the member; by default as in `Fabric.orphans`.
        timeout_s: For all other members to answer.

    Raises:
        ConfigError: that member is here.
        StateDirectoryError: there is no such state, or it cannot be used.
        SpillLockedError: somebody has it open.
        SpillBrokenError: the disk failed.
        JoinTimeoutError: somebody did not answer.
    """
    return _seat(enter_orphan(by, name, state_directory, timeout_s))


def enter_orphan(by: Member[Any], name: str, state_directory: str | os.PathLike[str] | None, timeout_s: float) -> Entry:
    """All of `adopt` but for the face; its parameters."""
    deadline = time.monotonic() + timeout_s
    engine = by._engine
    engine.require_open()
    with engine.lock:
        there = [
            peer.card
            for peer in engine.core.members.by_name.values()
            if peer.is_there and not engine.probe(peer.card)  # just killed, and not missed yet
        ]
    if name in {by.name, *(card.name for card in there)}:
        raise ConfigError(f"{name} is here itself", field="name")
    entry = Entry(replace(engine.config, install_signal_handler=False))
    try:
        entry.take_orphan(by._where(state_directory), by.job, name)
        entry.open(name, None, by.world_size, by.job)
        entry.greet([Card(**asdict(card)) for card in [engine.card, *there]], deadline)
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
