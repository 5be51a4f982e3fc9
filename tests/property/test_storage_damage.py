"""Any damage to a segment: what it does not touch is read, what it touches is reported, and nothing is invented."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fabric.storage.records import HEAD_BYTES
from fabric.storage.recovering import segment_name
from fabric.storage.spill import Damage, Entry, Span, SpillLog
from fabric.testing.disks import FakeDisk
from tests.harness.spills import FEED, WHERE, burst, held, identities, named, opened, small

FIRST = f"{WHERE}/{segment_name(0)}"
BURSTS = [burst(0, 2), burst(2, 1, frame=b""), burst(3, 2, o4=b"payload"), burst(5, 3, frame=b"x" * 40)]


def written(*, more: bool, clean: bool = True, killed: bool = False) -> tuple[FakeDisk, list[tuple[int, int, Entry]]]:
    """A disk with one small segment, or a second one behind it; and where each burst of the first lies."""
    disk, limits = FakeDisk(), small(segment_bytes=768)
    log = opened(disk, limits, identity=identities())
    log.append([named()])
    places = []
    for entry in BURSTS:
        log.append([entry])
        place = log._contents.exactly(FEED, entry.first)
        assert place is not None and place.segment == 0
        assert log._active is not None
        places.append((place.position, log._active.used, entry))
    if more:
        log.append([burst(8, frame=b"y" * 300)])
        assert log.segments == 2
    if killed:
        log.abandon()  # the room that was allocated stays, full of zeros
    else:
        log.close(clean=clean)
    return disk, places


def recovered(disk: FakeDisk) -> tuple[list[Entry], tuple[Damage, ...], SpillLog]:
    log = opened(disk)
    entries, damage = held(log), tuple(log.damage)
    log.close()
    assert disk.opened == 0
    return entries, damage, log


def check(disk: FakeDisk, places: list[tuple[int, int, Entry]], begin: int, end: int, *, sealed: bool) -> None:
    """Bytes begin <= at < end are damaged: exactly the bursts that they touch are lost, and they are reported."""
    entries, damage, _ = recovered(disk)
    whole = [entry for first, last, entry in places if last <= begin or first >= end]
    lost = [entry for first, last, entry in places if not (last <= begin or first >= end)]
    if sealed:
        whole.append(burst(8, frame=b"y" * 300))
    assert entries == whole
    assert any(one.position <= begin < one.position + one.size for one in damage), "the bad byte is in a named range"
    for entry in lost:
        first, last = next((first, last) for first, last, other in places if other == entry)
        over = [one for one in damage if one.position < last and first < one.position + one.size]
        assert over and all(one.lost in (None, Span(FEED, entry.first, entry.end)) for one in over if len(lost) == 1)
    for first, last, entry in places:
        assert entry in lost or not [one for one in damage if one.position < last and first < one.position + one.size]
    again, same, _ = recovered(disk)
    assert (again, same) == (entries, damage), "a second recovery finds the same"


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "last"])
@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_f34_any_flipped_byte_costs_the_entry_that_holds_it_and_no_other(sealed: bool, mask: int) -> None:
    disk, places = written(more=sealed)
    for at in range(len(disk.content(FIRST))):
        hurt = disk.copy()
        hurt.content(FIRST)[at] ^= mask
        check(hurt, places, at, at + 1, sealed=sealed)


def test_f34_a_flip_in_a_body_is_a_gap_that_is_known_exactly() -> None:
    disk, places = written(more=True)
    begin, end, entry = places[2]
    disk.content(FIRST)[end - 10] ^= 1
    _, (damage,), _ = recovered(disk)
    assert damage == Damage(
        segment=0,
        position=begin,
        size=end - begin,
        reason=damage.reason,
        lost=Span(FEED, entry.first, entry.end),
        after=Span(FEED, 2, 3),
        before=Span(FEED, 5, 8),
    )


def test_the_head_stands_twice_and_the_loss_of_both_is_the_loss_of_the_segment() -> None:
    disk, _ = written(more=True)
    disk.content(FIRST)[:HEAD_BYTES] = bytes(HEAD_BYTES)
    entries, (damage,), _ = recovered(disk)
    assert entries == [burst(8, frame=b"y" * 300)]
    assert (damage.position, damage.size, damage.lost) == (0, len(disk.content(FIRST)), None)


def tails() -> list[tuple[str, Callable[[bytearray, int], None]]]:
    def cut(data: bytearray, at: int) -> None:
        del data[at:]

    def zeroed(data: bytearray, at: int) -> None:
        data[at:] = bytes(len(data) - at)

    def garbage(data: bytearray, at: int) -> None:
        data[at:] = bytes((17 * position + 93) & 0xFF or 1 for position in range(len(data) - at))

    return [("cut", cut), ("zeroed", zeroed), ("garbage", garbage)]


@pytest.mark.parametrize(("name", "spoil"), tails(), ids=[name for name, _ in tails()])
def test_f33_a_tail_of_a_sealed_segment_is_missed_from_every_byte_on(
    name: str, spoil: Callable[[bytearray, int], None]
) -> None:
    disk, places = written(more=True)
    for at in range(HEAD_BYTES, len(disk.content(FIRST))):
        hurt = disk.copy()
        spoil(hurt.content(FIRST), at)
        if hurt.content(FIRST) != disk.content(FIRST):
            # A tail may hold zeros of its own: the damage begins with the first byte that is another one.
            check(hurt, places, _first_difference(hurt, disk), len(disk.content(FIRST)), sealed=True)


def _first_difference(one: FakeDisk, other: FakeDisk) -> int:
    left, right = one.content(FIRST), other.content(FIRST)
    return next((at for at, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), len(left))


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "closed"])
@pytest.mark.parametrize(("name", "spoil"), tails(), ids=[name for name, _ in tails()])
def test_f33_a_torn_tail_of_the_last_segment_costs_what_it_tore_from_every_byte_on(
    name: str, spoil: Callable[[bytearray, int], None], killed: bool
) -> None:
    disk, places = written(more=False, killed=killed)
    for at in range(HEAD_BYTES, len(disk.content(FIRST))):
        hurt = disk.copy()
        spoil(hurt.content(FIRST), at)
        if hurt.content(FIRST) == disk.content(FIRST):
            continue
        begin = _first_difference(hurt, disk)
        entries, damage, log = recovered(hurt)
        assert entries == [entry for _, end, entry in places if end <= begin]
        assert log.ended == frozenset(), "the end that it wrote is torn: it did not end clean"
        assert all(one.torn for one in damage)
        torn = any(hurt.content(FIRST)[_entry_at(places, begin) :])
        assert bool(damage) == torn, "whatever is left of it is reported; an end between two entries cannot be seen"
        assert recovered(hurt)[:2] == (entries, damage)


def _entry_at(places: list[tuple[int, int, Entry]], at: int) -> int:
    """Where the entry begins that holds this byte; the last one is followed by the end, or by room."""
    edges = [HEAD_BYTES, places[0][0], *(end for _, end, _ in places)]
    return max(edge for edge in edges if edge <= at)


def test_f35_stale_bytes_of_a_recycled_file_never_validate() -> None:
    old, _ = written(more=False)
    disk = FakeDisk()
    log = opened(disk, small(segment_bytes=768))
    log.append([named(), burst(100)])
    used = log._active.used if log._active else 0
    log.close(clean=False)
    stale = old.content(FIRST)
    content = disk.content(FIRST)
    content.extend(bytes(len(stale) - len(content)))
    content[used:] = stale[used:]
    entries, damage, _ = recovered(disk)
    assert entries == [burst(100)]
    assert [one.torn for one in damage] == [True]


def test_f35_bytes_of_the_same_segment_in_another_place_never_validate() -> None:
    disk, places = written(more=True)
    content = disk.content(FIRST)
    begin, end, _ = places[0]
    target = places[3][0]
    content[target : target + end - begin] = content[begin:end]
    entries, damage, _ = recovered(disk)
    assert entries == [*BURSTS[:3], burst(8, frame=b"y" * 300)]
    assert len(damage) == 1


def test_a_segment_that_is_gone_is_missed() -> None:
    disk, limits = FakeDisk(), small(segment_bytes=256)
    log = opened(disk, limits)
    log.append([named()])
    for first in range(3):
        log.append([burst(first, frame=bytes(64))])
    assert log.segments == 4
    log.close()
    del disk.files[f"{WHERE}/{segment_name(2)}"]
    entries, (damage,), _ = recovered(disk)
    assert [entry.first for entry in entries] == [0, 2]
    assert (damage.segment, damage.reason) == (2, "missing")


def test_an_end_says_that_the_incarnation_had_no_more_to_say() -> None:
    disk, _ = written(more=False, clean=False)
    assert recovered(disk)[2].ended == frozenset()
    log = opened(disk, incarnation=4)
    log.append([named(9, incarnation=4), burst(0, feed=9)])
    log.close()
    assert recovered(disk)[2].ended == {4}


def test_unknown_kinds_are_kept_and_skipped() -> None:
    disk = FakeDisk()
    log = opened(disk)
    strange = Entry(99, FEED, 1, 0, 5, b"from the future")
    log.append([named(), burst(0), strange, burst(1)])
    log.close()
    entries, damage, _ = recovered(disk)
    assert (entries, damage) == ([burst(0), burst(1)], ())
    assert b"from the future" in disk.content(FIRST)
