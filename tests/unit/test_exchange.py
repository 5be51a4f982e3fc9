"""Requests and replies between two cores: resent until answered, executed once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fabric.config import FabricConfig, Requests
from fabric.core import events
from fabric.core.exchange import DEADLINE_MS_MAX, Exchange
from fabric.core.wire import ADDRESSED, Drop, Kind, checksum_of, encode_control, encode_descriptor, member_id
from tests.harness.pair import MS, Link

SECOND = 1_000 * MS


def ask(link: Link, request: int = 1, *, peer: str = "b", timeout_ms: int = 10_000, **changed: Any) -> None:
    fields = {"kind": 2, "metadata": b"", "blob": b"question", "payload": None} | changed
    link.do(
        "a",
        events.RequestIssued(
            request=request, peer=peer, method="evaluate", priority=1, deadline_ns=link.now + timeout_ms * MS, **fields
        ),
    )


def answer(link: Link, request: int = 1, *, failed: bool = False, blob: bytes = b"answer", **changed: Any) -> None:
    link.do("b", events.ReplyIssued("a", 1, request, failed, changed.pop("kind", 3), blob, **changed))


def executed(link: Link) -> list[events.ExecuteRequest]:
    return link["b"].of(events.ExecuteRequest)


def completed(link: Link) -> list[events.CompleteRequest]:
    return link["a"].of(events.CompleteRequest)


def test_a_request_is_executed_once_and_its_reply_completes_it() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    (execute,) = executed(link)
    assert (execute.peer, execute.method, execute.priority, execute.blob, execute.space) == (
        "a",
        "evaluate",
        1,
        b"question",
        None,
    )
    answer(link)
    link.crank()
    assert completed(link) == [events.CompleteRequest(1, "reply", True, 3, b"answer")]


def test_a_failure_is_told_as_such() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    answer(link, failed=True)
    link.crank()
    assert [row.outcome for row in completed(link)] == ["failure"]


def test_a_member_may_ask_itself() -> None:
    link = Link("a")
    ask(link, peer="a")
    link.crank()
    assert len(link["a"].of(events.ExecuteRequest)) == 1


def test_an_unanswered_request_is_resent_and_not_executed_again() -> None:
    link = Link("a", "b")
    ask(link)
    link.drop_kind(Kind.REQUEST)
    link.run(1_000)
    assert len(executed(link)) == 1
    assert link["a"].counts["requests_resent"] >= 3
    assert link["b"].counts["requests_repeated"] == link["a"].counts["requests_resent"] - 1
    answer(link)
    link.drop_kind(Kind.REPLY)
    link.run(2_000)
    assert completed(link) == [events.CompleteRequest(1, "reply", True, 3, b"answer")]
    assert len(executed(link)) == 1


def test_resends_outnumber_requests_only_at_their_longest_wait() -> None:
    link = Link("a", "b")
    for request in range(1, 101):
        ask(link, request)
    link.drop()
    for _ in range(45):
        link.pass_time(20)
        link.drop_kind(Kind.REQUEST)
    counts = link["a"].counts
    assert (counts["requests_resent"], counts["resends_postponed"]) == (64, 100), "those in reserve; the others rest"
    link.run(2_000)
    assert len(executed(link)) == 100, "and none is forgotten"


@pytest.mark.parametrize("reached", [True, False])
def test_a_timeout_says_whether_the_responder_had_it(reached: bool) -> None:
    link = Link("a", "b")
    ask(link, timeout_ms=500)
    for _ in range(40):
        link.pass_time(20)
        link.drop(lambda flight: flight.kind is Kind.REQUEST and not reached)
        link.crank()
    assert completed(link) == [events.CompleteRequest(1, "timeout", reached)]


def test_an_abandoned_request_is_not_resent_and_its_answer_is_dropped() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    link.do("a", events.RequestAbandoned(1))
    answer(link)
    link.crank()
    assert completed(link) == []
    assert link["a"].counts[Drop.DUPLICATE] == 1


def test_an_answer_from_somebody_else_is_dropped() -> None:
    link = Link("a", "b", "c")
    ask(link)
    link.do("a", events.ControlReceived(encode_control(Kind.REPLY, member_id("c"), 1, 1, False, 1, b"forged")))
    link.do("a", events.ControlReceived(encode_control(Kind.ACCEPTED, member_id("b"), 1, 99)))
    assert completed(link) == []


def test_a_large_request_and_a_large_reply_are_fetched() -> None:
    link = Link("a", "b")
    question, reply = b"q" * 3_000_000, b"r" * 2_500_000
    descriptor = encode_descriptor(len(question), checksum_of(question))
    ask(link, kind=2 | ADDRESSED, blob=descriptor, payload=question)
    link.crank()
    (execute,) = executed(link)
    assert execute.space is not None
    assert (execute.kind, link["b"].complete[execute.space, 1]) == (2, question)
    descriptor = encode_descriptor(len(reply), checksum_of(reply))
    answer(link, kind=3 | ADDRESSED, blob=descriptor, payload=reply)
    link.repeat()
    link.crank()
    (done,) = completed(link)
    assert done.space is not None
    assert (done.outcome, done.kind, link["a"].complete[done.space, 1]) == ("reply", 3, reply)


def test_a_large_failure_stays_a_failure() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    reason = b"r" * 100_000
    answer(
        link, failed=True, kind=3 | ADDRESSED, blob=encode_descriptor(len(reason), checksum_of(reason)), payload=reason
    )
    link.crank()
    assert [row.outcome for row in completed(link)] == ["failure"]


def test_a_request_whose_value_cannot_be_had_is_not_executed() -> None:
    link = Link("a", "b")
    ask(link, kind=2 | ADDRESSED, blob=encode_descriptor(10, 1), payload=None)
    link.crank()
    assert executed(link) == []
    ask(link, 2, kind=2 | ADDRESSED, blob=encode_descriptor(4, checksum_of(b"good")), payload=b"good")
    link.crank()
    assert [row.request for row in executed(link)] == [2]


def test_a_reply_whose_value_cannot_be_had_ends_the_request() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    answer(link, kind=3 | ADDRESSED, blob=encode_descriptor(10, 1), payload=None)
    link.crank()
    assert [row.outcome for row in completed(link)] == ["gone"]


@pytest.mark.parametrize("blob", [b"short", encode_descriptor(2**40, 1)])
def test_an_impossible_descriptor_is_counted_and_leaves_nothing_behind(blob: bytes) -> None:
    link = Link("a", "b")
    ask(link, kind=2 | ADDRESSED, blob=blob)
    link.crank()
    assert executed(link) == []
    assert link["b"].counts[Drop.SHAPE] + link["b"].counts[Drop.TOO_LARGE] == 1
    assert link["b"].core.exchange._executions == {}
    ask(link, 2)
    link.crank()
    answer(link, 2, kind=3 | ADDRESSED, blob=blob)
    link.crank()
    assert [(row.request, row.outcome) for row in completed(link)] == [(2, "gone")]


def test_a_reply_that_comes_late_for_its_value_is_dropped() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    reply = b"r" * 100_000
    answer(link, kind=3 | ADDRESSED, blob=encode_descriptor(len(reply), checksum_of(reply)), payload=reply)
    link.deliver(link.wire[0])
    link.do("a", events.RequestAbandoned(1))
    link.crank()
    assert completed(link) == []
    link["a"].core.check_invariants()


def test_a_request_to_a_peer_that_leaves_is_gone_and_its_own_are_forgotten() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    link.do("a", events.PeerDied("b", 1))
    assert [row.outcome for row in completed(link)] == ["gone"]
    link.do("b", events.PeerDied("a", 1))
    answer(link)
    assert link.waiting(Kind.REPLY) == []
    assert link["b"].core.exchange._executions == {}


def test_a_second_reply_of_a_handler_changes_nothing() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    answer(link)
    answer(link, blob=b"other")
    assert len(link.waiting(Kind.REPLY)) == 1


def test_a_reply_to_an_earlier_life_is_kept_to_itself() -> None:
    link = Link("a", "b")
    ask(link)
    link.crank()
    execution = link["b"].core.exchange._executions["a", 1, 1]
    link["b"].core.members.by_name["a"].card = replace(link["b"].core.members.by_name["a"].card, incarnation=2)
    answer(link)
    assert execution.reply is not None
    assert link.waiting(Kind.REPLY) == []


def a_small_responder() -> Link:
    config = FabricConfig(requests=Requests(remembered_max=3, remembered_bytes_max=1_000))
    return Link("a", "b", config=config)


def test_what_is_remembered_is_bounded_and_room_returns_with_the_deadline() -> None:
    link = a_small_responder()
    for request in range(5):
        ask(link, request, timeout_ms=1_000)
    link.crank()
    assert [row.request for row in executed(link)] == [0, 1, 2]
    assert link["b"].counts[Drop.NO_ROOM] == 2
    for request in range(3):
        answer(link, request)
    link.run(1_500)
    ask(link, 9)
    link.crank()
    assert executed(link)[-1].request == 9


def test_remembered_bytes_are_bounded() -> None:
    link = a_small_responder()
    ask(link, 1, blob=bytes(990))
    link.crank()
    answer(link, 1, blob=bytes(100))
    ask(link, 2)
    link.crank()
    assert [row.request for row in executed(link)] == [1]


def test_a_priority_that_does_not_exist_is_refused() -> None:
    link = Link("a", "b")
    link.do("b", events.ControlReceived(encode_control(Kind.REQUEST, member_id("a"), 1, 1, 1, "m", 3, 10, 1, b"", b"")))
    assert executed(link) == []
    assert link["b"].counts[Drop.SHAPE] == 1


def test_a_far_deadline_is_brought_near() -> None:
    link = Link("a", "b")
    link.do(
        "b",
        events.ControlReceived(encode_control(Kind.REQUEST, member_id("a"), 1, 1, 1, "m", 1, 2**64 - 1, 1, b"", b"")),
    )
    assert executed(link)[0].deadline_ns == link.now + DEADLINE_MS_MAX * MS


def test_a_value_is_given_only_to_the_member_that_it_is_for() -> None:
    link = Link("a", "b", "c")
    question = b"q" * 100_000
    ask(link, kind=2 | ADDRESSED, blob=encode_descriptor(len(question), checksum_of(question)), payload=question)
    link.deliver(link.waiting(Kind.REQUEST)[0])
    (fetch,) = link.waiting(Kind.FETCH)
    exchange: Exchange = link["a"].core.exchange
    peers = link["a"].core.members.by_name
    space, request = fetch.fields[:2]
    assert exchange.payload_of(peers["b"], space, request) == question
    assert exchange.payload_of(peers["c"], space, request) is None
    assert exchange.payload_of(peers["b"], space + 1, request) is None


def test_what_nobody_waits_for_any_more_is_not_remembered() -> None:
    """Else a fast requester would stand still once all that may be remembered is."""
    link = Link("a", "b")
    for number in range(1, 50):
        ask(link, number)
        link.crank()
        answer(link, number)
        link.crank()
    assert len(completed(link)) == 49
    assert list(link["b"].core.exchange._executions) == [("a", 1, 49)]
    late = encode_control(Kind.REQUEST, member_id("a"), 1, 3, 3, "m", 1, 10, 1, b"", b"")
    link.do("b", events.ControlReceived(late))
    assert len(executed(link)) == 49
    assert link["b"].counts[Drop.STALE] == 1


def test_what_still_runs_is_remembered_until_it_is_answered() -> None:
    link = Link("a", "b")
    ask(link, 1)
    ask(link, 2)
    link.crank()
    answer(link, 2)
    link.do("a", events.RequestAbandoned(1))
    ask(link, 3)
    link.crank()
    assert sorted(link["b"].core.exchange._executions) == [("a", 1, 1), ("a", 1, 2), ("a", 1, 3)]
    answer(link, 1)
    answer(link, 3)
    link.crank()
    ask(link, 4)
    link.crank()
    assert list(link["b"].core.exchange._executions) == [("a", 1, 4)]
