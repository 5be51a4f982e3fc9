"""The books of two members against what a test saw happen, whatever is lost, dropped, closed and told late."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from fabric.core import events
from fabric.core.wire import Drop
from fabric.engine.auditing import draw_up
from fabric.observe.ledger import Ledger, LedgerRow
from tests.harness.pair import Link

WHAT = st.sampled_from(["publish", "lose", "handle", "drop", "wait", "deliver", "reopen"])
STEPS = st.lists(st.tuples(WHAT, st.integers(1, 9)), min_size=5, max_size=40)


class Story:
    """`a` publishes, `b` reads and counts what it does."""

    def __init__(self) -> None:
        self.link, self.number = Link("a", "b"), 0
        self.link["b"].settles = False
        self.done = Counter[tuple[int, str]]()
        self.reopen(0)

    def publish(self, n: int) -> None:
        self.link.publish("a", "t", [seed % 3 for seed in range(n)])

    def lose(self, n: int) -> None:
        kept = [flight for index, flight in enumerate(self.link.wire) if index % n]
        self.link.drop(lambda flight: flight not in kept)

    def wait(self, n: int) -> None:
        self.link.pass_time(100 * n)

    def deliver(self, n: int) -> None:
        for _ in range(n * n):
            if self.link.wire:
                self.link.deliver(self.link.wire[0])

    def handle(self, n: int) -> None:
        self.settle(n, "handled")

    def drop(self, n: int) -> None:
        self.settle(n, Drop.REJECTED if n % 2 else Drop.EXPIRED)

    def settle(self, most: int, end: str) -> None:
        hand = self.link["b"].in_hand
        for deliver in hand[:most]:
            rows = range(deliver.burst.count) if deliver.rows is None else deliver.rows
            for row in rows:
                offset, last = deliver.burst.first + row, row == rows[-1]
                dropped = None if end == "handled" else {end: 1}
                size = deliver.size if last else 0
                event = events.MessagesSettled(deliver.feed, offset, offset + 1, int(not dropped), size, dropped)
                self.link.do("b", event)
                self.done[self.number, str(end)] += deliver.subscription == self.number
        del hand[:most]

    def reopen(self, n: int) -> None:
        if self.number:
            self.link.do("b", events.SubscriptionClosed(self.number))
        self.link["b"].in_hand.clear()
        self.number += 1
        self.link.subscribe("b", "t", subscription=self.number)
        self.link.crank()

    def ledger(self, name: str) -> Ledger:
        return draw_up(self.link[name].core)

    def check(self) -> None:
        theirs = {row.subscription: row for row in self.ledger("b").rows}
        for number, row in theirs.items():
            assert row.balanced, str(row)
            seen = {end: count for (other, end), count in self.done.items() if other == number and count}
            assert {end: row.reasons.get(end, 0) for end in seen} == seen
            assert row.totals.handled == seen.get("handled", 0)
        for row in self.ledger("a").rows:
            assert row.balanced, str(row)
            if row.subscription in theirs:
                self.knows_no_more(row, theirs[row.subscription])

    @staticmethod
    def knows_no_more(told: LedgerRow, truth: LedgerRow) -> None:
        assert all(count <= truth.reasons.get(end, 0) for end, count in told.reasons.items())
        assert told.floor <= truth.floor or truth.state == "closed"


@given(STEPS)
def test_the_terms_add_up_at_every_moment_and_both_sides_agree_in_the_end(steps: list[tuple[str, int]]) -> None:
    story = Story()
    for what, n in steps:
        getattr(story, what)(n)
        story.check()
    for _ in range(4):
        story.link.run(1_500, step_ms=50)
        story.settle(1_000, "handled")
    story.link.run(1_500, step_ms=50)
    story.check()
    ours, theirs = (
        {row.subscription: (row.reasons, row.state, row.totals) for row in story.ledger(name).rows} for name in "ab"
    )
    assert ours.keys() >= theirs.keys()
    assert {number: ours[number] for number in theirs} == theirs
