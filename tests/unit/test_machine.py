"""The core as a whole: greetings, dispatch, floods, deadlines."""

from __future__ import annotations

from typing import Any

import pytest

import fabric.core.subscribing
from fabric.config import FabricConfig
from fabric.core import events
from fabric.core.machine import FETCH_BYTES_MAX, FabricCore
from fabric.core.members import MEMBERS_MAX, card_fields
from fabric.core.wire import NONE as NONE_BEFORE
from fabric.core.wire import Drop, Kind, encode_burst, encode_control, feed_id, member_id
from tests.harness.bursts import resealed
from tests.harness.pair import MS, Link, card
from tests.unit.test_publishing import FEED, listening, say, told


def states(link: Link, name: str) -> list[tuple[str, str]]:
    return [(report.name, report.state) for report in link[name].of(events.ReportPeer)]


def hello(
    name: str, incarnation: int = 1, seen: int = 0, source: str | None = None, **changed: Any
) -> events.ControlReceived:
    fields = (*card_fields(card(name, incarnation, **changed)), seen, [])
    return events.ControlReceived(encode_control(Kind.HELLO, member_id(source or name), incarnation, *fields))


def test_two_members_that_hear_of_each_other_join() -> None:
    link = Link("a", "b")
    assert states(link, "a") == [("b", "joined")]
    assert states(link, "b") == [("a", "joined")]


def test_one_that_is_only_greeted_knows_the_other_too() -> None:
    link = Link("a", "b", meet=False)
    link.do("a", events.PeerAnnounced(link["b"].core.context.card))
    link.run(200)
    assert (states(link, "a"), states(link, "b")) == ([("b", "joined")], [("a", "joined")])


def test_greetings_are_repeated_until_they_are_heard_and_no_longer() -> None:
    link = Link("a", "b", meet=False)
    link.do("a", events.PeerAnnounced(link["b"].core.context.card))
    for _ in range(20):
        link.pass_time(20)
        assert len(link.drop_kind(Kind.HELLO)) <= 1
    link.run(1_200)
    link.pass_time(900)
    assert link.waiting(Kind.HELLO) == []


def test_lost_greetings_do_not_keep_members_apart() -> None:
    link = Link("a", "b", "c", meet=False)
    for member in link.members.values():
        for other in link.members.values():
            link.do(member, events.PeerAnnounced(other.core.context.card))
    lost = 0
    for _ in range(40):
        link.pass_time(20)
        lost += len(
            link.drop(lambda flight: flight.kind is Kind.HELLO and (flight.source, flight.to.name) != ("c", "a"))
        )
        link.crank()
    assert lost
    link.run(2_000)
    for name in "abc":
        assert {(peer.name, peer.is_there) for peer in link[name].core.members.others()} == {
            (other, True) for other in "abc" if other != name
        }


def test_a_greeting_under_a_false_number_or_our_own_name_changes_nothing() -> None:
    link = Link("a")
    link.do("a", hello("b", source="c"))
    assert link["a"].core.members.by_name["b"].state == "known"
    assert link.waiting(Kind.HELLO) == []
    link.do("a", hello("a", 9))
    assert link["a"].of(events.ReportFenced) == [events.ReportFenced(9)]
    link.do("a", hello("b", 0))
    assert link["a"].counts["zombies_told"] == 1


def test_f26_a_zombie_is_told_and_stops_publishing() -> None:
    link = Link("a", "b")
    link.start("a", 2)
    link.introduce()
    zombie = link.zombies[0]
    link.do("b", hello("a", 1))
    link.crank()
    assert zombie.of(events.ReportFenced) == [events.ReportFenced(2)]


def test_a_new_life_of_a_subscriber_is_a_new_subscriber() -> None:
    link = listening()
    link["b"].settles = False
    link.publish("a", "t")
    link.crank()
    link["b"].stopped = True
    link.start("b", 2)
    link.introduce()
    assert link["a"].core.publishing.registrations.of("b") == {}
    assert not link["a"].core.publishing.feeds["t"].owed
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t")
    link.run(300)
    assert link["b"].offsets("t") == [1]


def test_the_roster_is_told_to_who_asks_and_brings_all_together() -> None:
    link = Link("a", "b")
    newcomer = link.start("c")
    newcomer.routes["somewhere"] = ("a", 1)
    link.do("c", events.RosterAsked("somewhere"))
    link.run(500)
    assert {peer.name for peer in newcomer.core.members.others() if peer.is_there} == {"a", "b"}
    assert {peer.name for peer in link["b"].core.members.others() if peer.is_there} == {"a", "c"}


def test_a_large_roster_fits_into_its_frames() -> None:
    link = Link("a")
    for n in range(500):
        link.do("a", events.PeerAnnounced(card(f"{n:0>200}", endpoints=("d" * 200, "c" * 200, "b" * 200))))
    newcomer = link.start("c")
    newcomer.routes["somewhere"] = ("a", 1)
    link.do("c", events.RosterAsked("somewhere"))
    link.crank()
    assert (len(newcomer.core.members.by_name), newcomer.counts[Drop.SHAPE]) == (502, 0)


def test_many_subscriptions_fit_into_their_frames() -> None:
    link = Link("a")
    for n in range(500):
        link.subscribe("a", "x" * 250 + f".{n}", subscription=n)
    link.crank()
    newcomer = link.start("c")
    link.introduce()
    link.run(100)
    assert (len(newcomer.core.publishing.registrations.of("a")), newcomer.counts[Drop.SHAPE]) == (500, 0)


def test_the_roster_is_not_told_to_another_job() -> None:
    link = Link("a")
    stranger = link.start("s", job="other")
    stranger.routes["somewhere"] = ("a", 1)
    link.do("s", events.RosterAsked("somewhere"))
    link.crank()
    assert link["a"].counts[Drop.STRANGER] == 1
    assert list(stranger.core.members.by_name) == ["s"]


def test_the_roster_is_not_told_to_who_could_not_be_met() -> None:
    link = Link("a")
    fields = (*card_fields(card("s", version=9)), 1)
    link.do("a", events.ControlReceived(encode_control(Kind.ROSTER_ASK, member_id("s"), 1, *fields)))
    assert (link.wire, link.unreachable) == ([], [])


def test_a_goodbye_is_said_to_all_that_were_met() -> None:
    link = Link("a", "b")
    link.do("a", events.PeerAnnounced(card("never-met")))
    link.do("a", events.IntakeStopped())
    assert link.waiting(Kind.BYE) == []
    link.do("a", events.IntakeStopped(say_bye=True))
    assert len(link.waiting(Kind.BYE)) == 1
    link.crank()
    assert states(link, "b")[-1] == ("a", "left")
    assert link["b"].of(events.DisconnectPeer) == [events.DisconnectPeer("a")]
    link.do("b", events.PeerDied("a", 1))
    assert states(link, "b")[-1] == ("a", "left")


def test_a_death_of_nobody_changes_nothing() -> None:
    link = Link("a", "b")
    link.do("a", events.PeerDied("x", 1))
    link.do("a", events.PeerDied("b", 2))
    assert states(link, "a") == [("b", "joined")]


def test_a_silent_peer_is_suspect_then_down_and_comes_back() -> None:
    link = Link("a", "b")
    link["b"].stopped = True
    link.run(12_000, step_ms=500)
    link["b"].stopped = False
    link.run(1_500)
    assert states(link, "a") == [("b", "joined"), ("b", "suspect"), ("b", "down"), ("b", "up")]


@pytest.mark.parametrize("kind", [Kind.REPAIR, Kind.CHUNK, Kind.MISSING, Kind.AVAILABLE])
def test_a_header_of_bulk_is_no_message(kind: Kind) -> None:
    link = Link("a", "b")
    fields = {
        Kind.REPAIR: (1, 2),
        Kind.CHUNK: (1, 2, 3, 4, 5),
        Kind.MISSING: (1, 2, 3),
        Kind.AVAILABLE: (1, 2, 3, 4, []),
    }
    assert say(link, kind, *fields[kind]) == []
    assert link["a"].counts[Drop.KIND] == 1


@pytest.mark.parametrize("chunk", [None, b"x"])
@pytest.mark.parametrize(
    ("kind", "fields"), [(Kind.ACCEPTED, (1,)), (Kind.CHUNK, (1, 2, 3, 4, 5)), (Kind.REPAIR, (1, 2))]
)
def test_what_is_no_bulk_is_counted(kind: Kind, fields: tuple[int, ...], chunk: bytes | None) -> None:
    link = Link("a", "b")
    link.do("a", events.BulkReceived(encode_control(kind, member_id("b"), 1, *fields), chunk))
    assert sum(link["a"].counts[reason] for reason in (Drop.KIND, Drop.DUPLICATE, Drop.TRUNCATED)) == 1


def test_strangers_are_counted_on_every_link() -> None:
    link = Link("a")
    link.do("a", events.ControlReceived(encode_control(Kind.ACCEPTED, 99, 1, 1)))
    link.do("a", events.BulkReceived(encode_control(Kind.REPAIR, 99, 1, 1, 1), b""))
    link.do("a", events.ControlReceived(b""))
    link.do("a", events.DataReceived(resealed(bytes(100))))
    link.do("a", events.BulkReceived(b"", None))
    counts = link["a"].counts
    assert counts[Drop.STRANGER] >= 2
    assert (counts[Drop.TRUNCATED], counts[Drop.MAGIC]) == (2, 1)


def test_a_missing_value_that_nobody_fetches_changes_nothing() -> None:
    link = Link("a", "b")
    assert link.do("a", events.BulkReceived(encode_control(Kind.MISSING, member_id("b"), 1, 1, 2, 3), None)) == []
    assert link.do("a", events.PayloadChecked(1, 2, b"x")) == []


def test_requests_and_values_under_way_end_with_the_life_of_their_peer() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    link.publish("a", "t", [0], payloads={0: bytes(50_000)})
    link.do("b", events.RequestIssued(1, "a", "m", 1, link.now + 10_000 * MS, 1, b"", b""))
    link.deliver(link.waiting(None)[0])
    assert link["b"].payloads
    link.do("b", events.PeerAnnounced(card("a", 2)))
    assert [done.outcome for done in link["b"].of(events.CompleteRequest)] == ["gone"]
    assert link["b"].payloads == {}


def test_time_never_goes_back() -> None:
    core = FabricCore(card("a"), FabricConfig())
    core.handle(events.TimePassed(), 100 * MS)
    core.handle(events.TimePassed(), 50 * MS)
    assert core.context.now == 100 * MS


def test_the_next_deadline_is_what_is_due_first() -> None:
    link = listening()
    link.run(2_000)
    quiet = link["b"].core.next_deadline_ns() - link.now
    assert 0 < quiet <= 1_000 * MS
    link.do("b", events.RequestIssued(1, "a", "m", 1, link.now + 5 * MS, 1, b"", b""))
    assert link["b"].core.next_deadline_ns() - link.now <= 5 * MS
    link.publish("a", "t")
    link.crank()
    assert link["b"].core.next_deadline_ns() - link.now <= 20 * MS


def test_acting_only_at_deadlines_is_enough() -> None:
    """What the engine does: nothing happens between an event and the deadline that the core named."""
    link = listening()
    link.publish("a", "t", [0, 1], payloads={0: bytes(3_000_000)})
    for n in range(30):
        link.publish("a", "t", [n])
        if n % 3 == 0:
            link.drop()
    for _ in range(300):
        link.crank()
        due = {name: member.core.next_deadline_ns() for name, member in link.members.items()}
        link.now = max(link.now + 1, min(due.values()))
        for name, when in due.items():
            if when <= link.now:
                link.do(name, events.TimePassed())
    assert sorted(link["b"].offsets("t")) == list(range(32))
    assert link["a"].core.publishing.feeds["t"].is_acknowledged


def test_it_shows_who_it_is() -> None:
    assert repr(FabricCore(card("a"), FabricConfig())) == "FabricCore(a@1, feeds=0, follows=0)"


# Floods.


def test_a_flood_of_greetings_is_bounded() -> None:
    core = FabricCore(card("a"), FabricConfig())
    for n in range(MEMBERS_MAX + 500):
        core.handle(hello(f"n{n}"), MS)
    assert len(core.members.by_name) == MEMBERS_MAX
    assert core.context.counts[Drop.NO_ROOM] == 501


def test_a_roster_of_any_size_is_bounded() -> None:
    core = FabricCore(card("a"), FabricConfig())
    for batch in range(30):
        cards = [(*card_fields(card(f"n{batch}-{n}")), 1) for n in range(100)]
        core.handle(events.ControlReceived(encode_control(Kind.ROSTER, 1, 1, cards)), MS)
    assert len(core.members.by_name) == MEMBERS_MAX


def test_a_flood_of_named_feeds_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fabric.core.subscribing, "FEEDS_PER_SUBSCRIPTION_MAX", 100)
    link = Link("a", "b")
    link.subscribe("b", "**")
    link.crank()
    feeds = [(feed_id("a", 1, f"t{n}"), f"t{n}", "reliable", 0, 0, 0, 1, 0, 0) for n in range(300)]
    say(link, Kind.REGISTERED, 1, 300, feeds, source="a", to="b")
    assert len(link["b"].core.following.feeds) == 100


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Kind.JOIN, ([(n, n) for n in range(4000)],)),
        (Kind.JOIN, ([(FEED, n) for n in range(4000)],)),
        (Kind.HEARTBEAT, ([(n, 2**64 - 1) for n in range(4000)], 1)),
        (Kind.ACKNOWLEDGE, ([(1, n, 5) for n in range(4000)],)),
        (Kind.ACKNOWLEDGE, ([(n, FEED, 5) for n in range(4000)],)),
        (Kind.PULL, (FEED, 1, 2**64 - 1, [(0, 2**64 - 1)] * 4000)),
        (Kind.PULL, (FEED, 1, 2**64 - 1, [(n, n + 2) for n in range(0, 8000, 2)])),
        (Kind.FETCH, (FEED, 0, 0, 2**64 - 1, 1, False)),
        (Kind.BYE, ([(FEED, 2**64 - 1, True)] * 4000, True)),
    ],
)
def test_one_frame_leads_to_bounded_work(kind: Kind, fields: tuple[Any, ...]) -> None:
    link = listening()
    link["b"].settles = False
    for _ in range(20):
        link.publish("a", "t")
    link.publish("b", "t")
    link.subscribe("a", "t")
    link.crank()
    link.drop()
    commands = say(link, kind, *fields)
    assert len(commands) <= 130


def test_a_value_is_sent_in_pieces_within_a_bound() -> None:
    config = FabricConfig()
    link = Link("a", "b", config=config)
    link.subscribe("b", "t")
    link.crank()
    link.publish("a", "t", [0], payloads={0: bytes(FETCH_BYTES_MAX + 100)})
    chunks = told(say(link, Kind.FETCH, FEED, 0, 0, 2**64 - 1, 1, False), Kind.CHUNK)
    assert len(chunks) == FETCH_BYTES_MAX // config.repair.chunk_bytes


def test_a_range_that_is_huge_or_turned_round_is_passed_at_once() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    lost = [(0, 2**62), (5, 3), (2**63, 2**64 - 1), (2, 2)]
    header = encode_control(Kind.AVAILABLE, member_id("a"), 1, FEED, 1, 0, 2**63 - 1, lost)
    link.do("b", events.BulkReceived(header, None))
    (gap,) = link["b"].of(events.ReportGap)
    assert (gap.first, gap.end) == (1, 2**62)


def test_a_burst_at_the_end_of_all_offsets_is_held_and_nothing_more() -> None:
    link = listening()
    link.publish("a", "t")
    link.crank()
    far = 2**63 - 5
    frame = encode_burst(FEED, 1, far, 0, [0], [2**62], [far - 1], [1], [b""])
    assert len(link.do("b", events.DataReceived(frame))) <= 2
    other = encode_burst(FEED, 1, far - 9, 0, [1], [0], [NONE_BEFORE], [1], [b""])
    link.do("b", events.DataReceived(other))
    assert link["b"].offsets("t") == [0, far - 9]
