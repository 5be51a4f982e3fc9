"""Owed retention that continues on disk: what is written, and what is read back for whom (RULES P2).

While more than half of what may be owed in memory is used, the oldest bursts are written, so that publishers go on in
the other half. A burst leaves memory once its write is over. What is asked for and lies on disk is loaded, and the
question is asked again then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fabric.core.disk import AppendRecords, LoadedBurst, LoadRecords, ReleaseRecords, WriteFailed, WriteFinished
from fabric.core.feeds import OutFeed, Place, Retention, StoredBurst
from fabric.core.guards import Retry
from fabric.core.members import Context, Peer, S
from fabric.core.wire import Drop, Kind

__all__ = ["Question", "Spilling"]

Question = tuple[Peer, Kind, Sequence[Any]]
"""What a peer asked for, as it came."""

WRITE_AGAIN = Retry(1 * S, 2 * S)
"""After the disk refused: space may come back, and a write that fails costs little. With full jitter that is once a
second; the members of one host have one disk, and were refused together."""
RETRY_NS = 1 * S
"""After the disk could not read; nobody else reads there."""
READS_MAX = 10
"""A read that fails so often, a second apart, is given up: what it was for becomes a gap, and those behind it go on."""
WRITING_BYTES_MAX = 16 * 1024 * 1024
"""Asked of the disk at once: a tenth of a second of a slow one."""
PARKED_MAX = 64
"""Questions of one peer that wait for the disk; it repeats what is not answered."""


def _same(question: Question) -> tuple[Any, ...]:
    """What two questions have in common if one answer serves both: all of a fetch but its token, a pull's feed."""
    peer, kind, fields = question
    return (peer.name, peer.incarnation, kind, *fields[: 1 if kind is Kind.PULL else 4])


class Spilling:
    """The disk's share of retention."""

    def __init__(self, context: Context, retention: Retention) -> None:
        self._context, self._retention = context, retention
        self._writes: dict[int, tuple[OutFeed, StoredBurst]] = {}
        """Writes under way, by number, in their order."""
        self._refused_until_ns = self._again_ns = self._failed_reads = 0
        self._refused = WRITE_AGAIN
        self._most = self._most_idle = retention.owed_bytes_max // 2
        """Owed in memory; what is more is written."""
        self._current: Question | None = None
        """The question that the disk is at, one at a time: so no more is loaded than one answer needs."""
        self._parked: deque[Question] = deque()
        """Those behind it."""
        self._asking = self._loading = False
        """Whether the current question is being asked again; whether the disk has still to answer for it."""
        self._loaded: dict[StoredBurst, OutFeed] = {}
        """Bursts on disk whose bytes are here, too, oldest first."""
        self._loaded_bytes = 0

    # Writing.

    def make_room(self, size: int) -> None:
        """A publisher waits for so many bytes, more than there are between half and all of the memory."""
        self._most = max(0, min(self._most, self._retention.owed_bytes_max - size))
        self.write()

    def write_all(self) -> None:
        """Ask the disk to take everything from now on."""
        self._most = self._most_idle = 0
        self._refused_until_ns = 0
        self.write()

    @property
    def is_writing(self) -> bool:
        """Whether the disk has still to answer."""
        return bool(self._writes)

    def write(self) -> None:
        """Ask the disk to take what memory should not have to hold."""
        retention = self._retention
        if self._context.now < self._refused_until_ns:
            return
        while retention.writing_bytes < WRITING_BYTES_MAX:
            found = retention.write_next(self._most)
            if found is None:
                self._most = self._most_idle
                break
            out, burst = found
            number = self._context.next_write()
            self._writes[number] = found
            self._context.emit(
                AppendRecords(
                    number,
                    out.topic,
                    out.feed,
                    burst.first,
                    burst.end - burst.first,
                    burst.frame,
                    burst.payloads or {},
                )
            )

    def on_finished(self, event: WriteFinished) -> None:
        """These bursts need no memory any more. A disk that takes some is worth asking for the rest."""
        self._refused_until_ns, self._refused = 0, WRITE_AGAIN
        for number in [number for number in self._writes if number <= event.number]:
            self._retention.written(*self._writes.pop(number), done=True)
            self._context.counts["bursts_spilled"] += 1
        self.write()

    def on_failed(self, event: WriteFailed) -> None:
        """They stay in memory, first in the queue, and publishers wait meanwhile."""
        refused = sorted(self._writes.keys() & range(event.first, event.number + 1), reverse=True)
        if not refused:
            return
        for number in refused:
            self._retention.written(*self._writes.pop(number), done=False)
        self._context.counts["writes_failed"] += 1
        self._refused = self._refused.after(self._context.now, self._context.chance())
        self._refused_until_ns = self._refused.due_ns
        self._context.wake_by(self._refused_until_ns)

    def on_expired(self, out: OutFeed, first: int, end: int) -> None:
        """Nobody fetched these for too long: they become a gap."""
        given_up = [burst for burst in out.owed if first <= burst.first and burst.end <= end]
        for burst in [burst for burst in given_up if burst.place is Place.DISK]:
            self._retention.lose(out, burst)
            self._context.counts["bursts_expired"] += 1

    def release(self) -> None:
        """Tell the disk what need not be kept."""
        released = self._retention.released
        for feed, below in released.items():
            self._context.emit(ReleaseRecords(feed, below))
        released.clear()
        self.forget()

    def tick(self, ask: Callable[[Question], None]) -> None:
        """The disk may have room again, or be able to read."""
        now = self._context.now
        if self._refused_until_ns and now >= self._refused_until_ns:
            self._refused_until_ns = 0
            self.write()
        if self._again_ns and now >= self._again_ns:
            self._again_ns, reads = 0, self._failed_reads
            self.ask_again(ask)
            self._failed_reads = reads if self._loading else 0

    def next_deadline_ns(self) -> int | None:
        """When the disk is asked again."""
        return min((due for due in (self._refused_until_ns, self._again_ns) if due), default=None)

    # Reading.

    def park(self, out: OutFeed, bursts: Iterable[StoredBurst], question: Question) -> bool:
        """If some of these have to be loaded: ask for them, and keep the question until they are here."""
        absent = tuple(burst.first for burst in bursts if burst.place is Place.DISK and not burst.frame)
        if not absent:
            return False
        if self._current is None or self._asking:
            self._current, self._loading = question, True
            self._context.emit(LoadRecords(out.feed, absent))
        else:
            self._keep(question)
        return True

    def _keep(self, question: Question) -> None:
        """A question takes the place of the same one before it: a peer repeats what is not answered yet."""
        peer, same = question[0], _same(question)
        if question[1] is Kind.FETCH and self._current is not None and _same(self._current) == same:
            return  # its answer is under way
        self._parked = deque(other for other in self._parked if _same(other) != same)
        if sum(other[0] is peer for other in self._parked) >= PARKED_MAX:
            self._context.counts[Drop.NO_ROOM] += 1
        else:
            self._parked.append(question)

    def on_loaded(self, out: OutFeed, bursts: Iterable[LoadedBurst]) -> None:
        """What the current question needs is here, or damaged, or cannot be read just now."""
        self._loading = False
        for first, frame, payloads, lost in bursts:
            burst = out.find(first)
            if burst is None or burst.first != first or burst.place is not Place.DISK:
                continue
            if frame is None and not lost and self._failed_reads < READS_MAX:
                self._again_ns = self._context.now + RETRY_NS
                self._context.wake_by(self._again_ns)
            elif frame is None:
                self._context.counts["bursts_damaged"] += 1
                self._retention.lose(out, burst)
            elif not burst.frame:
                burst.frame, burst.frame_size, burst.payloads = frame, len(frame), payloads
                self._loaded[burst] = out
                self._loaded_bytes += burst.size
                self._context.counts["bursts_loaded"] += 1

    def ask_again(self, ask: Callable[[Question], None]) -> None:
        """The current question, and those behind it until the disk is needed again."""
        if self._again_ns:
            self._failed_reads += 1
            return
        self._failed_reads = 0
        self._asking = True
        while self._current is not None:
            ask(self._current)
            if self._loading:
                break
            self.forget()
            self._current = self._parked.popleft() if self._parked else None
        self._asking = False

    def check_invariants(self) -> None:
        """Assert that no more is loaded than one answer needs, and the sums (I7)."""
        assert self._loaded_bytes == sum(burst.size for burst in self._loaded)
        most = 2 * self._context.config.repair.window_bytes
        assert self._current is not None or self._loaded_bytes <= most or len(self._loaded) == 1
        assert self._retention.writing_bytes == sum(burst.size for _, burst in self._writes.values())

    def forget(self) -> None:
        """Of what was loaded, the latest stays for a while: a large value is asked for in pieces."""
        most = 2 * self._context.config.repair.window_bytes
        newest = next(reversed(self._loaded), None)
        for burst, out in list(self._loaded.items()):
            is_needed = burst.end > out.acknowledged and (self._loaded_bytes <= most or burst is newest)
            if not is_needed:
                del self._loaded[burst]
                self._loaded_bytes -= burst.size
                burst.frame, burst.payloads = b"", None
