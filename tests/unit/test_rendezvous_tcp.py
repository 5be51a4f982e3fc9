from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fabric.errors import ClosedError, JoinTimeoutError, RendezvousError
from fabric.rendezvous import Card, TcpRendezvous, open_rendezvous
from fabric.rendezvous.identity import Identity
from tests.harness.cards import a_card

HOME = "tcp://127.0.0.1:7000"
BRIEF_S = 0.05
LONG_S = 20.0


class Town:
    """What the engines of all members do with a card that reaches them: keep it, and answer with all they have."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.cards: dict[int | None, Card] = {}
        self.open = True
        self.asked = 0

    def ask(self, address: str, card: Card, timeout_s: float) -> list[Card]:
        assert address == HOME
        assert 0 <= timeout_s <= LONG_S
        with self.lock:
            self.asked += 1
            if not self.open:
                raise TimeoutError
            self.cards[card.rank] = card
            return list(self.cards.values())

    def roster(self) -> list[Card]:
        with self.lock:
            return list(self.cards.values())


def at_home(rank: int, world_size: int = 2, **changed: Any) -> Card:
    endpoint = f"tcp://localhost:{7000 + rank}"
    return a_card(rank, world_size, endpoints=(f"{endpoint}0", endpoint, f"{endpoint}1"), **changed)


def enter(town: Town, rank: int, world_size: int = 2) -> TcpRendezvous:
    place = open_rendezvous(
        HOME, rank=rank, world_size=world_size, job="training", ask=town.ask, roster=town.roster if rank == 0 else None
    )
    assert isinstance(place, TcpRendezvous)
    return place


def test_all_ranks_meet_through_the_one_that_listens_there() -> None:
    town, cards = Town(), [at_home(rank, 3) for rank in range(3)]
    town.cards[0] = cards[0]
    with ThreadPoolExecutor(3) as pool:
        met = [pool.submit(enter(town, rank, 3).meet, cards[rank], timeout_s=LONG_S) for rank in (2, 0, 1)]
        assert [future.result() for future in met] == [cards] * 3


def test_who_listens_at_the_address_does_not_ask_itself() -> None:
    town, cards = Town(), [at_home(rank) for rank in range(2)]
    town.cards = {1: cards[1]}
    assert enter(town, 0).meet(cards[0], timeout_s=LONG_S) == cards
    assert town.asked == 0


def test_a_first_member_without_a_roster_asks_itself() -> None:
    town, cards = Town(), [at_home(rank) for rank in range(2)]
    town.cards = {1: cards[1]}
    place = TcpRendezvous(HOME, town.ask, identity=Identity(0, 2, "training"))
    assert place.meet(cards[0], timeout_s=LONG_S) == cards
    assert town.asked == 1


def test_a_missing_rank_is_named_with_what_the_address_did() -> None:
    town = Town()
    with pytest.raises(JoinTimeoutError, match=r"7000 answered; missing: rank 0, 2"):
        enter(town, 1, 3).meet(at_home(1, 3), timeout_s=BRIEF_S)
    town.open = False
    with pytest.raises(JoinTimeoutError, match=r"7000 did not answer; missing: rank 0, 2"):
        enter(town, 1, 3).meet(at_home(1, 3), timeout_s=BRIEF_S)
    with pytest.raises(JoinTimeoutError, match=r"we listen at the address ourselves; missing: rank 2"):
        enter(town, 0, 3).meet(at_home(0, 3), timeout_s=BRIEF_S)


def test_an_address_that_answers_late_is_asked_again() -> None:
    town, cards = Town(), [at_home(rank) for rank in range(2)]
    town.cards, town.open = {0: cards[0]}, False
    place = enter(town, 1)
    with ThreadPoolExecutor(1) as pool:
        met = pool.submit(place.meet, cards[1], timeout_s=LONG_S)
        while town.asked < 2:
            threading.Event().wait(0.001)
        town.open = True
        assert met.result() == cards


def test_another_job_at_the_address_is_refused_by_name() -> None:
    town = Town()
    town.cards[0] = at_home(0, job="another")
    with pytest.raises(RendezvousError, match="belongs to job 'another', not 'training'"):
        enter(town, 1).meet(at_home(1), timeout_s=LONG_S)


def test_a_rank_of_another_world_size_is_refused() -> None:
    town = Town()
    town.cards[0] = at_home(0, 3)
    with pytest.raises(RendezvousError, match="rank 0 expects 3 ranks, not 2"):
        enter(town, 1).meet(at_home(1), timeout_s=LONG_S)


def test_a_newer_incarnation_of_ours_takes_over() -> None:
    town = Town()
    town.cards[0] = at_home(0)
    place = enter(town, 1)
    place.meet(at_home(1, incarnation=4), timeout_s=LONG_S)
    town.cards[1] = at_home(1, incarnation=5)
    town.ask = lambda *_: town.roster()  # type: ignore[method-assign]
    with pytest.raises(RendezvousError, match="taken over"):
        enter(town, 1).meet(at_home(1, incarnation=4), timeout_s=LONG_S)


def test_refreshing_sees_who_came_back_and_survives_silence() -> None:
    town, cards = Town(), [at_home(rank) for rank in range(2)]
    town.cards[0] = cards[0]
    place = enter(town, 1)
    assert place.refresh() == []
    assert place.meet(cards[1], timeout_s=LONG_S) == cards
    back = at_home(0, incarnation=2)
    town.cards[0] = back
    assert place.refresh() == [back, cards[1]]
    town.cards[0] = cards[0]
    assert place.refresh() == [back, cards[1]], "an older card does not replace a newer one"
    town.open = False
    assert place.refresh() == [back, cards[1]]


def test_observers_in_the_roster_are_no_ranks() -> None:
    town, cards = Town(), [at_home(rank) for rank in range(2)]
    town.cards = {None: a_card(None), 0: cards[0]}
    assert enter(town, 1).meet(cards[1], timeout_s=LONG_S) == cards


def test_a_member_without_a_tcp_link_still_asks() -> None:
    town = Town()
    town.cards[1] = at_home(1)
    card = a_card(0)
    assert enter(town, 0).meet(card, timeout_s=LONG_S) == [card, town.cards[1]]


def test_closed_is_closed() -> None:
    place = enter(Town(), 0)
    place.close()
    place.close()
    with pytest.raises(ClosedError):
        place.meet(at_home(0), timeout_s=BRIEF_S)
    with pytest.raises(ClosedError):
        place.refresh()
