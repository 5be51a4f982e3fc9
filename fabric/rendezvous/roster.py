"""Meeting through a member: `tcp://host:port` is any member's control address, and it answers with the roster.

The socket belongs to the engine, which lends us `ask`. The first member is the one that listens at the address
itself; it takes its cards from the engine's roster, where they arrive as the others ask.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from urllib.parse import urlsplit

from fabric.errors import ClosedError, ConfigError, JoinTimeoutError, RendezvousError, shortened
from fabric.rendezvous.cards import Card
from fabric.rendezvous.identity import Identity

__all__ = ["Ask", "Roster", "TcpRendezvous"]

Ask = Callable[[str, Card, float], list[Card]]
"""`ask(address, our_card, timeout_s)` sends our card to that control address and gives the roster that it answered
with; raises TimeoutError."""

Roster = Callable[[], list[Card]]
"""The cards that reached our own control address."""

_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.2
_ASK_SLICE_S = 2.0  # An answer takes one round trip; a lost question is asked again.
_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


class TcpRendezvous:
    """The ranks of a job meet at a member's control address. One thread at a time.

    Raises:
        ConfigError: The address is not `tcp://host:port`.
    """

    def __init__(self, address: str, ask: Ask, *, identity: Identity, roster: Roster | None = None) -> None:
        self._place = _place(address)
        self._address, self._ask, self._roster_here = address, ask, roster
        self.identity = identity
        self._card: Card | None = None
        self._cards: dict[int, Card] = {}
        self._state = "nobody answered yet"
        self._closed = False

    def meet(self, card: Card, *, timeout_s: float) -> list[Card]:
        """Hand in our card and ask until those of all ranks are there; the cards by rank.

        Raises:
            JoinTimeoutError: Ranks were missing after `timeout_s`; they are named.
            RendezvousError: The address belongs to another job.
        """
        if self._closed:
            raise ClosedError(what="the rendezvous")
        assert card.rank == self.identity.rank, "another's card"
        self._card, self._cards = card, {card.rank: card}
        started = time.monotonic()
        deadline = started + timeout_s
        pause = _FIRST_PAUSE_S
        while True:
            self._look(max(0.0, min(_ASK_SLICE_S, deadline - time.monotonic())))
            missing = [rank for rank in range(self.identity.world_size) if rank not in self._cards]
            if not missing:
                return self._sorted()
            left = deadline - time.monotonic()
            if left <= 0:
                state = f"{self._state}; missing: rank {shortened(missing)}"
                raise JoinTimeoutError("not all members joined", waited_s=time.monotonic() - started, state=state)
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def refresh(self) -> list[Card]:
        """Ask once more; the cards by rank, as before if nobody answers.

        Raises:
            RendezvousError: The address belongs to another job by now.
        """
        if self._closed:
            raise ClosedError(what="the rendezvous")
        if self._card is not None:
            self._look(_ASK_SLICE_S)
        return self._sorted()

    def close(self) -> None:
        """Nothing to give back: the socket is the engine's. Idempotent."""
        self._closed = True

    def _look(self, timeout_s: float) -> None:
        assert self._card is not None
        if self._roster_here is not None and self._is_here(self._card):
            found, self._state = self._roster_here(), "we listen at the address ourselves"
        else:
            try:
                found, self._state = self._ask(self._address, self._card, timeout_s), f"{self._address} answered"
            except TimeoutError:
                self._state = f"{self._address} did not answer"
                return
        for card in found:
            self._take(card)

    def _take(self, card: Card) -> None:
        ours = self.identity
        if card.job != ours.job:
            raise RendezvousError(f"{self._address} belongs to job {card.job!r}, not {ours.job!r}")
        if card.rank is None:
            return
        if card.world_size != ours.world_size:
            raise RendezvousError(f"rank {card.rank} expects {card.world_size} ranks, not {ours.world_size}")
        if card.rank == ours.rank:
            self._stand(card)
            return
        known = self._cards.get(card.rank)
        if known is None or known.incarnation < card.incarnation:
            self._cards[card.rank] = card

    def _stand(self, card: Card) -> None:
        """Give way to a newer incarnation of our own rank."""
        assert self._card is not None
        if card.incarnation > self._card.incarnation:
            raise RendezvousError(f"rank {self.identity.rank} was taken over by a newer process, {card.pid}")

    def _is_here(self, card: Card) -> bool:
        try:
            return _place(card.endpoints[1]) == self._place
        except ConfigError:
            return False  # our control link is not tcp

    def _sorted(self) -> list[Card]:
        return [card for _, card in sorted(self._cards.items())]


def _place(address: str) -> tuple[str, int]:
    """Host and port, one name for all that mean this machine's loopback."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or not port or address != f"tcp://{parts.netloc}":
        raise ConfigError(f"{address[:80]!r} is not tcp://host:port", field="rendezvous")
    return ("localhost" if host in _LOOPBACK else host), port
