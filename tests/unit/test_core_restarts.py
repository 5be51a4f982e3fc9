"""What a core does with what earlier lives left: registrations, past feeds, cursors; the rare answers."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from fabric.config import Policy
from fabric.core import events
from fabric.core.cursors import Place, Slot, pack_cursor, parse_cursor, parse_redriven
from fabric.core.disk import PastFeed, ReleaseRecords, SaveRegistrations, StateRecovered
from fabric.core.registrations import RESTORED, UNMET_NS
from fabric.core.wire import Drop, Kind, decode_control, feed_id
from fabric.errors import ConfigError
from tests.harness.pair import Link
from tests.unit.test_publishing import say, told

OLD = feed_id("a", 1, "t")


def recovered(*rows: Any, feeds: tuple[PastFeed, ...] = (), since: int = 1) -> Link:
    """`a` in its second life, with what the first one left."""
    return begun(2, StateRecovered(feeds, msgpack.packb((since, rows)) if rows else b""))


def begun(incarnation: int, event: StateRecovered) -> Link:
    link = Link(meet=False)
    link.start("a", incarnation)
    link.start("b")
    link.do("a", event)
    link.introduce()
    return link


def past(end: int = 3, *, exact: bool = True, incarnation: int = 1) -> PastFeed:
    bursts = tuple((offset, offset + 1, 100) for offset in range(end))
    return PastFeed(feed_id("a", incarnation, "t"), "t", "durable", incarnation, end, exact, bursts)


def row(number: int = 5, *, name: str = "worker", incarnation: int = 1, joins: tuple[Any, ...] = ((OLD, 1),)) -> Any:
    return "b", number, incarnation, name, "t", "live", joins


def publishing(link: Link) -> Any:
    return link["a"].core.publishing


def saved(link: Link) -> list[SaveRegistrations]:
    return [command for command in link["a"].reported if isinstance(command, SaveRegistrations)]


def released(link: Link) -> list[tuple[int, int]]:
    return [(each.feed, each.below) for each in link["a"].reported if isinstance(each, ReleaseRecords)]


def register(link: Link, number: int, *positions: tuple[int, int], name: str = "worker", pattern: str = "t") -> None:
    say(link, Kind.REGISTER, number, pattern, "live", "reliable", False, list(positions), name)


def test_what_was_owed_is_owed_on_and_told_once_it_is_written_down() -> None:
    link = recovered(row(), feeds=(past(),))
    out = publishing(link).by_id[OLD]
    assert (out.readers, out.acknowledged, out.is_past) == ({("b", -1): 1}, 1, True)
    assert link["a"].core.publishing.retention.spilled_bytes == 200
    register(link, 9)
    (asked,) = saved(link)
    assert out.readers == {("b", 9): 1}
    commands = link.do("a", events.WriteFinished(asked.number))
    ((number, total, feeds),) = told(commands, Kind.REGISTERED)
    assert (number, total, feeds) == (9, 1, [[OLD, "t", "durable", 1, 3, 1, 1, 0, 1]])


@pytest.mark.parametrize("exact", [True, False])
def test_a_goodbye_says_that_what_earlier_lives_left_is_kept_if_its_end_is_exact(exact: bool) -> None:
    """Who missed the goodbye of that life would take the goodbye of this one, if it is short, for the end."""
    link = recovered(row(), feeds=(past(exact=exact),))
    link.drop()
    link.do("a", events.IntakeStopped(say_bye=True))
    (flight,) = link.waiting(Kind.BYE)
    assert list(decode_control(flight.event.frame).fields) == [[[OLD, 3, True]] if exact else [], True]


def test_a_registration_that_cannot_be_written_is_confirmed_when_it_asks_again() -> None:
    link = recovered(row(), feeds=(past(),))
    register(link, 9)
    link.do("a", events.WriteFailed(saved(link)[0].number, saved(link)[0].number, "full"))
    assert not publishing(link).registrations.is_confirmed("b", 9)
    register(link, 9)
    assert told(link.do("a", events.WriteFinished(saved(link)[1].number)), Kind.REGISTERED)
    assert publishing(link).registrations.is_confirmed("b", 9)


def test_who_states_a_place_is_owed_from_there_and_what_is_before_is_settled() -> None:
    feeds = (past(incarnation=1), past(4))
    newer = PastFeed(feed_id("a", 2, "t"), "t", "durable", 2, 4, True, feeds[1].bursts)
    link = begun(3, StateRecovered((feeds[0], newer), msgpack.packb((1, [row()]))))
    register(link, 9, (newer.feed, 2))
    by_id = publishing(link).by_id
    assert (by_id[OLD].readers, by_id[newer.feed].readers) == ({}, {("b", 9): 2})
    assert by_id[OLD].owed == by_id[OLD].kept
    register(link, 9, (newer.feed, 4))  # a repeated one changes nothing
    assert by_id[newer.feed].readers == {("b", 9): 2}


UNREADABLE = [
    None,
    b"\x92\x01",
    b"\xc1",
    msgpack.packb((1, [(*row(), "a field of a newer version")])),
    msgpack.packb((1, [row(joins=((OLD, "x"),))])),
    msgpack.packb((1, [row(joins=((OLD, -5),))])),
    msgpack.packb((1, [("b", 5, "a life", "worker", "t", "live", ())])),
    msgpack.packb((1, [("b", 5, 1, "worker", "a//b", "live", ())])),
    msgpack.packb((1, [("b", 5, 1, "worker", "t", "never", ())])),
    msgpack.packb("text"),
]


@pytest.mark.parametrize("blob", UNREADABLE)
def test_registrations_that_cannot_be_read_release_nothing_for_a_while(blob: bytes | None) -> None:
    link = begun(2, StateRecovered((past(),), blob))
    assert link["a"].counts["registrations_unreadable"] == 1
    assert released(link) == []
    register(link, 9)
    assert publishing(link).by_id[OLD].readers == {("b", 9): 0}, "twice rather than never"
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 3)])
    assert released(link) == [], "others may come"
    link.now += int(link["a"].core.context.config.retention.absent_s * 1e9) + 1
    link.do("a", events.TimePassed())
    assert released(link) == [(OLD, 3)]
    register(link, 10, name="another")
    assert publishing(link).by_id[OLD].readers == {}


def test_what_was_packed_is_restored_whatever_the_numbers_are() -> None:
    link = recovered(row(2**62, name="", incarnation=1), row(7, incarnation=1), feeds=(past(),))
    packed = publishing(link).registrations.pack(publishing(link)._position_of)
    again = begun(3, StateRecovered((past(),), packed))
    assert set(publishing(again).by_id[OLD].readers) == {("b", RESTORED - 2**62), ("b", -1)}
    register(again, 2**62 + 1, name="")
    assert again["a"].counts[Drop.SHAPE] == 1


def test_a_subscription_without_a_name_is_that_of_one_life_and_not_waited_for_long() -> None:
    link = recovered(row(5, name="", incarnation=7), feeds=(past(),))
    assert publishing(link).by_id[OLD].readers == {("b", RESTORED - 5): 1}
    link.now += UNMET_NS + 2_000_000_000
    link.do("a", events.TimePassed())
    assert publishing(link).by_id[OLD].readers == {}
    assert link["a"].counts["registrations_expired"] == 1


@pytest.mark.parametrize(("incarnation", "left"), [(1, 1), (0, 0)])
def test_a_survivor_goes_on_and_who_began_anew_does_not(incarnation: int, left: int) -> None:
    link = recovered(row(5, name="", incarnation=incarnation), row(6, name="", incarnation=1), feeds=(past(),))
    publishing(link).forget_before(link["a"].core.members.by_name["b"])
    register(link, 5, name="")
    assert (("b", 5) in publishing(link).by_id[OLD].readers) is bool(left)


def test_a_session_that_closes_leaves_a_named_subscription_owed() -> None:
    link = recovered(row(), feeds=(past(),))
    register(link, 9)
    link.do("a", events.WriteFinished(saved(link)[-1].number))
    assert told(say(link, Kind.UNREGISTER, 9, True), Kind.UNKNOWN) == [[9]]
    assert publishing(link).by_id[OLD].readers == {("b", -2): 1}
    register(link, 10)
    say(link, Kind.UNREGISTER, 10, False)
    assert publishing(link).by_id[OLD].readers == {}


def test_an_end_that_is_not_certain_lets_a_subscriber_have_more_than_we() -> None:
    link = recovered(row(), feeds=(past(exact=False),))
    register(link, 9)
    link.do("a", events.WriteFinished(saved(link)[-1].number))
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 2)])
    assert publishing(link).by_id[OLD].readers == {("b", 9): 2}
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 12)])
    assert publishing(link).by_id[OLD].readers == {}
    assert told(say(link, Kind.STATUS, "t", 1), Kind.FIN) == [["t", 1, 2, 0, 3, 3, False]]


def test_positions_that_moved_are_saved_again_now_and_then() -> None:
    link = recovered(row(), feeds=(past(),))
    register(link, 9)
    link.do("a", events.WriteFinished(saved(link)[-1].number))
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 2)])
    before = len(saved(link))
    for _ in range(4):
        link.now += 6_000_000_000
        link.do("a", events.TimePassed())
    assert len(saved(link)) == before + 1, "once for what moved, and not again"
    assert msgpack.unpackb(saved(link)[-1].blob)[1][0][-1] == [[OLD, 2]]


def test_what_cannot_be_read_is_counted() -> None:
    link = Link("a", "b")
    link.do("a", StateRecovered((), b"\xc1 nonsense"))
    assert link["a"].counts["registrations_unreadable"] == 1


def test_an_endless_name_is_refused() -> None:
    link = Link("a", "b")
    register(link, 9, name="x" * 300)
    assert link["a"].counts[Drop.SHAPE] == 1


def test_a_cursor_goes_through_plain_values() -> None:
    cursor = {("rank-0", "a.b"): Place(7, 3, ((5, 6), (8, 9))), ("rank/1", "c"): Place(1, 0)}
    assert parse_cursor(pack_cursor(cursor)) == cursor
    assert "redriven" not in pack_cursor(cursor) and parse_redriven(pack_cursor(cursor)) == frozenset()
    slots = [Slot("rank-0", "a.b", 7, 1), Slot("rank/1", "c", 1, 0)]
    assert parse_cursor(pack_cursor(cursor, slots)) == cursor
    assert parse_redriven(pack_cursor(cursor, slots)) == set(slots)


@pytest.mark.parametrize(
    "packed",
    [
        [],
        {"a": 1},
        {"a/b": [1, 2]},
        {"a/b": [0, 0, []]},
        {"a/b": [1, -1, []]},
        {"a/b": [1, 5, [[4, 6]]]},
        {1: [1, 1, []]},
    ],
)
def test_what_is_no_cursor_is_refused(packed: Any) -> None:
    with pytest.raises(ConfigError):
        parse_cursor(packed)


@pytest.mark.parametrize("named", [3, [3], ["abcd"], [["a", "t", 1]], [["a", "t", "1", 2]], [[1, "t", 1, 2]], {"a": 1}])
def test_what_names_no_letters_is_refused(named: Any) -> None:
    with pytest.raises(ConfigError, match="names no letters"):
        parse_redriven({"redriven": named})


def test_earlier_lives_owe_only_who_is_here_and_is_not_ourselves() -> None:
    own = ("a", 5, 1, "mine", "t", "live", ((OLD, 1),))
    link = recovered(row(), own, feeds=(past(),))
    assert not publishing(link).owes_past(), "nobody has either open"
    register(link, 9)
    assert publishing(link).owes_past()
    say(link, Kind.ACKNOWLEDGE, [(9, OLD, 2)])
    assert publishing(link).owes_past()
    link.do("a", events.PeerDied("b", 1))
    assert not publishing(link).owes_past()


def test_a_durable_record_that_nobody_reads_is_not_kept() -> None:
    link = recovered()
    link.publish("a", "t", policy=Policy.DURABLE)
    for number in (1, 2):
        link.do("a", events.WriteFinished(number))
    out = publishing(link).feeds["t"]
    assert (out.end, list(out.owed), list(out.kept)) == (1, [], [])


def test_what_is_durable_is_held_too_while_it_is_not_known_who_is_owed_what() -> None:
    link = begun(2, StateRecovered((past(),), None))
    for _ in range(2):
        link.publish("a", "t", policy=Policy.DURABLE)
        link.do("a", events.WriteFinished(9))
    register(link, 9)
    assert publishing(link).feeds["t"].readers == {("b", 9): 0}
    assert released(link) == []


def test_an_answer_to_a_late_naming_does_not_undo_an_unsubscribe() -> None:
    link = Link("a", "b")
    link.subscribe("b", "t")
    link.run(300)
    link.do("b", events.SubscriptionClosed(1, forgotten=True))
    link.drop()
    say(link, Kind.REGISTERED, 1, 0, [], source="a", to="b")
    assert [flight.fields[1] for flight in link.waiting(Kind.UNREGISTER)] == [False]
