"""What the core does with lives and endings where only an unlucky order of things leads."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fabric.config import Policy
from fabric.core import events, subscriptions
from fabric.core.cursors import Place
from fabric.core.disk import PastFeed, StateRecovered
from fabric.core.lanes import InboundFeed
from fabric.core.rooms import Room
from fabric.core.wire import Drop, Kind, feed_id
from tests.harness.bursts import Numbering
from tests.harness.pair import Link, card
from tests.unit.test_core_lives import LIFE, following, hear, meeting, row
from tests.unit.test_core_restarts import OLD, past, publishing, recovered, register, saved
from tests.unit.test_core_restarts import row as saved_row
from tests.unit.test_publishing import listening, say, told


def test_a_burst_that_the_log_has_twice_is_kept_once() -> None:
    twice = PastFeed(OLD, "t", "durable", 1, 3, True, ((0, 2, 100), (0, 2, 100), (2, 3, 50)))
    link = recovered(saved_row(joins=((OLD, 0),)), feeds=(twice,))
    assert publishing(link).retention.spilled_bytes == 150


def test_what_a_member_subscribed_to_of_its_own_without_a_name_ended_with_that_life() -> None:
    own = ("a", *saved_row(name="")[1:])
    link = recovered(own, saved_row(), feeds=(past(),))
    assert list(publishing(link).by_id[OLD].readers) == [("b", -1)]


def test_the_end_that_a_life_told_is_told_again_by_the_next() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 1, [row(4, end=3, ending=2)])
    assert link["b"].counts["open_gaps"] == 1
    link.do("b", events.PeerAnnounced(card("a", LIFE + 1)))
    assert link["b"].counts["open_gaps"] == 0
    hear(link, Kind.FIN, "t", 4, LIFE + 1, 0, 0, 3, True, life=LIFE + 1)
    assert (link["b"].counts["open_gaps"], following(link)) == (0, [4])


def test_who_asked_where_a_feed_ended_asks_no_more_once_it_is_known() -> None:
    link = meeting(name="worker", cursor={("a", "t"): Place(4, 0)})
    hear(link, Kind.REGISTERED, 1, 1, [row(LIFE, policy="reliable")])
    core = link["b"].core
    (inbound,) = core.subscribing.inbounds()
    assert core.subscribing.endings.dues_ns()
    core.members.leave(core.members.by_name["a"], "left")
    core.subscribing.endings.ask(inbound)
    assert core.subscribing.endings.dues_ns() == []


def test_the_end_of_a_feed_that_nobody_follows_any_more_is_told_to_nobody() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 1, [row(4, end=3)])
    core = link["b"].core
    (inbound,) = core.subscribing.inbounds()
    core.following.feeds[inbound.feed].inbounds.remove(inbound)
    inbound.learn(3, 3)
    core.following._dirty.clear()
    retired: list[InboundFeed] = []
    core.subscribing.endings._retire = lambda _, one: retired.append(one)
    core.subscribing.endings.check(inbound)
    assert (retired, core.following._dirty) == ([inbound], {})


def test_what_was_gone_before_we_came_is_booked() -> None:
    link = meeting()
    fields = list(row(LIFE, end=5))
    fields[5] = 3  # first available
    hear(link, Kind.REGISTERED, 1, 1, [tuple(fields)])
    (inbound,) = link["b"].core.subscribing.inbounds()
    assert (inbound.counts["gap"], inbound in link["b"].core.books.touched) == (3, True)


def test_a_value_on_its_way_from_a_durable_feed_is_not_lost_with_its_publisher() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 1, [row(LIFE, end=1)])
    frame = Numbering(feed_id("a", LIFE, "t"), LIFE).frame([0], payloads={0: b"x" * 100})
    link.do("b", events.DataReceived(frame))
    assert link["b"].core.fetching.next_deadline_ns() is not None
    link.do("b", events.PeerDied("a", LIFE))
    (inbound,) = link["b"].core.subscribing.inbounds()
    assert (list(inbound.held), link["b"].of(events.ReportGap)) == ([0], [])
    link.do("b", events.PeerAnnounced(card("a", LIFE + 1)))
    served = (*row(LIFE, end=1)[:8], 1)
    commands = hear(link, Kind.REGISTERED, 1, 1, [served], life=LIFE + 1)
    ((space, number, *_),) = told(commands, Kind.FETCH)
    assert (space, number) == (feed_id("a", LIFE, "t"), 0)


def test_a_number_that_another_subscription_takes_is_left_by_the_one_before() -> None:
    link = Link("a", "b")
    link.publish("a", "t")
    register(link, 9)
    (before,) = publishing(link).registrations.of("b").values()
    register(link, 9, name="other", pattern="u")
    (after,) = publishing(link).registrations.of("b").values()
    assert (before is after, publishing(link).feeds["t"].readers) == (False, {})


def test_values_that_were_claimed_and_have_not_come_are_known_by_what_they_are() -> None:
    feed = feed_id("a", 1, "t")
    room = Room(hand_max=10**6, hold_max=10**6, ranges_max=10)
    inbound = InboundFeed(
        subscription=1, source="a", topic="t", incarnation=1, join=0, room=room, emit=lambda command: None
    )
    inbound.receive(Numbering(feed, 1).burst([0], payloads={0: b"x" * 100}))
    assert inbound.claimed() == []
    claims = list(inbound.claim())
    assert inbound.claimed() == claims
    assert [descriptor.size for _, descriptor in claims] == [100]


def test_places_of_topics_that_are_over_are_remembered_up_to_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "ENDED_MAX", 1)
    link = Link("a", "b")
    link.subscribe("b", "**")
    link.crank()
    for topic in ("t", "u"):
        link.publish("a", topic)
    link.run(500)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.run(100)
    (subscription,) = link["b"].core.subscribing.subscriptions.values()
    assert list(subscription.ended) == list(subscription.places)
    assert len(subscription.ended) == 1


def test_a_write_that_two_sessions_waited_for_confirms_the_one_that_still_does() -> None:
    link = recovered(saved_row(), feeds=(past(),))
    register(link, 9)
    (first,) = saved(link)
    (registration,) = publishing(link).registrations.of("b").values()
    registration.saved = first.number + 1  # it was written down again meanwhile
    assert told(link.do("a", events.WriteFinished(first.number)), Kind.REGISTERED) == []


def test_a_registration_that_is_not_sound_changes_nothing() -> None:
    link = Link("a", "b")
    before = link["a"].counts[Drop.SHAPE]
    assert say(link, Kind.REGISTER, 1, "a..b", "live", "reliable", False, [], "") == []
    assert link["a"].counts[Drop.SHAPE] == before + 1


def test_a_subscription_that_rests_takes_no_place_in_a_feed_that_never_had_it() -> None:
    link = listening()
    link.publish("a", "t", policy=Policy.LOSSY)
    register(link, 9)
    out = publishing(link).feeds["t"]
    assert ("b", 9) in out.listeners
    say(link, Kind.UNREGISTER, 9, True)
    assert not any(number < 0 for _, number in out.readers)


def test_what_is_packed_can_be_read() -> None:
    link = recovered(saved_row(), feeds=(past(),))
    packed: Any = msgpack.unpackb(publishing(link).registrations.pack(lambda one, feed: 2))
    assert packed[1][0][-1] == [[OLD, 2]]
    link.do("a", StateRecovered((), b""))
