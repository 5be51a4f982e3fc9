"""The network between members in one process: queues, seeded faults, cuts.

Every choice is drawn from the hub's own `random.Random`, and only while the plan has that fault: a plan without faults
draws nothing. Unlike a socket, a faulty pipe loses, repeats and reorders single frames, on every link that the plan
names: worse than tcp ever does, so that what survives here needs nothing from the network.
"""

from __future__ import annotations

import heapq
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from transports.base import Buffer, Inbound, Link, OneProcess, SocketLimits, blank_statistics

__all__ = ["FaultPlan", "Feed", "Loan", "Mailbox", "MemoryHub", "Pipe"]

FAULTS = ("dropped_full", "dropped_loss", "dropped_cut", "dropped_dead", "duplicated", "straggled")
"""The names of what can happen to a frame."""


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """What goes wrong between members. The default is nothing: frames arrive at once and in order."""

    loss: float = 0.0
    """Probability that a frame is lost, 0 to 1."""

    duplication: float = 0.0
    """Probability that a frame arrives twice, 0 to 1."""

    delay_ms: float = 0.0
    """Mean of each frame's own exponential delay; frames overtake each other, subscriptions do not."""

    straggler: float = 0.0
    """Probability that a frame is delayed `straggler_factor` times as long."""

    straggler_factor: float = 30.0

    links: frozenset[Link] = frozenset(Link)
    """The links that suffer loss, duplication and delay. Cuts concern all of them."""

    data_frames: int = 1000
    """DATA frames that wait for one subscriber before more are dropped."""

    control_frames: int = 4096
    """CONTROL frames that wait for one peer before `SendBlockedError`."""

    bulk_frames: int = 32
    """BULK messages that wait for one peer before `SendBlockedError`."""

    def __post_init__(self) -> None:
        for name in ("loss", "duplication", "straggler"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, not {getattr(self, name)}")
        if self.delay_ms < 0 or self.straggler_factor < 0:
            raise ValueError("delays are not negative")
        if min(self.data_frames, self.control_frames, self.bulk_frames) < 1:
            raise ValueError("a queue holds at least one frame")


class Loan:
    """A chunk that its sender must not touch yet."""

    __slots__ = ("copies",)

    def __init__(self) -> None:
        self.copies = 0

    @property
    def done(self) -> bool:
        """Whether every copy was taken or lost."""
        return not self.copies


class Pipe:
    """One link of one direction between two members; `queued` counts what the reader has not taken."""

    __slots__ = ("blocked", "cap", "link", "peer", "queued", "reader", "writer")

    def __init__(self, writer: Mailbox, reader: Mailbox | None, link: Link, peer: str, cap: int) -> None:
        self.writer, self.reader, self.link, self.peer, self.cap = writer, reader, link, peer, cap
        self.queued = 0
        self.blocked = False


class Feed:
    """A publisher's view of one subscriber: the prefixes that have arrived, and those on their way."""

    __slots__ = ("by_length", "coming", "pipe")

    def __init__(self, pipe: Pipe) -> None:
        self.pipe = pipe
        self.by_length: dict[int, set[bytes]] = {}
        self.coming: deque[tuple[int, bool, bytes]] = deque()

    def wants(self, frame: bytes) -> bool:
        """Whether a prefix of the frame has arrived."""
        return any(frame[:length] in prefixes for length, prefixes in self.by_length.items())

    def apply(self, wanted: bool, prefix: bytes) -> None:
        """Take in one subscription, or its end."""
        prefixes = self.by_length.setdefault(len(prefix), set())
        if wanted:
            prefixes.add(prefix)
        else:
            prefixes.discard(prefix)
            if not prefixes:
                del self.by_length[len(prefix)]


Entry = tuple[int, int, tuple[Buffer, ...], Pipe, Loan | None]
"""Due time, order of sending, frames, where from, loan: a heap of these is an inbox."""


class Mailbox(OneProcess):
    """What the network knows of one life of a member."""

    name: str
    _generation: int

    def __init__(self, name: str) -> None:
        self.name = name
        self._inboxes: tuple[list[Entry], list[Entry], list[Entry]] = ([], [], [])
        self._readers: dict[Mailbox, Feed] = {}
        self._counts = blank_statistics(*FAULTS)
        self._received, self._received_bytes = [0, 0, 0], [0, 0, 0]
        self._unblocked: list[tuple[str, Link]] = []
        self._eventfd = -1
        self._signalled = False

    def _forget(self, pipe: Pipe) -> None:
        """Lose what has not arrived on a pipe."""
        inbox = self._inboxes[pipe.link]
        kept = [entry for entry in inbox if entry[3] is not pipe]
        for entry in inbox:
            if entry[3] is pipe and entry[4] is not None:
                entry[4].copies -= 1
        inbox[:] = kept
        heapq.heapify(inbox)
        pipe.queued = 0

    def _unblock(self, pipe: Pipe) -> None:
        if pipe.blocked and pipe.queued < pipe.cap:
            pipe.blocked = False
            pipe.writer._unblocked.append((pipe.peer, pipe.link))
            pipe.writer._wake()

    def _wake(self) -> None:
        if self._eventfd >= 0 and not self._signalled:
            self._signalled = True
            os.eventfd_write(self._eventfd, 1)

    def _take(self, inbox: list[Entry], now: int, arrived: list[Inbound], cap: int) -> None:
        while inbox and inbox[0][0] <= now and len(arrived) < cap:
            _, _, frames, pipe, loan = heapq.heappop(inbox)
            pipe.queued -= 1
            if pipe.blocked:
                self._unblock(pipe)
            whole: list[Buffer] = list(frames)
            if loan is not None:
                whole[1] = memoryview(bytes(frames[1]))
                loan.copies -= 1
            self._received[pipe.link] += 1
            self._received_bytes[pipe.link] += sum(map(len, whole))
            arrived.append(Inbound(pipe.link, None, whole))


class MemoryHub:
    """The network between `MemoryTransport`s. `clock` gives nanoseconds; a simulation hands in its own.

    Safe to use from many threads; reproducible when used from one.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        plan: FaultPlan | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        limits: SocketLimits | None = None,
    ) -> None:
        self.plan = plan or FaultPlan()
        self.clock = clock
        self.limits = limits or SocketLimits()
        self._random = random.Random(seed)
        self._lock = threading.RLock()
        self._members: dict[tuple[str, int], Mailbox] = {}
        self._generations: dict[str, int] = {}
        self._cuts: set[tuple[str, str]] = set()
        self._order = 0
        self._calm = False
        self._counts = dict.fromkeys(FAULTS, 0)
        self._decide()

    def cut(self, source: str, target: str) -> None:
        """Lose every frame that `source` sends to `target` from now on. What is under way still arrives."""
        with self._lock:
            self._cuts.add((source, target))
            self._decide()

    def heal(self, source: str, target: str) -> None:
        """Undo `cut`. Subscriptions that were made meanwhile get through now."""
        with self._lock:
            self._cuts.discard((source, target))
            self._decide()

    def calm(self) -> None:
        """No more faults: cuts heal, and frames sent from now on arrive at once. The bounds of the queues stay."""
        with self._lock:
            self._calm = True
            self._cuts.clear()
            self._decide()

    def late_frames(self) -> int:
        """How many frames are still delayed; in a calm network only those from before."""
        with self._lock:
            now = self.clock()
            return sum(entry[0] > now for member in self._members.values() for box in member._inboxes for entry in box)

    def statistics(self) -> dict[str, int]:
        """Faults so far, by kind, over all members and their earlier lives."""
        with self._lock:
            return dict(self._counts)

    def _decide(self) -> None:
        plan = self.plan
        harmful = plan.loss > 0 or plan.duplication > 0 or plan.delay_ms > 0
        self._harmed = plan.links if harmful and not self._calm else frozenset[Link]()
        self._quiet = not self._harmed and not self._cuts

    def _enter(self, member: Mailbox) -> int:
        generation = self._generations.get(member.name, 0) + 1
        self._generations[member.name] = generation
        self._members[member.name, generation] = member
        return generation

    def _count(self, writer: Mailbox, reason: str) -> None:
        self._counts[reason] += 1
        writer._counts[reason] += 1

    def _transfer(self, pipe: Pipe, frames: tuple[Buffer, ...], loan: Loan | None) -> None:
        """Move a message towards the reader. The caller holds the lock."""
        now = self.clock()
        if self._quiet:
            self._push(pipe, now, frames, loan)
            return
        writer, reader, plan = pipe.writer, pipe.reader, self.plan
        assert reader is not None
        if (writer.name, reader.name) in self._cuts:
            self._count(writer, "dropped_cut")
        elif pipe.link not in self._harmed:
            self._push(pipe, now, frames, loan)
        elif plan.loss and self._random.random() < plan.loss:
            self._count(writer, "dropped_loss")
        else:
            self._push(pipe, now + self._delay(writer), frames, loan)
            if plan.duplication and self._random.random() < plan.duplication:
                self._count(writer, "duplicated")
                self._push(pipe, now + self._delay(writer), frames, loan)

    def _delay(self, writer: Mailbox) -> int:
        plan = self.plan
        if not plan.delay_ms:
            return 0
        delay = self._random.expovariate(1 / plan.delay_ms)
        if plan.straggler and self._random.random() < plan.straggler:
            self._count(writer, "straggled")
            delay *= plan.straggler_factor
        return int(delay * 1e6)

    def _push(self, pipe: Pipe, due: int, frames: tuple[Buffer, ...], loan: Loan | None) -> None:
        reader = pipe.reader
        assert reader is not None
        self._order += 1
        pipe.queued += 1
        if loan is not None:
            loan.copies += 1
        heapq.heappush(reader._inboxes[pipe.link], (due, self._order, frames, pipe, loan))
        if reader._eventfd >= 0:
            reader._wake()
