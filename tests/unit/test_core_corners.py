"""What the core does where hardly anybody goes: what the other tests reach by chance or never."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fabric.config import Delivery, FabricConfig, Requests
from fabric.core import events, fetching
from fabric.core import machine as core_machine
from fabric.core.ranges import RangeSet
from fabric.core.wire import Descriptor, Drop, Kind, encode_control, member_id
from tests.harness.pair import MS, Link
from tests.unit.test_exchange import executed
from tests.unit.test_fetching import KEY, Desk
from tests.unit.test_publishing import FEED, listening, say, told


def test_a_request_that_waits_for_a_later_one_is_nonsense() -> None:
    link = Link("a", "b")
    say(link, Kind.REQUEST, 5, 6, "evaluate", 1, 1000, 2, b"", b"")
    assert (executed(link), link["a"].counts[Drop.SHAPE]) == ([], 1)


def test_replies_whose_deadline_passed_make_room_for_new_requests() -> None:
    link = Link("a", "b", config=replace(FabricConfig(), requests=Requests(remembered_max=2)))

    def request(number: int) -> None:  # its peer still waits for the first one, as far as it has told
        say(link, Kind.REQUEST, number, 1, "evaluate", 1, 50, 2, b"", b"")

    def executions() -> list[int]:
        return [execute.request for execute in link["a"].of(events.ExecuteRequest)]

    for number in (1, 2):
        request(number)
        link.do("a", events.ReplyIssued("b", 1, number, False, 2, b""))
    request(3)
    assert (executions(), link["a"].counts[Drop.NO_ROOM]) == ([1, 2], 1), "nothing may be forgotten yet"
    link.now += 60 * MS
    request(3)
    assert executions() == [1, 2, 3]


def test_a_value_in_crumbs_is_taken_as_far_as_there_is_room_to_note_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "PIECES_MAX", 2)
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    for position in (0, 2, 4):
        desk.fetching.on_chunk("a", KEY, position, b"x", 0)
    assert desk.context.counts[Drop.NO_ROOM] == 1
    desk.told()
    desk.fetching.on_chunk("a", KEY, 1, b"x", 0)  # joins two pieces: now there is room, but not for a third
    desk.fetching.on_chunk("a", KEY, 6, b"x", 0)
    assert [type(command) for command in desk.told()] == []
    assert desk.context.counts[Drop.NO_ROOM] == 3


def test_an_authenticated_sender_cannot_speak_for_another() -> None:
    link = Link("a", "b", "c")
    frame = encode_control(Kind.HEARTBEAT, member_id("c"), 1, [], 1)
    link.do("a", events.ControlReceived(frame, "b"))
    header = encode_control(Kind.REPAIR, member_id("c"), 1, FEED, 1)
    link.do("a", events.BulkReceived(header, b"", "b"))
    assert link["a"].counts[Drop.IMPOSTOR] == 2


def test_a_heartbeat_of_one_that_saw_an_older_life_of_us_is_answered_with_a_greeting() -> None:
    link = Link("a", "b")
    commands = say(link, Kind.HEARTBEAT, [], 77)
    assert len(told(commands, Kind.HELLO)) == 1
    assert told(say(link, Kind.HEARTBEAT, [], 1), Kind.HELLO) == []


def test_a_goodbye_in_many_frames_is_complete_with_the_last_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_machine, "FEEDS_PER_SUBSCRIPTION_MAX", 1)
    link = listening()
    link.publish("a", "t")
    link.crank()
    core = link["b"].core

    def bye(ends: list[tuple[int, int, bool]], is_last: bool) -> list[Any]:
        return link.do("b", events.ControlReceived(encode_control(Kind.BYE, member_id("a"), 1, ends, is_last)))

    bye([(FEED, 1, False)], False)
    assert not core.members.by_name["a"].is_gone
    bye([(99, 1, False)], False)
    assert core._farewells == {"a": {FEED: (1, False)}}, "a second frame finds no room"
    bye([], True)
    assert core.members.by_name["a"].is_gone
    assert core._farewells == {}
    assert link["b"].of(events.EndFeed) == [events.EndFeed(1, "a", "t")]


def test_a_registration_that_was_overtaken_by_its_goodbye_is_stale() -> None:
    link = listening()
    core = link["a"].core
    peer = core.members.by_name["b"]
    core.members.leave(peer, "left")
    core.publishing.forget("b")
    core.publishing.register(peer, (1, "t", "live", "reliable", False, []))
    assert core.publishing.registrations.of("b") == {}
    assert core.context.counts[Drop.STALE] == 1


def test_what_is_not_there_is_removed_without_a_trace() -> None:
    ranges = RangeSet([(5, 10)])
    for first, end in ((0, 5), (10, 20), (7, 7), (9, 6)):
        ranges.remove(first, end)
    assert list(ranges) == [(5, 10)]


@pytest.mark.parametrize(("delivery", "gaps"), [(Delivery.RELIABLE, 1), (Delivery.BEST_EFFORT, 0)])
def test_a_life_that_came_and_went_before_we_reached_it_is_an_open_gap(delivery: Delivery, gaps: int) -> None:
    link = listening(delivery=delivery)
    link.publish("a", "t")
    link.crank()
    link["b"].settles = False
    link.publish("a", "t")  # in the hand of b, who does not settle it: the old life is not over for it
    link.crank()
    link.start("a", 2)
    link.introduce()
    link.publish("a", "t")
    link.crank()
    core = link["b"].core
    (later,) = core.subscribing.subscriptions[1].later.items()
    assert later[0] == ("a", "t")
    link.do("b", events.PeerDied("a", 2))
    link["b"].settles = True
    link.settle("b")
    link.run(200)
    told_of_new = [gap for gap in link["b"].of(events.ReportGap) if gap.incarnation == 2]
    assert len(told_of_new) == gaps
    assert core.subscribing.subscriptions[1].later == {}


def test_a_feed_is_not_confirmed_to_one_that_is_gone_or_by_one_that_does_not_follow_it() -> None:
    link = listening()
    link.publish("a", "t")
    link.run(100)
    core = link["b"].core
    inbound = core.subscribing.subscriptions[1].feeds["a", "t"]
    core.members.leave(core.members.by_name["a"], "left")
    core.following.confirm(inbound)
    assert core.following._dirty == {}
    core.following.unfollow(inbound)
    core.following.confirm(inbound)
    assert core.following._dirty == {}
