"""The garbage law: any frame gives commands and bounded work, and everybody else is served."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.config import Start
from fabric.core import events
from fabric.core.fields import FIELDS, Each
from fabric.core.wire import (
    ADDRESSED,
    Kind,
    encode_burst,
    encode_control,
    encode_descriptor,
    encode_marker,
    feed_id,
    member_id,
)
from tests.harness.bursts import RAW
from tests.harness.pair import Link

COMMANDS_MAX = 5_000
"""More commands than this from one frame are no bounded work."""

EVIL = feed_id("evil", 1, "evil.topic")
NUMBERS = st.one_of(
    st.integers(0, 8),
    st.sampled_from(
        [EVIL, feed_id("evil", 1, "t"), feed_id("b", 1, "t"), feed_id("a", 1, "t"), member_id("a"), member_id("evil")]
    ),
    st.sampled_from([100, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
)
TEXTS = st.sampled_from(
    [
        *("t", "evil.topic", "**", "*.topic", "live", "retained", "last", "reliable", "best_effort", "latest", "lossy"),
        *("", ".", "\0", "a", "b", "evil", "training", "host-of-a", "x" * 300),
    ]
)


def hostile(wanted: Any) -> st.SearchStrategy[Any]:
    if isinstance(wanted, Each):
        return st.lists(st.tuples(*map(hostile, wanted.shape)), max_size=4)
    blobs = st.sampled_from(
        [b"", b"x", encode_descriptor(2**63, 1), encode_descriptor(0, 1), encode_descriptor(100, 1)]
    )
    return {int: NUMBERS, str: TEXTS, bool: st.booleans(), bytes: blobs}[wanted]


EVERYBODY = [member_id("evil")] * 6 + [member_id("a"), member_id("b"), 0]
NAMING = {Kind.HELLO, Kind.ROSTER, Kind.ROSTER_ASK, Kind.FENCED}
"""Messages that may speak of others, since nothing is authenticated yet."""


@st.composite
def control(draw: st.DrawFn, *, forging: bool = False) -> bytes:
    kind = draw(st.sampled_from([kind for kind in Kind if forging or kind not in NAMING]))
    source = draw(st.sampled_from(EVERYBODY if forging else [member_id("evil")]))
    incarnation = draw(st.sampled_from([1] * 6 + [0, 2, 2**64 - 1]))
    fields = [draw(hostile(wanted)) for wanted in FIELDS[kind]]
    if kind is Kind.REGISTERED and draw(st.booleans()):  # one that passes the check of its identity
        numbers = draw(st.tuples(NUMBERS, NUMBERS, NUMBERS))
        life = draw(st.sampled_from([(1, 0, 0), (1, 0, 1), (0, 0, 1), (0, 0, 2)]))
        policy = draw(st.sampled_from(["reliable", "durable"]))
        feed = EVIL if life[0] else feed_id("evil", 0, "evil.topic")
        fields = [1, draw(NUMBERS), [(feed, "evil.topic", policy, *numbers, *life)]]
    if kind in (Kind.HELLO, Kind.ROSTER_ASK) and draw(st.booleans()):
        fields[0], fields[3], fields[6] = draw(st.sampled_from(["evil", "other"])), "training", 1
    return encode_control(kind, source, incarnation, *fields)


@st.composite
def data(draw: st.DrawFn, *, forging: bool = False) -> bytes:
    feed = draw(st.sampled_from([EVIL, EVIL, feed_id("a", 1, "t"), 5] if forging else [EVIL]))
    first = draw(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 2**31, 2**62, 2**63 - 10]))
    if draw(st.integers(0, 3)) == 0:
        return encode_marker(feed, 1, draw(NUMBERS), 0, draw(st.lists(NUMBERS, max_size=3)))
    count = draw(st.integers(1, 4))
    previous = [
        draw(st.integers(-1, first + row - 1)) if draw(st.booleans()) else first + row - 1 for row in range(count)
    ]
    kinds = [draw(st.sampled_from([RAW, RAW, RAW | ADDRESSED, 0x7F])) for _ in range(count)]
    bodies = [draw(hostile(bytes)) for _ in range(count)]
    numbers = [draw(st.sampled_from([0, 1, 2**62])) for _ in range(count)]
    return encode_burst(feed, draw(st.sampled_from([1, 1, 1, 2])), first, 0, numbers, numbers, previous, kinds, bodies)


def attacks(*, forging: bool) -> st.SearchStrategy[list[Any]]:
    messages, bursts = control(forging=forging), data(forging=forging)
    repair = encode_control(Kind.REPAIR, member_id("evil"), 1, EVIL, 1)
    return st.lists(
        st.one_of(
            st.binary(max_size=80).map(events.ControlReceived),
            st.binary(max_size=80).map(events.DataReceived),
            messages.map(events.ControlReceived),
            messages.map(events.ControlReceived),
            bursts.map(events.DataReceived),
            st.tuples(messages, st.one_of(st.none(), st.binary(max_size=40), bursts)).map(
                lambda pair: events.BulkReceived(*pair)
            ),
            bursts.map(lambda frame: events.BulkReceived(repair, frame)),
            st.integers(1, 5_000),
        ),
        max_size=12,
    )


def a_fabric() -> Link:
    """a publishes to b, and evil is a member that b talks to."""
    link = Link("a", "b", "evil")
    link.subscribe("b", "**")
    link.subscribe("b", "t", subscription=2, start=Start.RETAINED, seeds=frozenset({1}))
    link.subscribe("evil", "**")
    link.publish("b", "t", [0, 1])
    link.crank()
    link.publish("a", "t", [0, 1])
    link.publish("evil", "evil.topic", [0, 0, 1, 1])
    link.crank()
    return link


def attack(link: Link, event: Any) -> None:
    if isinstance(event, int):
        link.pass_time(event, step_ms=max(20, event / 5))
    else:
        commands = link.do("b", event)
        assert len(commands) < COMMANDS_MAX
    assert link["b"].core.next_deadline_ns() >= 0
    link.drop(lambda flight: flight.to.name == "evil")


@settings(max_examples=100)
@given(attacks(forging=True))
def test_no_frame_at_all_raises_or_makes_endless_work(frames: list[Any]) -> None:
    link = a_fabric()
    for frame in frames:
        attack(link, frame)
    link.run(1_000, step_ms=100)


@settings(max_examples=100)
@given(attacks(forging=False))
def test_f24_a_hostile_member_delays_nobody_else(frames: list[Any]) -> None:
    link = a_fabric()
    for frame in frames:
        attack(link, frame)
    link.publish("a", "t", [0, 1, 2])
    link.run(1_000, step_ms=100)
    assert link["b"].values("t") == [b"0", b"1", b"2", b"3", b"4"]
