"""Who comes back: where a subscription goes on in what its publisher has, and what it is told of lives it missed."""

from __future__ import annotations

from typing import Any

import pytest

from fabric.config import Delivery, Start
from fabric.core import events
from fabric.core.cursors import Place
from fabric.core.wire import Kind, encode_control, feed_id, member_id
from tests.harness.bursts import Numbering
from tests.harness.pair import Link, card
from tests.unit.test_core_lives import LIFE, following, hear, meeting, row
from tests.unit.test_core_restarts import OLD, past, publishing, recovered, register, saved
from tests.unit.test_core_restarts import row as saved_row
from tests.unit.test_publishing import FEED, say, told


def begun_at(commands: list[Any]) -> list[tuple[int, int]]:
    return [(fields[0], fields[3]) for _, _, rows in told(commands, Kind.REGISTERED) for fields in rows]


def test_a_new_session_of_a_named_subscription_goes_on_where_the_last_one_stood() -> None:
    link = Link("a", "b")
    register(link, 9)
    for _ in range(5):
        link.publish("a", "t")
    say(link, Kind.ACKNOWLEDGE, [(9, FEED, 3)])
    say(link, Kind.UNREGISTER, 9, True)
    commands = say(link, Kind.REGISTER, 10, "t", "live", "reliable", False, [], "worker")
    assert begun_at(commands) == [(FEED, 3)]


def test_a_new_session_is_not_owed_again_what_the_one_before_was_done_with() -> None:
    link = recovered(saved_row(), feeds=(past(),))
    register(link, 9)
    link.do("a", events.WriteFinished(saved(link)[-1].number))
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 3)])
    say(link, Kind.UNREGISTER, 9, True)
    assert publishing(link).by_id[OLD].readers == {}
    register(link, 10)
    assert publishing(link).by_id[OLD].readers == {}


def test_who_has_a_cursor_in_a_life_that_is_forgotten_misses_nothing_of_the_next() -> None:
    link = Link(meet=False)
    link.start("a", LIFE)
    link.start("b")
    link.introduce()
    for _ in range(3):
        link.publish("a", "t")
    cursor = {("a", "t"): Place(4, 7)}
    link.do("b", events.SubscriptionOpened(1, "t", Start.LIVE, Delivery.RELIABLE, None, "worker", cursor))
    link.run(500)
    assert link["b"].offsets("t") == [0, 1, 2]


def held_at_its_end(policy: str) -> Link:
    """`b` has all of life 4 in its hand, and the next life has been named: then a third one comes."""
    link = meeting()
    link["b"].settles = False
    old = feed_id("a", 4, "t")
    hear(link, Kind.REGISTERED, 1, 2, [row(4, end=1, policy=policy), row(LIFE, before=4, policy=policy)])
    header = encode_control(Kind.REPAIR, member_id("a"), LIFE, old, 1)
    link.do("b", events.BulkReceived(header, Numbering(old, 4).frame([0])))
    assert (link["b"].offsets("t"), following(link)) == ([0], [4])
    link.do("b", events.PeerAnnounced(card("a", LIFE + 1)))
    return link


def named_by_the_third(link: Link, *rows: Any) -> None:
    new = feed_id("a", LIFE + 1, "t")
    last = rows[-1][6] if rows else 0
    present = (new, "t", "reliable", 0, 0, 0, LIFE + 1, last, 0)
    hear(link, Kind.REGISTERED, 1, len(rows) + 1, [*rows, present], life=LIFE + 1)
    link.settle("b")


def lost_lives(link: Link) -> list[int]:
    return [gap.incarnation for gap in link["b"].of(events.ReportGap)]


@pytest.mark.parametrize("policy", ["reliable", "durable"])
def test_a_life_that_the_next_one_does_not_know_is_a_gap(policy: str) -> None:
    link = held_at_its_end(policy)
    named_by_the_third(link)
    hear(link, Kind.FIN, "t", LIFE, LIFE + 1, 0, 0, 0, False, life=LIFE + 1)
    assert (lost_lives(link), following(link)) == ([LIFE], [LIFE + 1])


def test_a_reliable_life_that_the_next_one_serves_is_no_gap() -> None:
    link = held_at_its_end("reliable")
    served = feed_id("a", LIFE, "t"), "t", "reliable", 0, 1, 0, LIFE, 4, 1
    named_by_the_third(link, served)
    assert (lost_lives(link), following(link)) == ([], [LIFE])


def test_what_a_life_that_left_would_have_served_is_given_up_in_time() -> None:
    link = meeting()
    hear(link, Kind.REGISTERED, 1, 1, [row(4, end=3)])
    assert following(link) == [4]
    hear(link, Kind.BYE, [], True)
    link.pass_time(3_700_000, step_ms=100_000)
    assert following(link) == []


def test_who_has_saved_nothing_yet_says_where_it_began() -> None:
    link = Link("a", "b")
    for _ in range(2):
        link.publish("a", "t")
    link.do("b", events.SubscriptionOpened(1, "t", Start.LIVE, Delivery.RELIABLE, None, "worker", {}))
    link.run(500)
    link.publish("a", "t")
    link.run(500)
    assert link["b"].offsets("t") == [2]
    assert link["b"].core.subscribing.subscriptions[1].positions("a") == [(FEED, 2)]
