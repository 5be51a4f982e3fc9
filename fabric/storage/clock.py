"""The wall clock of the disk: right when the process began, and steady from then on."""

from __future__ import annotations

import time

__all__ = ["steady_wall_ns"]

_AHEAD_NS = time.time_ns() - time.monotonic_ns()


def steady_wall_ns() -> int:
    """Nanoseconds of the wall clock. Who sets that clock meanwhile makes nothing on disk too old (F30)."""
    return _AHEAD_NS + time.monotonic_ns()
