"""Cards for tests."""

from __future__ import annotations

import os
from typing import Any

from fabric.rendezvous import Card, this_host


def a_card(rank: int | None = 0, world_size: int = 2, **changed: Any) -> Card:
    """A valid card of this process; any field may be given."""
    fields: dict[str, Any] = {
        "job": "training",
        "name": "watcher" if rank is None else f"rank-{rank}",
        "rank": rank,
        "world_size": world_size,
        "incarnation": 1,
        "host": this_host(),
        "pid": os.getpid(),
        "version": 1,
        "endpoints": (f"ipc://data-{rank}", f"ipc://control-{rank}", f"ipc://bulk-{rank}"),
    }
    return Card(**(fields | changed))
