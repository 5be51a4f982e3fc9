"""How feeds end for us: by a goodbye, by a proven death, or by what their publisher's next life says (RULES S6, S7)."""

from __future__ import annotations

from collections.abc import Callable

from fabric.core.events import ReportGap
from fabric.core.fetching import Fetching
from fabric.core.following import Following
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context, Members, Peer, S
from fabric.core.subscriptions import Subscription
from fabric.core.wire import Drop, Kind, feed_id

__all__ = ["Endings"]

ASK_NS = 50 * MS


class Endings:
    """The feeds that are about to end, and those whose publishers are gone."""

    def __init__(
        self,
        context: Context,
        members: Members,
        fetching: Fetching,
        following: Following,
        subscriptions: dict[int, Subscription],
        retire: Callable[[Subscription, InboundFeed], None],
    ) -> None:
        self._context, self._members, self._fetching, self._following = context, members, fetching, following
        self._subscriptions, self._retire = subscriptions, retire
        self._open: list[InboundFeed] = []
        """Feeds whose end is not known: what follows their last record is an open gap."""
        self._asking: dict[InboundFeed, int] = {}
        """Feeds of lives that are over, and when to ask again where they ended."""
        self._orphans: dict[InboundFeed, int] = {}
        """Feeds that outlive their publishers, which are gone, and how long their next lives are waited for."""

    def _of(self, peer: Peer) -> list[InboundFeed]:
        return [
            inbound
            for subscription in self._subscriptions.values()
            for (source, _), inbound in subscription.feeds.items()
            if source == peer.name
        ]

    # What we are told.

    def welcome(self, peer: Peer) -> None:
        """A publisher's new life: where did the feeds of the ones before end, and what is left of them?"""
        for inbound in self._of(peer):
            self._orphans.pop(inbound, None)
            if inbound.incarnation < peer.incarnation and _lacks_some(inbound):
                self._take_back(inbound)
                self.ask(inbound)

    def _take_back(self, inbound: InboundFeed) -> None:
        """What the life before last said of its end is said again by this one."""
        inbound.fin = None
        if inbound in self._open:
            self._open.remove(inbound)
            inbound.counts["open_gaps"] -= 1

    def ask(self, inbound: InboundFeed) -> None:
        """Its publisher lives a newer life; where did this one end? Asked until FIN, or another end, is told (S7)."""
        peer = self._members.by_name[inbound.source]
        if inbound.fin is not None or peer.is_gone or self._following.find(inbound) is None:
            self._asking.pop(inbound, None)
            return
        self._asking[inbound] = self._context.now + ASK_NS
        self._context.wake_by(self._asking[inbound])
        self._context.send(peer.name, Kind.STATUS, inbound.topic, inbound.incarnation)

    def on_fin(self, peer: Peer, topic: str, incarnation: int, first: int, end: int, exact: bool) -> None:
        """Where an older feed ended (S7). What its publisher cannot name any more is an open gap."""
        for inbound in self._of(peer):
            if inbound.topic == topic and inbound.incarnation == incarnation < peer.incarnation and inbound.fin is None:
                self.end_past(peer, inbound, first, end, exact=exact)

    def end_past(self, peer: Peer, inbound: InboundFeed, first: int, end: int, *, exact: bool) -> None:
        """A newer life of its publisher says where a feed ended, and has what is left of it."""
        self._asking.pop(inbound, None)
        if not (end or exact):  # it knows nothing of it
            self._finish(inbound, 0, exact=False)
            return
        inbound.fin, inbound.outlives = end, True  # it is on the disk that served it once
        self._following.serve(inbound, end)
        inbound.learn(min(first, end), end)
        self._end(inbound, end, exact=exact)

    def on_bye(self, peer: Peer, told: dict[int, tuple[int, bool]]) -> None:
        """Its ends are exact; what did not come by now will not come, unless it is on disk, for a next life."""
        for inbound in self._of(peer):
            if not _lacks_some(inbound):
                continue
            end, kept = told.get(feed_id(peer.name, inbound.incarnation, inbound.topic), (None, False))
            inbound.known = max(inbound.known, end or 0)
            inbound.outlives |= kept
            if inbound.outlives and (end is None or inbound.next < end):
                self._orphan(inbound)
            else:  # 0: nobody is left to ask for what is missing
                self._finish(inbound, 0, exact=end is not None)

    def on_death(self, peer: Peer) -> None:
        """Its memory is gone, and where its feeds ended is not known."""
        for inbound in self._of(peer):
            if not _lacks_some(inbound):
                continue
            if inbound.outlives:
                self._orphan(inbound)
            else:
                self._finish(inbound, 0, exact=False)

    def _orphan(self, inbound: InboundFeed) -> None:
        """Wait for the next life of its publisher."""
        self._asking.pop(inbound, None)
        due_ns = self._context.now + int(self._context.config.retention.absent_s * S)
        self._orphans[inbound] = due_ns
        self._context.wake_by(due_ns)

    # Ending.

    def _finish(self, inbound: InboundFeed, end: int, *, exact: bool) -> None:
        """Nobody has what is missing."""
        for offset in list(inbound.awaiting):
            key = (inbound.feed, offset)
            self._fetching.end(key)
            inbound.payload_lost(offset, Drop.GAP)
        self._end(inbound, end, exact=exact)

    def _end(self, inbound: InboundFeed, end: int, *, exact: bool) -> None:
        if not exact and not inbound.best_effort and inbound not in self._open:
            inbound.counts["open_gaps"] += 1
            self._open.append(inbound)
        inbound.finish(end)
        self.check(inbound)

    def check(self, inbound: InboundFeed) -> None:
        """Whether a feed that ended is settled; then it is over."""
        subscription = self._subscriptions.get(inbound.subscription)
        key = inbound.source, inbound.topic
        if not inbound.is_finished or subscription is None or subscription.feeds.get(key) is not inbound:
            return
        if inbound in self._open:
            self._open.remove(inbound)
            gap = ReportGap(inbound.subscription, *key, inbound.incarnation, inbound.floor, None, Drop.GAP)
            self._context.emit(gap)
        followed = self._following.find(inbound)
        if followed is not None:
            self._following.acknowledge_soon(followed, inbound)
        self._retire(subscription, inbound)

    def forget(self, inbound: InboundFeed) -> None:
        """Nobody follows it any more."""
        self._orphans.pop(inbound, None)
        self._asking.pop(inbound, None)

    # Time.

    def tick(self) -> None:
        """Ask again; give up what nobody came back with."""
        now = self._context.now
        for inbound in [inbound for inbound, due_ns in self._asking.items() if now >= due_ns]:
            self.ask(inbound)
        for inbound in [inbound for inbound, due_ns in self._orphans.items() if now >= due_ns]:
            del self._orphans[inbound]
            self._finish(inbound, 0, exact=inbound.fin is not None)

    def dues_ns(self) -> list[int]:
        """When any of that is due."""
        return [*self._asking.values(), *self._orphans.values()]


def _lacks_some(inbound: InboundFeed) -> bool:
    """Whether anything of it may still have to come from its publisher."""
    return inbound.fin is None or inbound.next < inbound.fin
