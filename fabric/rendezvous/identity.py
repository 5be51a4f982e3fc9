"""Who am I? The only place where the fabric reads the launcher's variables.

torchrun (2.13) sets for each worker, whatever its rendezvous: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
TORCHELASTIC_RUN_ID (`none` unless --rdzv-id or --standalone), TORCHELASTIC_RESTART_COUNT (counts restarts of the worker
group), and TORCHELASTIC_USE_AGENT_STORE=True: its agent hosts the store, so that no rank's death takes it away.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fabric.errors import ConfigError
from fabric.rendezvous.cards import WORLD_SIZE_MAX, check_integer, check_text

__all__ = ["Identity", "StoreAddress", "read_identity", "read_store_address"]

_LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_NO_RUN_ID = "none"
_COUNT_END = 2**31
_PORT_END = 2**16


@dataclass(frozen=True, slots=True)
class Identity:
    """A rank's place in its job."""

    rank: int
    """0 <= rank < world_size."""
    world_size: int
    """Ranks of the job, 1 to 65,536."""
    job: str
    """The job's name: torchrun's run id unless given."""
    restart_count: int = 0
    """How often the launcher restarted the whole group of workers."""

    def __post_init__(self) -> None:
        check_text("job", self.job)
        check_integer("world_size", self.world_size, low=1, end=WORLD_SIZE_MAX + 1)
        check_integer("rank", self.rank, end=self.world_size)
        check_integer("restart_count", self.restart_count, end=_COUNT_END)


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """Where torch's store is, and whether the launcher's agent hosts it (else rank 0 does)."""

    host: str
    port: int
    agent_hosts: bool
    run_id: str


def read_identity(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    job: str | None = None,
    alone: bool = True,
    environ: Mapping[str, str] | None = None,
) -> Identity:
    """The identity from the arguments, else from the launcher's variables, else (with `alone`) a world of one.

    Raises:
        ConfigError: A value is impossible, or some of what is needed is missing; it is named.
    """
    environ = os.environ if environ is None else environ
    restarts = _number(environ, "TORCHELASTIC_RESTART_COUNT", end=_COUNT_END, default=0)
    if (rank is None) != (world_size is None):
        missing = "rank" if rank is None else "world_size"
        raise ConfigError("rank and world_size are given together", field=missing)
    if rank is not None and world_size is not None:
        return Identity(rank, world_size, job or _job(environ), restarts)
    present = [name for name in _LAUNCHER if environ.get(name)]
    if not present and alone:
        return Identity(0, 1, job or f"alone-{os.getpid()}", restarts)
    needed = _LAUNCHER if alone else _LAUNCHER[:2]
    _require(environ, needed, present)
    return Identity(
        _number(environ, "RANK", end=WORLD_SIZE_MAX),
        _number(environ, "WORLD_SIZE", end=WORLD_SIZE_MAX + 1),
        job or _job(environ),
        restarts,
    )


def read_store_address(environ: Mapping[str, str] | None = None) -> StoreAddress:
    """Where the launcher's variables say that torch's store is.

    Raises:
        ConfigError: MASTER_ADDR or MASTER_PORT is missing or impossible.
    """
    environ = os.environ if environ is None else environ
    _require(environ, _LAUNCHER[2:], ())
    check_text("MASTER_ADDR", environ["MASTER_ADDR"])
    return StoreAddress(
        host=environ["MASTER_ADDR"],
        port=_number(environ, "MASTER_PORT", end=_PORT_END),
        agent_hosts=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        run_id=environ.get("TORCHELASTIC_RUN_ID") or _NO_RUN_ID,
    )


def _job(environ: Mapping[str, str]) -> str:
    """The run id; where the launcher made none, the store's address, which two jobs on one machine never share."""
    run_id = environ.get("TORCHELASTIC_RUN_ID") or _NO_RUN_ID
    if run_id != _NO_RUN_ID or not environ.get("MASTER_ADDR"):
        return run_id
    return f"{environ['MASTER_ADDR']}:{environ.get('MASTER_PORT', '')}"


def _require(environ: Mapping[str, str], needed: tuple[str, ...], present: list[str] | tuple[()]) -> None:
    missing = [name for name in needed if not environ.get(name)]
    if not missing:
        return
    seen = f"; {', '.join(present)} {'is' if len(present) == 1 else 'are'} set" if present else ""
    verb = "is" if len(missing) == 1 else "are"
    raise ConfigError(
        f"{', '.join(missing)} {verb} missing from the environment{seen}: start with torchrun, "
        "or give rank, world_size and a rendezvous that needs no launcher",
        field="rendezvous",
    )


def _number(environ: Mapping[str, str], name: str, *, end: int, default: int | None = None) -> int:
    text = environ.get(name) or ("" if default is None else str(default))
    # int() would take signs, spaces, underscores and other scripts' digits.
    value = int(text) if text.isascii() and text.isdigit() and len(text) <= len(str(end)) else None
    check_integer(name, value, end=end)
    assert value is not None
    return value
