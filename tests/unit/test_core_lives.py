"""What a subscriber makes of the feeds of earlier lives: which it enters when, how they end, and who it waits for."""

from __future__ import annotations

from typing import Any

import pytest

import fabric.core.subscribing
from fabric.config import Delivery, Policy, Start
from fabric.core import events
from fabric.core.cursors import Place
from fabric.core.wire import Drop, Kind, encode_control, feed_id, member_id
from tests.harness.pair import Link
from tests.harness.shelf import Shelf
from tests.unit.test_publishing import told

LIFE = 9


def meeting(**wanted: Any) -> Link:
    """`b` subscribes to what `a` publishes, in a life that is not its first."""
    link = Link(meet=False)
    link.start("a", LIFE)
    link.start("b")
    link.introduce()
    opened = events.SubscriptionOpened(1, "t", Start.LIVE, Delivery.RELIABLE, None)
    for setting, value in wanted.items():
        setattr(opened, setting, value)
    link.do("b", opened)
    return link


def row(incarnation: int, *, before: int = 0, end: int = 0, ending: int | None = None, policy: str = "durable") -> Any:
    ends = ending if ending is not None else int(incarnation < LIFE)
    return feed_id("a", incarnation, "t"), "t", policy, 0, end, 0, incarnation, before, ends


def hear(link: Link, kind: Kind, *fields: object, life: int = LIFE) -> list[Any]:
    return link.do("b", events.ControlReceived(encode_control(kind, member_id("a"), life, *fields)))


def following(link: Link) -> list[int]:
    return [followed.incarnation for followed in link["b"].core.following.feeds.values()]


def acknowledged(link: Link, commands: list[Any]) -> list[Any]:
    return [entry for (entries,) in told(commands, Kind.ACKNOWLEDGE) for entry in entries]


def test_a_feed_waits_for_the_one_before_it() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 2, [row(LIFE, before=4)])
    assert following(link) == []
    assert link["b"].core.subscribing.unconfirmed(1) or not link["b"].core.members.by_name["a"].is_there
    hear(link, Kind.REGISTERED, 1, 2, [row(4, end=3)])
    assert following(link) == [4]
    hear(link, Kind.REGISTERED, 1, 2, [row(LIFE, before=4)])
    assert following(link) == [4], "it comes later"


def test_an_empty_feed_is_over_at_once_and_the_next_begins() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 2, [row(4), row(LIFE, before=4)])
    assert following(link) == [LIFE]
    commands = hear(link, Kind.REGISTERED, 1, 2, [row(4, end=0)])
    assert acknowledged(link, commands) == [[1, feed_id("a", 4, "t"), 0]], "it is told again that we are done with that"


def test_between_lives_nothing_is_over_until_the_publisher_goes() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 1, [row(4)])
    assert link["b"].of(events.EndFeed) == []
    hear(link, Kind.BYE, [], True)
    assert [(end.source, end.topic) for end in link["b"].of(events.EndFeed)] == [("a", "t")]


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabric.core.subscribing, "LATER_MAX", 2)
    link = meeting()
    rows = [row(2, end=5), *(row(life, before=2) for life in range(3, 8))]
    hear(link, Kind.REGISTERED, 1, 6, rows)
    (later,) = link["b"].core.subscribing.subscriptions[1].later.values()
    assert (sorted(later), link["b"].counts[Drop.NO_ROOM]) == ([3, 4], 3)


def test_a_cursor_in_a_life_that_is_not_named_asks_for_its_end() -> None:
    link = meeting(name="worker", cursor={("a", "t"): Place(4, 7, ((9, 10),))})
    hear(link, Kind.REGISTERED, 1, 1, [row(LIFE)])
    assert following(link) == [4]
    assert link.waiting(Kind.STATUS)
    hear(link, Kind.FIN, "t", 4, LIFE, 0, 0, 0, False)
    assert [(gap.incarnation, gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [
        (4, 7, 9),
        (4, 10, None),
    ]
    assert following(link) == [LIFE]


def run(link: Link, shelf: Shelf, ms: int) -> None:
    """Time passes, and the disk works."""
    for _ in range(ms // 50):
        link.run(50)
        shelf.work()


def durable(link: Link, count: int) -> Shelf:
    shelf = Shelf(link, "a")
    link.subscribe("b", "t")
    link.crank()
    for _ in range(count):
        link.publish("a", "t", policy=Policy.DURABLE)
        shelf.work()
    run(link, shelf, 500)
    return shelf


def test_a_durable_feed_waits_for_the_next_life_of_its_publisher_but_not_for_ever() -> None:
    link = Link("a", "b")
    durable(link, 3)
    assert link["b"].offsets("t") == [0, 1, 2]
    link.do("b", events.PeerDied("a", 1))
    assert (link["b"].of(events.EndFeed), link["b"].of(events.ReportGap)) == ([], [])
    link["a"].stopped = True
    link.now += int(link["b"].core.context.config.retention.absent_s * 1e9) + 1
    link.do("b", events.TimePassed())
    assert [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [(3, None)]
    assert len(link["b"].of(events.EndFeed)) == 1


def test_a_durable_feed_that_came_whole_ends_with_a_goodbye() -> None:
    link = Link("a", "b")
    durable(link, 3)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    assert len(link["b"].of(events.EndFeed)) == 1
    assert link["b"].of(events.ReportGap) == []


def test_of_a_durable_feed_that_did_not_come_whole_the_rest_is_waited_for() -> None:
    link = Link("a", "b")
    shelf = durable(link, 3)
    link.publish("a", "t", policy=Policy.DURABLE)
    shelf.work()
    link.drop_kind(None)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.drop_kind(None)
    link.crank()
    assert link["b"].of(events.EndFeed) == []
    assert link["b"].core.subscribing.endings.dues_ns()


def test_nobody_hears_of_a_durable_feed_before_the_disk_knows_it() -> None:
    link = Link("a", "b")
    shelf = Shelf(link, "a")
    link.subscribe("b", "t")
    link.crank()
    link.do("a", events.FeedOpened("t", Policy.DURABLE, sync="process"))
    assert not link.waiting(Kind.REGISTERED)
    link.do("a", events.WriteFailed(1, 1, "full"))
    assert shelf.asked()
    link.publish("a", "u", policy=Policy.DURABLE)
    assert not link.waiting(Kind.REGISTERED)


def test_a_refused_burst_never_was() -> None:
    link = Link("a", "b")
    shelf = durable(link, 1)
    out = link["a"].core.publishing.feeds["t"]
    link.publish("a", "t", policy=Policy.DURABLE)
    assert shelf.refuse() == 1
    assert (out.end, out.refused, link["a"].core.publishing.retention.passing_bytes) == (1, 1, 0)
    assert link["a"].counts["durable_refused"] == 1


def test_only_what_is_committed_is_told_and_positions_only_rise() -> None:
    link = Link("a", "b")
    shelf = Shelf(link, "a")
    link.do("b", events.SubscriptionOpened(1, "t", Start.LIVE, Delivery.RELIABLE, None, "worker", {}))
    link.crank()
    for _ in range(4):
        link.publish("a", "t", policy=Policy.DURABLE)
        shelf.work()
    run(link, shelf, 500)
    out = link["a"].core.publishing.feeds["t"]
    assert out.readers == {("b", 1): 0}
    for floor, heard in ((3, 3), (2, 3), (4, 4)):
        link.do("b", events.CursorCommitted(1, {("a", "t"): Place(1, floor)}))
        run(link, shelf, 100)
        assert out.readers == {("b", 1): heard}
    link.do("b", events.CursorCommitted(7, {}))
    assert link["b"].core.subscribing.cursor(7) == {}
    assert link["b"].core.subscribing.cursor(1) == {("a", "t"): Place(1, 4)}
