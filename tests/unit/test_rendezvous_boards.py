"""One contract for the boards of one process: memory, files, and torch's store with rank 0 as its host."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from fabric.errors import ClosedError, ConfigError, JoinTimeoutError, RendezvousError
from fabric.rendezvous import Card, Rendezvous, open_rendezvous
from fabric.rendezvous import boards as boards_room
from fabric.rendezvous.boards import BoardRendezvous, Entry
from fabric.rendezvous.identity import Identity, StoreAddress
from fabric.rendezvous.shared import FileBoard
from fabric.rendezvous.store import StoreBoard
from tests.harness.cards import a_card

Enter = Callable[..., Rendezvous]
BRIEF_S = 0.05
LONG_S = 20.0


@pytest.fixture(params=["memory", "file", pytest.param("store", marks=pytest.mark.torch)])
def kind(request: pytest.FixtureRequest) -> str:
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def enter(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Enter]:
    """`enter(rank, world_size=2)` opens the rendezvous of the kind under test; all are closed at the end."""
    opened: list[Rendezvous] = []
    spec = {"memory": f"memory://{tmp_path.name}", "file": f"file://{tmp_path}/cards", "store": "env"}[kind]
    user_store = None
    if kind == "store":
        distributed = pytest.importorskip("torch.distributed", reason="the store is torch's")
        # As after the user's init_process_group: a store of rank 0 is there, on a port that the system chose.
        user_store = distributed.TCPStore("localhost", 0, is_master=True, multi_tenant=True, wait_for_workers=False)
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(user_store.port))

    def enter(rank: int, world_size: int = 2, job: str = "training") -> Rendezvous:
        place = open_rendezvous(spec, rank=rank, world_size=world_size, job=job)
        opened.append(place)
        return place

    yield enter
    # Clients of the store first: its host waits for those who still read.
    for place in sorted(opened, key=lambda place: -place.identity.rank):
        place.close()
    del user_store


def meet_all(places: list[Rendezvous], cards: list[Card], *, timeout_s: float = LONG_S) -> list[list[Card]]:
    with ThreadPoolExecutor(len(places)) as pool:
        waiting: list[Future[list[Card]]] = [
            pool.submit(place.meet, card, timeout_s=timeout_s) for place, card in zip(places, cards, strict=True)
        ]
        return [future.result() for future in waiting]


def test_every_rank_meets_every_other(enter: Enter) -> None:
    cards = [a_card(rank, 4, incarnation=10 + rank) for rank in range(4)]
    assert meet_all([enter(rank, 4) for rank in (3, 1, 0, 2)], [cards[rank] for rank in (3, 1, 0, 2)]) == [cards] * 4


def test_a_missing_rank_is_named(enter: Enter) -> None:
    cards = [a_card(rank, 4) for rank in range(4)]
    with pytest.raises(JoinTimeoutError) as caught:
        enter(0, 4).meet(cards[0], timeout_s=BRIEF_S)
    assert "missing: rank 1, 2, 3" in caught.value.fields["state"]
    assert caught.value.retriable


def test_after_a_timeout_the_same_rank_can_try_again(enter: Enter) -> None:
    first = enter(0)
    with pytest.raises(JoinTimeoutError):
        first.meet(a_card(0, incarnation=1), timeout_s=BRIEF_S)
    first.close()
    cards = [a_card(0, incarnation=2), a_card(1, incarnation=1)]
    assert meet_all([enter(0), enter(1)], cards) == [cards] * 2


def test_a_second_round_of_the_same_job_meets_the_second_incarnations(enter: Enter) -> None:
    for round_number in (1, 2, 3):
        cards = [a_card(rank, incarnation=round_number) for rank in range(2)]
        places = [enter(rank) for rank in range(2)]
        assert meet_all(places, cards) == [cards] * 2
        for place in reversed(places):
            place.close()


def test_what_an_earlier_run_left_is_not_mistaken_for_a_present_member(enter: Enter) -> None:
    places = [enter(rank) for rank in range(2)]
    meet_all(places, [a_card(rank, incarnation=1) for rank in range(2)])
    for place in reversed(places):
        place.close()
    with pytest.raises(JoinTimeoutError, match="missing: rank 1"):
        enter(0).meet(a_card(0, incarnation=2), timeout_s=BRIEF_S)


def test_jobs_do_not_see_each_other(enter: Enter) -> None:
    other = enter(1, job="another")
    with pytest.raises(JoinTimeoutError):
        other.meet(a_card(1, job="another"), timeout_s=BRIEF_S)
    with pytest.raises(JoinTimeoutError, match="missing: rank 1"):
        enter(0).meet(a_card(0), timeout_s=BRIEF_S)


def test_a_rank_of_another_world_size_is_refused_with_its_reason(enter: Enter) -> None:
    wrong = enter(1, world_size=3)
    with pytest.raises(JoinTimeoutError):
        wrong.meet(a_card(1, 3), timeout_s=BRIEF_S)
    with pytest.raises(JoinTimeoutError, match=r"missing: rank 1 \(it expects 3 ranks, not 2\)"):
        enter(0).meet(a_card(0), timeout_s=BRIEF_S)


def test_closed_is_closed_and_closing_twice_is_well(enter: Enter) -> None:
    place = enter(0)
    place.close()
    place.close()
    with pytest.raises(ClosedError):
        place.meet(a_card(0), timeout_s=BRIEF_S)
    with pytest.raises(ClosedError):
        place.refresh()


def test_refreshing_before_and_after_meeting_gives_what_is_known(enter: Enter) -> None:
    places, cards = [enter(rank) for rank in range(2)], [a_card(rank) for rank in range(2)]
    assert places[0].refresh() == []
    meet_all(places, cards)
    assert [place.refresh() for place in places] == [cards] * 2


@pytest.mark.parametrize("kind", ["memory", "file"], indirect=True)
class TestABoardThatIsKept:
    def test_a_rank_that_came_back_meets_at_once_and_is_seen_by_refreshing(self, enter: Enter) -> None:
        places = [enter(rank) for rank in range(2)]
        meet_all(places, [a_card(rank, incarnation=1) for rank in range(2)])
        places[1].close()
        back = enter(1)
        cards = [a_card(0, incarnation=1), a_card(1, incarnation=2)]
        assert back.meet(cards[1], timeout_s=LONG_S) == cards
        assert places[0].refresh() == cards

    def test_a_rank_that_left_at_once_can_still_be_met(self, enter: Enter) -> None:
        fast, slow = enter(0), enter(1)
        cards = [a_card(0, incarnation=5), a_card(1, incarnation=6)]
        assert isinstance(slow, BoardRendezvous)
        slow._board.open(1.0)
        slow._board.post(Entry(cards[1]))
        assert fast.meet(cards[0], timeout_s=LONG_S) == cards
        fast.close()
        assert slow.meet(cards[1], timeout_s=LONG_S) == cards

    def test_an_older_incarnation_gives_way_to_a_newer_one_of_its_rank(self, enter: Enter) -> None:
        with pytest.raises(JoinTimeoutError):
            enter(0).meet(a_card(0, incarnation=9), timeout_s=BRIEF_S)
        with pytest.raises(RendezvousError, match="taken over by a newer process"):
            enter(0).meet(a_card(0, incarnation=8), timeout_s=BRIEF_S)

    def test_refreshing_does_not_go_back_to_an_older_card(self, enter: Enter) -> None:
        places, cards = [enter(rank) for rank in range(2)], [a_card(rank, incarnation=5) for rank in range(2)]
        meet_all(places, cards)
        place = places[0]
        assert isinstance(place, BoardRendezvous)
        place._cards[1] = newer = a_card(1, incarnation=6)  # as if a shared file system still showed the file before
        assert place.refresh() == [cards[0], newer]

    def test_a_rank_whose_successor_is_there_learns_it_by_refreshing(self, enter: Enter) -> None:
        places = [enter(rank) for rank in range(2)]
        meet_all(places, [a_card(rank, incarnation=1) for rank in range(2)])
        enter(1).meet(a_card(1, incarnation=2), timeout_s=LONG_S)
        with pytest.raises(RendezvousError, match="taken over"):
            places[1].refresh()


@pytest.mark.parametrize("kind", ["file"], indirect=True)
class TestFiles:
    @staticmethod
    def folder(tmp_path: Path) -> Path:
        (found,) = (tmp_path / "cards").iterdir()
        return found

    def test_cards_are_private_and_whole_and_tidied_away_by_the_last(self, enter: Enter, tmp_path: Path) -> None:
        places = [enter(rank) for rank in range(2)]
        meet_all(places, [a_card(rank) for rank in range(2)])
        folder = self.folder(tmp_path)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {
            "rank-0.json": 0o600,
            "rank-1.json": 0o600,
        }
        places[0].close()
        assert len(list(folder.iterdir())) == 2, "rank 1 may still read"
        places[1].close()
        assert not folder.exists()

    def test_a_card_that_vanished_is_put_up_again(self, enter: Enter, tmp_path: Path) -> None:
        place = enter(0)
        with pytest.raises(JoinTimeoutError):
            place.meet(a_card(0), timeout_s=BRIEF_S)
        card = self.folder(tmp_path) / "rank-0.json"
        card.unlink()
        card.parent.rmdir()
        place.refresh()
        assert card.exists()

    def test_the_card_of_a_dead_process_does_not_count(self, enter: Enter, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            board = FileBoard(tmp_path / "cards", Identity(1, 2, "training"))
            board.open(1.0)
            board.post(Entry(a_card(1, pid=child.pid)))
            assert set(board.read(range(2))[0]) == {1}
            assert child.stdin is not None
            child.stdin.close()
        with pytest.raises(JoinTimeoutError, match=r"rank 1 \(process \d+ has died\)"):
            enter(0).meet(a_card(0), timeout_s=BRIEF_S)

    @pytest.mark.parametrize(
        "garbage", [b"", b"{", b"[]", b"[" * 5000, b"\xff", b"{}" + b" " * 20_000, b'{"left":false}']
    )
    def test_garbage_in_place_of_a_card_is_named_and_can_be_replaced(
        self, enter: Enter, tmp_path: Path, garbage: bytes
    ) -> None:
        place = enter(0)
        with pytest.raises(JoinTimeoutError):
            place.meet(a_card(0), timeout_s=BRIEF_S)
        (self.folder(tmp_path) / "rank-1.json").write_bytes(garbage)
        with pytest.raises(JoinTimeoutError, match=r"missing: rank 1 \("):
            place.meet(a_card(0), timeout_s=BRIEF_S)
        cards = [a_card(0), a_card(1)]
        assert enter(1).meet(cards[1], timeout_s=LONG_S) == cards

    def test_the_last_word_of_a_process_that_has_ended_counts(self, enter: Enter, tmp_path: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            board = FileBoard(tmp_path / "cards", Identity(1, 2, "training"))
            board.open(1.0)
            gone = a_card(1, pid=child.pid)
            board.post(Entry(gone, {0: 7}, left=True))
            assert child.stdin is not None
            child.stdin.close()
        with pytest.raises(JoinTimeoutError, match="missing: rank 1"):
            enter(0).meet(a_card(0, incarnation=6), timeout_s=BRIEF_S)
        card = a_card(0, incarnation=7)
        assert enter(0).meet(card, timeout_s=LONG_S) == [card, gone]

    def test_a_link_or_a_pipe_in_place_of_a_card_is_not_followed(self, enter: Enter, tmp_path: Path) -> None:
        place = enter(0, world_size=3)
        with pytest.raises(JoinTimeoutError):
            place.meet(a_card(0, 3), timeout_s=BRIEF_S)
        secret = tmp_path / "secret.json"
        secret.write_text(Entry(a_card(1, 3)).to_json(), encoding="utf-8")
        (self.folder(tmp_path) / "rank-1.json").symlink_to(secret)
        os.mkfifo(self.folder(tmp_path) / "rank-2.json", 0o600)
        with pytest.raises(JoinTimeoutError, match=r"rank 1 \(its file cannot be read.*2 \(its file is not ours"):
            place.meet(a_card(0, 3), timeout_s=BRIEF_S)

    def test_a_directory_that_others_may_enter_is_refused(self, enter: Enter, tmp_path: Path) -> None:
        place = enter(0)
        with pytest.raises(JoinTimeoutError):
            place.meet(a_card(0), timeout_s=BRIEF_S)
        self.folder(tmp_path).chmod(0o755)
        with pytest.raises(RendezvousError, match="no other may enter"):
            enter(1).meet(a_card(1), timeout_s=BRIEF_S)

    def test_a_restarted_group_does_not_see_the_cards_of_the_group_before(
        self, enter: Enter, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(JoinTimeoutError):
            enter(1).meet(a_card(1), timeout_s=BRIEF_S)
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        with pytest.raises(JoinTimeoutError, match="missing: rank 1"):
            enter(0).meet(a_card(0), timeout_s=BRIEF_S)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    place = open_rendezvous(f"file://{tmp_path}/file/below", rank=0, world_size=2, job="j")
    with pytest.raises(RendezvousError, match="cannot be used"):
        place.meet(a_card(0, job="j"), timeout_s=BRIEF_S)


def test_the_memory_of_a_room_goes_with_its_last_member(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (open_rendezvous("memory://gone", rank=rank, world_size=2, job="training") for rank in range(2))
    meet_all([one, other], [a_card(0), a_card(1)])
    one.close()
    assert ("gone", "training") in boards_room._rooms
    other.close()
    assert ("gone", "training") not in boards_room._rooms
    monkeypatch.setattr(boards_room, "_ROOMS_MAX", 0)
    with pytest.raises(RendezvousError, match="rooms are open"):
        open_rendezvous("memory://full", rank=0, world_size=2, job="training")


def test_a_world_of_one_meets_itself_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    place = open_rendezvous()
    card = a_card(0, 1, job=place.identity.job)
    assert place.refresh() == []
    assert place.meet(card, timeout_s=0) == place.refresh() == [card]
    place.close()
    with pytest.raises(ClosedError):
        place.meet(card, timeout_s=0)
    with pytest.raises(ClosedError):
        place.refresh()


def test_the_store_without_torch_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setitem(sys.modules, "torch.distributed", None)
    place = open_rendezvous(rank=1, world_size=2, job="training")
    with pytest.raises(ConfigError, match=r"install tensor-fabric\[torch\]"):
        place.meet(a_card(1), timeout_s=1.0)


@pytest.mark.torch
def test_a_store_that_nobody_hosts_is_a_timeout_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch.distributed", reason="the store is torch's")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    place = open_rendezvous(rank=1, world_size=2, job="training")
    with pytest.raises(JoinTimeoutError, match=r"no store answers at 127\.0\.0\.1:1"):
        place.meet(a_card(1), timeout_s=0.2)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("rank", "error", "reason"),
    [
        (0, RendezvousError, "the store cannot be hosted at localhost"),
        (1, JoinTimeoutError, "no store answers at localhost"),
    ],
)
def test_a_port_of_another_service_is_named(
    monkeypatch: pytest.MonkeyPatch, rank: int, error: type[Exception], reason: str
) -> None:
    """The other service takes the connection and never says a word, for which torch would wait without end."""
    pytest.importorskip("torch.distributed", reason="the store is torch's")
    with socket.create_server(("localhost", 0)) as service:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", str(service.getsockname()[1]))
        place = open_rendezvous(rank=rank, world_size=2, job="training")
        with pytest.raises(error, match=reason):
            place.meet(a_card(rank), timeout_s=0.5)
        place.close()


@pytest.mark.torch
def test_a_port_that_an_earlier_life_is_about_to_give_back_is_waited_for() -> None:
    pytest.importorskip("torch.distributed", reason="the store is torch's")
    earlier = socket.create_server(("localhost", 0))
    port = earlier.getsockname()[1]
    address = StoreAddress("localhost", port, agent_hosts=False, run_id="r")
    board = StoreBoard(Identity(0, 1, "training"), address)
    gone = threading.Timer(0.1, earlier.close)
    gone.start()
    board.open(LONG_S)
    gone.join()
    entry = Entry(a_card(0))
    board.post(entry)
    assert set(board.read(range(1))[0]) == {0}
    board.close(entry)


@pytest.mark.torch
def test_a_store_that_is_lost_while_ranks_meet_is_named() -> None:
    distributed = pytest.importorskip("torch.distributed", reason="the store is torch's")
    store = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    board = StoreBoard(Identity(1, 2, "training"), StoreAddress("localhost", store.port, agent_hosts=True, run_id="r"))
    board.open(LONG_S)
    board.post(Entry(a_card(1)))
    assert set(board.read(range(2))[0]) == {1}
    del store
    with pytest.raises(RendezvousError, match="was lost while the ranks met"):
        board.read(range(2))
    with pytest.raises(RendezvousError, match="was lost while the ranks met"):
        board.post(Entry(a_card(1)))
    board.close(None)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["store"], indirect=True)
def test_garbage_in_the_store_is_named(enter: Enter, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed import PrefixStore, TCPStore

    raw = TCPStore("localhost", int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)
    store = PrefixStore("tensor-fabric/none/training/0", raw)
    store.set("entry/1", "x" * 100_000)
    store.set("entry/2", "[]")
    with pytest.raises(JoinTimeoutError, match=r"1 \(an entry has 100000 bytes.*2 \(an entry is malformed"):
        enter(0, 3).meet(a_card(0, 3), timeout_s=BRIEF_S)


def test_waiting_in_memory_ends_when_someone_posts() -> None:
    one, other = (open_rendezvous("memory://wake", rank=rank, world_size=2, job="training") for rank in range(2))
    assert isinstance(one, BoardRendezvous)
    done = threading.Event()
    waiter = threading.Thread(target=lambda: (one._board.wait(LONG_S), done.set()))
    waiter.start()
    while not done.is_set():  # the thread may begin to wait after a post; the next one wakes it
        assert isinstance(other, BoardRendezvous)
        other._board.post(Entry(a_card(1)))
        done.wait(0.01)
    waiter.join()
    one.close()
    other.close()
