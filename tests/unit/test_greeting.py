"""Greetings that are lost because a connection was not up yet, and members that do not stay long."""

from __future__ import annotations

from fabric.core.events import ControlReceived, IntakeStopped, PeerAnnounced
from fabric.core.members import Peer, card_fields
from fabric.core.wire import Kind, encode_control, member_id
from fabric.entering import _has_met
from tests.harness.pair import Link, card


def strangers() -> Link:
    """Two members that have each other's card and have not spoken."""
    link = Link("a", "b", meet=False)
    for name, other in (("a", "b"), ("b", "a")):
        link.do(name, PeerAnnounced(link[other].core.context.card))
    return link


def met(link: Link, name: str, other: str) -> bool:
    return link[name].core.members.by_name[other].has_met


def test_a_greeting_goes_on_until_the_hello_is_heard_whatever_else_is() -> None:
    """Who has met a member knows what it subscribes to; a heartbeat does not say that."""
    link = strangers()
    link.subscribe("b", "t")
    link.pass_time(25)
    for _ in range(2):
        link.drop(lambda flight: flight.source == "b")  # b's connection to a is not up yet
        link.crank(until=lambda: not [flight for flight in link.wire if flight.to is link["b"]])
        link.drop()
        link.pass_time(25)
    heartbeat = encode_control(Kind.HEARTBEAT, member_id("b"), 1, [], 1)
    link.do("a", ControlReceived(heartbeat))
    assert link["a"].core.members.by_name["b"].sees_us
    assert not met(link, "a", "b")
    assert not link["a"].core.publishing.registrations.of("b")
    link.drop()
    link.pass_time(100)
    link.crank()
    assert met(link, "a", "b")
    assert met(link, "b", "a")
    assert link["a"].core.publishing.registrations.of("b")
    link.pass_time(3_000)
    assert link.waiting(Kind.HELLO) == []


def test_the_answer_to_a_repeated_hello_is_not_answered() -> None:
    link = Link("a", "b")
    link.drop()
    ours, theirs = link["a"].core.context, link["b"].core.context
    hello = encode_control(Kind.HELLO, ours.id, ours.incarnation, *card_fields(ours.card), theirs.incarnation, [])
    link.do("b", ControlReceived(hello))
    assert [flight.kind for flight in link.wire] == [Kind.HEARTBEAT]
    assert link.crank() == 1


def test_a_member_that_left_was_met() -> None:
    link = Link("a", "b")
    link.do("b", IntakeStopped(say_bye=True))
    link.crank()
    peer = link["a"].core.members.by_name["b"]
    peer.sees_us = False
    assert peer.state == "left"
    assert _has_met(peer)
    assert not _has_met(Peer(card("c"), 0))


def test_whom_we_heard_is_there_and_is_waited_for() -> None:
    """Its join may have returned: what it publishes right after our subscribe is owed to us."""
    link = strangers()
    link.pass_time(25)
    link.drop(lambda flight: flight.source == "b")
    link.crank(until=lambda: not [flight for flight in link.wire if flight.to is link["b"]])
    assert link["b"].core.members.by_name["a"].state == "joined"
    link.drop()
    link.subscribe("b", "t")
    assert "a" in link["b"].core.subscribing.unconfirmed(1)
