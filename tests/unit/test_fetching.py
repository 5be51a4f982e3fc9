"""Addressed payloads: chunk by chunk, in any order, within a bound."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from typing import Any

from fabric.config import FabricConfig, Inboxes
from fabric.core.events import BeginPayload, DropPayload, FinishPayload, PlaceChunk, SendControl
from fabric.core.fetching import Fetching
from fabric.core.members import MS, Context
from fabric.core.wire import Descriptor, Drop, decode_control
from tests.harness.pair import card

KEY = (1, 5)


class Desk:
    """Fetching, and the commands that it led to."""

    def __init__(self, ceiling: int = 100) -> None:
        config = replace(FabricConfig(), inboxes=Inboxes(assembly_bytes_max=ceiling))
        self.context = Context(card("b"), config)
        self.fetching = Fetching(self.context)

    def told(self) -> list[Any]:
        """The commands since the last call; FETCH as (peer, fields)."""
        commands = self.context.commands.copy()
        self.context.commands.clear()
        self.fetching.check_invariants()
        return [
            (command.peer, *decode_control(command.frame).fields) if isinstance(command, SendControl) else command
            for command in commands
        ]


def test_a_payload_is_complete_when_all_bytes_came_in_any_order() -> None:
    chunks = [(0, b"abcd"), (4, b"ef"), (6, b"ghij")]
    for order in permutations(chunks):
        desk = Desk()
        desk.fetching.begin(KEY, "a", Descriptor(10, 99))
        assert desk.told() == [BeginPayload(1, 5, 10), ("a", 1, 5, 0, 10, 1, False)]
        for position, chunk in order:
            desk.fetching.on_chunk("a", KEY, position, chunk, 0)
        assert desk.told() == [*[PlaceChunk(1, 5, *piece) for piece in order], FinishPayload(1, 5, 99)]
        assert desk.fetching.on_checked(KEY, True) is True
        assert KEY not in desk.fetching
        assert desk.told() == []


def test_f75_what_there_was_no_memory_for_is_asked_for_again_after_a_while() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    desk.fetching.on_chunk("a", KEY, 0, b"abcd", 0)
    desk.told()
    desk.fetching.starve(KEY)
    assert desk.told() == [BeginPayload(1, 5, 10)]
    desk.fetching.on_chunk("a", KEY, 4, b"efghij", 0)
    assert desk.told() == [], "what is still on its way is in vain"
    desk.context.now = desk.fetching.next_deadline_ns() - 1
    desk.fetching.tick()
    assert desk.told() == []
    desk.context.now += 1
    desk.fetching.tick()
    assert desk.told() == [("a", 1, 5, 0, 10, 2, False)]
    desk.fetching.on_chunk("a", KEY, 0, b"abcdefghij", 0)
    assert desk.told() == [PlaceChunk(1, 5, 0, b"abcdefghij"), FinishPayload(1, 5, 99)]
    desk.fetching.on_checked(KEY, True)
    desk.fetching.starve(KEY)
    assert desk.told() == [], "it is here"
    assert (desk.context.counts["out_of_memory"], desk.context.counts[Drop.NO_ROOM]) == (1, 1)


def test_begun_twice_is_asked_for_once() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    desk.told()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    assert desk.told() == []


def test_pieces_that_are_there_strange_or_too_long_are_dropped() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    desk.fetching.on_chunk("a", KEY, 2, b"cd", 0)
    desk.told()
    for peer, key, position, chunk, reason in [
        ("a", KEY, 2, b"cd", Drop.DUPLICATE),
        ("a", KEY, 1, b"bc", Drop.DUPLICATE),
        ("a", KEY, 4, b"", Drop.DUPLICATE),
        ("x", KEY, 4, b"ef", Drop.DUPLICATE),
        ("a", (1, 6), 4, b"ef", Drop.DUPLICATE),
        ("a", KEY, 9, b"jk", Drop.SHAPE),
        ("a", KEY, 2**64 - 1, b"jk", Drop.SHAPE),
    ]:
        before = desk.context.counts[reason]
        desk.fetching.on_chunk(peer, key, position, chunk, 0)
        assert desk.context.counts[reason] == before + 1
        assert desk.told() == []


def test_a_wrong_checksum_is_fetched_again_and_then_given_up() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(2, 99))
    for attempt in range(3):
        desk.told()
        desk.fetching.on_chunk("a", KEY, 0, b"xx", 0)
        outcome = desk.fetching.on_checked(KEY, False)
        assert outcome is (None if attempt < 2 else False)
    assert desk.told()[-1] == DropPayload(1, 5)
    assert desk.context.counts["payloads_refetched"] == 2
    assert desk.fetching.on_checked(KEY, True) is None


def test_what_is_under_way_is_bounded_and_a_larger_one_travels_alone() -> None:
    desk = Desk(ceiling=100)
    for number, size in enumerate([60, 60, 500, 10]):
        desk.fetching.begin((1, number), "a", Descriptor(size, 0))
    begun = [command.number for command in desk.told() if isinstance(command, BeginPayload)]
    assert begun == [0]
    for number in range(3):
        desk.fetching.end((1, number), drop=False)
        begun += [command.number for command in desk.told() if isinstance(command, BeginPayload)]
    assert begun == [0, 1, 2, 3]


def test_a_peer_that_does_not_answer_holds_up_no_other() -> None:
    desk = Desk(ceiling=100)
    for number, peer in enumerate(["a", "a", "b", "b"]):
        desk.fetching.begin((1, number), peer, Descriptor(90, 0))
    assert [command.number for command in desk.told() if isinstance(command, BeginPayload)] == [0, 2]
    desk.fetching.end((1, 2))
    assert [command.number for command in desk.told() if isinstance(command, BeginPayload)] == [3]


def test_the_value_of_a_request_does_not_wait_behind_records() -> None:
    desk = Desk(ceiling=100)
    desk.fetching.begin((1, 0), "a", Descriptor(90, 0))
    desk.fetching.begin((2, 0), "a", Descriptor(90, 0), exchange=True)
    desk.fetching.begin((2, 1), "a", Descriptor(90, 0), exchange=True)
    assert [command.space for command in desk.told() if isinstance(command, BeginPayload)] == [1, 2]
    desk.fetching.end((2, 0))
    assert [command.number for command in desk.told() if isinstance(command, BeginPayload)] == [1]
    desk.fetching.check_invariants()


def test_a_payload_that_nobody_wants_any_more_leaves_the_queue() -> None:
    desk = Desk(ceiling=100)
    for number in range(3):
        desk.fetching.begin((1, number), "a", Descriptor(60, 0))
    desk.fetching.end((1, 1))
    desk.fetching.end((1, 1))
    desk.told()
    desk.fetching.end((1, 0))
    assert desk.told()[:2] == [DropPayload(1, 0), BeginPayload(1, 2, 60)]


def test_what_stalled_is_asked_for_again_with_growing_patience_and_only_what_is_missing() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    desk.fetching.on_chunk("a", KEY, 0, b"abcd", 0)
    desk.told()
    asked = []
    for ms in range(1, 400):
        desk.context.now = ms * MS
        due = desk.fetching.next_deadline_ns()
        assert due is not None
        desk.fetching.tick()
        if told := desk.told():
            asked.append(ms)
            assert due <= desk.context.now
            assert [row[:5] for row in told] == [("a", 1, 5, 4, 6)]
    assert asked[0] <= 40
    gaps = [after - before for before, after in pairwise(asked)]
    assert gaps == sorted(gaps)
    assert desk.context.counts["fetches_repeated"] == len(asked)


def test_a_complete_payload_is_not_asked_for_while_it_is_checked() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(2, 99))
    desk.fetching.on_chunk("a", KEY, 0, b"xx", 0)
    desk.told()
    desk.context.now = 10_000 * MS
    desk.fetching.tick()
    assert desk.told() == []
    assert desk.fetching.next_deadline_ns() is None


def test_a_peer_that_is_gone_sends_nothing_more() -> None:
    desk = Desk()
    desk.fetching.begin(KEY, "a", Descriptor(10, 99))
    desk.fetching.begin((1, 6), "c", Descriptor(10, 99))
    desk.told()
    assert desk.fetching.forget("a") == [KEY]
    assert desk.told() == [DropPayload(1, 5)]
    assert (1, 6) in desk.fetching
