"""The subscriber's side of a feed against a small model: order in the lane, every offset ends once, bounds, closure."""

from __future__ import annotations

from itertools import permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.events import Deliver, ReportGap
from fabric.core.lanes import InboundFeed
from fabric.core.rooms import Room
from fabric.core.wire import Burst, Drop, encode_burst
from tests.harness.bursts import Numbering, burst_of
from tests.harness.pair import settled


class Reader:
    """An inbound feed with an application that settles, and the model that judges both."""

    def __init__(
        self,
        bursts: list[list[int]],
        *,
        addressed: frozenset[int] = frozenset(),
        wanted: frozenset[int] | None = None,
        best_effort: bool = False,
        join: int = 0,
        hand: int = 10**9,
        hold: int = 10**9,
        ranges: int = 1000,
    ) -> None:
        self.room = Room(hand_max=hand, hold_max=hold, ranges_max=ranges)
        self.numbering, self.bursts, self.wanted, self.join = Numbering(), [], wanted, join
        offset = 0
        for seeds in bursts:
            payloads = {row: b"p%d" % (offset + row) for row in range(len(seeds)) if offset + row in addressed}
            self.bursts.append(self.numbering.burst(seeds, payloads=payloads))
            offset += len(seeds)
        self.end, self.addressed = offset, addressed
        self.handled: list[int] = []
        self.gaps: list[int] = []
        self.in_hand: list[Deliver] = []
        self.inbound = InboundFeed(
            subscription=1,
            source="a",
            topic="t",
            incarnation=1,
            join=join,
            room=self.room,
            emit=self.on_command,
            seeds=wanted,
            best_effort=best_effort,
        )

    def on_command(self, command: object) -> None:
        if isinstance(command, ReportGap):
            assert command.end is not None
            self.gaps += range(command.first, command.end)
            return
        assert isinstance(command, Deliver)
        rows = range(command.burst.count) if command.rows is None else command.rows
        for row in rows:
            offset = command.burst.first + row
            if offset in self.addressed:
                assert command.burst.payloads is not None and command.burst.payloads[offset] == b"p%d" % offset
            else:
                assert command.burst.body(row) == b"%d" % offset
        self.handled += [command.burst.first + row for row in rows]
        self.in_hand.append(command)

    # What may happen.

    def receive(self, index: int) -> None:
        self.take(burst_of(self.bursts[index % len(self.bursts)].frame))

    def receive_part(self, index: int, cut: int) -> None:
        """The same records, cut otherwise."""
        burst = self.bursts[index % len(self.bursts)]
        first = cut % burst.count
        self.take(cut_out(burst, first, burst.count))
        if first:
            self.take(cut_out(burst, 0, first))

    def take(self, burst: Burst) -> None:
        self.inbound.receive(burst)
        assert all(offset in self.addressed for offset, _ in self.inbound.claim())

    def settle(self, index: int, _: int = 0) -> None:
        """Some message in hand that nothing in its lanes precedes."""
        offsets = {id(item): set(self.offsets_of(item)) for item in self.in_hand}
        free = [
            item
            for item in self.in_hand
            if not any(
                self.numbering.rows[offset][2] in others
                for offset in offsets[id(item)]
                for key, others in offsets.items()
                if key != id(item)
            )
        ]
        if free:
            item = free[index % len(free)]
            self.in_hand.remove(item)
            for event in settled(item):
                self.inbound.settle(event.first, event.end, event.size)

    def arrive(self, index: int, _: int = 0) -> None:
        if self.inbound.awaiting:
            offset = sorted(self.inbound.awaiting)[index % len(self.inbound.awaiting)]
            self.inbound.payload_arrived(offset, b"p%d" % offset)

    def lose(self, index: int, _: int = 0) -> None:
        if self.inbound.awaiting:
            offset = sorted(self.inbound.awaiting)[index % len(self.inbound.awaiting)]
            self.inbound.payload_lost(offset, Drop.CORRUPT_AT_SOURCE)

    def learn(self, first: int, lost: int) -> None:
        first %= self.end + 1
        begin = lost % (self.end + 1)
        self.inbound.learn(first // 2, self.end, [(begin, begin + 1)])

    # Judging.

    @staticmethod
    def offsets_of(item: Deliver) -> list[int]:
        rows = range(item.burst.count) if item.rows is None else item.rows
        return [item.burst.first + row for row in rows]

    def judge(self) -> None:
        inbound, rows = self.inbound, self.numbering.rows
        inbound.check_invariants()
        assert len(set(self.handled)) == len(self.handled), "handed over twice"
        assert len(set(self.gaps)) == len(self.gaps), "reported twice"
        assert not set(self.handled) & set(self.gaps)
        lanes: dict[int, int] = {}
        for offset in self.handled:
            seed = rows[offset][0]
            assert lanes.get(seed, -1) < offset, "out of order in its lane"
            lanes[seed] = offset
        taken = {offset for first, end in inbound.taken for offset in range(first, end)}
        done = {offset for first, end in inbound.settled for offset in range(first, end)}
        wanted = {offset for offset, row in enumerate(rows) if self.wanted is None or row[0] in self.wanted}
        taken, done = (taken & wanted, done & wanted) if not inbound.best_effort else (set[int](), set[int]())
        for offset in taken:
            assert rows[offset][2] < inbound.next or rows[offset][2] in taken, "I14: taken is closed"
        for offset in done:
            assert rows[offset][2] < inbound.floor or rows[offset][2] in done, "I14: settled is closed"
        assert len(list(inbound.taken)) <= self.room.ranges_max
        biggest = max(burst.size for burst in self.bursts)
        assert self.room.hold <= self.room.hold_max + 2 * biggest + 100
        assert self.room.hand < self.room.hand_max + biggest + 100
        assert self.room.hand == sum(item.size for item in self.in_hand)

    def finish(self) -> None:
        """Everything is offered again, whenever there is room: then all of it ends."""
        for _ in range(3 * self.end + 3):
            while self.in_hand:
                self.settle(0)
            if self.inbound.floor >= self.end:
                break
            for index in range(len(self.bursts)):
                self.receive(index)
                while self.inbound.awaiting:
                    self.arrive(0)
                self.settle(0)
            self.judge()
        assert self.inbound.floor == self.end, f"stuck: {self.inbound}"
        assert not self.inbound.held and not self.inbound.taken and not self.inbound.settled and not self.inbound.have
        assert self.room.hand == self.room.hold == 0
        ends = len(self.handled) + len(self.gaps)
        skipped = sum(self.inbound.counts[reason] for reason in (Drop.NOT_ASKED, Drop.BEST_EFFORT, Drop.SUPERSEDED))
        covered = self.covered()
        assert ends + skipped + covered == self.end - self.join
        if self.wanted is not None:
            assert all(self.numbering.rows[offset][0] in self.wanted for offset in self.handled)

    def covered(self) -> int:
        """Records not asked for that were settled together with a message."""
        return self.settled_along

    settled_along = 0


def cut_out(burst: Burst, begin: int, end: int) -> Burst:
    """Some rows of a burst as a burst of their own."""
    previous, (seeds, sequences, kinds, _, _) = burst.previous, burst.columns
    rows = slice(begin, end)
    bodies = [burst.body(row) for row in range(begin, end)]
    first = burst.first + begin
    return burst_of(
        encode_burst(burst.feed, 1, first, 0, seeds[rows], sequences[rows], previous[rows], kinds[rows], bodies)
    )


BURSTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=8)
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["receive", "receive", "receive_part", "settle", "settle", "arrive"]),
        st.integers(0, 31),
        st.integers(0, 31),
    ),
    max_size=30,
)
FAULTS = st.lists(
    st.tuples(
        st.sampled_from(["receive", "receive", "receive_part", "settle", "arrive", "lose", "learn"]),
        st.integers(0, 31),
        st.integers(0, 31),
    ),
    max_size=30,
)
ROOMS = st.sampled_from([1, 100, 300, 600, 10**6])


def play(reader: Reader, steps: list[tuple[str, int, int]]) -> None:
    for what, a, b in steps:
        if what == "receive":
            reader.receive(a)
        else:
            getattr(reader, what)(a, b)
        reader.judge()


@settings(max_examples=120)
@given(BURSTS, STEPS, ROOMS, ROOMS, st.integers(1, 3))
def test_any_arrival_in_any_room_ends_with_everything_handled_once(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], hand: int, hold: int, ranges: int
) -> None:
    reader = Reader(bursts, hand=hand, hold=hold, ranges=ranges)
    play(reader, steps)
    reader.finish()
    assert sorted(reader.handled) == list(range(reader.end))
    assert reader.gaps == []


@settings(max_examples=120)
@given(BURSTS, STEPS, ROOMS, ROOMS, st.frozensets(st.integers(0, 31)))
def test_addressed_values_keep_their_place_in_the_lane(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], hand: int, hold: int, addressed: frozenset[int]
) -> None:
    reader = Reader(bursts, hand=hand, hold=hold, addressed=addressed)
    play(reader, steps)
    reader.finish()
    assert sorted(reader.handled) == list(range(reader.end))


@settings(max_examples=120)
@given(BURSTS, FAULTS, ROOMS, ROOMS, st.frozensets(st.integers(0, 31)))
def test_with_losses_every_offset_is_handled_or_a_gap_and_never_both(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], hand: int, hold: int, addressed: frozenset[int]
) -> None:
    reader = Reader(bursts, hand=hand, hold=hold, addressed=addressed)
    play(reader, steps)
    reader.finish()
    assert sorted(reader.handled + reader.gaps) == list(range(reader.end))
    assert reader.inbound.counts[Drop.GAP] + reader.inbound.counts[Drop.CORRUPT_AT_SOURCE] == len(reader.gaps)


@settings(max_examples=100)
@given(BURSTS, FAULTS, ROOMS, st.frozensets(st.integers(0, 3)), st.integers(0, 5))
def test_only_the_wanted_seeds_are_handed_over_and_the_rest_is_settled(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], hold: int, wanted: frozenset[int], join: int
) -> None:
    reader = Reader(bursts, hold=hold, wanted=wanted, join=0)
    play(reader, steps)
    reader.settled_along = 0
    for _ in range(3 * reader.end):
        for index in range(len(reader.bursts)):
            reader.receive(index)
            while reader.in_hand:
                reader.settle(join)
    assert reader.inbound.floor == reader.end
    everything = {offset for offset, row in enumerate(reader.numbering.rows) if row[0] in wanted}
    assert set(reader.handled) <= everything
    assert everything <= set(reader.handled) | set(reader.gaps)


@settings(max_examples=100)
@given(BURSTS, FAULTS, ROOMS, ROOMS)
def test_best_effort_never_waits(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], hand: int, hold: int
) -> None:
    reader = Reader(bursts, hand=hand, hold=hold, best_effort=True)
    play(reader, steps)
    assert reader.inbound.missing(reader.end, most=10) == []
    reader.take(burst_of(reader.numbering.frame([9])))
    while reader.in_hand:
        reader.settle(0)
    assert reader.inbound.next == reader.end + 1
    assert reader.gaps == []


@settings(max_examples=100)
@given(BURSTS, STEPS, st.integers(0, 20))
def test_what_is_missing_is_what_was_not_received_from_the_join_offset_on(
    bursts: list[list[int]], steps: list[tuple[str, int, int]], join: int
) -> None:
    reader = Reader(bursts)
    reader.inbound = InboundFeed(
        subscription=1, source="a", topic="t", incarnation=1, join=join, room=reader.room, emit=reader.on_command
    )
    got: set[int] = set()
    for what, a, _ in steps:
        if what.startswith("receive"):
            reader.receive(a)
            burst = reader.bursts[a % len(reader.bursts)]
            got |= set(range(burst.first, burst.end))
    missing = {n for first, end in reader.inbound.missing(reader.end, most=100) for n in range(first, end)}
    assert missing == set(range(join, reader.end)) - got
    assert all(offset >= join for offset in reader.handled)


def test_all_orders_of_up_to_five_bursts_with_loss_and_duplication() -> None:
    for count in range(1, 6):
        for seeds in ([0] * count, [0, 1] * count, [0, 0, 1, 0, 1]):
            lanes = [[seed] for seed in seeds[:count]]
            for order in permutations(range(count)):
                reader = Reader(lanes)
                for index in order:
                    reader.receive(index)
                    reader.receive(index)
                    reader.judge()
                assert sorted(reader.handled) == list(range(count))
                assert reader.inbound.next == count
                assert reader.inbound.counts[Drop.DUPLICATE] == count


def test_all_losses_from_all_orders_of_four_bursts_are_gaps_exactly_at_the_floor() -> None:
    for order in permutations(range(4)):
        for lost in product([False, True], repeat=4):
            reader = Reader([[0], [1], [0], [1]])
            for index in order:
                if not lost[index]:
                    reader.receive(index)
                    reader.judge()
            assert reader.gaps == []
            reader.inbound.learn(4, 4)
            while reader.in_hand:
                reader.settle(0)
            reader.judge()
            assert reader.gaps == [offset for offset in range(4) if lost[offset]]
            assert sorted(reader.handled + reader.gaps) == [0, 1, 2, 3]
            assert reader.inbound.floor == 4
