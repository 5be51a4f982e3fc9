"""Durable feeds: a burst is on disk before anybody has it. One that the disk refuses never was.

Its publisher waits, and publishes nothing more on this feed until it knows: so a refused burst leaves no hole, and its
offsets are used again (RULES N2).
"""

from __future__ import annotations

from typing import NamedTuple

from fabric.core.disk import AppendRecords, WriteFailed
from fabric.core.events import BurstClosed
from fabric.core.feeds import OutFeed, Retention
from fabric.core.members import Context

__all__ = ["DurableWrites"]


class _Write(NamedTuple):
    out: OutFeed
    burst: BurstClosed
    size: int


class DurableWrites:
    """Bursts of durable feeds on their way to the disk."""

    def __init__(self, context: Context, retention: Retention) -> None:
        self._context, self._retention = context, retention
        self._under_way: dict[int, _Write] = {}
        self._naming: dict[int, OutFeed] = {}

    def name(self, out: OutFeed) -> None:
        """Ask the disk to know this feed; nobody hears of it before."""
        number = self._context.next_write()
        self._naming[number] = out
        self._context.emit(
            AppendRecords(number, out.topic, out.feed, 0, 0, b"", policy=out.policy.value, sync=out.sync)
        )

    def named(self, number: int) -> list[OutFeed]:
        """The feeds that the disk knows now that all writes up to this one are done. A burst names its feed, too."""
        done = [self._naming.pop(other) for other in list(self._naming) if other <= number]
        done += [write.out for other, write in self._under_way.items() if other <= number]
        fresh = list({out.feed: out for out in done if not out.is_named}.values())
        for out in fresh:
            out.is_named = True
        return fresh

    def ask(self, out: OutFeed, burst: BurstClosed) -> None:
        """Ask the disk to take a burst."""
        payloads = burst.payloads or {}
        size = len(burst.frame) + sum(memoryview(payload).nbytes for payload in payloads.values())
        number = self._context.next_write()
        self._under_way[number] = _Write(out, burst, size)
        self._retention.owed_bytes += size
        self._retention.passing_bytes += size
        self._context.emit(
            AppendRecords(
                number, out.topic, out.feed, burst.first, burst.count, burst.frame, payloads, out.policy.value, out.sync
            )
        )

    def finished(self, number: int) -> list[tuple[OutFeed, BurstClosed]]:
        """The bursts that are on disk now that all writes up to this one are; they are retained."""
        done = [self._end(other) for other in list(self._under_way) if other <= number]
        for out, burst, size in done:
            self._retention.append_written(out, burst.first, burst.first + burst.count, size)
        return [(out, burst) for out, burst, _ in done]

    def on_failed(self, event: WriteFailed) -> None:
        """What was refused is forgotten: its publisher is told, and nothing was taken."""
        for number in self._naming.keys() & range(event.first, event.number + 1):
            del self._naming[number]
        for number in self._under_way.keys() & range(event.first, event.number + 1):
            self._end(number).out.refused += 1
            self._context.counts["durable_refused"] += 1

    def _end(self, number: int) -> _Write:
        write = self._under_way.pop(number)
        self._retention.owed_bytes -= write.size
        self._retention.passing_bytes -= write.size
        return write

    def check_invariants(self) -> None:
        """Assert the sum, and that a feed has one burst under way at most."""
        assert self._retention.passing_bytes == sum(write.size for write in self._under_way.values())
        assert len({write.out.feed for write in self._under_way.values()}) == len(self._under_way)
