"""Who a member is."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Card"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Who a member is and where it listens."""

    name: str
    rank: int | None
    world_size: int
    job: str
    host: str
    pid: int
    version: int
    incarnation: int
    endpoints: tuple[str, str, str]
    """Of DATA, CONTROL and BULK."""
