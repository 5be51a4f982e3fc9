"""Closing with state: what is still owed is written down, named with its end, and told in BYE."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import Policy
from fabric.core import events
from fabric.core.disk import AppendRecords, PastFeed, RestWanted, StateRecovered
from fabric.core.wire import Kind, decode_control, encode_control, feed_id, member_id
from tests.harness.pair import Link

FEED = feed_id("a", 1, "t")


def owing(policy: Policy = Policy.RELIABLE, *, spills: bool = True) -> Link:
    """`a` has state and owes three records of `t` to `b`, who receives nothing any more."""
    link = Link(meet=False)
    link.start("a")
    link.start("b")
    link.do("a", StateRecovered((), b""))
    link.introduce()
    link.subscribe("b", "t")
    link.crank()
    write_all(link)
    link["b"].settles = False
    for _ in range(3):
        link.publish("a", "t", policy=policy, spills=spills)
        if policy is Policy.DURABLE:
            write_all(link)
    link.crank()
    return link


def asked(link: Link) -> list[AppendRecords]:
    return [command for command in link["a"].reported if isinstance(command, AppendRecords)]


def write_all(link: Link) -> None:
    """The disk does what it was asked for until now, and what that leads to."""
    done = -1
    while link["a"].core.context._writes > done:
        done = link["a"].core.context._writes
        link.do("a", events.WriteFinished(done))
        link.crank()


def out_of(link: Link) -> Any:
    return link["a"].core.publishing.by_id[FEED]


def bye(link: Link) -> list[Any]:
    link.drop()
    link.do("a", events.IntakeStopped(say_bye=True))
    (flight,) = link.waiting(Kind.BYE)
    return list(decode_control(flight.event.frame).fields)


@pytest.mark.parametrize("spills", [True, False], ids=["spill", "block"])
def test_what_is_owed_is_written_and_then_its_end(spills: bool) -> None:
    link = owing(spills=spills)
    link.do("a", events.IntakeStopped())
    before = len(asked(link))
    link.do("a", RestWanted())
    bursts = asked(link)[before:]
    assert [(wish.first, wish.count) for wish in bursts] == [(0, 1), (1, 1), (2, 1)]
    assert not link["a"].core.publishing.keeping.is_over
    link.do("a", events.WriteFinished(bursts[-1].number))
    (name,) = asked(link)[before + 3 :]
    assert (name.first, name.count, name.policy, name.sync) == (3, 0, "reliable", "closed")
    assert not link["a"].core.publishing.keeping.is_over
    link.do("a", events.WriteFinished(name.number))
    assert link["a"].core.publishing.keeping.is_over
    assert bye(link) == [[[FEED, 3, True]], True]


def test_what_the_disk_refuses_is_not_kept_and_the_close_goes_on() -> None:
    link = owing()
    link.do("a", events.IntakeStopped())
    link.do("a", RestWanted())
    last = asked(link)[-1].number
    link.do("a", events.WriteFailed(last, last, "full"))
    link.do("a", events.WriteFinished(last - 1))
    again = asked(link)[-1]
    assert again.first == 2, "it took some, and may take the rest"
    link.do("a", events.WriteFailed(again.number, again.number, "full"))
    assert link["a"].core.publishing.keeping.is_over
    assert bye(link) == [[[FEED, 3, False]], True]


def test_an_end_that_the_disk_refuses_is_not_kept() -> None:
    link = owing()
    link.do("a", events.IntakeStopped())
    link.do("a", RestWanted())
    link.do("a", events.WriteFinished(asked(link)[-1].number))
    name = asked(link)[-1]
    assert name.count == 0
    link.do("a", events.WriteFailed(name.number, name.number, "full"))
    assert link["a"].core.publishing.keeping.is_over
    assert not out_of(link).is_written_down


def test_a_second_time_asks_for_nothing() -> None:
    link = owing()
    link.do("a", RestWanted())
    write_all(link)
    before = len(asked(link))
    link.do("a", RestWanted())
    assert len(asked(link)) == before
    assert link["a"].core.publishing.keeping.is_over


def test_what_is_durable_is_on_disk_already() -> None:
    link = owing(Policy.DURABLE, spills=False)
    before = len(asked(link))
    link.do("a", events.IntakeStopped())
    link.do("a", RestWanted())
    assert len(asked(link)) == before
    assert out_of(link).is_written_down


def test_who_is_told_that_the_rest_is_kept_waits_for_the_next_life() -> None:
    link = owing()
    link["b"].settles = True
    link.publish("a", "t")
    link.drop()  # the fourth never comes
    link.do("a", events.IntakeStopped())
    link.do("a", RestWanted())
    write_all(link)
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    assert link["b"].of(events.ReportGap) == []
    assert link["b"].of(events.EndFeed) == []


def test_who_is_told_that_it_is_not_kept_has_a_gap() -> None:
    link = owing()
    link["b"].settles = True
    link.publish("a", "t")
    link.drop()
    link.do("a", events.IntakeStopped(say_bye=True))
    link.crank()
    assert [(gap.first, gap.end) for gap in link["b"].of(events.ReportGap)] == [(3, 4)]
    assert len(link["b"].of(events.EndFeed)) == 1


def test_nobody_who_reads_nothing_to_keep() -> None:
    link = owing()
    link.do("a", events.FeedOpened("unread", Policy.RELIABLE, True, ""))
    link.do("a", RestWanted())
    write_all(link)
    assert not link["a"].core.publishing.feeds["unread"].is_written_down


def test_a_goodbye_tells_the_ends_of_earlier_lives_that_are_certain() -> None:
    link = Link(meet=False)
    link.start("a", 3)
    link.start("b")
    old = [PastFeed(feed_id("a", life, "t"), "t", "reliable", life, 3, life == 2, ()) for life in (1, 2)]
    link.do("a", StateRecovered(tuple(old), b""))
    link.introduce()
    assert bye(link) == [[[old[1].feed, 3, True]], True]


def test_who_missed_a_goodbye_hears_the_end_in_that_of_the_next_life() -> None:
    link = owing()
    link.settle("b")
    link.drop()
    link["a"].stopped = True
    link.start("a", 2)
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    link.drop()
    ends = [(FEED, 3, True)]
    link.do("b", events.ControlReceived(encode_control(Kind.BYE, member_id("a"), 2, ends, True)))
    assert link["b"].of(events.ReportGap) == []
    assert [(end.source, end.topic) for end in link["b"].of(events.EndFeed)] == [("a", "t")]
