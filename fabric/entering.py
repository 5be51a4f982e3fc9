"""A member in the making: its state, its sockets, its engine, and whom it meets first."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from fabric.config import FabricConfig
from fabric.core import events
from fabric.core.members import Peer
from fabric.core.wire import VERSION
from fabric.engine.lettering import Desk, LetterKeeper
from fabric.engine.loop import Engine
from fabric.engine.process import ProcessMembership, install_signals
from fabric.engine.sharing import open_sharing
from fabric.engine.sleeping import ThreadedWaits
from fabric.engine.storing import Storekeeper, ThreadedStore, recovered
from fabric.errors import (
    ConfigError,
    JoinTimeoutError,
    SpillError,
    SpillLockedError,
    StateDirectoryError,
    VersionMismatchError,
    shortened,
)
from fabric.rendezvous import Card, announce, this_host, withdraw
from fabric.storage.clock import steady_wall_ns
from fabric.storage.hand_page import HandPage
from fabric.storage.home import open_home, open_letters, state_home, states_home, sweep
from fabric.storage.orphans import find_orphans
from fabric.storage.state import LETTERS, MemberState
from transports import Endpoints
from transports.base import AddressError, SocketLimits
from transports.zeromq import ZeroMQTransport

__all__ = ["Entry"]

log = logging.getLogger("fabric.join")

LETTERS_S = 30.0
"""How long a join waits for the letters of an earlier life: 256 MiB are read and verified, from a slow disk."""
FEEDS_FOLLOWED_MAX = 65_536
"""Feeds that one member may follow at once: each is a subscribed prefix."""
TAKEOVER_S = 5.0
"""How long a new life waits for the state of one that is being killed."""


class Entry:
    """A member in the making; its face is put on it last."""

    letters_directory: Path | None = None
    """Where dead letters, and what is in hand, outlive this process; None: they end with it."""

    state_directory: Path | None = None
    """That was given for state."""

    def __init__(self, config: FabricConfig) -> None:
        self.config = config
        self.leave: list[Callable[[], None]] = []
        self._engine: Engine | None = None
        self._state: MemberState | None = None
        self._stateless = "there is no state: give join a job that stays the same, or a state_directory"
        self.waits = ThreadedWaits()
        self._membership: ProcessMembership | None = None

    def take_state(self, directory: Path | None, job: str, name: str) -> None:
        """Take what earlier lives of this member left.

        Without a directory that the user named, going on without state is better than not at all: then durable topics
        say why there is none.
        """
        try:
            state = self._open_state(directory, job, name, TAKEOVER_S if directory is not None else 0.0)
            state.kept = directory is not None
        except SpillError as error:
            if directory is not None:
                raise
            log.warning("%s of %s has no state, and cannot have durable topics: %s", name, job, error)
            self._stateless = str(error)

    def take_orphan(self, directory: Path | None, job: str, name: str) -> None:
        """Take what a member left that is not expected back."""
        home = states_home(directory, job, base=self.config.spill.directory)
        if name not in (orphan.name for orphan in find_orphans(home)):
            raise StateDirectoryError(f"there is no state of {name}, or it is in use", directory=str(home))
        state = self._open_state(directory, job, name, 0.0)
        state.kept, state.is_adopted = False, True

    def _open_state(self, directory: Path | None, job: str, name: str, patience_s: float) -> MemberState:
        home = state_home(directory, job, name, base=self.config.spill.directory)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                self._state = MemberState.open(
                    home, self.config.spill, name=name, boot=this_host(), wall_ns=steady_wall_ns
                )
                break
            except SpillLockedError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)  # its last owner is being killed: the kernel has much memory to give back
        self.state_directory, self.letters_directory = directory, home / LETTERS
        return self._state

    def open(self, name: str, rank: int | None, world_size: int, job: str) -> None:
        """Bind the sockets and start the engine."""
        sweep(self.config.spill)
        limits = SocketLimits(wildcard=self.config.wildcard, prefixes=FEEDS_FOLLOWED_MAX, sockets=4096)
        try:
            transport = ZeroMQTransport(listen=self.config.listen, name=f"{job}/{name}", limits=limits)
        except AddressError as error:
            raise ConfigError(str(error), field="listen") from error
        endpoints = transport.endpoints
        self.card = Card(
            job=job,
            name=name,
            rank=rank,
            world_size=world_size,
            incarnation=time.time_ns() if self._state is None else self._state.incarnation,
            host=this_host(),
            pid=os.getpid(),
            version=VERSION,
            endpoints=(endpoints.data, endpoints.control, endpoints.bulk),
        )
        engine = self._engine = Engine(_to_event(self.card), self.config, transport, time.monotonic_ns, self.waits)
        engine.sharing = open_sharing(engine)
        keeper = Storekeeper(
            self.card.incarnation,
            lambda: open_home(self.config.spill, job, name, self.card.incarnation),
            steady_wall_ns,
            self._state,
        )
        engine.store = ThreadedStore(engine, Desk(keeper, self._letter_keeper(engine)))
        if self._state is None:
            engine.stateless = self._stateless
        else:
            engine.submit(recovered(self._state))
        self._membership = ProcessMembership(engine, self.waits, self.leave)
        self._membership.state_directory = self.state_directory
        engine.on_connect = self._membership.remember
        self.waits.start(engine)
        if self.letters_directory is not None:
            self._read_letters()

    def _letter_keeper(self, engine: Engine) -> LetterKeeper:
        card, config, where = engine.card, engine.config, self.letters_directory
        keeper = LetterKeeper(
            lambda: open_letters(config.spill, config.letters, card.job, card.name, card.incarnation, where),
            engine.clock,
            open_page=None if where is None else lambda: HandPage.open(where),
            remembers=self._state is None or self._state.kept,
            chance=random.random,
        )
        keeper.refused, keeper.damaged = engine.letters.on_refused, engine.letters.on_damaged
        keeper.cut = engine.letters.on_cut
        return keeper

    def _read_letters(self) -> None:
        """What an earlier life left; nothing is handled before it is known."""
        letters = self.engine.letters
        letters.load()
        if not self.engine.until(lambda: letters.is_ready or letters.error is not None, LETTERS_S):
            state = f"reading {self.letters_directory}"
            raise JoinTimeoutError("dead letters were not read", waited_s=LETTERS_S, state=state)
        if letters.error is not None:
            raise letters.error

    @property
    def engine(self) -> Engine:
        """The engine, once it is open."""
        assert self._engine is not None, "open comes first"
        return self._engine

    @property
    def membership(self) -> ProcessMembership:
        """What leaves, once it is open."""
        assert self._membership is not None, "open comes first"
        return self._membership

    def roster(self) -> list[Card]:
        """The cards of the ranks that have reached us."""
        with self.engine.lock:
            peers = list(self.engine.core.members.by_name.values())
        return [Card(**asdict(peer.card)) for peer in peers if not peer.is_gone]

    def ask(self, address: str, card: Card, timeout_s: float) -> list[Card]:
        """Ask a control address for its roster. Raises `TimeoutError`."""
        engine, key = self.engine, f"roster at {address}"
        counts = engine.core.context.counts
        before = counts["rosters_heard"]  # not who is known: a greeting may overtake the roster
        with engine.lock:
            own = engine.transport.endpoints
            try:
                engine.transport.connect(key, Endpoints(own.data, address, address))
            except AddressError as error:
                raise ConfigError(str(error), field="address") from error
        try:
            deadline = time.monotonic() + timeout_s
            while counts["rosters_heard"] == before:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"{address} did not answer")
                engine.submit(events.RosterAsked(key))
                engine.until(lambda: counts["rosters_heard"] > before, min(0.1, left))
        finally:
            with engine.lock:
                engine.transport.disconnect(key)
        return self.roster()

    def look_in(self, address: str, timeout_s: float) -> list[Card]:
        """Ask an address that the user gave; what we learn of the job there is ours, too."""
        try:
            cards = self.ask(address, self.card, timeout_s)
        except TimeoutError as error:
            raise JoinTimeoutError("the job was not found", waited_s=timeout_s, state=str(error)) from error
        world_size = max((card.world_size for card in cards if card.rank is not None), default=1)
        self.engine.card = replace(self.engine.card, world_size=world_size)
        return cards

    def greet(self, cards: list[Card], deadline: float) -> None:
        """Greet all members and wait until they know us, and we their subscriptions."""
        engine, began = self.engine, time.monotonic()
        others = {card.name for card in cards if card.name != self.card.name}
        for card in cards:
            engine.submit(events.PeerAnnounced(_to_event(card)))

        def missing() -> list[str]:
            members = engine.core.members.by_name
            return sorted(name for name in others if name not in members or not _has_met(members[name]))

        if not engine.until(
            lambda: bool(engine.version_mismatches) or not missing(), max(0.0, deadline - time.monotonic())
        ):
            waited_s, state = time.monotonic() - began, f"missing: {shortened(missing())}"
            raise JoinTimeoutError("not all members answered", waited_s=waited_s, state=state)
        for name, theirs in engine.version_mismatches.items():
            raise VersionMismatchError(peer=name, ours=VERSION, theirs=theirs)
        directory = self.config.runtime_directory
        if self.card.rank is not None:
            announce(self.card, directory=directory)
            self.leave.insert(0, lambda: withdraw(self.card, directory=directory))

    def hand_over(self, on_exit: Callable[[], object]) -> None:
        """It has its face: from now on SIGTERM leaves by `with`, and the process ends by `on_exit`.

        To be called on the user's thread.
        """
        if self.config.install_signal_handler:
            self.leave.append(install_signals())
        self.membership.on_exit = on_exit

    def give_up(self) -> None:
        """Undo what was done so far."""
        if self._membership is not None:
            self._membership.close()
        else:
            if self._state is not None:
                self._state.abandon()
            for step in self.leave:
                step()


def _has_met(peer: Peer) -> bool:
    """Whether we know each other; with one that left we did, or it would not have said goodbye."""
    return peer.has_met or peer.state == "left"


def _to_event(card: Card) -> events.Card:
    return events.Card(**asdict(card))
