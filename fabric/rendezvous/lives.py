"""Is the process behind a card still alive? Asked only where the answer is certain; elsewhere it counts as alive."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fabric.rendezvous.cards import Card, this_host

__all__ = ["Life", "is_dead"]

# Fields of /proc/<pid>/stat behind the program's name: proc(5) numbers them from 3, the state.
_STATE, _START = 0, 22 - 3
_ENDED = "ZX"


@dataclass(frozen=True, slots=True)
class Life:
    """One process of one boot: a process id is reused, its start makes it unique.

    The namespace says where the number means anything: containers of one host share the boot id and not the processes.
    """

    namespace: str
    started: int
    """Clock ticks since boot."""

    @classmethod
    def of(cls, pid: int) -> Life | None:
        """The life of this process now, or None if it has ended, waits to be reaped, or /proc cannot say."""
        try:
            namespace = os.readlink("/proc/self/ns/pid")
            text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        # The program's name stands in parentheses and may hold spaces and parentheses itself.
        fields = text.rpartition(")")[2].split()
        return None if fields[_STATE] in _ENDED else cls(namespace, int(fields[_START]))

    @classmethod
    def from_fields(cls, found: object) -> Life | None:
        """What a file says; None if it says nothing of use."""
        match found:
            case {"namespace": str(namespace), "started": int(started)}:
                return cls(namespace, started)
        return None


def is_dead(card: Card, life: Life | None) -> bool:
    """Whether the process that wrote this card, and was in this life, has surely ended."""
    ours = Life.of(os.getpid())
    if life is None or ours is None or card.host != this_host() or life.namespace != ours.namespace:
        return False
    return Life.of(card.pid) != life
