"""What an arena and its readers have to do, whether memory is shared between processes or only in a simulated world."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from tests.harness.arenas import KIB, SIZE, FakeArenas, RealArenas, address, freed, published
from transports.arena import Arena
from transports.base import TransportClosedError
from transports.mappings import Mappings
from transports.segments import Place


@pytest.fixture(params=[RealArenas, FakeArenas])
def arenas(request: pytest.FixtureRequest) -> Iterator[RealArenas]:
    arenas = request.param()
    yield arenas
    arenas.close()


@pytest.fixture
def arena(arenas: RealArenas) -> Arena:
    return arenas.arena(address())


def connected(arenas: RealArenas, **limits: int) -> tuple[Arena, Mappings]:
    at = address()
    arena, mappings = arenas.arena(at, **limits), arenas.mappings()
    assert mappings.connect("writer", at)
    arena.poll()
    return arena, mappings


def content(view: memoryview | None) -> bytes:
    assert view is not None
    return bytes(view)


# Slots.


def test_the_warmest_slot_is_used_first(arena: Arena) -> None:
    first, second = published(arena, b"a" * SIZE), published(arena, b"b" * SIZE)
    places = first[0], second[0]
    del first, second
    arena.forgotten()
    arena.free(places[0])
    arena.free(places[1])
    slot = arena.take(SIZE)
    assert slot is not None and slot.place[:2] == places[1][:2]
    assert arena.statistics()["reused"] == 1 and arena.statistics()["fresh"] == 2


def test_a_generation_is_never_used_again(arena: Arena) -> None:
    seen = []
    for _ in range(5):
        place, view = published(arena, b"x" * SIZE)
        seen.append(place.generation)
        del view
        freed(arena, place)
    assert seen == sorted(set(seen)) and seen[0] > 0


def test_slots_of_one_class_serve_sizes_of_that_class_only(arena: Arena) -> None:
    place, view = published(arena, b"x" * 3 * SIZE)
    del view
    freed(arena, place)
    slot = arena.take(SIZE)
    assert slot is not None and slot.place.segment != place.segment


def test_no_slot_is_freed_twice_nor_while_somebody_here_looks(arena: Arena) -> None:
    place, view = published(arena, b"x" * SIZE)
    with pytest.raises(ValueError, match="still looks"):
        arena.free(place)
    del view
    freed(arena, place)
    with pytest.raises(ValueError, match="is not there"):
        arena.free(place)
    with pytest.raises(ValueError, match="is not there"):
        arena.free(Place(99, 0, 1))


def test_beyond_the_ceiling_there_is_none_and_it_is_counted(arenas: RealArenas) -> None:
    arena = arenas.arena(address(), bytes_max=2 * SIZE + 4 * KIB, segment_bytes=8 * SIZE)
    held = [published(arena, b"x" * SIZE) for _ in range(2)]
    assert arena.take(SIZE) is None
    assert arena.statistics()["fallback_full"] == 1
    assert arena.statistics()["bytes_committed"] <= 2 * SIZE + 4 * KIB
    assert arena.statistics()["bytes_in_use"] == 2 * SIZE
    place = held.pop()[0]
    freed(arena, place)
    assert arena.take(SIZE) is not None


def test_an_idle_segment_of_another_class_makes_room(arenas: RealArenas) -> None:
    arena = arenas.arena(address(), bytes_max=4 * SIZE + 8 * KIB, segment_bytes=4 * SIZE)
    small = [published(arena, b"x" * SIZE) for _ in range(4)]
    assert arena.take(2 * SIZE) is None
    places = [place for place, _ in small]
    small.clear()
    freed(arena, *places)
    assert arena.take(2 * SIZE) is not None
    assert arena.statistics()["segments"] == 1


def test_a_frozen_slot_is_read_only_and_exactly_as_large(arena: Arena) -> None:
    slot = arena.take(SIZE + 5)
    assert slot is not None and len(slot.view) == SIZE + 5
    alias = slot.view[:10]
    with pytest.raises(BufferError):
        slot.freeze()
    alias.release()
    view = slot.freeze()
    assert view.readonly and len(view) == SIZE + 5
    slot.release()  # has no effect any more
    assert arena.statistics()["bytes_in_use"] > SIZE
    with pytest.raises(ValueError, match="released"):
        slot.freeze()


def test_a_slot_that_was_not_published_is_given_back_once_nobody_writes_to_it(arena: Arena) -> None:
    slot = arena.take(SIZE)
    assert slot is not None
    array = np.frombuffer(slot.view, np.uint8)
    slot.release()
    slot.release()
    assert arena.statistics()["bytes_in_use"] == SIZE
    del array
    assert arena.forgotten() == []
    assert arena.statistics()["bytes_in_use"] == 0
    other = arena.take(SIZE)
    assert other is not None
    other.release()
    assert arena.statistics()["bytes_in_use"] == 0


def test_a_size_of_nothing_is_refused(arena: Arena) -> None:
    with pytest.raises(ValueError, match="0 bytes"):
        arena.take(0)


# Readers.


def test_a_reader_sees_what_was_published_and_tells_when_it_has_looked(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, kept = published(arena, b"abc" * SIZE)
    view = mappings.map("writer", place, 3 * SIZE)
    assert content(view) == content(kept)
    assert view is not None and view.readonly
    assert mappings.released() == []
    del view
    assert mappings.released() == [("writer", place)]
    assert mappings.released() == []


@pytest.mark.torch
def test_views_of_a_view_keep_it_alive(arenas: RealArenas) -> None:
    import torch

    arena, mappings = connected(arenas)
    place, _kept = published(arena, b"abcd" * SIZE)
    view = mappings.map("writer", place, 4 * SIZE)
    assert view is not None
    tensor = torch.from_numpy(np.frombuffer(view, np.float32)[5:].view(np.int32).reshape(-1)[:7].copy())
    array = np.frombuffer(view, np.float32)[5:].view(np.int32)[::2][:7]
    del view
    gc.collect()
    assert mappings.released() == []
    assert array.shape == (7,) and tensor.shape == (7,)
    del array
    assert mappings.released() == [("writer", place)]


def test_each_look_is_told_for_itself(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, _kept = published(arena, b"x" * SIZE)
    one, two = mappings.map("writer", place, SIZE), mappings.map("writer", place, SIZE)
    del one
    assert mappings.released() == [("writer", place)]
    assert mappings.statistics()["views"] == 1
    del two
    assert mappings.released() == [("writer", place)]


def test_another_generation_bounds_and_segment_are_refused_and_counted(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, _kept = published(arena, b"x" * SIZE)
    assert mappings.map("writer", place._replace(generation=place.generation + 1), SIZE) is None
    assert mappings.map("writer", place._replace(slot=1000), SIZE) is None
    assert mappings.map("writer", place, SIZE + 1) is None
    assert mappings.map("writer", place, 0) is None
    assert mappings.map("writer", place._replace(segment=7), SIZE) is None
    assert mappings.map("nobody", place, SIZE) is None
    counts = mappings.statistics()
    assert (counts["stale"], counts["out_of_bounds"], counts["unknown_segment"]) == (1, 3, 2)
    assert mappings.released() == []


def test_a_freed_slot_is_stale(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, kept = published(arena, b"x" * SIZE)
    assert mappings.map("writer", place, SIZE) is not None
    del kept
    freed(arena, place)
    assert mappings.map("writer", place, SIZE) is None
    assert mappings.statistics()["stale"] == 1


def test_our_own_arena_is_read_without_a_connection(arenas: RealArenas) -> None:
    arena = arenas.arena(address())
    mappings = arenas.mappings(own=arena)
    place, _kept = published(arena, b"own" * SIZE)
    view = mappings.map("own", place, 3 * SIZE)
    assert content(view) == b"own" * SIZE and view is not None and view.readonly


def test_a_closed_segment_counts_until_its_readers_let_go_of_it(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas, bytes_max=4 * SIZE + 8 * KIB, segment_bytes=4 * SIZE)
    small = [published(arena, b"x" * SIZE) for _ in range(4)]
    view = mappings.map("writer", small[0][0], SIZE)
    assert view is not None
    places = [place for place, _ in small]
    small.clear()
    freed(arena, *places)  # as if the lease were over: the arena asks nobody
    assert arena.take(2 * SIZE) is None, "its memory is mapped by a reader"
    assert arena.statistics()["bytes_retired"] > 0
    mappings.listen()
    arena.poll()
    assert arena.take(2 * SIZE) is None, "and looked at"
    del view
    mappings.released()
    mappings.listen()
    arena.poll()
    assert arena.take(2 * SIZE) is not None
    assert arena.statistics()["bytes_retired"] == 0


def test_who_is_refused_gets_no_new_segment_and_none_that_it_has_is_used_again(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, _kept = published(arena, b"x" * SIZE)
    held = mappings.map("writer", place, SIZE)
    arena.refuse("reader")
    assert not arena.reads("reader")
    later, _later = published(arena, b"y" * SIZE)
    assert later.segment != place.segment
    mappings.listen()
    assert mappings.map("writer", later, SIZE) is None
    assert content(held) == b"x" * SIZE
    arena.admit("reader")
    arena.poll()
    assert arena.reads("reader")
    assert content(mappings.map("writer", later, SIZE)) == b"y" * SIZE


def test_a_reader_that_comes_late_gets_every_segment(arenas: RealArenas) -> None:
    at = address()
    arena = arenas.arena(at)
    values = [published(arena, bytes([n]) * (n * SIZE)) for n in (1, 2, 5)]
    mappings = arenas.mappings()
    assert mappings.connect("writer", at)
    assert mappings.map("writer", values[0][0], SIZE) is None  # not yet
    arena.poll()
    for place, view in values:
        assert content(mappings.map("writer", place, len(view))) == content(view)
    assert arena.statistics()["readers"] == 1


def test_who_greets_again_begins_anew(arenas: RealArenas) -> None:
    at = address()
    arena, mappings = arenas.arena(at), arenas.mappings()
    place, _kept = published(arena, b"x" * SIZE)
    for _ in range(3):
        assert mappings.connect("writer", at)
        arena.poll()
        assert mappings.map("writer", place, SIZE) is not None
    assert arena.statistics()["readers"] == 1
    mappings.disconnect("writer")
    assert mappings.map("writer", place, SIZE) is None


def test_nobody_is_at_an_address(arenas: RealArenas) -> None:
    assert not arenas.mappings().connect("writer", address())


# The end.


def test_views_outlive_both_ends(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    place, kept = published(arena, b"still" * SIZE)
    view = mappings.map("writer", place, 5 * SIZE)
    arena.close()
    mappings.close()
    arena.close()
    mappings.close()
    gc.collect()
    assert content(view) == content(kept) == b"still" * SIZE


def test_what_is_closed_is_refused(arenas: RealArenas) -> None:
    arena, mappings = connected(arenas)
    slot = arena.take(SIZE)
    assert slot is not None
    arena.close()
    mappings.close()
    slot.release()  # has nowhere to go
    for call in (lambda: arena.take(1), arena.forgotten, arena.poll, lambda: arena.free(slot.place), slot.freeze):
        with pytest.raises(TransportClosedError):
            call()
    with pytest.raises(TransportClosedError):
        mappings.connect("writer", address())
    assert arena.statistics()["fresh"] == 1
