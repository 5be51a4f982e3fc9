"""Meeting in torch's store, which the launcher (or rank 0) already hosts: the default under torchrun.

The store is used once, to meet, and then left alone: nothing of the fabric depends on whoever hosts it. A second client
beside the one of `init_process_group` shares its server (`multi_tenant`), so either may come first.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, ClassVar, TypeVar, cast

from fabric.errors import ConfigError, RendezvousError
from fabric.rendezvous.boards import Entry, entry_bytes_max
from fabric.rendezvous.cards import Card
from fabric.rendezvous.identity import Identity, StoreAddress

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["StoreBoard"]

_ANSWER_S = 0.5  # at least, so that ranks missing at the deadline are still named
_LINGER_S = 5.0
_LINGER_PAUSE_S = 0.01
_PORT_PAUSES_S = (0.05, 0.1, 0.2, 0.4)

_T = TypeVar("_T")
_Call = tuple[Callable[[], object], "queue.SimpleQueue[tuple[object, RuntimeError | None]]"]


class _Caller:
    """Runs calls on a thread of its own.

    torch's client waits without end for a server that is reached and does not answer (2.13: its first question after
    connecting has no timeout), and while it waits it does not see Ctrl-C. A thread that hangs there is left behind.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="fabric-store", daemon=True).start()

    def call(self, function: Callable[[], _T], timeout_s: float) -> _T:
        """What `function` returns; its RuntimeError; or TimeoutError when it takes longer."""
        answer: queue.SimpleQueue[tuple[object, RuntimeError | None]] = queue.SimpleQueue()
        self._calls.put((function, answer))
        try:
            result, error = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError("torch's store does not answer") from None
        if error is not None:
            raise error
        return cast("_T", result)

    def close(self) -> None:
        """The thread ends when its call has returned."""
        self._calls.put(None)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            function, answer = call
            try:
                answer.put((function(), None))
            except RuntimeError as error:  # torch's DistError is one
                answer.put((None, error))
            del call, function, answer  # they hold the store, which closes with its last owner


class StoreBoard:
    """Entries under `tensor-fabric/<run id>/<job>/<restart count>` in the store at `address`."""

    kept: ClassVar[bool] = False

    def __init__(self, identity: Identity, address: StoreAddress) -> None:
        self._identity, self._address = identity, address
        self._hosts = identity.rank == 0 and not address.agent_hosts
        self._caller: _Caller | None = None
        self._store: Store | None = None
        self._deadline = 0.0
        self._marks: list[str] = []

    def open(self, timeout_s: float) -> None:
        """Connect, and host the store if that falls to us.

        Raises:
            TimeoutError: Nobody hosted it in time.
            ConfigError: torch is not installed.
            RendezvousError: The store cannot be hosted here.
        """
        self._deadline = time.monotonic() + timeout_s
        if self._store is not None:
            return
        try:
            from torch.distributed import PrefixStore, TCPStore
        except ImportError as error:
            raise ConfigError(
                "torchrun's store needs torch: install tensor-fabric[torch], or give another rendezvous",
                field="rendezvous",
            ) from error
        identity, address = self._identity, self._address
        prefix = f"tensor-fabric/{address.run_id}/{identity.job}/{identity.restart_count}"
        connect = functools.partial(
            TCPStore,
            address.host,
            address.port,
            is_master=self._hosts,
            multi_tenant=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=max(timeout_s, 0.1)),
        )
        self._caller = _Caller()
        try:
            self._store = PrefixStore(prefix, self._host(connect) if self._hosts else self._call(connect))
        except (RuntimeError, TimeoutError) as error:
            self._let_go()
            if self._hosts:
                raise RendezvousError(f"the store cannot be hosted at {self._where()}") from error
            raise TimeoutError(f"no store answers at {self._where()}") from error

    def post(self, entry: Entry) -> None:
        """Put up our entry."""
        self._set(f"entry/{entry.card.rank}", entry.to_json())

    def read(self, ranks: Iterable[int]) -> tuple[dict[int, Entry], dict[int, str]]:
        """The entries of these ranks as far as they are there."""
        entries: dict[int, Entry] = {}
        refused: dict[int, str] = {}
        limit = entry_bytes_max(self._identity.world_size)
        try:
            texts = self._call(functools.partial(_texts, self._reached(), list(ranks)))
        except RuntimeError as error:
            raise self._lost() from error
        for rank, text in texts.items():
            try:
                if len(text) > limit:
                    raise RendezvousError(f"an entry has {len(text)} bytes, at most {limit} are allowed")
                entries[rank] = Entry.from_json(text)
            except RendezvousError as error:
                refused[rank] = error.detail
        return entries, refused

    def wait(self, seconds: float) -> None:
        """The store wakes nobody who waits for a value to change; sleep."""
        time.sleep(seconds)

    def met(self, cards: Mapping[int, Card]) -> None:
        """Say so, and let go of the store; who hosts it keeps it for those who still read."""
        self._marks = [f"met/{rank}/{card.incarnation}" for rank, card in cards.items()]
        self._set(f"met/{self._identity.rank}/{cards[self._identity.rank].incarnation}", "1")
        if not self._hosts:
            self._let_go()

    def close(self, entry: Entry | None) -> None:
        """Let go of the store; who hosts it first waits for those who still read, at most 5 s."""
        self._deadline = time.monotonic() + _LINGER_S
        if self._store is not None and self._hosts and self._marks:
            check = functools.partial(self._store.check, self._marks)
            with contextlib.suppress(RuntimeError, TimeoutError):  # a store that is lost is read by nobody
                while not self._call(check) and time.monotonic() < self._deadline:
                    time.sleep(_LINGER_PAUSE_S)
            del check
        self._let_go()

    def _let_go(self) -> None:
        self._store = None
        if self._caller is not None:
            self._caller.close()
            self._caller = None

    def _set(self, key: str, text: str) -> None:
        try:
            self._call(functools.partial(self._reached().set, key, text))
        except RuntimeError as error:
            raise self._lost() from error

    def _host(self, connect: Callable[[], _T]) -> _T:
        """Host the store; one of an earlier life of ours may take a moment to give its port back."""
        for pause_s in _PORT_PAUSES_S:
            try:
                return self._call(connect)
            except RuntimeError as error:
                if "EADDRINUSE" not in str(error):
                    raise
                time.sleep(pause_s)
        return self._call(connect)

    def _call(self, function: Callable[[], _T]) -> _T:
        assert self._caller is not None
        return self._caller.call(function, max(self._deadline - time.monotonic(), _ANSWER_S))

    def _reached(self) -> Store:
        assert self._store is not None, "the store is open while ranks meet"
        return self._store

    def _lost(self) -> RendezvousError:
        return RendezvousError(f"the store at {self._where()} was lost while the ranks met")

    def _where(self) -> str:
        return f"{self._address.host}:{self._address.port}"


def _texts(store: Store, ranks: list[int]) -> dict[int, bytes]:
    """The raw entries: two calls when all are there, one more for each rank until then."""
    keys = {rank: f"entry/{rank}" for rank in ranks}
    if not store.check(list(keys.values())):
        keys = {rank: key for rank, key in keys.items() if store.check([key])}
    return dict(zip(keys, store.multi_get(list(keys.values())), strict=True)) if keys else {}
