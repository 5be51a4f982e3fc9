"""Two members and a link that loses, repeats and reorders: in the end everything is handled, once, in order."""

from __future__ import annotations

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.config import FabricConfig, Inboxes, Repair, Start
from fabric.core.events import EndFeed, IntakeStopped, ReportGap
from tests.harness.pair import Link

SMALL = FabricConfig(
    inboxes=Inboxes(hand_bytes_max=500, hold_bytes_max=400, ranges_max=3), repair=Repair(window_bytes=300)
)


def trouble(link: Link, random: Random, loss: float) -> None:
    """Deliver what is on its way with faults."""
    for _ in range(random.randrange(12)):
        if not link.wire:
            return
        flight = link.wire[0 if random.random() < 0.7 else random.randrange(len(link.wire))]
        if random.random() < loss:
            link.wire.remove(flight)
        else:
            if random.random() < 0.1:
                link.wire.append(type(flight)(flight.source, flight.to, flight.event))
            link.deliver(flight)


@settings(max_examples=80)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.1, 0.4]), st.booleans())
def test_f16_whatever_the_link_does_all_is_handled_once_and_in_order(seed: int, loss: float, small: bool) -> None:
    random = Random(seed)
    link = Link("a", "b", config=SMALL if small else None)
    link.subscribe("b", "t.*", start=Start.RETAINED)
    link.crank()
    link["b"].settles = False
    published: dict[str, list[int]] = {"t.x": [], "t.y": []}
    for _ in range(25):
        topic = random.choice(list(published))
        seeds = [random.randrange(3) for _ in range(random.randint(1, 4))]
        payloads = {0: random.randbytes(random.randint(1, 3000))} if random.random() < 0.2 else None
        link.publish("a", topic, seeds, payloads=payloads)
        published[topic] += seeds
        trouble(link, random, loss)
        if random.random() < 0.5:
            link.settle("b", 1)
        if random.random() < 0.3:
            link.pass_time(random.choice([5, 60, 300]))
    link["b"].settles = True
    link.settle("b")
    link.run(8_000, step_ms=50)
    for topic, seeds in published.items():
        offsets = link["b"].offsets(topic)
        assert sorted(offsets) == list(range(len(seeds)))
        for lane in range(3):
            mine = [offset for offset in offsets if seeds[offset] == lane]
            assert mine == sorted(mine)
        if seeds:
            assert link["a"].core.publishing.feeds[topic].is_acknowledged
    assert link["b"].of(ReportGap) == []


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_a_goodbye_settles_everything_that_was_published(seed: int) -> None:
    random = Random(seed)
    link = Link("a", "b")
    link.subscribe("b")
    link.crank()
    count = 0
    for _ in range(8):
        seeds = [random.randrange(3) for _ in range(random.randint(1, 3))]
        link.publish("a", "t", seeds)
        count += len(seeds)
        trouble(link, random, 0.3)
    link.drop_kind(None)
    link.do("a", IntakeStopped(say_bye=True))
    link.run(1_000, step_ms=50)
    gaps = [n for gap in link["b"].of(ReportGap) if gap.end is not None for n in range(gap.first, gap.end)]
    begun = link["b"].core.subscribing.subscriptions[1].feeds
    assert not begun, f"never over: {begun}"
    assert len(link["b"].of(EndFeed)) <= 1
    if link["b"].of(EndFeed):
        assert sorted(link["b"].offsets("t") + gaps) == list(range(count))
