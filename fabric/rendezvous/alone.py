"""A world of one: nobody to meet."""

from __future__ import annotations

from fabric.errors import ClosedError
from fabric.rendezvous.cards import Card
from fabric.rendezvous.identity import Identity

__all__ = ["AloneRendezvous"]


class AloneRendezvous:
    """Rank 0 of 1; needs no store and no torch."""

    def __init__(self, identity: Identity) -> None:
        assert identity.world_size == 1
        self.identity = identity
        self._cards: list[Card] = []
        self._closed = False

    def meet(self, card: Card, *, timeout_s: float) -> list[Card]:
        """Our own card, at once."""
        if self._closed:
            raise ClosedError(what="the rendezvous")
        self._cards = [card]
        return [card]

    def refresh(self) -> list[Card]:
        """Our own card."""
        if self._closed:
            raise ClosedError(what="the rendezvous")
        return list(self._cards)

    def close(self) -> None:
        """Nothing to give back. Idempotent."""
        self._closed = True
