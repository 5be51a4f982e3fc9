"""Which slots of this member's arena readers may still need (RULES: shared memory).

A slot is reused once retention has let go of it and no reader needs it; what each of them needs it told in HOLDS. Time
frees nothing: only what a reader says, or its proven death.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from fabric.core.feeds import OutFeed
from fabric.core.members import Context, Peer, S
from fabric.core.ranges import RangeSet
from fabric.core.sharing import AdmitReader, FreeSlots, ReaderGone, RefuseReader, SlotsForgotten
from fabric.core.wire import OFFSET_END, Kind

__all__ = ["Leases"]

RECALL_NS = 1 * S
"""So long a slot waits for a reader before that is asked again what it holds."""
FEEDS_PER_FRAME = 1000

Life = tuple[str, int]
"""One life of a member: its name and incarnation. Views that a life handed out end with its process, not with it."""


class _Needs:
    """What one reader needs of one feed: all slots from `floor` on, and those that are `held`.

    Of one that left, or began anew, without a last word, what was published before it did: `end`.
    """

    __slots__ = ("end", "floor", "held", "serial")

    def __init__(self) -> None:
        self.serial, self.floor, self.held, self.end = -1, 0, RangeSet(), OFFSET_END

    def include(self, offset: int) -> bool:
        """Whether this slot may not be reused."""
        return self.floor <= offset < self.end or offset in self.held

    @property
    def is_over(self) -> bool:
        """Whether the reader follows the feed no longer, and holds nothing."""
        return self.floor >= self.end and not self.held.firsts


class Leases:
    """All slots that retention let go of, and who may need them."""

    def __init__(self, context: Context, by_id: Mapping[int, OutFeed]) -> None:
        self._context, self._by_id = context, by_id
        self._needs: dict[int, dict[Life, _Needs]] = {}
        self._forgotten: dict[int, dict[int, int]] = {}
        """Of each feed the offsets, with their bytes, that retention let go of and some reader needs."""
        self._dead: dict[str, int] = {}
        """The newest life of each reader that is proven dead: what it said may come after the proof."""
        self._refused: set[Life] = set()
        self._recall_ns = 0
        """When readers are asked again; 0 while nothing waits for them."""

    # Readers.

    def on_holds(self, peer: Peer, rows: Iterable[tuple[int, int, bool, int, list[tuple[int, int]]]]) -> None:
        """A reader says what it needs; if it asks, it is told that we wait for it from now on."""
        life = peer.name, peer.incarnation
        if peer.incarnation <= self._dead.get(peer.name, -1):
            return
        leased = []
        for feed, serial, asks, floor, held in rows:
            if feed not in self._by_id:
                continue
            readers = self._needs.setdefault(feed, {})
            needs = readers.setdefault(life, _Needs())
            if serial <= needs.serial:
                continue  # overtaken: a connection that was made again may carry what the one before had, later
            needs.serial, needs.floor, needs.held = serial, floor, RangeSet(held)
            if asks:
                leased.append((feed, serial))
            if needs.is_over:
                del readers[life]
            self._look(feed)
        if leased:
            self._context.send(peer.name, Kind.LEASED, leased)

    def shared_with(self, feed: int) -> Collection[Life]:
        """The lives that read this feed in our arena. From any thread."""
        needs = list(self._needs.get(feed, {}).items())
        return [life for life, needed in needs if needed.floor < OFFSET_END == needed.end]

    def replace(self, before: Peer, peer: Peer) -> None:
        """A member begins anew. In another process the life before may not know it, and reads on until that ends."""
        if before.card.pid == peer.card.pid:
            self.leave(before)

    def leave(self, peer: Peer) -> None:
        """A member said goodbye, or begins anew: it reads nothing more, but what it holds its process may still use."""
        life = peer.name, peer.incarnation
        for feed, readers in self._needs.items():
            needs = readers.get(life)
            if needs is not None:
                needs.end = self._by_id[feed].end
                if needs.is_over:
                    del readers[life]
                self._look(feed)

    def on_gone(self, event: ReaderGone) -> None:
        """This process is proven dead."""
        life = event.name, event.incarnation
        self._dead[event.name] = max(event.incarnation, self._dead.get(event.name, -1))
        self._refused.discard(life)
        for feed, readers in self._needs.items():
            if readers.pop(life, None) is not None:
                self._look(feed)

    # Slots.

    def on_forgotten(self, event: SlotsForgotten) -> None:
        """Retention let go of these."""
        free = []
        for feed, offset, size in event.slots:
            if any(needs.include(offset) for needs in self._needs.get(feed, {}).values()):
                self._forgotten.setdefault(feed, {})[offset] = size
            else:
                free.append((feed, offset))
        self._free(free)
        if self._forgotten and not self._recall_ns:
            self._recall_ns = self._context.now + RECALL_NS
            self._context.wake_by(self._recall_ns)

    def _look(self, feed: int) -> None:
        """Some reader needs less of this feed."""
        waiting = self._forgotten.get(feed)
        if not waiting:
            return
        readers = self._needs.get(feed, {}).values()
        free = [offset for offset in waiting if not any(needs.include(offset) for needs in readers)]
        for offset in free:
            del waiting[offset]
        if not waiting:
            del self._forgotten[feed]
        self._free([(feed, offset) for offset in free])

    def _free(self, slots: list[tuple[int, int]]) -> None:
        if slots:
            self._context.emit(FreeSlots(slots))

    def tick(self) -> None:
        """Ask those again that keep slots from being used, and find out who keeps too many."""
        if not self._recall_ns or self._context.now < self._recall_ns:
            return
        self._recall_ns = self._context.now + RECALL_NS if self._forgotten else 0
        kept: dict[Life, int] = {}
        feeds: dict[Life, list[tuple[int, int]]] = {}
        for feed, waiting in self._forgotten.items():
            for life, needs in self._needs.get(feed, {}).items():
                needed = [offset for offset in waiting if needs.include(offset)]
                if needed:
                    kept[life] = kept.get(life, 0) + sum(waiting[offset] for offset in needed)
                    feeds.setdefault(life, []).append((feed, max(needed) + 1))
        for (name, _), asked in feeds.items():
            self._context.send(name, Kind.RECALL, asked[:FEEDS_PER_FRAME])
        self._judge(kept)

    def _judge(self, kept: Mapping[Life, int]) -> None:
        """Who keeps half of the arena from being used gets values by socket from now on, until it let go of them."""
        for life, size in kept.items():
            if size > self._context.config.arena.bytes_max // 2 and life not in self._refused:
                self._refused.add(life)
                self._context.counts["readers_refused"] += 1
                self._context.emit(RefuseReader(*life))
        for life in self._refused - kept.keys():
            self._refused.discard(life)
            self._context.emit(AdmitReader(*life))

    def next_deadline_ns(self) -> int | None:
        """When readers are asked again."""
        return self._recall_ns or None

    def check_invariants(self) -> None:
        """Assert that every slot that waits is needed by somebody."""
        for feed, waiting in self._forgotten.items():
            readers = self._needs.get(feed, {}).values()
            assert all(any(needs.include(offset) for needs in readers) for offset in waiting)
        assert not self._forgotten or self._recall_ns
