"""Telling the books: to publishers that may not be there, over links that lose, and in time for a close."""

from __future__ import annotations

import pytest

from fabric.config import FabricConfig, Policy, Retention
from fabric.core import books, events
from fabric.core.wire import Kind, encode_control, member_id
from fabric.observe.ledger import Totals
from tests.harness.pair import Link
from tests.unit.test_ledger import FEED, ledger, row_of, settle_as, unsettled
from tests.unit.test_publishing import listening


def test_books_are_told_at_most_once_in_a_heartbeats_period_and_not_at_all_when_nothing_changes() -> None:
    link = listening()
    told = 0
    for _ in range(100):
        link.publish("a", "t")
        link.pass_time(20)
        told += len(link.waiting(Kind.BOOKS))
        link.crank()
    assert 2 <= told <= 3
    link.run(2_000)
    for _ in range(100):
        link.pass_time(20)
        assert link.waiting(Kind.BOOKS) == []
        link.crank()


def test_books_are_told_again_until_they_are_confirmed() -> None:
    for lost in (Kind.BOOKS, Kind.BOOKED):
        link = unsettled()
        settle_as(link)
        for _ in range(200):
            link.pass_time(20)
            while link.drop_kind(lost) or link.wire:
                link.deliver(link.wire[0]) if link.wire else None
        link.run(1_100)
        assert row_of(link, "a").totals == Totals(owed=3, handled=3)
        link.run(2_000)
        assert link["b"].core.books._untold == {}


def test_an_older_frame_that_comes_late_changes_nothing() -> None:
    link = unsettled(2)
    link.pass_time(1_100)
    late = link.waiting(Kind.BOOKS)[-1]
    link.drop(lambda flight: flight is late)
    settle_as(link)
    link.run(2_000)
    link.wire.append(late)
    link.run(2_000)
    assert row_of(link, "a").totals == Totals(owed=2, handled=2)


def test_what_changed_after_it_was_told_is_told_even_if_that_is_confirmed() -> None:
    link = unsettled(2)
    link.pass_time(1_100)
    settle_as(link)  # between the books and their confirmation
    link.run(2_500)
    assert row_of(link, "a").totals == Totals(owed=2, handled=2)


def test_a_confirmation_of_open_books_does_not_confirm_the_last_ones() -> None:
    link = unsettled(2)
    link.pass_time(1_100)
    (told,) = link.waiting(Kind.BOOKS)
    link.deliver(told)
    link.do("b", events.SubscriptionClosed(1))
    link.run(2_500)
    assert (row_of(link, "a").state, row_of(link, "a").totals) == ("closed", Totals(owed=2, dropped=2))


def test_books_of_a_reader_that_was_away_too_long_go_on_when_it_is_back() -> None:
    link = Link("a", "b", config=FabricConfig(retention=Retention(absent_s=20)))
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t", [0, 1])
    link.run(1_500)
    link["b"].stopped = True
    link.run(25_000, step_ms=200)
    (row,) = ledger(link, "a").rows
    assert (row.state, row.peer, row.totals) == ("lost", "down", Totals(owed=2, handled=2))
    link["b"].stopped = False
    link.run(5_000)
    assert (row_of(link, "a").state, row_of(link, "a").totals) == ("open", Totals(owed=2, handled=2))
    link.publish("a", "t", [0, 1])
    link.run(5_000)
    assert (row_of(link, "a").state, row_of(link, "a").totals) == ("open", Totals(owed=4, handled=4))
    assert link["a"].core.books.untold_by() == set()


def test_who_closes_asks_for_the_last_books_and_gets_them_at_once() -> None:
    link = unsettled()
    settle_as(link)
    link.pass_time(40)
    link.crank()
    core = link["a"].core
    assert core.books.untold_by() == {"b"}
    link.do("a", events.BooksWanted())
    link.pass_time(20)
    link.crank()
    assert core.books.untold_by() == set()
    assert row_of(link, "a").totals == Totals(owed=3, handled=3)


def test_who_closes_asks_again_and_waits_for_the_last_books_of_what_was_closed() -> None:
    link = unsettled()
    link.do("b", events.SubscriptionClosed(1))
    link.crank()
    assert link["a"].core.books.untold_by() == {"b"}
    link.do("a", events.BooksWanted())
    link.pass_time(20)
    assert len(link.drop_kind(Kind.BOOKED, Kind.BOOKS)) > 0
    assert link["a"].core.books.next_deadline_ns() == link.now + 250_000_000
    assert link["a"].core.next_deadline_ns() <= link.now + 250_000_000
    link.pass_time(260)
    link.crank()
    assert link["a"].core.books.untold_by() == set()


def test_two_who_close_at_once_hear_from_each_other() -> None:
    link = Link("a", "b")
    for name in "ab":
        link.subscribe(name, "**")
        link.crank()
    for name in "ab":
        link.publish(name, f"of-{name}", [0])
    link.run(300)
    for name in "ab":
        link.publish(name, f"of-{name}", [1])
    link["a"].settles = link["b"].settles = False
    link.crank()
    for name in "ab":
        link.do(name, events.IntakeStopped())
        link.do(name, events.SubscriptionClosed(1))
    link.pass_time(20)
    link.crank()
    for name, other in ("ab", "ba"):
        (row,) = [row for row in ledger(link, name, final=True).rows if row.subscriber == other]
        assert (row.state, row.totals.owed) == ("closed", 2)


def test_what_a_leaving_reader_has_to_say_stands_before_its_goodbye() -> None:
    link = unsettled()
    settle_as(link)
    link.do("b", events.SubscriptionClosed(1))
    link.do("b", events.IntakeStopped(say_bye=True))
    kinds = [flight.kind for flight in link.wire if flight.source == "b"]
    assert kinds.index(Kind.BOOKS) < kinds.index(Kind.BYE)
    link.crank()
    assert (row_of(link, "a").state, row_of(link, "a").totals) == ("closed", Totals(owed=3, handled=3))


def tell(link: Link, *row: object, again: bool = False) -> None:
    fields = (0, True) if again else (9, [row])
    kind = Kind.BOOKED if again else Kind.BOOKS
    link.do("a", events.ControlReceived(encode_control(kind, member_id("b"), 1, *fields)))
    link.crank()


def test_impossible_books_are_refused() -> None:
    link = unsettled()
    before = row_of(link, "a")
    for row in [
        (1, FEED, 2, 3, 1, 0, False, []),
        (1, FEED, 0, 2, 2, 1, False, [("handled", 3)]),
        (1, FEED, 0, 4, 4, 0, False, [("handled", 4)]),
        (1, FEED, 0, 3, 3, 0, False, [("eaten", 3)]),
    ]:
        tell(link, *row)
    assert link["a"].counts["shape"] == 4
    tell(link, 1, 12345, 0, 3, 3, 0, False, [("handled", 3)])
    tell(link, 77, FEED, 0, 3, 3, 0, False, [("handled", 3)])
    assert row_of(link, "a") == before


def test_books_that_lie_do_not_add_up() -> None:
    link = unsettled()
    tell(link, 1, FEED, 0, 3, 3, 0, False, [("handled", 2)])
    assert not ledger(link, "a").balanced
    assert ledger(link, "a").explain() == "does not add up: a/t -> b#1 [open] 0..3: 3 owed, 2 handled"
    tell(link, 1, FEED, 0, 3, 3, 0, True, [("handled", 3)])
    tell(link, 1, FEED, 0, 3, 3, 0, False, [("gap", 3)])
    assert row_of(link, "a").state == "closed", "what is closed stays closed"
    assert row_of(link, "a").totals == Totals(owed=3, handled=3)


def test_a_publisher_that_is_not_there_hears_the_books_later_and_not_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(books, "UNTOLD_BOOKS_MAX", 1)
    link = listening()
    link.publish("a", "t")
    link.run(1_100)
    link["a"].stopped = True
    link.run(11_000)
    assert link["b"].core.members.by_name["a"].state == "down"
    link.do("b", events.SubscriptionClosed(1))
    told = link["b"].core.books._token
    link.pass_time(5_000)
    assert link["b"].core.books._token == told
    link.subscribe("b", "t", subscription=2)
    link["a"].stopped = False
    link.run(5_000)
    link["a"].stopped = True
    link.run(11_000)
    assert sorted(row.state for row in ledger(link, "a").rows) == ["closed", "open"]


def test_what_is_closed_by_the_thousand_while_a_publisher_is_away_is_counted_as_not_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(books, "UNTOLD_BOOKS_MAX", 1)
    link = Link("a", "b")
    for number in (1, 2):
        link.subscribe("b", "t", subscription=number)
    link.crank()
    link.publish("a", "t")
    link.crank()
    for number in (1, 2):
        link.do("b", events.SubscriptionClosed(number))
    assert link["b"].counts["books_not_told"] == 1


def test_the_dead_need_no_books() -> None:
    link = unsettled()
    link.settle("b")
    link.pass_time(1_000)
    assert len(link.drop_kind(Kind.BOOKS)) == 1
    assert link["b"].core.books._untold != {}
    link.do("b", events.PeerDied("a", 1))
    link.pass_time(1_100)
    assert link["b"].core.books._untold == {}


def test_many_books_take_several_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(books, "ROWS_PER_FRAME", 2)
    monkeypatch.setattr(books, "FRAMES_AT_ONCE", 2)
    link = Link("a", "b")
    link.subscribe("b", "**")
    link.crank()
    for number in range(5):
        link.publish("a", f"t{number}")
    link.crank()
    link.pass_time(1_000)
    assert len(link.waiting(Kind.BOOKS)) == 2
    link.run(3_000)
    assert ledger(link, "a").totals == Totals(owed=5, handled=5)


def test_what_was_gone_before_we_came_is_told() -> None:
    link = Link("a")
    link.publish("a", "t", policy=Policy.LOSSY)
    link.start("b")
    link.do("b", events.PeerAnnounced(link["a"].core.context.card))
    link.subscribe("b", "t")  # it is older than its meeting with `a`: all that `a` published belongs to it
    for _ in range(75):
        link.pass_time(20)
        while link.drop_kind(None) or link.wire:  # and no marker comes that would prove the link
            link.deliver(link.wire[0]) if link.wire else None
    for name in "ab":
        assert row_of(link, name).totals == Totals(owed=1, dropped=1)
