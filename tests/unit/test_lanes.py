"""The subscriber's side of a feed: what the property tests do not say."""

from __future__ import annotations

import pytest

from fabric.core.events import Deliver, ReportGap
from fabric.core.lanes import InboundFeed
from fabric.core.rooms import Room
from fabric.core.wire import NONE, Burst, Drop, encode_burst
from fabric.errors import WireFormatError
from tests.harness.bursts import Numbering, burst_of, resealed


class Desk:
    """An inbound feed and what it emitted."""

    def __init__(
        self,
        *,
        hand: int = 10**6,
        hold: int = 10**6,
        seeds: frozenset[int] | None = None,
        best_effort: bool = False,
        join: int = 0,
    ) -> None:
        self.room = Room(hand_max=hand, hold_max=hold, ranges_max=1000)
        self.emitted: list[object] = []
        self.inbound = InboundFeed(
            subscription=1,
            source="a",
            topic="t",
            incarnation=1,
            join=join,
            room=self.room,
            emit=self.emitted.append,
            seeds=seeds,
            best_effort=best_effort,
        )

    def delivered(self) -> list[int]:
        return [offset for command in self.emitted if isinstance(command, Deliver) for offset in offsets_of(command)]

    def gaps(self) -> list[tuple[int, int | None, str]]:
        return [(gap.first, gap.end, gap.reason) for gap in self.emitted if isinstance(gap, ReportGap)]


def offsets_of(command: Deliver) -> list[int]:
    rows = range(command.burst.count) if command.rows is None else command.rows
    return [command.burst.first + row for row in rows]


def test_a_burst_in_order_is_handed_over_whole_and_untouched() -> None:
    desk, numbering = Desk(), Numbering()
    burst = numbering.burst([0, 1, 2])
    desk.inbound.receive(burst)
    assert list(desk.inbound.claim()) == []
    assert desk.emitted == [Deliver(1, desk.inbound, burst, None, burst.size, (0, 3))]
    assert burst._columns is None, "the fast path looks into nothing"


def test_a_gap_in_one_lane_delays_no_other() -> None:
    desk, numbering = Desk(), Numbering()
    lost, after, other = numbering.burst([7]), numbering.burst([7]), numbering.burst([8])
    for burst in (other, after):
        desk.inbound.receive(burst)
    assert desk.delivered() == [2]
    desk.inbound.receive(lost)
    assert desk.delivered() == [2, 0, 1]


def test_a_duplicate_is_counted_and_dropped() -> None:
    desk, numbering = Desk(), Numbering()
    first, second, third = (numbering.burst([0]) for _ in range(3))
    for burst in (first, first, third, third, second, second):
        desk.inbound.receive(burst)
    assert desk.delivered() == [0, 1, 2]
    assert desk.inbound.counts[Drop.DUPLICATE] == 3


def test_a_gap_is_reported_when_the_floor_reaches_it_and_not_before() -> None:
    desk, numbering = Desk(), Numbering()
    first, _, third = (numbering.burst([0]) for _ in range(3))
    desk.inbound.receive(first)
    desk.inbound.receive(third)
    desk.inbound.learn(2, 3)
    assert (desk.gaps(), desk.delivered()) == ([], [0])
    desk.inbound.settle(0, 1, first.size)
    assert (desk.gaps(), desk.delivered()) == ([(1, 2, Drop.GAP)], [0, 2])
    desk.inbound.settle(2, 3, third.size)
    assert desk.inbound.floor == 3
    desk.inbound.learn(2, 3)
    assert len(desk.gaps()) == 1


def test_what_is_held_when_it_is_told_lost_is_no_gap() -> None:
    desk, numbering = Desk(), Numbering()
    _, second = numbering.burst([0]), numbering.burst([0])
    desk.inbound.receive(second)
    desk.inbound.learn(0, 2, [(0, 2)])
    assert (desk.gaps(), desk.delivered()) == ([(0, 1, Drop.GAP)], [1])


def test_the_highest_offset_gives_way() -> None:
    numbering = Numbering()
    bursts = [numbering.burst([0]) for _ in range(5)]
    desk = Desk(hold=2 * bursts[0].size)
    for index in (4, 3, 2):
        desk.inbound.receive(bursts[index])
        desk.inbound.check_invariants()
    assert sorted(desk.inbound.held) == [2, 3]
    assert desk.inbound.counts[Drop.NO_ROOM] == 1
    desk.inbound.receive(bursts[4])
    assert sorted(desk.inbound.held) == [2, 3]
    assert desk.inbound.turned_away
    assert desk.inbound.missing(5, most=9) == [(0, 2), (4, 5)]


def test_a_hold_stays_bounded_while_another_lane_flows() -> None:
    numbering = Numbering()
    numbering.burst([0])  # lost: lane 0 waits for it
    bursts = [numbering.burst([1, 0, 0, 0]) for _ in range(50)]
    desk = Desk(hold=2 * bursts[0].size)
    for burst in bursts:
        desk.inbound.receive(burst)
        desk.inbound.check_invariants()
        assert desk.room.hold <= desk.room.hold_max + burst.size
    assert desk.delivered() == [burst.first for burst in bursts]


def test_with_a_full_hand_what_is_next_waits_and_nothing_more_is_asked_for() -> None:
    numbering = Numbering()
    first, second, _ = (numbering.burst([0]) for _ in range(3))
    desk = Desk(hand=1, hold=1)
    desk.inbound.receive(first)
    desk.inbound.receive(second)
    assert desk.delivered() == [0]
    assert desk.room.left == 0
    assert desk.inbound.missing(3, most=9) == []
    desk.inbound.settle(0, 1, first.size)
    assert desk.delivered() == [0, 1]
    assert desk.inbound.missing(3, most=9) == [(2, 3)]


def test_at_most_so_many_ranges_are_named_missing() -> None:
    desk, numbering = Desk(), Numbering()
    for burst in [numbering.burst([n]) for n in range(10)][1::2]:
        desk.inbound.receive(burst)
    assert desk.inbound.missing(10, most=2) == [(0, 1), (2, 3)]


def test_nothing_beyond_the_told_end_is_missing_and_the_rest_is_a_gap() -> None:
    desk = Desk()
    desk.inbound.learn(0, 10)
    desk.inbound.finish(4)
    assert desk.inbound.missing(10, most=9) == [(0, 4)]
    assert not desk.inbound.is_finished
    desk.inbound.learn(4, 10)
    assert desk.inbound.is_finished
    assert desk.gaps() == [(0, 4, Drop.GAP), (4, 10, Drop.GAP)]


def test_a_value_that_cannot_be_had_is_a_gap_with_its_reason() -> None:
    desk, numbering = Desk(), Numbering()
    burst = numbering.burst([0, 0, 0, 0], payloads={1: b"x", 2: b"y"})
    desk.inbound.receive(burst)
    assert [offset for offset, _ in desk.inbound.claim()] == [1, 2]
    desk.inbound.payload_lost(2, Drop.CORRUPT_AT_SOURCE)
    desk.inbound.payload_lost(1, Drop.TOO_LARGE)
    desk.inbound.payload_lost(1, Drop.TOO_LARGE)
    assert desk.delivered() == [0]
    desk.inbound.settle(0, 1, 0)
    assert desk.gaps() == [(1, 2, Drop.TOO_LARGE), (2, 3, Drop.CORRUPT_AT_SOURCE)]
    assert desk.delivered() == [0, 3]
    assert desk.inbound.reasons == {}


def test_addressed_values_are_asked_for_within_the_room() -> None:
    """What is under way or waits to be handed over is bounded; the next record always has room (I7)."""
    desk, numbering = Desk(hand=1), Numbering()
    desk.room.payload_max = 10
    bursts = [numbering.burst([seed], payloads={0: b"12345678"}) for seed in range(3)]
    for burst in bursts:
        desk.inbound.receive(burst)
    assert [offset for offset, _ in desk.inbound.claim()] == [0]
    desk.inbound.payload_arrived(1, b"12345678")  # another subscription asked for it
    assert desk.room.payload == 8
    assert desk.inbound.awaiting == {0, 1, 2}
    desk.inbound.payload_arrived(0, b"12345678")
    assert desk.delivered() == [0]
    assert desk.room.payload == 0
    assert [offset for offset, _ in desk.inbound.claim()] == [1]
    desk.inbound.payload_arrived(1, b"12345678")
    assert [offset for offset, _ in desk.inbound.claim()] == []
    assert desk.delivered() == [0], "the hand is full"
    desk.inbound.settle(0, 1, desk.room.hand)
    assert desk.delivered() == [0, 1]
    assert [offset for offset, _ in desk.inbound.claim()] == [2]


def test_a_gap_before_a_lost_value_keeps_its_own_reason() -> None:
    desk, numbering = Desk(), Numbering()
    numbering.burst([0])
    desk.inbound.receive(numbering.burst([1], payloads={0: b"x"}))
    desk.inbound.payload_lost(1, Drop.TOO_LARGE)
    desk.inbound.learn(1, 2, [(0, 1)])
    assert desk.gaps() == [(0, 1, Drop.GAP), (1, 2, Drop.TOO_LARGE)]


def test_a_value_for_nothing_that_waits_is_ignored() -> None:
    desk, numbering = Desk(), Numbering()
    desk.inbound.payload_arrived(0, b"x")
    desk.inbound.receive(numbering.burst([0], payloads={0: b"x"}))
    desk.inbound.payload_arrived(0, b"x")
    desk.inbound.payload_arrived(0, b"x")
    assert desk.delivered() == [0]


def test_the_bytes_of_a_value_count_in_the_hand() -> None:
    desk, numbering = Desk(), Numbering()
    burst = numbering.burst([0], payloads={0: bytes(500)})
    desk.inbound.receive(burst)
    desk.inbound.payload_arrived(0, bytes(500))
    assert desk.room.hand == burst.size + 500


def test_superseded_records_are_counted_and_not_reported() -> None:
    desk = Desk()
    desk.inbound.name_losses(Drop.SUPERSEDED)
    desk.inbound.learn(0, 5, [(0, 5)])
    assert (desk.gaps(), desk.inbound.floor, desk.inbound.counts[Drop.SUPERSEDED]) == ([], 5, 5)


def test_seeds_that_are_not_asked_for_are_settled_at_once() -> None:
    desk, numbering = Desk(seeds=frozenset({1})), Numbering()
    desk.inbound.receive(numbering.burst([0, 2]))
    assert (desk.inbound.floor, desk.inbound.counts[Drop.NOT_ASKED]) == (2, 2)
    mixed = numbering.burst([0, 1, 0])
    desk.inbound.receive(mixed)
    assert desk.emitted == [Deliver(1, desk.inbound, mixed, (1,), mixed.size, (2, 5))]
    desk.inbound.settle(2, 5, mixed.size)
    assert desk.inbound.floor == 5


def test_a_seed_that_is_asked_for_waits_for_the_hand_and_unwanted_ones_do_not() -> None:
    numbering = Numbering()
    desk = Desk(seeds=frozenset({1}), hand=1)
    first, second = numbering.burst([1]), numbering.burst([0, 1])
    desk.inbound.receive(first)
    desk.inbound.receive(second)
    assert desk.delivered() == [0]
    desk.inbound.settle(0, 1, first.size)
    assert desk.delivered() == [0, 2]


def test_an_unwanted_record_that_would_open_one_range_too_many_is_not_taken() -> None:
    desk, numbering = Desk(seeds=frozenset({1})), Numbering()
    desk.room.ranges_max = 1
    bursts = [numbering.burst([0]) for _ in range(6)]
    for index in (1, 3, 2):
        desk.inbound.receive(bursts[index])
    assert list(desk.inbound.taken) == [(1, 3)]
    assert desk.inbound.counts[Drop.NO_ROOM] == 1


def test_a_wanted_record_that_would_open_one_range_too_many_waits_in_the_hold() -> None:
    desk, numbering = Desk(), Numbering()
    desk.room.ranges_max = 1
    bursts = [numbering.burst([n]) for n in range(6)]
    for index in (1, 3):
        desk.inbound.receive(bursts[index])
    assert (desk.delivered(), sorted(desk.inbound.held)) == ([1], [3])
    desk.inbound.receive(bursts[2])
    assert (desk.delivered(), sorted(desk.inbound.held)) == ([1, 2, 3], [])


def test_best_effort_goes_on_and_what_comes_too_late_is_dropped() -> None:
    desk, numbering = Desk(best_effort=True), Numbering()
    bursts = [numbering.burst([0]) for _ in range(4)]
    for index in (0, 2, 1, 3):
        desk.inbound.receive(bursts[index])
    assert desk.delivered() == [0, 2, 3]
    assert desk.inbound.counts[Drop.DUPLICATE] == 1
    for index in (0, 2, 3):
        desk.inbound.settle(index, index + 1, bursts[index].size)
    assert (desk.inbound.floor, desk.inbound.counts[Drop.BEST_EFFORT], desk.gaps()) == (4, 1, [])


def test_best_effort_does_not_wait_for_what_had_no_room() -> None:
    numbering = Numbering()
    bursts = [numbering.burst([n]) for n in range(3)]
    desk = Desk(best_effort=True, hand=1, hold=1)
    for burst in bursts:
        desk.inbound.receive(burst)
    desk.inbound.settle(0, 1, bursts[0].size)
    desk.inbound.settle(1, 2, bursts[1].size)
    assert (desk.delivered(), desk.inbound.floor) == ([0, 1], 3)


def test_best_effort_does_not_wait_for_a_value_that_is_lost() -> None:
    desk, numbering = Desk(best_effort=True), Numbering()
    desk.inbound.receive(numbering.burst([0, 0], payloads={0: b"x"}))
    assert desk.delivered() == []
    desk.inbound.payload_lost(0, Drop.CORRUPT_AT_SOURCE)
    assert desk.delivered() == [1]


def test_two_records_that_follow_the_same_one_are_no_lane() -> None:
    desk = Desk()
    rows = ([1, 1], [1, 1], [0, 0], [1, 1], [b"", b""])
    desk.inbound.receive(burst_of(encode_burst(7, 1, 1, 0, *rows)))
    desk.inbound.check_invariants()
    desk.inbound.receive(burst_of(encode_burst(7, 1, 0, 0, [1], [0], [NONE], [1], [b""])))
    desk.inbound.settle(0, 1, 0)
    desk.inbound.settle(1, 2, 0)
    assert (desk.delivered(), desk.gaps(), desk.inbound.floor) == ([0, 1], [(2, 3, Drop.UNDECODABLE)], 3)


def test_what_gave_way_again_and_again_leaves_nothing_behind() -> None:
    numbering = Numbering()
    bursts = [numbering.burst([n]) for n in range(4)]
    desk = Desk(hand=1, hold=bursts[0].size)
    desk.inbound.receive(bursts[0])
    for _ in range(300):
        desk.inbound.receive(bursts[3])
        desk.inbound.receive(bursts[2])
        desk.inbound._forget(2)
    assert len(desk.inbound._ready) < 100


def test_a_huge_gap_is_passed_in_one_step() -> None:
    desk, numbering = Desk(), Numbering()
    desk.inbound.learn(2**62, 2**63 - 1, [(0, 2**62), (5, 3)])
    assert (desk.inbound.floor, desk.gaps()) == (2**62, [(0, 2**62, Drop.GAP)])
    desk.inbound.receive(numbering.burst([0]))
    assert desk.inbound.counts[Drop.DUPLICATE] == 1
    assert desk.inbound.missing(2**63, most=3) == [(2**62, 2**63)]


def test_a_feed_shows_where_it_is() -> None:
    assert repr(Desk(join=4).inbound) == "InboundFeed(a/t, floor=4, next=4, known=4, held=0, fin=None)"


def lying(numbering: Numbering, seeds: list[int]) -> Burst:
    """The next burst, whose first record says that it waits for itself."""
    frame, at = numbering.frame(seeds), 48 + 16 * len(seeds)
    first = numbering.end - len(seeds)
    return burst_of(resealed(frame[:at] + first.to_bytes(8, "little") + frame[at + 8 :]))


def test_a_lane_that_does_not_point_backwards_matters_only_where_somebody_waits_for_it() -> None:
    whole = Desk()
    whole.inbound.receive(lying(Numbering(), [0, 1]))
    assert whole.delivered() == [0, 1], "in order: nobody looked"
    for best_effort in (False, True):
        ahead, numbering = Desk(best_effort=best_effort), Numbering()
        numbering.burst([0])
        with pytest.raises(WireFormatError) as caught:
            ahead.inbound.receive(lying(numbering, [0, 1]))
        assert caught.value.fields["reason"] == Drop.SHAPE
        assert (list(ahead.inbound.have), list(ahead.inbound.lost), ahead.inbound.held) == ([], [], {})
