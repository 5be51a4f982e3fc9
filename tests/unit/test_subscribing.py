"""The subscriber's part of the protocol, between cores."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import Delivery, FabricConfig, Inboxes, Liveness, Policy, Repair, Start
from fabric.core import events
from fabric.core.wire import (
    ADDRESSED,
    NONE,
    Drop,
    Kind,
    encode_burst,
    encode_control,
    encode_descriptor,
    encode_marker,
    feed_id,
    member_id,
)
from tests.harness.pair import MS, Link, inbound_of
from tests.unit.test_publishing import FEED, listening, out_of, say, told


def hear(link: Link, kind: Kind, *fields: object, source: str = "a") -> list[Any]:
    return say(link, kind, *fields, source=source, to="b")


def test_a_subscription_is_confirmed_by_every_member_that_is_there() -> None:
    link = Link("a", "b", "c")
    link.subscribe("b")
    assert set(link["b"].core.subscribing.unconfirmed(1)) == {"a", "b", "c"}
    link.crank()
    assert link["b"].core.subscribing.unconfirmed(1) == []
    assert link["b"].core.subscribing.unconfirmed(9) == []


def test_a_lost_registration_is_repeated() -> None:
    link = Link("a", "b")
    link.subscribe("b", "t")
    link.drop_kind(Kind.REGISTER)
    link.run(200)
    assert link["b"].core.subscribing.unconfirmed(1) == []


def test_a_feed_that_opens_later_is_owed_from_its_first_record() -> None:
    link = listening()
    link.publish("a", "t")
    link.drop()
    link.run(2_000)
    assert link["b"].offsets("t") == [0]


def test_a_member_that_comes_later_owes_everything_from_its_offset_0() -> None:
    link = Link("b")
    link.subscribe("b", "t")
    link.crank()
    link.start("a")
    link.publish("a", "t")
    link.introduce()
    link.run(500)
    assert link["b"].offsets("t") == [0]


def test_a_member_that_nobody_subscribed_to_any_more_is_told() -> None:
    link = listening()
    link.publish("a", "t")
    assert told(hear(link, Kind.REGISTERED, 9, 0, []), Kind.UNREGISTER) == [[9, True]]


@pytest.mark.parametrize(
    "feed",
    [
        (FEED + 1, "t", "reliable", 0, 5, 0, 1, 0, 0),
        (FEED, "u", "reliable", 0, 5, 0, 1, 0, 0),
        (FEED, "t", "eternal", 0, 5, 0, 1, 0, 0),
        (FEED, "t", "reliable", 6, 5, 0, 1, 0, 0),
        (FEED, "t", "reliable", 0, 5, 6, 1, 0, 0),
        (FEED, "t", "reliable", 0, 2**63, 0, 1, 0, 0),
        (feed_id("a", 1, "a..b"), "a..b", "reliable", 0, 5, 0, 1, 0, 0),
        (FEED, "t", "reliable", 0, 5, 0, 1, 0, 1),
        (FEED, "t", "reliable", 0, 5, 0, 1, 0, 3),
        (FEED, "t", "reliable", 0, 5, 0, 1, 1, 0),
        (feed_id("a", 2, "t"), "t", "reliable", 0, 5, 0, 2, 0, 0),
    ],
)
def test_a_feed_that_cannot_be_is_not_followed(feed: tuple[Any, ...]) -> None:
    link = listening()
    hear(link, Kind.REGISTERED, 1, 1, [feed])
    assert link["b"].core.following.feeds == {}
    assert link["b"].counts[Drop.SHAPE] == 1


def test_a_feed_that_was_not_asked_for_is_not_followed() -> None:
    link = listening()
    other = feed_id("a", 1, "other")
    hear(link, Kind.REGISTERED, 1, 1, [(other, "other", "reliable", 0, 5, 0, 1, 0, 0)])
    assert link["b"].core.following.feeds == {}


def test_two_subscriptions_share_what_comes() -> None:
    link = listening()
    link.subscribe("b", "**", subscription=2)
    link.crank()
    link.publish("a", "t", [0, 1])
    link.run(500)
    assert link["b"].offsets("t") == link["b"].offsets("t", subscription=2) == [0, 1]
    link.do("b", events.SubscriptionClosed(1))
    assert list(link["b"].core.following.feeds) == [FEED]
    link.publish("a", "t")
    link.run(500)
    assert link["b"].offsets("t", subscription=2) == [0, 1, 2]


def test_data_of_strangers_is_counted() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    counts = link["b"].counts
    row = ([0], [0], [NONE], [1], [b""])
    link.do("b", events.DataReceived(encode_burst(99, 1, 0, 0, *row)))
    link.do("b", events.DataReceived(encode_burst(FEED, 2, 0, 0, *row)))
    assert link["b"].counts[Drop.STRANGER] - counts[Drop.STRANGER] == 2
    before = inbound_of(link["b"], "t").known
    link.do("b", events.DataReceived(encode_marker(99, 1, 50, 0)))
    link.do("b", events.DataReceived(encode_marker(FEED, 2, 50, 0)))
    assert inbound_of(link["b"], "t").known == before


def test_a_repair_that_is_not_of_this_feed_or_peer_is_counted() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    burst = encode_burst(FEED, 1, 1, 0, [0], [1], [0], [1], [b""])
    for source, header in [("a", 99), ("b", FEED)]:
        frame = encode_control(Kind.REPAIR, member_id(source), 1, header, 1)
        link.do("b", events.BulkReceived(frame, burst))
    assert link["b"].counts[Drop.STRANGER] == 2
    marker = encode_marker(FEED, 1, 9, 0)
    link.do("b", events.BulkReceived(encode_control(Kind.REPAIR, member_id("a"), 1, FEED, 1), marker))
    assert link["b"].offsets("t") == [0]


def test_what_cannot_be_available_is_not_believed() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    for first, end in [(5, 4), (0, 2**63)]:
        header = encode_control(Kind.AVAILABLE, member_id("a"), 1, FEED, 1, first, end, [])
        assert link.do("b", events.BulkReceived(header, None)) == []
    header = encode_control(Kind.AVAILABLE, member_id("b"), 1, FEED, 1, 5, 5, [])
    link.do("b", events.BulkReceived(header, None))
    assert inbound_of(link["b"], "t").known == 1


def test_a_lie_about_the_end_makes_no_endless_conversation() -> None:
    link = listening()
    link.publish("a", "t")
    link.run(500)
    link.do("b", events.DataReceived(encode_marker(FEED, 1, 10, 0)))
    turns = sum(link.crank() + (link.pass_time(20) or 0) for _ in range(100))
    assert turns < 200
    link.publish("a", "t")
    link.run(1_500)
    assert link["b"].offsets("t") == [0, 1]


def slow() -> Link:
    """b has room for two bursts or so."""
    config = FabricConfig(
        inboxes=Inboxes(hand_bytes_max=2_000, hold_bytes_max=1_500), repair=Repair(window_bytes=4_000)
    )
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    link["b"].settles = False
    return link


def test_one_that_is_far_behind_leaves_the_push_and_comes_back_when_it_is_near() -> None:
    link = slow()
    for _ in range(40):
        link.publish("a", "t", [0], bodies=[bytes(1000)])
        link.crank()
    assert link["b"].counts["demoted"] == 1
    assert FEED not in link["b"].follows
    link["b"].settles = True
    link.settle("b")
    link.run(3_000)
    assert link["b"].offsets("t") == list(range(40))
    assert link["b"].counts["rejoined"] >= 1
    assert FEED in link["b"].follows
    assert link["b"].core.following.feeds[FEED].live


def test_one_that_caught_up_comes_back_although_the_stream_goes_on() -> None:
    link = slow()
    for _ in range(10):
        link.publish("a", "t", [0], bodies=[bytes(1000)])
        link.crank()
    assert link["b"].counts["demoted"] == 1
    link["b"].settles = True
    link.settle("b")
    for _ in range(100):
        link.pass_time(50)
        while link.wire:
            if link.wire[0].kind is Kind.PULL:
                link.publish("a", "t", [0], bodies=[bytes(1000)])
            link.deliver(link.wire[0])
            if link["b"].counts["rejoined"]:
                return
    raise AssertionError("it pulls for ever")


def test_a_full_hand_is_not_filled_over_and_over() -> None:
    link = slow()
    for _ in range(40):
        link.publish("a", "t", [0], bodies=[bytes(1000)])
    link.crank()
    before = link["a"].counts["repaired_bytes"]
    link.run(10_000, step_ms=100)
    assert link["a"].counts["repaired_bytes"] - before < 40_000


def test_what_is_turned_away_is_not_sent_again_with_each_pull() -> None:
    """A hold for one record, behind a value that is fetched: a window for each record would be quadratic."""
    link = Link("a", "b", config=FabricConfig(inboxes=Inboxes(hold_bytes_max=1)))
    link.subscribe("b", "t")
    link.crank()
    for _ in range(200):
        link.publish("a", "t", [0], payloads={0: bytes(5_000)})
    link.run(20_000)
    assert link["b"].offsets("t") == list(range(200))
    assert link["a"].counts["repaired_bytes"] < 20 * 200 * len(out_of(link).kept[0].frame)


def test_what_is_repaired_is_what_was_lost_and_one_window_at_most() -> None:
    link = listening()
    for n in range(200):
        link.publish("a", "t", [n % 3], bodies=[bytes(1000)])
        if n % 10 == 0:
            link.drop_kind(None)
        link.crank()
    link.run(2_000)
    assert sorted(link["b"].offsets("t")) == list(range(200))
    assert link["a"].counts["repaired_bytes"] <= 20 * 1_100 * 2


def test_heavy_handling_is_acknowledged_before_its_time() -> None:
    config = FabricConfig(liveness=Liveness(acknowledge_bytes=1_000))
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t", [0], bodies=[bytes(2_000)])
    link.crank()
    assert out_of(link).is_acknowledged


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"short", Drop.UNDECODABLE),
        (encode_descriptor(2**50, 1), Drop.TOO_LARGE),
    ],
)
def test_a_value_that_cannot_be_is_reported_with_its_reason(body: bytes, reason: Drop) -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    link.do("b", events.DataReceived(encode_burst(FEED, 1, 1, 0, [0], [1], [0], [ADDRESSED | 1], [body])))
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.first, gap.end, gap.reason) == (1, 2, reason)


def test_f37_a_value_that_changed_on_its_way_is_fetched_again_and_then_reported() -> None:
    link = listening()
    link.publish("a", "t", [0], payloads={0: bytes(5_000)})
    stored = out_of(link).owed[0]
    stored.payloads[0] = b"x" * 5_000
    link.run(2_000)
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.reason, link["b"].counts["payloads_refetched"]) == (Drop.CORRUPT_AT_SOURCE, 2)
    assert link["b"].payloads == {}


def test_a_value_that_its_publisher_no_longer_has_is_a_gap() -> None:
    link = listening()
    link.publish("a", "t", [0], payloads={0: bytes(5_000)})
    out_of(link).owed[0].payloads.clear()
    link.run(1_000)
    (gap,) = link["b"].of(events.ReportGap)
    assert gap.reason == Drop.GAP


def test_a_subscription_that_ends_gives_up_its_values() -> None:
    link = listening()
    link.publish("a", "t", [0], payloads={0: bytes(5_000_000)})
    link.crank(until=lambda: bool(link.waiting(Kind.CHUNK)))
    link.do("b", events.SubscriptionClosed(1))
    assert link["b"].payloads == {}
    link.crank()
    link["b"].core.check_invariants()


def test_messages_of_a_subscription_that_ended_may_still_be_settled() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    link.do("b", events.SubscriptionClosed(1))
    link.settle("b")
    link["b"].core.check_invariants()


def test_messages_that_were_dropped_are_counted_by_reason() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t", [0, 0, 0])
    link.crank()
    (deliver,) = link["b"].in_hand
    link.do("b", events.MessagesSettled(deliver.feed, 0, 3, 1, deliver.size, {Drop.REJECTED: 2}))
    assert (link["b"].counts["handled"], link["b"].counts[Drop.REJECTED], link["b"].counts[Drop.NOT_ASKED]) == (1, 2, 0)


def test_a_heartbeat_that_lists_an_unknown_feed_asks_once_more_for_it() -> None:
    link = listening()
    hear(link, Kind.HEARTBEAT, [(5, 1)], 1)
    assert link["b"].core.subscribing.unconfirmed(1) == ["a"]
    link.run(200)
    assert link["b"].core.subscribing.unconfirmed(1) == []
    assert hear(link, Kind.UNKNOWN, 9) == []


def test_only_some_seeds_of_a_feed() -> None:
    link = listening(seeds=frozenset({2}))
    link.publish("a", "t", [1, 2, 3, 2])
    link.publish("a", "t", [1, 1])
    link.publish("a", "t", [2, 1])
    lost = link.waiting(None)[1:2]
    link.drop(lambda flight: flight in lost)
    link.run(1_000)
    assert link["b"].offsets("t") == [1, 3, 6]
    assert out_of(link).is_acknowledged


def test_settled_records_of_all_feeds_are_in_the_totals() -> None:
    link = listening(start=Start.LIVE)
    link.publish("a", "t", [0, 1], policy=Policy.RELIABLE)
    link.run(100)
    assert link["b"].counts["handled"] == 2
    link.do("b", events.PeerDied("a", 1))
    assert link["b"].counts["handled"] == 2


def test_without_any_room_nothing_is_pulled() -> None:
    config = FabricConfig(inboxes=Inboxes(hand_bytes_max=1, hold_bytes_max=1))
    link = Link("a", "b", config=config)
    link.subscribe("b", "t.*")
    link.crank()
    link["b"].settles = False
    for topic in ("t.x", "t.x", "t.y", "t.x", "t.x"):
        link.publish("a", topic)
        link.run(300)
        link.publish("a", "t.y")
        link.drop_kind(None)
    before = link["b"].counts["pulls"]
    link.run(2_000)
    assert link["b"].counts["pulls"] - before <= 20
    link["b"].settles = True
    link.settle("b")
    link.run(5_000)
    assert (link["b"].offsets("t.x"), link["b"].offsets("t.y")) == (list(range(4)), list(range(6)))


def test_a_lost_farewell_of_a_subscription_is_repeated_until_it_is_answered() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    link.do("b", events.SubscriptionClosed(1))
    assert link.drop_kind(Kind.UNREGISTER)
    link.run(2_000)
    assert link["a"].core.publishing.registrations.of("b") == {}
    link.pass_time(2_000)
    assert link.waiting(Kind.UNREGISTER) == []


def test_a_lost_naming_of_a_feed_is_repeated() -> None:
    link = Link("a", "b")
    link.subscribe("b", "t", delivery=Delivery.BEST_EFFORT)
    link.crank()
    link.publish("a", "t")
    assert link.drop_kind(Kind.REGISTERED)
    link.run(3_000)
    assert link["b"].of(events.BeginFeed) == [events.BeginFeed(1, "a", "t", 1, 0)]


def test_a_late_answer_to_an_early_join_proves_the_link() -> None:
    link = listening()
    link.publish("a", "t")
    link.run(100)
    core = link["b"].core
    followed = core.following.feeds[FEED]
    core.following._leave_push(followed)
    core.following._come_back(followed)
    asked = []
    for _ in range(100):  # the answer stands behind much data, so the question is repeated
        asked += told(link.do("b", events.TimePassed()), Kind.JOIN)
        link.drop()
        link.now += 50_000_000
    assert not followed.live
    assert len(asked) > 2
    assert asked == [[[[FEED, followed.nonce]]]] * len(asked)
    link.do("b", events.DataReceived(encode_marker(FEED, 1, 1, 0, [asked[0][0][0][1]])))
    assert followed.live


def test_who_listens_again_asks_under_a_fresh_nonce() -> None:
    link = listening()
    link.publish("a", "t")
    link.run(100)
    core = link["b"].core
    followed = core.following.feeds[FEED]
    before = followed.nonce
    assert followed.live
    core.following._leave_push(followed)
    core.following._come_back(followed)
    assert followed.nonce != before
    link.do("b", events.DataReceived(encode_marker(FEED, 1, 1, 0, [before])))
    assert not followed.live, "a marker from before it left may have waited in the socket"


def test_who_asks_for_a_lost_name_asks_from_the_start() -> None:
    link = listening()
    link.publish("a", "t")
    link.run(100)
    link.drop()
    hear(link, Kind.HEARTBEAT, [(99, 5)], 1)  # it was opened since; and we may have been forgotten, as well
    link.now += 10 * MS
    (asked,) = told(link.do("b", events.TimePassed()), Kind.REGISTER)
    assert asked[4] is True


def test_who_is_forgotten_while_he_registers_asks_from_the_start() -> None:
    link = Link("a", "b")
    link.run(100)
    link.subscribe("b", "t")
    link.drop()
    hear(link, Kind.UNKNOWN, 1)
    link.now += 2000 * MS
    commands = link.do("b", events.TimePassed())
    (asked,) = told([c for c in commands if getattr(c, "peer", None) == "a"], Kind.REGISTER)
    assert asked[4] is True
