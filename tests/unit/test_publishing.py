"""The publisher's part of the protocol, between two cores."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import Delivery, FabricConfig, Policy, Retention, Start
from fabric.core import events
from fabric.core.publishing import FEEDS_PER_FRAME
from fabric.core.registrations import REGISTRATIONS_PER_PEER_MAX
from fabric.core.wire import Drop, Kind, decode_control, decode_data, encode_control, feed_id, member_id
from tests.harness.pair import MS, Link, inbound_of

FEED = feed_id("a", 1, "t")


def say(link: Link, kind: Kind, *fields: object, source: str = "b", to: str = "a") -> list[Any]:
    """A message of `source`, as if it had sent it; returns the commands."""
    return link.do(to, events.ControlReceived(encode_control(kind, member_id(source), 1, *fields)))


def told(commands: list[Any], kind: Kind) -> list[list[Any]]:
    """The fields of all messages of a kind among commands."""
    frames = [c.header if isinstance(c, events.SendBulk) else c.frame for c in commands if hasattr(c, "peer")]
    return [list(message.fields) for message in map(decode_control, frames) if message.kind is kind]


def out_of(link: Link, topic: str = "t") -> Any:
    return link["a"].core.publishing.feeds[topic]


def listening(**options: Any) -> Link:
    link = Link("a", "b")
    link.subscribe("b", "t", **options)
    link.crank()
    return link


def test_what_is_published_after_the_subscription_arrives_in_order() -> None:
    link = Link("a", "b")
    link.subscribe("b", "layers.**")
    link.crank()
    for _ in range(5):
        link.publish("a", "layers.0.health", [1, 2, 1])
        link.crank()
    assert link["b"].values("layers.0.health") == [b"%d" % n for n in range(15)]
    link.run(1000)
    assert inbound_of(link["b"], "layers.0.health").floor == 15
    assert out_of(link, "layers.0.health").is_acknowledged


@pytest.mark.parametrize(
    ("start", "expected"), [(Start.LIVE, [4]), (Start.RETAINED, [0, 1, 2, 3, 4]), (Start.LAST, [3, 4])]
)
def test_a_subscription_begins_where_it_asked_to(start: Start, expected: list[int]) -> None:
    link = Link("a", "b")
    link.publish("a", "other")
    for _ in range(4):
        link.publish("a", "t")
    link.subscribe("b", "t", start=start)
    link.run(200)
    link.publish("a", "t")
    link.run(500)
    assert link["b"].offsets("t") == expected
    assert link["b"].of(events.BeginFeed) == [events.BeginFeed(1, "a", "t", 1, expected[0])]


def test_a_member_receives_its_own_publications() -> None:
    link = Link("a")
    link.subscribe("a", "t")
    link.crank()
    link.publish("a", "t", [0, 1])
    link.run(500)
    assert link["a"].values("t") == [b"0", b"1"]
    assert link["a"].core.publishing.readers_elsewhere("t") == {}


def test_a_repeated_registration_gets_the_same_answer() -> None:
    link = listening()
    for _ in range(2):
        link.publish("a", "t")
    fields = (5, "t", "live", "reliable", False, [], "")
    first = told(say(link, Kind.REGISTER, *fields), Kind.REGISTERED)
    link.publish("a", "t")
    ((number, total, feeds),) = told(say(link, Kind.REGISTER, *fields), Kind.REGISTERED)
    assert first == [[5, 1, [[FEED, "t", "reliable", 2, 2, 0, 1, 0, 0]]]]
    assert (number, total, feeds) == (5, 1, [[FEED, "t", "reliable", 2, 3, 0, 1, 0, 0]])


def test_a_registration_that_resumes_stands_where_it_says() -> None:
    link = Link("a", "b")
    for _ in range(4):
        link.publish("a", "t")
    commands = say(link, Kind.REGISTER, 5, "t", "live", "reliable", False, [(FEED, 1), (9, 9)], "")
    assert told(commands, Kind.REGISTERED)[0][2][0][3] == 1
    commands = say(link, Kind.REGISTER, 6, "t", "live", "reliable", True, [], "")
    assert told(commands, Kind.REGISTERED)[0][2][0][3] == 0
    commands = say(link, Kind.REGISTER, 7, "t", "live", "reliable", True, [(FEED, 2**64 - 1)], "")
    assert told(commands, Kind.REGISTERED)[0][2][0][3] == 4
    assert out_of(link).readers == {("b", 5): 1, ("b", 6): 0, ("b", 7): 4}
    assert len(out_of(link).owed) == 4


@pytest.mark.parametrize("fields", [("a..b", "live"), ("x" * 300, "live"), ("t", "yesterday"), ("", "live")])
def test_an_impossible_registration_is_counted(fields: tuple[str, str]) -> None:
    link = Link("a", "b")
    assert say(link, Kind.REGISTER, 1, *fields, "reliable", False, [], "") == []
    assert link["a"].counts[Drop.SHAPE] == 1


def test_f23_the_registrations_of_a_peer_are_bounded() -> None:
    link = Link("a", "b")
    core = link["a"].core
    for number in range(REGISTRATIONS_PER_PEER_MAX + 3):
        frame = encode_control(Kind.REGISTER, member_id("b"), 1, number, "x", "live", "reliable", False, [], "")
        core.handle(events.ControlReceived(frame), link.now)
    assert len(core.publishing.registrations.of("b")) == REGISTRATIONS_PER_PEER_MAX
    assert link["a"].counts[Drop.NO_ROOM] == 3


def test_many_feeds_are_told_in_several_frames() -> None:
    link = Link("a", "b")
    for n in range(FEEDS_PER_FRAME + 1):
        link.publish("a", f"t.n{n}")
    link.subscribe("b", "t.*")
    link.crank()
    assert len(link["b"].core.subscribing.subscriptions[1].feeds) == FEEDS_PER_FRAME + 1
    assert link["b"].core.subscribing.unconfirmed(1) == []


def test_who_left_cannot_register() -> None:
    link = listening()
    link.do("a", events.PeerDied("b", 1))
    say(link, Kind.REGISTER, 5, "t", "live", "reliable", False, [], "")
    assert link["a"].core.publishing.registrations.of("b") == {}


def test_an_acknowledgement_only_raises_and_never_beyond_the_end() -> None:
    link = listening()
    link["b"].settles = False
    for _ in range(4):
        link.publish("a", "t")
    for floor, expected in [(2, 2), (1, 2), (5, 2), (2**64 - 1, 2), (3, 3), (4, 4)]:
        say(link, Kind.ACKNOWLEDGE, [(1, FEED, floor)])
        assert out_of(link).readers["b", 1] == expected
    assert not out_of(link).owed


def test_who_acknowledges_unregistered_is_told_so_and_registers_again() -> None:
    link = listening()
    link["a"].core.publishing.unregister("b", 1)
    link.publish("a", "t")
    assert told(say(link, Kind.ACKNOWLEDGE, [(1, FEED, 0)]), Kind.UNKNOWN) == [[1]]
    link.run(500)
    assert link["b"].offsets("t") == [0]
    assert out_of(link).readers == {("b", 1): 1}
    assert told(say(link, Kind.ACKNOWLEDGE, [(1, 99, 0)]), Kind.UNKNOWN) == []


def test_what_a_subscription_was_owed_is_free_when_it_ends() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    assert out_of(link).owed
    link.do("b", events.SubscriptionClosed(1))
    link.do("b", events.SubscriptionClosed(1))
    link.crank()
    assert (out_of(link).readers, len(out_of(link).owed)) == ({}, 0)
    assert told(say(link, Kind.UNREGISTER, 77, False), Kind.UNKNOWN) == [[77]]
    assert link["b"].core.following.feeds == {}


def test_best_effort_is_never_owed() -> None:
    link = listening(delivery=Delivery.BEST_EFFORT)
    link.publish("a", "t")
    link.crank()
    for _ in range(3):
        link.publish("a", "t")
    link.wire.pop(0)
    link.run(500)
    assert link["b"].offsets("t") == [2, 3]
    assert link["b"].counts[Drop.BEST_EFFORT] == 2
    assert (out_of(link).readers, len(out_of(link).owed)) == ({}, 0)
    assert link.waiting() == []


def test_a_lossy_topic_owes_nobody() -> None:
    link = listening()
    for _ in range(3):
        link.publish("a", "t", policy=Policy.LOSSY)
    lost = [flight for flight in link.wire if flight.kind is None][:1]
    link.drop(lambda flight: flight in lost)
    link.run(1_000)
    link.publish("a", "t")
    link.run(1_000)
    assert link["b"].offsets("t")[-1] == 3
    assert out_of(link).readers == {}


def test_a_latest_topic_repairs_only_what_is_newest() -> None:
    link = listening()
    link.publish("a", "t", [7], policy=Policy.LATEST)
    link.crank()
    for seeds in ([1], [2], [1], [1]):
        link.publish("a", "t", seeds)
    link.drop_kind(None)
    link.run(1_500)
    assert link["b"].values("t") == [b"0", b"2", b"4"]
    assert link["b"].counts[Drop.SUPERSEDED] == 2
    assert link["b"].of(events.ReportGap) == []


def test_f17_a_lost_tail_is_told_by_a_marker_and_repaired() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    link.pass_time(1)
    link.publish("a", "t")
    link.drop_kind(None)
    link.run(200)
    assert link["b"].offsets("t") == [0, 1]
    assert link["a"].counts["repaired_bytes"] > 0


def test_f18_a_lost_tail_is_told_by_heartbeats_even_if_every_marker_is_lost() -> None:
    link = listening()
    link.publish("a", "t")
    for _ in range(150):
        link.drop_kind(None)
        link.pass_time(20)
        link.drop_kind(None)
        link.crank()
    assert link["b"].offsets("t") == [0]


def test_a_feed_is_listed_and_marked_until_it_is_acknowledged_to_its_end() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    markers, listed = 0, 0
    for _ in range(100):
        link.pass_time(20)
        markers += sum(decode_data(flight.event.frame)[1] is not None for flight in link.waiting(None))
        listed += sum(bool(flight.fields[0]) for flight in link.waiting(Kind.HEARTBEAT) if flight.source == "a")
        link.crank()
    assert 7 <= markers <= 12
    assert 7 <= listed <= 10
    link.settle("b")
    link.run(100)
    link.pass_time(900)
    assert not [flight for flight in link.waiting(Kind.HEARTBEAT) if flight.fields[0]]
    assert link.waiting(None) == []


def test_a_pull_is_answered_within_the_credit_and_always_with_what_is_available() -> None:
    link = listening()
    link["b"].settles = False
    for _ in range(10):
        link.publish("a", "t", [0], bodies=[bytes(1000)])
    answers = say(link, Kind.PULL, FEED, 3, 2500, [(2, 9)])
    assert [decode_data(bytes(c.chunk))[0].first for c in answers[:-1]] == [2, 3]
    assert told(answers, Kind.AVAILABLE) == [[FEED, 3, 0, 10, []]]
    answers = say(link, Kind.PULL, FEED, 4, 0, [(2, 9)])
    assert [decode_data(bytes(c.chunk))[0].first for c in answers[:-1]] == [2]
    answers = say(link, Kind.PULL, FEED, 5, 2**64 - 1, [(9, 2), (2**63, 2**64 - 1), (7, 8), (7, 8), (7, 8)])
    assert len(answers) == 2
    assert say(link, Kind.PULL, 99, 5, 100, [(0, 1)]) == []


def test_an_owed_subscriber_out_of_reach_is_given_up_after_its_time() -> None:
    config = FabricConfig(retention=Retention(absent_s=5))
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t")
    link["b"].stopped = True
    link.drop()
    link.run(4_000, step_ms=500)
    assert out_of(link).owed
    link.run(3_000, step_ms=500)
    assert not out_of(link).owed
    assert link["a"].counts["registrations_expired"] == 1


def test_the_oldest_owed_bursts_give_way_for_everybody() -> None:
    config = FabricConfig(retention=Retention(owed_bytes_max=500, kept_bytes_max=200))
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    for _ in range(4):
        link.publish("a", "t", [0], bodies=[bytes(50)])
    link.drop_kind(None)
    link.do("a", events.RoomNeeded("t", 300))
    assert link["a"].counts["dropped_oldest"] == 3
    link.run(1_000)
    assert link["b"].offsets("t") == [3]
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.first, gap.end, gap.reason) == (0, 3, Drop.GAP)


def test_the_owed_readers_elsewhere_are_told() -> None:
    link = listening()
    link.publish("a", "t")
    assert link["a"].core.publishing.readers_elsewhere("t") == {("b", 1): 0}
    assert link["a"].core.publishing.readers_elsewhere("unknown") == {}


def test_a_marker_echoes_the_nonces_of_who_joins() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    commands = say(link, Kind.JOIN, [(FEED, 5), (FEED, 6), (99, 7)])
    (marker,) = [command for command in commands if isinstance(command, events.Broadcast)]
    assert marker.marker
    assert decode_data(marker.frame)[1] == (5, 6)


def test_an_addressed_value_is_fetched_in_chunks_and_missing_when_it_is_gone() -> None:
    link = listening()
    value = bytes(range(256)) * 12_000
    link.publish("a", "t", [0], payloads={0: value})
    link.run(100)
    assert link["b"].values("t") == [value]
    assert told(say(link, Kind.FETCH, FEED, 5, 0, 10, 1, False), Kind.MISSING) == [[FEED, 5, 1]]
    assert told(say(link, Kind.FETCH, 99, 0, 0, 10, 1, False), Kind.MISSING) == [[99, 0, 1]]
    chunks = told(say(link, Kind.FETCH, FEED, 0, 2**20 - 5, 10, 1, False), Kind.CHUNK)
    assert chunks == [[FEED, 0, 2**20 - 5, 1, 0]]
    assert say(link, Kind.FETCH, FEED, 0, 2**63, 2**64 - 1, 1, False) == []


def test_an_older_feed_of_ours_has_no_known_end() -> None:
    link = Link("a", "b")
    link.start("a", 2)
    link.publish("a", "t")
    link.introduce()
    new = feed_id("a", 2, "t")
    assert told(say(link, Kind.STATUS, "t", 1), Kind.FIN) == [["t", 1, 2, new, 0, 0, False]]
    assert told(say(link, Kind.STATUS, "u", 1), Kind.FIN) == [["u", 1, 2, 0, 0, 0, False]]
    assert say(link, Kind.STATUS, "t", 2) == []


def test_time_without_anybody_costs_nothing() -> None:
    link = Link("a")
    link.publish("a", "t")
    link.pass_time(5_000)
    assert link.wire == []
    assert link["a"].core.next_deadline_ns() > link.now - MS


def test_each_of_many_feeds_is_marked_first_now_and_then() -> None:
    link = Link("a", "b")
    topics = ["t0", "t1", "t2"]
    link["b"].settles = False
    link.subscribe("b", "**")
    link.crank()
    for topic in topics:
        link.publish("a", topic)
    link.crank()
    first: list[int] = []
    for _ in range(60):
        link.now += 50 * MS
        marked = [decode_data(c.frame)[0].feed for c in link.do("a", events.TimePassed()) if hasattr(c, "marker")]
        first += marked[:1]
        link.crank()
    feeds = {link["a"].core.publishing.feeds[topic].feed for topic in topics}
    assert set(first) == feeds
    assert all(len(set(first[at : at + 3])) == 3 for at in range(len(first) - 2)), "in turn"
