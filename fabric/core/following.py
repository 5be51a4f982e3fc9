"""Following feeds: receiving what is pushed, pulling what was missed, acknowledging (RULES S2 to S5, S8).

A *followed feed* is a feed of some member that one or more of our subscriptions want: its data comes once, each
subscription has an `InboundFeed` of its own, and what any of them misses is pulled once.
"""

from __future__ import annotations

from heapq import heappop, heappush

from fabric.core.events import Buffer, FollowFeed, UnfollowFeed
from fabric.core.fetching import Fetching
from fabric.core.guards import Retry
from fabric.core.holding import Holding
from fabric.core.lanes import InboundFeed
from fabric.core.members import MS, Context, Peer
from fabric.core.obtaining import Obtaining
from fabric.core.ranges import RangeSet
from fabric.core.sharing import SlotRead
from fabric.core.wire import Burst, Drop, Kind

__all__ = ["FollowedFeed", "Following"]

PULL_RANGES_MAX = 64
"""Ranges in one pull (reliability notes, section 4.7)."""
ACKNOWLEDGEMENTS_PER_FRAME = 4000
JOINS_PER_FRAME = 1000
JOIN = Retry.beyond(20 * MS, 1000 * MS)
WINDOW_BYTES_MIN = 64
"""The credit of a pull sinks no lower, whatever is turned away."""


class FollowedFeed:
    """A feed of some member as it reaches us."""

    __slots__ = (
        "asked_end",
        "asked_first",
        "behind_ns",
        "crowded",
        "far",
        "feed",
        "inbounds",
        "incarnation",
        "joining",
        "known",
        "live",
        "nonce",
        "past",
        "peer",
        "pulling",
        "pushed",
        "queued_ns",
        "token",
        "topic",
        "unserved",
        "window",
    )

    def __init__(
        self, feed: int, peer: Peer, topic: str, incarnation: int, known: int, pulling: Retry, window: int
    ) -> None:
        self.feed, self.peer, self.topic, self.incarnation, self.known = feed, peer, topic, incarnation, known
        self.past = self.unserved = incarnation < peer.incarnation
        """Whether a newer life of its publisher has it, and may have it, but has not said so yet."""
        self.inbounds: list[InboundFeed] = []
        self.pushed = self.queued_ns = 0
        """What came over the push link, or was marked there, ends here: what is absent below it is lost."""
        self.behind_ns = 0
        """Since when a heartbeat knows more than the push link told; 0 if it does not."""
        self.live = self.far = self.crowded = False
        self.window = window
        """The credit of the next pull, room allowing: half of the last if some of that was turned away, else double."""
        self.nonce = self.token = self.asked_end = self.asked_first = 0
        self.joining, self.pulling = JOIN, pulling
        """When to ask for a marker again, and to pull again; the latter is due at 0 while no pull is under way."""


class Following:
    """All feeds that reach this member. Methods that may end a feed return it, for its subscriptions to look."""

    def __init__(self, context: Context, fetching: Fetching, touched: dict[InboundFeed, None]) -> None:
        self._context, self.holding = context, Holding(context)
        self._obtaining = Obtaining(context, fetching, self.holding)
        repair = context.config.repair
        self._first_pull = Retry.beyond(repair.retry_ms_first * MS, repair.retry_ms_max * MS)
        self._touched = touched
        """What was received, settled or lost of these, so their books may have changed."""
        self.feeds: dict[int, FollowedFeed] = {}
        self._dirty: dict[tuple[int, int], tuple[Peer, InboundFeed]] = {}
        self._dirty_bytes = self._acknowledge_due_ns = self._nonce = 0
        self.joining: dict[str, list[tuple[int, int]]] = {}
        """Feeds and nonces for `send_joins` to send, by peer."""
        self._restless: dict[int, FollowedFeed] = {}
        """Feeds that wait for a marker or for the answer to a pull; only these need the clock."""
        self._dues: list[tuple[int, int]] = []
        """A heap of (when, feed) of the restless; what is not the feed's `queued_ns` any more is met and dropped."""
        self._starved: dict[int, FollowedFeed] = {}
        """Feeds that miss something and have no room for it; subscriptions share their room among feeds."""

    def follow(self, feed: int, peer: Peer, inbound: InboundFeed, end: int) -> None:
        """One more subscription wants this feed, which has `end` records by now."""
        followed = self.feeds.get(feed)
        if followed is None:
            repair = self._context.config.repair
            followed = self.feeds[feed] = FollowedFeed(
                feed, peer, inbound.topic, inbound.incarnation, end, self._first_pull, repair.window_bytes
            )
            if followed.past:
                followed.far = True
            else:
                self._listen(followed)
        followed.inbounds.append(inbound)
        if inbound.counts:  # some of it was gone before we came
            self._touched[inbound] = None
        followed.known = max(followed.known, end)
        self.confirm(inbound)

    def unfollow(self, inbound: InboundFeed) -> None:
        """A subscription is done with a feed."""
        followed = self.feeds[inbound.feed]
        followed.inbounds.remove(inbound)
        self._obtaining.forget(followed, inbound)
        if not followed.inbounds:
            del self.feeds[followed.feed]
            self._restless.pop(followed.feed, None)
            self._starved.pop(followed.feed, None)
            self._context.emit(UnfollowFeed(followed.feed))

    def find(self, inbound: InboundFeed) -> FollowedFeed | None:
        """The feed behind what a subscription knows of it."""
        followed = self.feeds.get(inbound.feed)
        return followed if followed is not None and inbound in followed.inbounds else None

    def settled(self, inbound: InboundFeed, size: int) -> None:
        """A subscription settled something, and `size` bytes of its room are free again."""
        followed = self.feeds.get(inbound.feed)
        if followed is None or inbound not in followed.inbounds:
            return
        self._dirty_bytes += size
        self.holding.settled(followed.feed, size)
        self.acknowledge_soon(followed, inbound)
        if self._dirty_bytes >= self._context.config.liveness.acknowledge_bytes:
            self.acknowledge()
        self._obtaining.claim_more()
        if followed.far or not followed.live:
            self._pull(followed)
        if size and self._starved:
            for starved in list(self._starved.values()):
                self._pull(starved)

    # The feeds of lives that are over.

    def outlive(self, peer: Peer) -> None:
        """A newer life of a publisher: what we follow of the ones before waits until it says what it has of them."""
        for followed in self.feeds.values():
            if followed.peer.name == peer.name and followed.incarnation < peer.incarnation:
                followed.peer, followed.past, followed.unserved = peer, True, True
                followed.pulling = followed.pulling.rested()
                if not followed.far:
                    followed.far, followed.live = True, False
                    self._context.emit(UnfollowFeed(followed.feed))
                self._note(followed)

    def serve(self, inbound: InboundFeed, end: int) -> None:
        """Its publisher's newer life has this feed, up to `end`: it is only pulled, and values are asked for again."""
        followed = self.feeds[inbound.feed]
        followed.unserved = False
        followed.known = max(followed.known, end)
        self._obtaining.fetch_again(followed, inbound)
        self._pull(followed)

    def keeps(self, feed: int) -> bool:
        """Whether what is lost of this feed with its publisher may be had from its next life."""
        followed = self.feeds.get(feed)
        return followed is not None and any(inbound.outlives for inbound in followed.inbounds)

    # Receiving.

    def on_burst(self, burst: Burst) -> None:
        """A burst over the push link."""
        followed = self.feeds.get(burst.feed)
        if followed is None or burst.incarnation != followed.incarnation:
            self._context.counts[Drop.STRANGER] += 1
            return
        followed.peer.data_heard_ns = followed.peer.heard_ns = self._context.now
        followed.pushed = max(followed.pushed, burst.end)
        followed.known = max(followed.known, burst.end)
        if followed.pushed == followed.known:
            followed.behind_ns = 0
        self._receive(followed, burst)
        for inbound in followed.inbounds:
            if inbound.have.firsts:
                self._pull(followed)
                break

    def _receive(self, followed: FollowedFeed, burst: Burst) -> None:
        burst.check()
        for number, inbound in enumerate(followed.inbounds):
            # What is fetched for a burst hangs on it, so each subscription that keeps one has its own.
            inbound.receive(burst.twin() if number and burst.has_addressed else burst)
            self._touched[inbound] = None
            if burst.has_addressed and inbound.has_unclaimed:
                self._obtaining.claim(followed, inbound)
            if inbound.turned_away:
                inbound.turned_away, followed.crowded = False, True
                self._leave_push(followed)

    def on_payload(self, feed: int, offset: int, payload: Buffer | None, reason: str) -> FollowedFeed | None:
        """An addressed value is here, or will not come."""
        followed = self.feeds.get(feed)
        for inbound in followed.inbounds if followed else ():
            self._touched[inbound] = None
            if payload is not None:
                inbound.payload_arrived(offset, payload)
            else:
                inbound.payload_lost(offset, reason)
        self._obtaining.claim_more()
        return followed

    def on_read(self, event: SlotRead) -> FollowedFeed | None:
        """A slot of its publisher's arena was looked at."""
        followed = self.feeds.get(event.feed)
        self._obtaining.on_read(followed, event)
        return followed if event.payload is None else self.on_payload(event.feed, event.offset, event.payload, "")

    def on_marker(self, feed: int, incarnation: int, end: int, nonces: tuple[int, ...]) -> None:
        """What is below a marker and absent is lost: repair at once."""
        followed = self.feeds.get(feed)
        if followed is None or incarnation != followed.incarnation:
            return
        followed.peer.data_heard_ns = followed.peer.heard_ns = self._context.now
        followed.pushed = max(followed.pushed, end)
        self._learn_end(followed, end)
        if followed.pushed == followed.known:
            followed.behind_ns = 0
        if followed.nonce in nonces and not followed.far:
            followed.live = True
        self._pull(followed)
        self._note(followed)

    def on_listed(self, feed: int, end: int) -> bool:
        """A heartbeat lists a feed that we have not acknowledged to its end; False if we do not follow it."""
        followed = self.feeds.get(feed)
        if followed is not None:
            if end > followed.pushed and not followed.behind_ns:
                followed.behind_ns = self._context.now
            self._learn_end(followed, end)
            self._pull(followed)
        return followed is not None

    def _learn_end(self, followed: FollowedFeed, end: int) -> None:
        """We are listed, so our position was not heard: it is told again."""
        followed.known = max(followed.known, end)
        for inbound in followed.inbounds:
            inbound.learn(inbound.first_available, followed.known)
            self.acknowledge_soon(followed, inbound)

    # Pulling.

    def on_repair(self, peer: Peer, feed: int, token: int, burst: Burst) -> None:
        """A burst that we asked for."""
        followed = self.feeds.get(feed)
        if (
            followed is None
            or burst.feed != feed
            or followed.peer is not peer
            or burst.incarnation != followed.incarnation
        ):
            self._context.counts[Drop.STRANGER] += 1
            return
        self._context.counts["bytes_repaired"] += burst.size
        peer.bulk_heard_ns = self._context.now
        followed.known = max(followed.known, burst.end)
        if token == followed.token:
            followed.pulling = followed.pulling.postponed(self._context.now)
        self._receive(followed, burst)

    def on_available(
        self, peer: Peer, feed: int, token: int, first: int, end: int, lost: list[tuple[int, int]]
    ) -> FollowedFeed | None:
        """The pull is answered: this is what can be had, and what is lost in between."""
        followed = self.feeds.get(feed)
        if followed is None or followed.peer is not peer or first > end or end >= 2**63:
            return None
        peer.bulk_heard_ns = self._context.now
        followed.known = max(followed.known, end)
        for inbound in followed.inbounds:
            inbound.learn(first, end, lost)
            self.acknowledge_soon(followed, inbound)
        if token == followed.token:
            self._continue(followed)
        return followed

    def _continue(self, followed: FollowedFeed) -> None:
        """A pull was answered: ask for more, or listen again."""
        left = [
            ranges[0][0] for inbound in followed.inbounds if (ranges := inbound.missing(followed.asked_end, most=1))
        ]
        if min(left, default=None) == followed.asked_first:
            return  # nothing came that had room: an immediate pull would have the same answer, without end
        followed.pulling = self._first_pull
        if not left:
            self._come_back(followed)
        self._pull(followed)
        self._note(followed)

    def _target(self, followed: FollowedFeed) -> int:
        """Below this offset, what is absent is lost. On a live link only the link itself tells, or its silence."""
        silent_ns = self._context.now - max(followed.peer.data_heard_ns, followed.behind_ns)  # while it has to say some
        if followed.live and silent_ns < 2 * self._context.config.liveness.marker_ms * MS:
            return followed.pushed
        return followed.known

    def _pull(self, followed: FollowedFeed) -> None:
        now = self._context.now
        pulling = followed.pulling
        if now < pulling.due_ns or followed.peer.is_gone or followed.unserved:
            return
        if pulling.due_ns and self._is_answering(followed.peer.bulk_heard_ns, pulling):
            followed.pulling = pulling.postponed(followed.peer.bulk_heard_ns)
            self._note(followed)
            return
        target, wanted = self._target(followed), RangeSet()
        for inbound in followed.inbounds:
            for first, end in inbound.missing(target, most=PULL_RANGES_MAX):
                wanted.add(first, end)
        if not wanted:
            followed.pulling = pulling.rested()
            self._come_back(followed)
            self._note(followed)
            return
        left = max(inbound.room.left for inbound in followed.inbounds)
        if left <= 0 and not any(inbound.held for inbound in followed.inbounds):
            followed.pulling = pulling.rested()  # nobody wakes up for it: what is settled, and heartbeats, try again
            self._starved[followed.feed] = followed
            self._note(followed)
            return
        self._starved.pop(followed.feed, None)
        followed.token += 1
        followed.asked_first, followed.asked_end = next(iter(wanted))[0], wanted.end
        followed.pulling = pulling.after(now, self._context.chance())
        credit = max(1, min(left, self._window(followed)))
        self._context.counts["pulls"] += 1
        self._context.send(
            followed.peer.name, Kind.PULL, followed.feed, followed.token, credit, list(wanted)[:PULL_RANGES_MAX]
        )
        self._note(followed)

    def _window(self, followed: FollowedFeed) -> int:
        """Room in the hand is none for records behind one that is not whole: what was taken of the last answer tells.

        A whole window for each record, all but one of it turned away, was quadratic in what was behind.
        """
        window = followed.window // 2 if followed.crowded else 2 * followed.window
        followed.window = min(max(WINDOW_BYTES_MIN, window), self._context.config.repair.window_bytes)
        followed.crowded = False
        return followed.window

    def _note(self, followed: FollowedFeed) -> None:
        pull_ns, join_ns = followed.pulling.due_ns, followed.joining.due_ns
        if pull_ns or not (followed.live or followed.far):
            self._restless[followed.feed] = followed
            due_ns = pull_ns or join_ns
            if not (followed.live or followed.far):
                due_ns = min(due_ns, join_ns)
            if not followed.queued_ns or due_ns < followed.queued_ns:
                followed.queued_ns = due_ns
                heappush(self._dues, (due_ns, followed.feed))
                self._context.wake_by(due_ns)
        else:
            self._restless.pop(followed.feed, None)
            followed.queued_ns = 0  # it is in the queue no longer: who is restless again must enter it again

    # The push link.

    def _listen(self, followed: FollowedFeed) -> None:
        """Begin to listen, under a nonce that no marker in the link can carry yet."""
        self._nonce += 1
        followed.nonce = (self._context.id + self._nonce) % 2**64
        self._context.emit(FollowFeed(followed.feed))
        self._join(followed)

    def _join(self, followed: FollowedFeed) -> None:
        """Ask for a marker; again with the same nonce, for the first answer may only stand behind much data."""
        followed.joining = followed.joining.after(self._context.now, self._context.chance())
        self.joining.setdefault(followed.peer.name, []).append((followed.feed, followed.nonce))
        self._note(followed)

    def _join_again(self, followed: FollowedFeed) -> None:
        if self._is_answering(followed.peer.data_heard_ns, followed.joining):
            followed.joining = followed.joining.after(self._context.now, self._context.chance())
            self._note(followed)
        else:
            self._join(followed)

    def _is_answering(self, heard_ns: int, asked: Retry) -> bool:
        """Whether a peer that we asked for much is still at it: then asking again would only make it more."""
        now = self._context.now
        return now < heard_ns + asked.wait_ns and now < asked.due_ns + self._context.config.repair.retry_ms_max * MS

    def send_joins(self) -> None:
        """What one event led to join leaves together: many feeds are often named at once."""
        for name, entries in self.joining.items():
            for begin in range(0, len(entries), JOINS_PER_FRAME):
                self._context.send(name, Kind.JOIN, entries[begin : begin + JOINS_PER_FRAME])
        self.joining.clear()

    def _leave_push(self, followed: FollowedFeed) -> None:
        """Far behind: leave the live feed and only pull (S8)."""
        if followed.far or any(inbound.best_effort for inbound in followed.inbounds):
            return
        followed.far, followed.live = True, False
        self._context.counts["demoted"] += 1
        self._context.emit(UnfollowFeed(followed.feed))
        self._note(followed)

    def _come_back(self, followed: FollowedFeed) -> None:
        """Near again: listen, and be live once a marker came back over the push link."""
        if (
            followed.far
            and not followed.past
            and all(inbound.room.hand * 2 <= inbound.room.hand_max for inbound in followed.inbounds)
        ):
            followed.far = False
            followed.joining = JOIN
            self._context.counts["rejoined"] += 1
            self._listen(followed)

    # Acknowledging and time.

    def acknowledge_soon(self, followed: FollowedFeed, inbound: InboundFeed) -> None:
        """The floor of this subscription is worth telling."""
        self._touched[inbound] = None
        if not (inbound.best_effort or followed.peer.is_gone):
            self._tell_floor(followed, inbound)

    def confirm(self, inbound: InboundFeed) -> None:
        """Its publisher named this feed to us: say that we know it, a best-effort subscription too."""
        followed = self.find(inbound)
        if followed is not None and not followed.peer.is_gone:
            self._tell_floor(followed, inbound)

    def _tell_floor(self, followed: FollowedFeed, inbound: InboundFeed) -> None:
        if not self._dirty:
            self._acknowledge_due_ns = self._context.now + self._context.config.liveness.acknowledge_ms * MS
            self._context.wake_by(self._acknowledge_due_ns)
        self._dirty[inbound.subscription, followed.feed] = (followed.peer, inbound)

    def acknowledge(self) -> None:
        """Tell each publisher how far we are."""
        by_peer: dict[str, list[tuple[int, int, int]]] = {}
        for (number, feed), (peer, inbound) in self._dirty.items():
            by_peer.setdefault(peer.name, []).append((number, feed, inbound.told_floor))
        self._dirty.clear()
        self._dirty_bytes = 0
        for name, entries in by_peer.items():
            for begin in range(0, len(entries), ACKNOWLEDGEMENTS_PER_FRAME):
                self._context.send(name, Kind.ACKNOWLEDGE, entries[begin : begin + ACKNOWLEDGEMENTS_PER_FRAME])

    def tick(self) -> None:
        """Repeat what was not answered."""
        now = self._context.now
        dues = self._dues
        while dues and dues[0][0] <= now:
            due_ns, feed = heappop(dues)
            followed = self._restless.get(feed)
            if followed is None or due_ns != followed.queued_ns:
                continue  # it came to rest, or is due at another time
            followed.queued_ns = 0
            if followed.peer.is_gone:
                del self._restless[feed]
                continue
            if not followed.live and not followed.far and now >= followed.joining.due_ns:
                self._join_again(followed)
            self._pull(followed)
            self._note(followed)
        if self._dirty and now >= self._acknowledge_due_ns:
            self.acknowledge()
        self.holding.tick()

    def next_deadline_ns(self) -> int | None:
        """When something has to be repeated or acknowledged."""
        dues = [self._acknowledge_due_ns] if self._dirty else []
        dues += [self._dues[0][0]] if self._dues else []
        holding_ns = self.holding.next_deadline_ns()
        dues += [holding_ns] if holding_ns is not None else []
        return min(dues, default=None)
