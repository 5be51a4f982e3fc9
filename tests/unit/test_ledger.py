"""The books: they balance at every moment, are told whatever gets lost, are bounded, and say what is not known."""

from __future__ import annotations

import pytest

from fabric.config import Delivery, Policy
from fabric.core import books, events
from fabric.core.books import DROPPED, ENDS, LETTERS
from fabric.core.wire import Drop, feed_id
from fabric.engine.auditing import draw_up
from fabric.observe.ledger import Ledger, LedgerRow, Totals, Unknown
from tests.harness.pair import Link, inbound_of
from tests.unit.test_publishing import listening

FEED = feed_id("a", 1, "t")
REFUSALS = (
    *("truncated", "magic", "version", "checksum", "kind", "shape", "stranger", "impostor", "stale"),
    *("duplicate", "no_room", "blocked"),
)
"""Reasons that are no end of a record, but of a frame, of a copy, or of an attempt."""


def ledger(link: Link, name: str, *, final: bool = False) -> Ledger:
    return draw_up(link[name].core, final=final)


def row_of(link: Link, name: str, *, final: bool = False) -> LedgerRow:
    (row,) = ledger(link, name, final=final).rows
    return row


def settle_as(link: Link, **reasons: int) -> None:
    """`b` is done with all that it holds: so many of each burst were dropped for a reason, the rest was handled."""
    for deliver in link["b"].in_hand:
        first, end = deliver.burst.first, deliver.burst.end
        handled = deliver.burst.count - sum(reasons.values())
        link.do("b", events.MessagesSettled(deliver.feed, first, end, handled, deliver.size, reasons or None))
    link["b"].in_hand.clear()


def unsettled(count: int = 3) -> Link:
    """`b` has so many records of `a` in its hand, and told its books a moment ago."""
    link = listening()
    link["b"].core.books._due_ns = link.now + 800_000_000
    link["b"].settles = False
    link.publish("a", "t", range(count))
    link.crank()
    return link


def test_every_reason_is_either_an_end_or_a_refusal() -> None:
    ends = {"handled", Drop.GAP, Drop.NOT_ASKED, *LETTERS, *DROPPED}
    assert ends == set(ENDS)
    assert len(ends) == len(ENDS)
    assert ends - {"handled"} | set(REFUSALS) == set(Drop)
    assert not ends & set(REFUSALS)


def test_what_is_in_hand_is_in_flight_until_it_is_settled() -> None:
    link = unsettled()
    row = row_of(link, "b")
    assert (row.source, row.topic, row.subscriber, row.subscription, row.state) == ("a", "t", "b", 1, "open")
    assert row.totals == Totals(owed=3, in_flight=3)
    assert row.balanced
    settle_as(link, rejected=1, superseded=1)
    row = row_of(link, "b")
    assert row.totals == Totals(owed=3, handled=1, dead_lettered=1, dropped=1)
    assert dict(row.reasons) == {"handled": 1, "rejected": 1, "superseded": 1}
    assert (row.first, row.end, row.floor, row.peer) == (0, 3, 3, "joined")


def test_the_publisher_hears_what_became_of_its_records() -> None:
    link = unsettled()
    assert row_of(link, "a").totals == Totals(owed=3, in_flight=3)
    settle_as(link, rejected=1)
    link.run(100)
    assert row_of(link, "a").totals == Totals(owed=3, acknowledged=3), "it is acknowledged, and not told yet"
    link.run(1_100)
    row = row_of(link, "a")
    assert row.totals == Totals(owed=3, handled=2, dead_lettered=1)
    assert dict(row.reasons) == {"handled": 2, "rejected": 1}
    assert (row.source, row.subscriber, row.subscription, row.state) == ("a", "b", 1, "open")


def test_a_closed_subscription_gives_up_the_rest_and_says_so() -> None:
    link = unsettled()
    link.do("b", events.SubscriptionClosed(1))
    row = row_of(link, "b")
    assert (row.state, row.totals, dict(row.reasons)) == ("closed", Totals(owed=3, dropped=3), {"given_up": 3})
    assert link["b"].counts["given_up"] == 3
    link.crank()
    assert row_of(link, "a").state == "left"
    assert row_of(link, "a", final=True).known_unknown == Unknown("a", "t", "b", 1, 0, 3, "joined")
    link.run(1_100)
    assert (row_of(link, "a").state, row_of(link, "a").totals) == ("closed", Totals(owed=3, dropped=3))
    link.publish("a", "t")
    assert row_of(link, "a").end == 3, "what is published later is not owed to it"


def test_of_a_reader_that_died_nobody_can_say_more_and_it_is_owed_nothing() -> None:
    link = unsettled()
    link.settle("b", 1)
    link.run(1_100)
    link["b"].stopped = True
    link.publish("a", "t", [0, 1])
    link.do("a", events.PeerDied("b", 1))
    books_of_a = ledger(link, "a")
    (row,) = books_of_a.rows
    assert (row.state, row.peer) == ("lost", "dead")
    assert row.totals == Totals(owed=3, handled=3)
    assert books_of_a.known_unknowns == (Unknown("a", "t", "b", 1, 3, 5, "dead"),)
    assert books_of_a.balanced
    assert books_of_a.explain() == "nobody can say any more: a/t 3..5 for b#1 (dead)"


def test_a_reader_that_lives_and_does_not_settle_keeps_a_close_from_balancing() -> None:
    link = unsettled()
    assert ledger(link, "a").balanced
    final = ledger(link, "a", final=True)
    assert not final.balanced
    assert final.unknown == (Unknown("a", "t", "b", 1, 0, 3, "joined"),)
    assert final.explain() == "nothing is known of a/t 0..3 for b#1 (joined)"


def test_a_gap_and_an_open_gap_are_in_the_books() -> None:
    link = unsettled(1)
    link.publish("a", "t", [0, 1])
    link.drop()
    link["b"].core.following.feeds[FEED].known = 3
    inbound_of(link["b"], "t").learn(0, 3)
    link.settle("b")
    link.do("b", events.PeerDied("a", 1))
    row = row_of(link, "b")
    assert (row.state, row.peer, row.totals) == ("ended", "dead", Totals(owed=3, handled=1, gap=2))
    assert row.known_unknown == Unknown("a", "t", "b", 1, 3, None, "dead")
    assert ledger(link, "b").explain() == "nobody can say any more: a/t 3..? for b#1 (dead)"
    assert row.balanced


def test_a_life_that_was_over_before_its_subscription_came_to_it_is_a_known_unknown() -> None:
    link = unsettled(1)
    link["a"].stopped = True
    link.start("a", 2)
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    link.do("a", events.PeerAnnounced(link["b"].core.context.card))
    link.publish("a", "t")
    link.run(300)
    link["a"].stopped = True
    link.do("b", events.PeerDied("a", 2))
    link.settle("b")
    rows = ledger(link, "b").rows
    assert [(row.incarnation, row.state, row.totals.owed) for row in rows] == [(1, "ended", 1), (2, "ended", 0)]
    assert all(row.known_unknown is not None and row.known_unknown.end is None for row in rows)


def test_best_effort_readers_are_owed_nothing() -> None:
    link = listening(delivery=Delivery.BEST_EFFORT)
    link.publish("a", "t")
    link.run(300)
    link.publish("a", "t", [0, 1])
    link.run(1_100)
    assert row_of(link, "a").totals == Totals(owed=3, handled=2, dropped=1)
    link.publish("a", "t")
    link.drop()
    link["b"].stopped = True
    link.do("a", events.PeerDied("b", 1))
    assert row_of(link, "a").totals == Totals(owed=3, handled=2, dropped=1)
    assert row_of(link, "a").known_unknown is None
    assert ledger(link, "a", final=True).balanced


def test_filtered_records_are_not_asked_for_and_told_without_any_settling() -> None:
    link = listening(seeds=frozenset({7}))
    link.publish("a", "t", [1, 2])
    link.run(1_100)
    assert row_of(link, "b").totals == Totals(owed=2, not_asked=2)
    assert row_of(link, "a").totals == Totals(owed=2, not_asked=2)


def test_what_we_read_of_ourselves_stands_in_the_books_once() -> None:
    link = Link("a", "b")
    link.subscribe("a", "t")
    link.crank()
    link.publish("a", "t", [0, 1])
    link.run(1_500)
    assert row_of(link, "a").totals == Totals(owed=2, handled=2)
    assert row_of(link, "a", final=True).balanced
    link.do("a", events.SubscriptionClosed(1))
    link.run(1_500)
    assert [row.state for row in ledger(link, "a").rows] == ["closed"]


def test_books_of_what_is_over_are_summed_beyond_a_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "PAST_BOOKS_MAX", 2)
    link = Link("a", "b")
    for number in range(1, 6):
        link.subscribe("b", "t", subscription=number)
        link.crank()
        link.publish("a", "t", [0, 1])
        link.run(50)
        link.do("b", events.SubscriptionClosed(number))
        link.run(1_200)
    for name in "ba":
        kept = ledger(link, name)
        assert sorted(row.subscription for row in kept.rows if row.source) == [4, 5]
        (older,) = [row for row in kept.rows if not row.source]
        assert (older.state, older.feeds, older.totals) == ("sum", 3, Totals(owed=6, handled=6))
        assert str(older) == "3 older feeds [sum] 0..6: 6 owed, 6 handled"
        assert kept.totals == Totals(owed=10, handled=10)
        assert kept.balanced


def test_readers_that_died_are_summed_with_what_they_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "PAST_BOOKS_MAX", 0)
    link = unsettled(1)
    link["b"].stopped = True
    link.do("a", events.PeerDied("b", 1))
    assert row_of(link, "a").totals == Totals()
    assert ledger(link, "a").balanced


def test_a_next_life_of_a_reader_has_books_of_its_own() -> None:
    link = unsettled(1)
    link.settle("b")
    link.run(1_100)
    link["b"].stopped = True
    link.start("b", 2)
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    link.run(100)
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t", [0, 1])
    link.run(1_500)
    rows = ledger(link, "a").rows
    assert sorted((row.state, row.totals.owed, row.totals.handled) for row in rows) == [("lost", 1, 1), ("open", 2, 2)]


def test_a_lossy_feed_is_told_too() -> None:
    link = Link("a", "b")
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t", policy=Policy.LOSSY)
    link.run(300)
    link.publish("a", "t")
    link.drop()
    link.publish("a", "t")
    link.run(1_500)
    assert dict(row_of(link, "a").reasons) == {"handled": 1, "best_effort": 2}, "nobody followed it at first"


def test_a_ledger_can_be_printed() -> None:
    rows = tuple(
        LedgerRow("a", "t", 1, "b", number, "open", "up", 0, 1, 1, Totals(owed=1, handled=1)) for number in range(50)
    )
    text = str(Ledger("a", rows))
    assert text.startswith("ledger of a, balanced: 50 owed, 50 handled\na/t -> b#0 [open] 0..1: 1 owed, 1 handled\n")
    assert text.endswith("... and 10 more rows")
    assert Ledger("a").explain() == "the books of a balance: nothing owed"
    wrong = Ledger("a", (LedgerRow("a", "t", 1, "b", 1, "open", "up", 0, 2, 1, Totals(owed=2, handled=1)),))
    assert "NOT balanced" in str(wrong)
    assert Totals(owed=3, in_flight=1).settled == 2
