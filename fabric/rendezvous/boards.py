"""Meeting at a board: a place where each rank posts an entry that all the others can read.

A rank posts its card, and once it has read the cards of all ranks it posts which incarnations it saw. Whether an
entry can be believed depends on the board:

- Of an entry that saw our own incarnation, its writer was there while we are: always believed, even
  if it has left since.
- A board that is read once (torch's store) believes nothing else. What a rank left behind in an earlier attempt saw an
  earlier incarnation of ours, so it is never mistaken for its present.
- A board that is kept (files, memory) also believes an entry that has not been marked as left: the others of a running
  job finished meeting long ago, and a restarted rank must not wait for them to look again.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol

from fabric.errors import ClosedError, ConfigError, JoinTimeoutError, RendezvousError, shortened
from fabric.rendezvous.cards import CARD_BYTES_MAX, Card, check_integer
from fabric.rendezvous.identity import Identity

__all__ = ["Board", "BoardRendezvous", "Entry", "MemoryBoard", "entry_bytes_max"]

_FIRST_PAUSE_S = 0.001
_LONGEST_PAUSE_S = 0.1
_SEEN_BYTES_EACH = 32  # "65535":18446744073709551615,
_ROOMS_MAX = 1024
_U64 = 2**64


@dataclass(frozen=True, slots=True)
class Entry:
    """What a rank posts: its card, the incarnations that it saw once it saw all, and whether it has left."""

    card: Card
    seen: Mapping[int, int] = field(default_factory=dict)
    left: bool = False

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_fields(), separators=(",", ":"))

    def to_fields(self) -> dict[str, object]:
        """What is written as JSON."""
        return {"card": json.loads(self.card.to_json()), "seen": dict(self.seen), "left": self.left}

    @classmethod
    def from_json(cls, text: str | bytes) -> Entry:
        """The entry in this JSON text.

        Raises:
            RendezvousError: It is malformed.
        """
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RendezvousError("an entry is not JSON") from error
        return cls.from_fields(found)

    @classmethod
    def from_fields(cls, found: object) -> Entry:
        """The entry in what JSON gave.

        Raises:
            RendezvousError: It is malformed.
        """
        if not isinstance(found, dict) or not isinstance(found.get("left"), bool):
            raise RendezvousError("an entry is malformed")
        card = Card.from_fields(found.get("card"))
        return cls(card, _seen(found.get("seen"), card.world_size), found["left"])


def _seen(found: object, world_size: int) -> dict[int, int]:
    if not isinstance(found, dict) or len(found) > world_size:
        raise RendezvousError("an entry does not say whom it saw")
    seen = {}
    for rank, incarnation in found.items():
        if not (rank.isascii() and rank.isdigit() and len(rank) <= len(str(world_size))):
            raise RendezvousError("an entry saw what is no rank")
        try:
            check_integer("incarnation", incarnation, end=_U64)
        except ConfigError as error:
            raise RendezvousError("an entry saw what is no incarnation") from error
        seen[int(rank)] = incarnation
    return seen


def entry_bytes_max(world_size: int) -> int:
    """Bytes of the longest entry of a world of this size."""
    return CARD_BYTES_MAX + 256 + _SEEN_BYTES_EACH * world_size


class Board(Protocol):
    """Where the ranks of one job post their entries.

    All errors of the world are `RendezvousError`, and TimeoutError when the time given to `open` is over.
    """

    kept: ClassVar[bool]
    """Whether it is read again after meeting; see above."""

    def open(self, timeout_s: float) -> None:
        """Reach the board; each `meet` begins with it."""
        ...

    def post(self, entry: Entry) -> None:
        """Put up our entry, in place of an older one of our rank."""
        ...

    def read(self, ranks: Iterable[int]) -> tuple[dict[int, Entry], dict[int, str]]:
        """The entries of these ranks as far as they are there; and why one that is there cannot be read."""
        ...

    def wait(self, seconds: float) -> None:
        """Until something may have changed, at most so long."""
        ...

    def met(self, cards: Mapping[int, Card]) -> None:
        """Everyone was met."""
        ...

    def close(self, entry: Entry | None) -> None:
        """Leave; `entry` is our last word, None if we never posted one. Idempotent."""
        ...


class BoardRendezvous:
    """The ranks of a job meet at a board. One thread at a time."""

    def __init__(self, identity: Identity, board: Board) -> None:
        self.identity = identity
        self._board = board
        self._entry: Entry | None = None
        self._cards: dict[int, Card] = {}
        self._refused: dict[int, str] = {}
        self._closed = False

    def meet(self, card: Card, *, timeout_s: float) -> list[Card]:
        """Post our card and wait for those of all ranks; the cards by rank.

        Raises:
            JoinTimeoutError: Ranks were missing after `timeout_s`; they are named.
            RendezvousError: The board cannot be used, or a newer incarnation of our rank is there.
        """
        self._check(card)
        try:
            return self._meet(card, timeout_s)
        except JoinTimeoutError:
            raise
        except TimeoutError as error:
            raise _late("the members could not meet", timeout_s, str(error)) from error

    def _meet(self, card: Card, timeout_s: float) -> list[Card]:
        started = time.monotonic()
        deadline = started + timeout_s
        self._board.open(timeout_s)
        self._entry, self._cards = Entry(card), {self.identity.rank: card}
        self._board.post(self._entry)
        pause = _FIRST_PAUSE_S
        while missing := self._look():
            left = deadline - time.monotonic()
            if left <= 0:
                raise _late("not all members joined", time.monotonic() - started, self._reason(missing))
            self._board.wait(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        self._board.met(self._cards)
        return self._roster()

    def refresh(self) -> list[Card]:
        """The cards by rank as they are now: a rank that came back has its newer card.

        Raises:
            RendezvousError: The board cannot be used, or a newer incarnation of our rank is there.
        """
        if self._closed:
            raise ClosedError(what="the rendezvous")
        if self._board.kept and self._entry is not None:
            entries, _ = self._board.read(range(self.identity.world_size))
            self._stand(entries)
            for rank, entry in entries.items():
                known = self._cards.get(rank)
                newer = known is None or entry.card.incarnation > known.incarnation
                if newer and not entry.left and not self._objection(rank, entry):
                    self._cards[rank] = entry.card
            self._tell()
        return self._roster()

    def close(self) -> None:
        """Leave the board. Who has not read our card yet still can. Idempotent."""
        if not self._closed:
            self._closed = True
            self._board.close(self._entry and replace(self._entry, left=True))

    def _check(self, card: Card) -> None:
        if self._closed:
            raise ClosedError(what="the rendezvous")
        ours = self.identity
        assert (card.job, card.rank, card.world_size) == (ours.job, ours.rank, ours.world_size), "another's card"

    def _look(self) -> list[int]:
        """Read what is new, tell the others when all were seen, and give the ranks that still cannot be believed."""
        assert self._entry is not None
        entries, self._refused = self._board.read(range(self.identity.world_size))
        self._stand(entries)
        believed = {self.identity.rank}
        for rank, entry in entries.items():
            if rank == self.identity.rank:
                continue
            if objection := self._objection(rank, entry):
                self._refused[rank] = objection
                continue
            believes = self._believes(entry)
            if believes or not entry.left:
                self._cards[rank] = entry.card
            if believes:
                believed.add(rank)
        self._tell()
        return [rank for rank in range(self.identity.world_size) if rank not in believed]

    def _believes(self, entry: Entry) -> bool:
        assert self._entry is not None
        saw_us = entry.seen.get(self.identity.rank) == self._entry.card.incarnation
        return saw_us or (self._board.kept and not entry.left)

    def _tell(self) -> None:
        """Post whom we saw, once we saw all and whenever one of them came back meanwhile."""
        assert self._entry is not None
        seen = {rank: card.incarnation for rank, card in self._cards.items()}
        if len(seen) == self.identity.world_size and seen != self._entry.seen:
            self._entry = replace(self._entry, seen=seen)
            self._board.post(self._entry)

    def _stand(self, entries: Mapping[int, Entry]) -> None:
        """Put our entry up again if another's tidying took it; give way to a newer incarnation of our own rank."""
        assert self._entry is not None
        ours = entries.get(self.identity.rank)
        if ours is None or ours.card.incarnation < self._entry.card.incarnation:
            self._board.post(self._entry)
        elif ours.card.incarnation > self._entry.card.incarnation:
            raise RendezvousError(f"rank {self.identity.rank} was taken over by a newer process, {ours.card.pid}")

    def _objection(self, rank: int, entry: Entry) -> str:
        ours, theirs = self.identity, entry.card
        if (theirs.job, theirs.rank) != (ours.job, rank):
            return "its card is another's"
        if theirs.world_size != ours.world_size:
            return f"it expects {theirs.world_size} ranks, not {ours.world_size}"
        return ""

    def _reason(self, missing: list[int]) -> str:
        names = [f"{rank} ({self._refused[rank]})" if rank in self._refused else str(rank) for rank in missing]
        return f"missing: rank {shortened(names)}"

    def _roster(self) -> list[Card]:
        return [card for _, card in sorted(self._cards.items())]


def _late(detail: str, waited_s: float, state: str) -> JoinTimeoutError:
    return JoinTimeoutError(detail, waited_s=waited_s, state=state)


class _Room:
    """The entries of one job in this process, and how many boards use them."""

    __slots__ = ("changed", "entries", "users")

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.entries: dict[int, Entry] = {}
        self.users = 0


_rooms: dict[tuple[str, str], _Room] = {}
_rooms_lock = threading.Lock()


class MemoryBoard:
    """Members in one process. The room is forgotten when the last of them has left."""

    kept: ClassVar[bool] = True

    def __init__(self, name: str, job: str) -> None:
        self._key = (name, job)
        self._closed = False
        with _rooms_lock:
            if self._key not in _rooms and len(_rooms) >= _ROOMS_MAX:
                raise RendezvousError(f"{_ROOMS_MAX} rooms are open in this process")
            self._room = _rooms.setdefault(self._key, _Room())
            self._room.users += 1

    def open(self, timeout_s: float) -> None:
        """Nothing to reach."""

    def post(self, entry: Entry) -> None:
        """Put up our entry unless a newer incarnation of our rank is there."""
        assert entry.card.rank is not None
        with self._room.changed:
            there = self._room.entries.get(entry.card.rank)
            if there is None or there.card.incarnation <= entry.card.incarnation:
                self._room.entries[entry.card.rank] = entry
                self._room.changed.notify_all()

    def read(self, ranks: Iterable[int]) -> tuple[dict[int, Entry], dict[int, str]]:
        """The entries of these ranks as far as they are there."""
        with self._room.changed:
            return {rank: self._room.entries[rank] for rank in ranks if rank in self._room.entries}, {}

    def wait(self, seconds: float) -> None:
        """Until anyone posts, at most so long."""
        with self._room.changed:
            self._room.changed.wait(seconds)

    def met(self, cards: Mapping[int, Card]) -> None:
        """Nothing to do."""

    def close(self, entry: Entry | None) -> None:
        """Leave our last word; the last to leave takes the room away."""
        if self._closed:
            return
        self._closed = True
        if entry is not None:
            self.post(entry)
        with _rooms_lock:
            self._room.users -= 1
            if not self._room.users:
                del _rooms[self._key]
