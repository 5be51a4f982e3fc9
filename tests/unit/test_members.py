"""Who is there: greetings, lives, silence, floods of names."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from fabric.config import FabricConfig
from fabric.core.events import ConnectPeer, DisconnectPeer, ProbePeer, ReportFenced, ReportPeer, SendControl
from fabric.core.members import MEMBERS_MAX, MS, ZOMBIES_MAX, Context, Members, Peer, S, card_fields, card_of
from fabric.core.wire import Control, Drop, Kind, decode_control, member_id
from tests.harness.pair import card


class Desk:
    """The roster of `b`, and the commands that it led to."""

    def __init__(self) -> None:
        self.context = Context(card("b", 5), FabricConfig())
        self.members = Members(self.context)

    def told(self) -> list[Any]:
        commands = self.context.commands.copy()
        self.context.commands.clear()
        return commands

    def meet(self, name: str = "a", incarnation: int = 1, **changed: Any) -> Peer:
        peer = self.members.meet(card(name, incarnation, **changed))
        assert peer is not None
        return peer


def test_a_card_survives_its_fields() -> None:
    for rank in (None, 0, 3):
        one = card("a", 7, rank=rank)
        assert card_of(list(card_fields(one)), 7) == one


def test_a_new_member_is_connected_and_greeted_until_it_sees_us() -> None:
    desk = Desk()
    peer = desk.meet()
    assert desk.told() == [ConnectPeer("a", peer.card)]
    assert (peer.state, peer.is_there, peer.is_gone) == ("known", False, False)
    greeted = []
    for ms in range(4000):
        desk.context.now = ms * MS
        if desk.members.tick():
            greeted.append(ms)
    waits = [after - before for before, after in pairwise(greeted)]
    assert waits[0] == 20 and all(20 <= wait <= min(1000, 20 * 2**n + 1) for n, wait in enumerate(waits))
    assert len({*waits[1:]}) == len(waits) - 1, "by chance: members that were cut off together do not keep step"
    desk.members.on_seen(peer, 4)
    assert peer.state == "known"
    desk.members.on_seen(peer, 5)
    assert (peer.state, peer.is_there) == ("joined", True)
    assert ReportPeer("a", "joined") in desk.told()
    desk.members.on_seen(peer, 5)
    assert desk.told() == []


def test_the_same_life_is_no_news_and_another_job_or_version_no_member() -> None:
    desk = Desk()
    desk.meet()
    desk.told()
    assert desk.members.meet(card("a")) is None
    assert desk.members.meet(card("c", job="other")) is None
    assert desk.context.counts[Drop.STRANGER] == 1
    assert desk.members.meet(card("c", version=9)) is None
    assert desk.told() == [ReportPeer("c", "version", "9")]
    assert [peer.name for peer in desk.members.others()] == ["a"]


def test_a_new_life_takes_the_place_of_the_old_and_the_old_is_told() -> None:
    desk = Desk()
    desk.meet("a", 2)
    newer = desk.meet("a", 3)
    assert desk.members.by_name["a"] is newer
    desk.told()
    assert desk.members.meet(card("a", 2)) is None
    connect, send = desk.told()
    assert connect == ConnectPeer("a@2", card("a", 2))
    assert isinstance(send, SendControl)
    message = decode_control(send.frame)
    assert (send.peer, message.kind, message.fields) == ("a@2", Kind.FENCED, [3])


def test_connections_to_older_lives_are_bounded() -> None:
    desk = Desk()
    desk.meet("a", 1000)
    desk.told()
    for incarnation in range(100):
        for _ in range(2):
            desk.members.meet(card("a", incarnation))
    commands = desk.told()
    opened = [command.key for command in commands if isinstance(command, ConnectPeer)]
    closed = [command.key for command in commands if isinstance(command, DisconnectPeer)]
    assert len(opened) == 100
    assert closed == opened[: 100 - ZOMBIES_MAX]


def test_a_newer_life_of_ourselves_fences_us_once() -> None:
    desk = Desk()
    assert desk.members.meet(card("b", 5)) is None
    assert desk.members.meet(card("b", 4)) is None
    assert desk.told() == []
    assert desk.members.meet(card("b", 6)) is None
    assert desk.members.meet(card("b", 6)) is None
    assert desk.told() == [ReportFenced(6)]
    desk.members.on_fenced(Control(Kind.FENCED, 1, 1, [9]))
    assert desk.told() == []


def test_being_told_of_a_newer_life_fences_us_and_of_an_older_does_not() -> None:
    desk = Desk()
    desk.members.on_fenced(Control(Kind.FENCED, 1, 1, [5]))
    assert desk.told() == []
    desk.members.on_fenced(Control(Kind.FENCED, 1, 1, [6]))
    assert desk.told() == [ReportFenced(6)]


def test_frames_of_strangers_of_old_lives_and_under_false_names_are_counted() -> None:
    desk = Desk()
    peer = desk.meet("a", 2)
    ours = member_id("a")
    assert desk.members.sender_of(Control(Kind.BYE, ours, 2, []), None) is peer
    assert desk.members.sender_of(Control(Kind.BYE, ours, 2, []), "a") is peer
    assert desk.members.sender_of(Control(Kind.BYE, ours, 2, []), "c") is None
    assert desk.members.sender_of(Control(Kind.BYE, ours, 1, []), None) is None
    assert desk.members.sender_of(Control(Kind.BYE, 99, 2, []), None) is None
    counts = desk.context.counts
    assert (counts[Drop.IMPOSTOR], counts[Drop.STALE], counts[Drop.STRANGER]) == (1, 1, 1)


def test_silence_makes_a_peer_suspect_then_down_and_a_word_brings_it_back() -> None:
    desk = Desk()
    peer = desk.meet(host="host-of-b")
    desk.members.on_seen(peer, 5)
    desk.told()
    states = []
    for second in range(12):
        desk.context.now = second * S
        desk.members.tick()
        for command in desk.told():
            states += [(second, command.state if isinstance(command, ReportPeer) else type(command).__name__)]
    assert [state for state in states if state[1] != "ProbePeer"] == [(5, "suspect"), (11, "down")]
    assert [second for second, state in states if state == "ProbePeer"] == [5, 7, 9, 11]
    desk.members.sender_of(Control(Kind.BYE, peer.id, 1, []), None)
    assert desk.told() == [ReportPeer("a", "up")]


def test_one_that_never_greeted_us_is_probed_too_and_is_nobody_to_wait_for() -> None:
    desk = Desk()
    peer = desk.meet(host="host-of-b")
    desk.told()
    probed = []
    for second in range(8):
        desk.context.now = second * S
        desk.members.tick()
        probed += [second for command in desk.told() if isinstance(command, ProbePeer)]
    assert probed == [5, 7]
    assert (peer.state, peer.is_there) == ("known", False)


def test_only_a_process_of_this_host_is_probed() -> None:
    desk = Desk()
    desk.members.on_seen(desk.meet(), 5)
    desk.context.now = 100 * S
    desk.members.tick()
    assert not [command for command in desk.told() if isinstance(command, ProbePeer)]


def test_who_left_is_gone_once_and_no_longer_greeted() -> None:
    desk = Desk()
    peer = desk.meet()
    desk.members.leave(peer, "left")
    desk.members.leave(peer, "dead")
    assert (peer.state, peer.is_gone) == ("left", True)
    assert desk.members.tick() == []
    assert repr(peer) == "Peer(a, left, incarnation=1)"


def test_a_flood_of_names_is_bounded_and_the_gone_give_way() -> None:
    desk = Desk()
    for n in range(MEMBERS_MAX + 50):
        desk.members.meet(card(f"n{n}"))
    assert len(desk.members.by_name) == len(desk.members.by_id) == MEMBERS_MAX
    assert desk.context.counts[Drop.NO_ROOM] == 51
    for name in ("n5", "n7"):
        desk.members.leave(desk.members.by_name[name], "left")
    desk.members.in_use = lambda name: name == "n5"
    desk.meet("new")
    assert "n7" not in desk.members.by_name
    assert "n5" in desk.members.by_name
    assert desk.members.meet(card("newer")) is None
    desk.meet("n5", 2)
    assert len(desk.members.by_name) == len(desk.members.by_id) == MEMBERS_MAX


def test_a_name_has_a_bounded_length() -> None:
    desk = Desk()
    assert desk.members.meet(card("")) is None
    assert desk.members.meet(card("x" * 256)) is None
    desk.meet("x" * 255)


def test_an_earlier_life_that_still_speaks_is_told_where_it_was() -> None:
    desk = Desk()
    for incarnation in (1, 2, 3):
        desk.meet("a", incarnation)
    desk.told()
    assert desk.members.sender_of(Control(Kind.HEARTBEAT, member_id("a"), 2, []), None) is None
    assert desk.told()[0] == ConnectPeer("a@2", card("a", 2))
    assert desk.members.sender_of(Control(Kind.HEARTBEAT, member_id("a"), 99, []), None) is None
    assert desk.told() == []
