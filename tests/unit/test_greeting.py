"""Greetings that are lost because a connection was not up yet, and members that do not stay long."""

from __future__ import annotations

from fabric.core.events import ControlReceived, IntakeStopped, PeerAnnounced
from fabric.core.members import Peer, card_fields
from fabric.core.wire import Kind, encode_control
from fabric.entering import _has_met
from tests.harness.pair import Link, card


def strangers() -> Link:
    """Two members that have each other's card and have not spoken."""
    link = Link("a", "b", meet=False)
    for name, other in (("a", "b"), ("b", "a")):
        link.do(name, PeerAnnounced(link[other].core.context.card))
    return link


def sees(link: Link, name: str, other: str) -> bool:
    return link[name].core.members.by_name[other].sees_us


def test_a_repeated_hello_is_answered_although_its_sender_is_known() -> None:
    link = strangers()
    link.pass_time(25)
    link.drop(lambda flight: flight.source == "b")  # b's connection to a is not up yet
    link.crank(until=lambda: not [flight for flight in link.wire if flight.to is link["b"]])
    link.drop()
    assert sees(link, "b", "a")
    assert not sees(link, "a", "b"), "a was not told"
    for _ in range(3):
        link.pass_time(25)
        link.drop(lambda flight: flight.source == "b")  # heartbeats of its own among them
        link.crank(until=lambda: bool([flight for flight in link.wire if flight.source == "b"]))
        if link.waiting(Kind.HEARTBEAT):
            break
    assert [flight.source for flight in link.waiting(Kind.HEARTBEAT)] == ["b"], "the answer to a repeated HELLO"
    link.crank()
    assert sees(link, "a", "b")


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
