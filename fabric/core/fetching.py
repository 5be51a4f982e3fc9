"""Addressed payloads on their way to us: asked for, chunk by chunk, within a bound on what is under way."""

from __future__ import annotations

from collections import Counter, deque

from fabric.core.events import BeginPayload, Buffer, DropPayload, FinishPayload, PlaceChunk
from fabric.core.guards import Retry
from fabric.core.members import MS, Context
from fabric.core.ranges import RangeSet
from fabric.core.wire import Descriptor, Drop, Kind, checksum_of

__all__ = ["Fetching", "Key"]

Key = tuple[int, int]
"""(space, number): a feed and an offset, or the space of a member's requests or replies and a request."""
Line = tuple[str, bool]
"""A peer, and whether these are values of its requests and replies. Those stand in a line of their own, so that no
deadline waits behind a record that the peer cannot read from its disk."""


PIECES_MAX = 1024
"""Separate pieces of one payload that are noted; in order there is only one."""


class _Fetch:
    """One payload. `received`: the bytes that are there. Nothing is taken before `rests_ns`."""

    __slots__ = ("attempts", "descriptor", "key", "line", "peer", "received", "rests_ns", "retry", "size", "started")

    def __init__(self, key: Key, line: Line, descriptor: Descriptor, retry: Retry) -> None:
        self.key, self.line, self.peer, self.descriptor, self.size = key, line, line[0], descriptor, descriptor.size
        self.received = RangeSet()
        self.attempts, self.rests_ns, self.retry, self.started = 0, 0, retry, False


class Fetching:
    """All fetches of this member."""

    def __init__(self, context: Context) -> None:
        self._context = context
        repair = context.config.repair
        self._first_retry = Retry.beyond(repair.retry_ms_first * MS, repair.retry_ms_max * MS)
        self._all: dict[Key, _Fetch] = {}
        self._queues: dict[Line, deque[_Fetch]] = {}
        self._started: Counter[Line] = Counter()
        """How many of each line are under way."""
        self._under_way = 0
        self._token = 0
        self._progress: dict[str, int] = {}
        """When each peer last sent a chunk: payloads of one peer come one after the other."""

    def __contains__(self, key: Key) -> bool:
        return key in self._all

    def begin(self, key: Key, peer: str, descriptor: Descriptor, *, exchange: bool = False) -> None:
        """Fetch a payload from a peer; a second call for the same key changes nothing.

        Of a request or a reply (`exchange`) it does not wait for those of records.
        """
        if key in self._all:
            return
        line = (peer, exchange)
        fetch = self._all[key] = _Fetch(key, line, descriptor, self._first_retry)
        self._queues.setdefault(line, deque()).append(fetch)
        self._start(line)

    def _start(self, line: Line) -> None:
        """Begin what there is room for. One of each line always may be under way: a dead peer holds up no other."""
        ceiling = self._context.config.inboxes.assembly_bytes_max
        queue = self._queues.get(line, ())
        while queue and (not self._started[line] or self._under_way + queue[0].size <= ceiling):
            fetch = queue.popleft()
            if self._all.get(fetch.key) is not fetch:
                continue
            fetch.started = True
            self._started[line] += 1
            self._under_way += fetch.size
            self._context.emit(BeginPayload(*fetch.key, fetch.size))
            self._ask(fetch)
        if not queue:
            self._queues.pop(line, None)

    def _ask(self, fetch: _Fetch) -> None:
        self._token += 1
        first, end = next(fetch.received.missing(0, fetch.size), (0, 0))
        fetch.retry = fetch.retry.after(self._context.now, self._context.chance())
        self._context.wake_by(fetch.retry.due_ns)
        sampled = fetch.descriptor.sample > 0
        self._context.send(fetch.peer, Kind.FETCH, *fetch.key, first, end - first, self._token, sampled)

    def on_chunk(self, peer: str, key: Key, position: int, chunk: Buffer, checksum: int) -> None:
        """A piece came; what is there already is dropped. Where only a sample is summed, each piece has its own sum."""
        fetch, size = self._all.get(key), memoryview(chunk).nbytes
        if fetch is None or fetch.peer != peer or not fetch.started:
            self._context.counts[Drop.DUPLICATE] += 1
            return
        if fetch.descriptor.sample and checksum_of(chunk) != checksum:
            self._context.counts[Drop.CHECKSUM] += 1
            return
        end = position + size
        if not size or end > fetch.size or next(fetch.received.missing(position, end), None) != (position, end):
            self._context.counts[Drop.DUPLICATE if end <= fetch.size else Drop.SHAPE] += 1
            return
        if len(fetch.received) >= PIECES_MAX or self._context.now < fetch.rests_ns:
            self._context.counts[Drop.NO_ROOM] += 1  # in crumbs and not in order, or starved: it is asked for again
            return
        fetch.received.add(position, end)
        self._progress[peer] = self._context.now
        fetch.retry = self._first_retry._replace(due_ns=fetch.retry.due_ns)
        self._context.emit(PlaceChunk(*key, position, chunk))
        if fetch.received.count == fetch.size:
            self._context.emit(FinishPayload(*key, fetch.descriptor.checksum, fetch.descriptor.sample))

    def on_checked(self, key: Key, intact: bool) -> bool | None:
        """The checksum was compared. True: done; False: given up; None: it is fetched once more, or was not ours."""
        fetch = self._all.get(key)
        if fetch is None:
            return None
        fetch.attempts += 1
        if not intact and fetch.attempts < self._context.config.repair.attempts_max:
            self._context.counts["payloads_refetched"] += 1
            fetch.received = RangeSet()
            self._ask(fetch)
            return None
        self.end(key, drop=not intact)
        return intact

    def starve(self, key: Key) -> None:
        """There was no memory for it: all of it is asked for again after a while, when there may be some."""
        fetch, context = self._all.get(key), self._context
        if fetch is None:
            return
        context.counts["out_of_memory"] += 1
        fetch.received = RangeSet()
        fetch.rests_ns = context.now + context.config.repair.retry_ms_max * MS
        fetch.retry = fetch.retry._replace(due_ns=fetch.rests_ns)
        context.wake_by(fetch.rests_ns)
        context.emit(BeginPayload(*key, fetch.size))

    def end(self, key: Key, *, drop: bool = True) -> None:
        """Nobody wants this payload any more, or it is complete."""
        fetch = self._all.pop(key, None)
        if fetch is None:
            return
        if fetch.started:
            self._under_way -= fetch.size
            self._started[fetch.line] -= 1
            if drop:
                self._context.emit(DropPayload(*key))
        for line in list(self._queues):
            self._start(line)

    def forget(self, peer: str) -> list[Key]:
        """The peer is gone: what it has not sent will not come."""
        keys = [fetch.key for fetch in self._all.values() if fetch.peer == peer]
        for key in keys:
            self.end(key)
        return keys

    def tick(self) -> None:
        """Ask again for what stalled: neither it nor anything before it from that peer has moved."""
        for fetch in list(self._all.values()):
            if self._is_asking(fetch) and self._context.now >= self._due_ns(fetch):
                self._context.counts["fetches_repeated"] += 1
                self._ask(fetch)

    def _is_asking(self, fetch: _Fetch) -> bool:
        return fetch.started and fetch.received.count < fetch.size

    def _due_ns(self, fetch: _Fetch) -> int:
        """Not while its peer is sending others, unless that takes long: then the question itself was lost."""
        due_ns = fetch.retry.due_ns
        moved_ns = self._progress.get(fetch.peer, 0) + fetch.retry.wait_ns
        return max(due_ns, min(moved_ns, due_ns + fetch.retry.max_ns))

    def next_deadline_ns(self) -> int | None:
        """When a fetch may have stalled."""
        return min((self._due_ns(fetch) for fetch in self._all.values() if self._is_asking(fetch)), default=None)

    def check_invariants(self) -> None:
        """Assert the sum of what is under way, and that a slot is never left idle (I7, I9)."""
        assert self._under_way == sum(fetch.size for fetch in self._all.values() if fetch.started)
        assert all(self._started[fetch.line] for fetch in self._all.values())
