"""Addressed values of the feeds that we follow: read in their publisher's arena, or fetched from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fabric.core.fetching import Fetching
from fabric.core.holding import Holding
from fabric.core.lanes import InboundFeed
from fabric.core.members import Context
from fabric.core.sharing import ReadSlot, SlotRead
from fabric.core.wire import Descriptor, Drop

if TYPE_CHECKING:
    from fabric.core.following import FollowedFeed

__all__ = ["Obtaining"]


class Obtaining:
    """The values that records of followed feeds wait for."""

    def __init__(self, context: Context, fetching: Fetching, holding: Holding) -> None:
        self._context, self._fetching, self._holding = context, fetching, holding
        self._waiting: dict[InboundFeed, FollowedFeed] = {}
        """Subscriptions to feeds whose addressed values wait for room."""

    def claim(self, followed: FollowedFeed, inbound: InboundFeed) -> None:
        """Ask for the values that there is room for."""
        nobody = followed.unserved or followed.peer.is_gone  # to ask; its next life may have it
        waits = inbound.fin is None and (inbound.outlives or not followed.peer.is_gone)
        for offset, descriptor in inbound.claim():
            if not nobody:
                self._obtain(followed, offset, descriptor)
            elif not waits:
                inbound.payload_lost(offset, Drop.GAP)
        if inbound.has_unclaimed:
            self._waiting[inbound] = followed
        else:
            self._waiting.pop(inbound, None)

    def claim_more(self) -> None:
        """There may be room again."""
        for inbound, followed in list(self._waiting.items()):
            self.claim(followed, inbound)

    def _obtain(self, followed: FollowedFeed, offset: int, descriptor: Descriptor) -> None:
        feed, peer, incarnation = followed.feed, followed.peer.name, followed.incarnation
        holding = self._holding
        if holding.reaches(peer, incarnation):
            if descriptor.slot is not None and holding.may_read(feed, offset):
                holding.read(feed, offset)  # now: what is told before the answer must not leave it out
                self._context.emit(ReadSlot(peer, incarnation, feed, offset, descriptor))
                return
            holding.begin(feed, peer, followed.inbounds)
        self._fetch(followed, offset, descriptor)

    def _fetch(self, followed: FollowedFeed, offset: int, descriptor: Descriptor) -> None:
        if descriptor.slot is not None:
            self._context.counts["slots_fetched"] += 1
        self._fetching.begin((followed.feed, offset), followed.peer.name, descriptor)

    def fetch_again(self, followed: FollowedFeed, inbound: InboundFeed) -> None:
        """Another life of its publisher has what this one was asked for."""
        for offset, descriptor in inbound.claimed():
            self._fetch(followed, offset, descriptor)

    def on_read(self, followed: FollowedFeed | None, event: SlotRead) -> None:
        """A slot was looked at: the value is there, and ours until its last view dies, or it has to be fetched."""
        if event.payload is not None:
            return
        wanted = {
            offset: descriptor
            for inbound in (followed.inbounds if followed is not None else ())
            for offset, descriptor in inbound.claimed()
        }
        if followed is not None and event.offset in wanted and not followed.peer.is_gone:
            self._fetch(followed, event.offset, wanted[event.offset])

    def forget(self, followed: FollowedFeed, inbound: InboundFeed) -> None:
        """A subscription is done with a feed."""
        self._waiting.pop(inbound, None)
        if not followed.inbounds:
            for offset in inbound.awaiting:
                self._fetching.end((followed.feed, offset))
            self._holding.end(followed.feed)
