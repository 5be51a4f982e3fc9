"""Answers on BULK: bursts that a subscriber pulls, and values that it fetches, from memory or from disk (RULES P5)."""

from __future__ import annotations

from collections.abc import Mapping

from fabric.core.events import Buffer, SendBulk
from fabric.core.feeds import OutFeed
from fabric.core.members import Context, Peer
from fabric.core.ranges import RangeSet
from fabric.core.spilling import Question, Spilling
from fabric.core.wire import Drop, Kind, encode_control

__all__ = ["Answering"]

PULL_RANGES_MAX = 64
"""Ranges of a pull that are answered; the same as a subscriber asks for at once."""


class Answering:
    """What others ask of our feeds."""

    def __init__(self, context: Context, by_id: Mapping[int, OutFeed], spilling: Spilling) -> None:
        self._context, self._by_id, self._spilling = context, by_id, spilling

    def on_pull(self, peer: Peer, feed: int, token: int, credit: int, ranges: list[tuple[int, int]]) -> None:
        """Data within the credit, then what is available (P5)."""
        out = self._by_id.get(feed)
        if out is None:
            self._context.counts[Drop.STRANGER] += 1
            return
        wanted = list(RangeSet(ranges))[:PULL_RANGES_MAX]  # merged: a range named twice is sent once
        bursts, lost = out.select(wanted, min(credit, self._context.config.repair.window_bytes))
        if self._spilling.park(out, bursts, (peer, Kind.PULL, (feed, token, credit, ranges))):
            return
        for burst in bursts:
            self._bulk(peer, Kind.REPAIR, (feed, burst.first, burst.end), feed, token, chunk=burst.frame)
            self._context.counts["repaired_bytes"] += burst.frame_size
        self._bulk(peer, Kind.AVAILABLE, (feed,), feed, token, out.first_available, out.end, lost)

    def payload_of(self, feed: int, offset: int) -> Buffer | None:
        """The value of an addressed record, while it is retained."""
        out = self._by_id.get(feed)
        burst = out.find(offset) if out else None
        return burst.payloads.get(offset) if burst and burst.payloads else None

    def waits_for_disk(self, feed: int, offset: int, question: Question) -> bool:
        """Whether the record that is asked for has to be loaded first; then the question is kept until it is."""
        out = self._by_id.get(feed)
        burst = out.find(offset) if out else None
        return out is not None and burst is not None and self._spilling.park(out, [burst], question)

    def _bulk(
        self, peer: Peer, kind: Kind, about: tuple[int, ...], *fields: object, chunk: Buffer | None = None
    ) -> None:
        header = encode_control(kind, self._context.id, self._context.incarnation, *fields)
        self._context.emit(SendBulk(peer.name, header, chunk, (kind, *about)))
