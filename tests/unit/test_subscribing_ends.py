"""How feeds end: goodbyes, deaths, new lives."""

from __future__ import annotations

from fabric.config import Delivery
from fabric.core import events
from fabric.core.wire import Drop, Kind, encode_control, member_id
from tests.harness.pair import Link, inbound_of
from tests.unit.test_publishing import listening


def test_a_goodbye_ends_feeds_when_all_is_settled() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t", [0, 1])
    link.crank()
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    assert link["b"].of(events.EndFeed) == []
    link.settle("b")
    assert link["b"].of(events.EndFeed) == [events.EndFeed(1, "a", "t")]
    assert link["b"].of(events.ReportGap) == []
    assert link["b"].core.following.feeds == {}


def test_what_a_goodbye_leaves_behind_is_a_gap() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    for _ in range(3):
        link.publish("a", "t")
    link.drop_kind(None)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.first, gap.end) == (1, 4)
    assert link["b"].of(events.EndFeed) == [events.EndFeed(1, "a", "t")]


def test_a_death_leaves_an_open_gap() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    link.publish("a", "t", [0], payloads={0: bytes(5_000)})
    link.deliver(link.waiting(None)[0])
    link.do("b", events.PeerDied("a", 7))
    assert link["b"].of(events.EndFeed) == []
    link.do("b", events.PeerDied("a", 1))
    gaps = [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)]
    assert gaps == [(1, 2), (2, None)]
    assert link["b"].of(events.EndFeed) == [events.EndFeed(1, "a", "t")]
    assert link["b"].payloads == {}
    assert link["b"].core.subscribing.unconfirmed(1) == []


def test_an_addressed_record_that_a_goodbye_overtook_is_a_gap() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    link.publish("a", "t", [0], payloads={0: bytes(5_000)})
    late = link.waiting(None)[0]
    link.drop_kind(None)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    link.do("b", late.event)
    link.crank()
    link.settle("b")
    assert [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [(1, 2)]
    assert link["b"].of(events.EndFeed) == [events.EndFeed(1, "a", "t")]
    assert link["b"].core.fetching.next_deadline_ns() is None, "nobody is asked for it"


def test_best_effort_has_no_open_gap() -> None:
    link = listening(delivery=Delivery.BEST_EFFORT)
    link.publish("a", "t")
    link.crank()
    link.do("b", events.PeerDied("a", 1))
    assert link["b"].of(events.ReportGap) == []
    assert len(link["b"].of(events.EndFeed)) == 1


def test_a_new_life_begins_after_all_of_the_old_is_settled() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t", [0, 0])
    link.crank()
    link["a"].stopped = True
    link.start("a", 2)
    link.publish("a", "t", [0], bodies=[b"new"])
    link.introduce()
    link.run(500)
    assert link["b"].values("t") == [b"0", b"1"]
    link.settle("b")
    link["b"].settles = True
    link.run(1_000)
    assert link["b"].values("t") == [b"0", b"1", b"new"]
    assert [row[3] for row in link["b"].delivered] == [1, 1, 2]
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.incarnation, gap.first, gap.end) == (1, 2, None)


def test_the_end_of_an_old_life_is_asked_for_until_it_is_told() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t", [0])
    link.crank()
    link["a"].stopped = True
    link.start("a", 2)
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    assert link.waiting(Kind.STATUS)
    link.drop()
    link.pass_time(500)
    assert link.waiting(Kind.STATUS)
    link.introduce()
    link.settle("b")
    link.run(500)
    assert len(link["b"].of(events.EndFeed)) == 1


def test_an_exact_end_leaves_no_open_gap() -> None:
    link = listening()
    link.publish("a", "t", [0])
    link.crank()
    link["a"].stopped = True
    link.start("a", 2)
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    frame = encode_control(Kind.FIN, member_id("a"), 2, "t", 1, 2, 0, 0, 1, True)
    link.do("b", events.ControlReceived(frame))
    link.do("b", events.ControlReceived(frame))
    assert link["b"].of(events.ReportGap) == []
    assert len(link["b"].of(events.EndFeed)) == 1


def test_nothing_more_is_asked_of_a_peer_that_is_gone() -> None:
    link = listening()
    link.publish("a", "t")
    link.do("b", events.PeerDied("a", 1))
    link.drop()
    link.pass_time(3_000)
    assert [flight for flight in link.wire if flight.to.name == "a" and flight.source == "b"] == []
    link.subscribe("b", "**", subscription=2)
    link.do("b", events.SubscriptionClosed(2))
    assert [flight for flight in link.wire if flight.to.name == "a" and flight.source == "b"] == []


def test_a_message_settled_twice_after_the_feed_is_over_changes_nothing() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    inbound = inbound_of(link["b"], "t")
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    assert link["b"].of(events.EndFeed)
    assert link.do("b", events.MessagesSettled(inbound, 1, 1, 0, 0)) == []


def test_who_is_known_by_what_is_not_settled() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    assert link["b"].core.subscribing.knows("a")
    assert not link["b"].core.subscribing.knows("b")
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    link.settle("b")
    assert not link["b"].core.subscribing.knows("a")


def test_a_naming_that_comes_after_the_goodbye_begins_nothing() -> None:
    link = listening()
    link.publish("a", "t")
    late = link.waiting(Kind.REGISTERED)
    link.drop()
    link.do("b", events.PeerDied("a", 1))
    link.do("b", late[0].event)
    assert link["b"].of(events.BeginFeed) == []
    assert link["b"].counts[Drop.STALE] == 1


def test_the_life_and_death_of_one_publisher_leaves_the_others_alone() -> None:
    link = Link("a", "b", "c")
    link.publish("c", "other")
    link.subscribe("b", "**")
    link.crank()
    link.publish("a", "t")
    link.publish("c", "t")
    link.run(300)
    link["a"].stopped = True
    link.start("a", 2)
    link.publish("a", "t")
    link.introduce()
    link.drop_kind(Kind.FIN)
    link.run(1_000)
    assert [row[1:5] for row in link["b"].delivered if row[1] == "a"] == [("a", "t", 1, 0), ("a", "t", 2, 0)]
    link.do("b", events.PeerDied("a", 2))
    assert {end.source for end in link["b"].of(events.EndFeed)} == {"a"}
    link.publish("c", "t")
    link.run(300)
    assert [row[4] for row in link["b"].delivered if row[1:3] == ("c", "t")] == [0, 1]


def test_the_end_of_an_old_life_is_asked_for_again_when_the_new_one_names_its_feed() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    link["a"].stopped = True
    link.start("a", 2)
    link.publish("a", "t")
    link.do("a", events.PeerAnnounced(link["b"].core.context.card))
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    for _ in range(10):
        link.pass_time(20)
        while link.wire:
            link.drop_kind(Kind.STATUS, Kind.FIN)
            if link.wire:
                link.deliver(link.wire[0])
    assert link["b"].core.subscribing.subscriptions[1].later
    link["b"].settles = True
    link.settle("b")
    link.run(1_000)
    assert [row[3] for row in link["b"].delivered] == [1, 2]


def test_a_life_that_was_over_before_we_came_to_it_is_an_open_gap() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    for incarnation in (2, 3):
        link["a"].stopped = True
        link.start("a", incarnation)
        link.publish("a", "t")
        link.introduce()
        link.run(300)
    link["b"].settles = True
    link.settle("b")
    link.run(1_000)
    assert [row[3] for row in link["b"].delivered] == [1, 3]
    gaps = link["b"].of(events.ReportGap)
    what_is_known_and_the_rest = [(1, None), (2, 1), (2, None)]
    assert [(gap.incarnation, gap.end) for gap in gaps] == what_is_known_and_the_rest


def test_a_subscription_that_ended_is_not_taken_leave_of_from_a_later_life() -> None:
    link = listening()
    link.do("b", events.SubscriptionClosed(1))
    link.drop()
    link["a"].stopped = True
    link.start("a", 2)
    link.introduce()
    link.run(300)
    link.pass_time(2_000)
    assert link.waiting(Kind.UNREGISTER) == []
