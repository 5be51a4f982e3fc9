"""A member's card: who it is and where it listens. What members exchange when they meet, and nothing else.

A card comes from a store, a file or a peer, so every field is checked and bounded; its text is never trusted as a path.
Fields that this version does not know are ignored, so that a newer member is refused by its version and
not by its spelling.
"""

from __future__ import annotations

import functools
import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from fabric.errors import ConfigError, RendezvousError

__all__ = ["CARD_BYTES_MAX", "WORLD_SIZE_MAX", "Card", "check_integer", "check_text", "this_host"]

CARD_BYTES_MAX = 8192
"""Of a card as JSON. Its texts together have at most 2.3 KiB; JSON may escape a byte as six."""

WORLD_SIZE_MAX = 65_536
"""Members of one job: far more than the fabric is sized for, small enough that a wrong number cannot exhaust memory."""

_TEXT_BYTES_MAX = 255
_ENDPOINT_BYTES_MAX = 512
_LINKS = 3
_U64 = 2**64
_PID_END = 2**31
_VERSION_END = 2**16


@dataclass(frozen=True, slots=True)
class Card:
    """One incarnation of one member.

    Raises:
        ConfigError: A field is of the wrong type or out of its bounds.
    """

    job: str
    """The job's name, 1 to 255 bytes, printable."""
    name: str
    """The member's name, 1 to 255 bytes, printable."""
    rank: int | None
    """0 <= rank < world_size; None for an observer."""
    world_size: int
    """Ranks of the job, 1 to 65,536."""
    incarnation: int
    """One life of the member, u64; a later life has a greater one."""
    host: str
    """The machine, as `this_host()` names it."""
    pid: int
    """The process, in its own namespace of process ids."""
    version: int
    """Of the wire protocol, u16."""
    endpoints: tuple[str, str, str]
    """Where it listens: data, control, bulk; 1 to 512 bytes each."""

    def __post_init__(self) -> None:
        for field, check in _CHECKS.items():
            check(f"card.{field}", getattr(self, field))
        if self.rank is not None and not 0 <= self.rank < self.world_size:
            raise ConfigError(f"{self.rank} is no rank of {self.world_size}", field="card.rank")

    def to_json(self) -> str:
        """The card as one line of JSON, at most `CARD_BYTES_MAX` bytes."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> Card:
        """The card in this JSON text.

        Raises:
            RendezvousError: It is too long, not JSON, or a field is missing or out of its bounds.
        """
        if len(text) > CARD_BYTES_MAX:
            raise RendezvousError(f"a card has {len(text)} bytes, at most {CARD_BYTES_MAX} are allowed")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RendezvousError("a card is not JSON") from error
        return cls.from_fields(found)

    @classmethod
    def from_fields(cls, found: object) -> Card:
        """The card in what JSON gave.

        Raises:
            RendezvousError: It is no object, or a field is missing or out of its bounds.
        """
        if not isinstance(found, dict):
            raise RendezvousError("a card is not an object")
        try:
            values = {field.name: found[field.name] for field in fields(cls)}
            if isinstance(values["endpoints"], list):
                values["endpoints"] = tuple(values["endpoints"])
            return cls(**values)
        except KeyError as error:
            raise RendezvousError(f"a card has no {error.args[0]}") from error
        except ConfigError as error:
            raise RendezvousError(f"a card is malformed: {error}") from error


def check_text(field: str, value: object, *, limit: int = _TEXT_BYTES_MAX) -> None:
    """Refuse what is not a printable text of 1 to `limit` bytes of UTF-8.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(value, str) or not value.isprintable():
        raise ConfigError("must be printable text", field=field)
    if not 1 <= len(value.encode("utf-8", "replace")) <= limit:
        raise ConfigError(f"must have 1 to {limit} bytes", field=field)


def check_integer(field: str, value: object, *, low: int = 0, end: int) -> None:
    """Refuse what is not an integer in low <= value < end.

    Raises:
        ConfigError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < end:
        raise ConfigError(f"must be an integer from {low} to {end - 1}", field=field)


def _check_rank(field: str, value: object) -> None:
    if value is not None:
        check_integer(field, value, end=WORLD_SIZE_MAX)


def _check_endpoints(field: str, value: object) -> None:
    if not isinstance(value, tuple) or len(value) != _LINKS:
        raise ConfigError("must be three addresses", field=field)
    for address in value:
        check_text(field, address, limit=_ENDPOINT_BYTES_MAX)


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "job": check_text,
    "name": check_text,
    "rank": _check_rank,
    "world_size": functools.partial(check_integer, low=1, end=WORLD_SIZE_MAX + 1),
    "incarnation": functools.partial(check_integer, end=_U64),
    "host": check_text,
    "pid": functools.partial(check_integer, low=1, end=_PID_END),
    "version": functools.partial(check_integer, end=_VERSION_END),
    "endpoints": _check_endpoints,
}


@functools.cache
def this_host() -> str:
    """This machine until its next boot: the kernel's boot id, or the host's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
