"""Answers on their way to peers over BULK: queued while a pipe is full, each of them once."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING

from fabric.core.wire import Drop
from transports import Link, PeerUnreachableError, SendBlockedError

if TYPE_CHECKING:
    from collections.abc import Hashable

    from fabric.core.events import SendBulk
    from transports import Transport

__all__ = ["BYTES_MAX", "Bulk"]

BYTES_MAX = 256 * 1024 * 1024
"""Queued for one peer, in bytes; what is more is dropped, counted, and asked for again."""


class Bulk:
    """A queue for each peer. From the engine's lock.

    Who waits for an answer asks again, and over a slow link he does so before it has left. The same answer is never
    queued twice, or each question would make the link slower for the next: the newer one, which names the newer
    question, takes the place of the older.
    """

    def __init__(self, transport: Transport, counts: Counter[str]) -> None:
        self._transport, self._counts = transport, counts
        self._queues: dict[str, OrderedDict[Hashable, SendBulk]] = {}
        self._bytes: Counter[str] = Counter()

    def bytes_for(self, peer: str) -> int:
        """Queued for this peer."""
        return self._bytes[peer]

    def add(self, command: SendBulk) -> None:
        """Queue an answer, in place of the same one; one without a chunk, which ends others, comes after them."""
        queue, size = self._queues.setdefault(command.peer, OrderedDict()), _size_of(command)
        older = queue.get(command.about)
        if older is not None:
            size -= _size_of(older)
            self._counts["bulk_asked_again"] += 1
        if self._bytes[command.peer] + size > BYTES_MAX:
            self._counts[Drop.NO_ROOM] += 1
            return
        self._bytes[command.peer] += size
        queue[command.about] = command
        if command.chunk is None:
            queue.move_to_end(command.about)

    def flush(self) -> None:
        """Send what the pipes take."""
        self._transport.unblocked()  # always: until it is told, a pipe that is free again passes for work
        for peer, queue in self._queues.items():
            while queue:
                about, command = next(iter(queue.items()))
                frames = (command.header,) if command.chunk is None else (command.header, command.chunk)
                try:
                    self._transport.send(peer, Link.BULK, frames)
                except SendBlockedError:
                    break
                except PeerUnreachableError:
                    self._counts[Drop.BLOCKED] += len(queue)
                    queue.clear()
                    self._bytes[peer] = 0
                    break
                del queue[about]
                self._bytes[peer] -= _size_of(command)

    def forget(self, peer: str) -> None:
        """What an earlier life asked for would stand before what this one needs."""
        self._queues.pop(peer, None)
        self._bytes.pop(peer, None)


def _size_of(command: SendBulk) -> int:
    return len(command.header) + (len(command.chunk) if command.chunk is not None else 0)
