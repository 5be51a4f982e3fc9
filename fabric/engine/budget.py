"""The one account of what a member may owe in memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fabric.engine.loop import Engine

__all__ = ["Budget"]


class Budget:
    """The owed bytes of a member: what the core retains, and what open bursts have reserved."""

    def __init__(self, engine: Engine) -> None:
        self._retention = engine.core.publishing.retention
        self._lock = threading.Lock()
        self.reserved = 0

    @property
    def used(self) -> int:
        """Owed and reserved, in bytes."""
        return self._retention.owed_bytes + self.reserved

    def take(self, size: int) -> bool:
        """Reserve; False if there is no room. One burst always fits into an empty retention."""
        with self._lock:
            if self.used + size > self._retention.owed_bytes_max and self.used:
                return False
            self.reserved += size
            return True

    def give(self, size: int) -> None:
        """The core retains it now, or it was not used."""
        with self._lock:
            self.reserved -= size
