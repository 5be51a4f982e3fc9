"""How the members of a job find each other: identity from the launcher, cards exchanged once, cards for observers.

`open_rendezvous` chooses the place:

- `"env"`, the default: torchrun's variables and store; without them a world of one
- `"file:///shared/dir"`: a directory that all ranks reach
- `"tcp://host:port"`: any member's control address
- `"memory://name"`: members in one process

After meeting nothing of the fabric depends on the place. This room alone reads the environment.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from fabric.errors import ConfigError
from fabric.rendezvous.alone import AloneRendezvous
from fabric.rendezvous.boards import BoardRendezvous, MemoryBoard
from fabric.rendezvous.cards import Card, this_host
from fabric.rendezvous.identity import Identity, read_identity, read_store_address
from fabric.rendezvous.roster import Ask, Roster, TcpRendezvous
from fabric.rendezvous.runtime import announce, find, runtime_directory, withdraw
from fabric.rendezvous.shared import FileBoard
from fabric.rendezvous.store import StoreBoard

__all__ = [
    "Ask",
    "Card",
    "Identity",
    "Rendezvous",
    "Roster",
    "TcpRendezvous",
    "announce",
    "find",
    "open_rendezvous",
    "read_identity",
    "runtime_directory",
    "this_host",
    "withdraw",
]

_ROOM_NAME_MAX = 255


class Rendezvous(Protocol):
    """Where the ranks of a job meet. One thread at a time."""

    @property
    def identity(self) -> Identity:
        """Our place in the job."""
        ...

    def meet(self, card: Card, *, timeout_s: float) -> list[Card]:
        """Publish our card and wait for those of all ranks; the cards by rank, ours included.

        Raises:
            JoinTimeoutError: Ranks were missing after `timeout_s`; they are named.
            RendezvousError: The place cannot be used, or a newer incarnation of our rank is there.
            ClosedError: `close` was called.
        """
        ...

    def refresh(self) -> list[Card]:
        """The cards by rank as they are now: a rank that came back has its newer card. Does not wait for anyone.

        torch's store is used once; there it gives the cards that were met.

        Raises:
            RendezvousError: The place cannot be used, or a newer incarnation of our rank is there.
            ClosedError: `close` was called.
        """
        ...

    def close(self) -> None:
        """Leave: call it when the member leaves the job. Who still needs our card to finish meeting can read it.

        Idempotent. A rank that hosts torch's store itself waits at most 5 s for those who still read.
        """
        ...


def open_rendezvous(
    spec: str | None = None,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    job: str | None = None,
    ask: Ask | None = None,
    roster: Roster | None = None,
) -> Rendezvous:
    """The place that `spec` names, and who we are there. Nothing is contacted before `meet`.

    `ask` and `roster` are the engine's, for `tcp://`: see `TcpRendezvous`.

    Raises:
        ConfigError: The place's name is malformed, or rank and world size are neither given nor in the environment.
    """
    spec = "env" if spec is None else spec
    if spec == "env":
        return _at_the_store(read_identity(rank=rank, world_size=world_size, job=job))
    kind, separator, rest = spec.partition("://")
    if not separator or kind not in ("file", "memory", "tcp"):
        raise ConfigError(f'{spec[:80]!r} is none of "env", "file://", "tcp://", "memory://"', field="rendezvous")
    identity = read_identity(rank=rank, world_size=world_size, job=job, alone=False)
    if kind == "tcp":
        assert ask is not None, "the engine lends its control link"
        return TcpRendezvous(spec, ask, identity=identity, roster=roster)
    if kind == "file":
        return BoardRendezvous(identity, FileBoard(_directory(spec), identity))
    if not (rest.isprintable() and 1 <= len(rest) <= _ROOM_NAME_MAX):
        raise ConfigError("memory:// needs a name of 1 to 255 printable characters", field="rendezvous")
    return BoardRendezvous(identity, MemoryBoard(rest, identity.job))


def _at_the_store(identity: Identity) -> Rendezvous:
    if identity.world_size == 1:
        return AloneRendezvous(identity)
    return BoardRendezvous(identity, StoreBoard(identity, read_store_address()))


def _directory(spec: str) -> Path:
    """The absolute directory that `file:///...` names.

    Raises:
        ConfigError: It names none, or one of another host.
    """
    try:
        parts = urlsplit(spec)
    except ValueError:
        parts = urlsplit("")
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or "\0" in path or parts.query:
        raise ConfigError(f"{spec[:80]!r} is not file:///absolute/directory", field="rendezvous")
    return Path(path)
