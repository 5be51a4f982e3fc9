"""The spill log: what it keeps and for how long, who may open it, and how it ends."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from fabric.errors import (
    ClosedError,
    InternalError,
    SpillBrokenError,
    SpillFullError,
    SpillLockedError,
    StateDirectoryError,
)
from fabric.storage.recovering import segment_name, segment_number
from fabric.storage.spill import Entry, Kind, Span
from fabric.testing.disks import FakeDisk
from tests.harness.spills import (
    BIG,
    FEED,
    WHERE,
    Clock,
    begun,
    burst,
    firsts,
    named,
    opened,
    plain,
    reopened,
    small,
)

# What is appended can be read.


def test_what_was_appended_can_be_read_found_and_listed() -> None:
    log = begun(FakeDisk())
    log.append([burst(1, 3, o2=b"payload"), burst(6, 2)])
    assert plain(log.read(FEED, 1)) == burst(1, 3, o2=b"payload")
    assert log.find(FEED, 2) == log.find(FEED, 3) == Span(FEED, 1, 4)
    assert (log.find(FEED, 4), log.find(FEED, 8), log.find(99, 0)) == (None, None, None)
    assert (log.spans(FEED), log.spans(99)) == ([(0, 4), (6, 8)], [])
    assert (log.entries, log.segments, log.names[FEED].frame) == (3, 1, b"topic 7")
    with pytest.raises(InternalError, match="ask `find`"):
        log.read(FEED, 2)
    with pytest.raises(InternalError):
        log.read(99, 0)
    log.close()


def test_nothing_is_made_until_something_is_appended() -> None:
    disk = FakeDisk()
    log = opened(disk)
    log.append([])
    assert (log.bytes, log.segments, list(disk.files)) == (0, 0, [f"{WHERE}/lock"])
    log.close()
    assert list(disk.files) == [f"{WHERE}/lock"]


def test_a_burst_that_comes_again_replaces_the_older_one() -> None:
    log = begun(FakeDisk(), small(segment_bytes=512))
    log.append([burst(5, frame=b"old"), burst(9)])
    log.append([burst(3), burst(5, 2, frame=b"new" * 90)])
    assert firsts(log) == [0, 9, 3, 5]
    assert bytes(log.read(FEED, 5).frame) == b"new" * 90
    assert log.entries == 4
    log.close()


def test_a_feed_is_named_first_and_again_in_each_segment_that_holds_bursts_of_it() -> None:
    disk = FakeDisk()
    log = opened(disk, small(segment_bytes=640))
    with pytest.raises(InternalError, match="never named"):
        log.append([burst(0)])
    log.append([named(), named(8), burst(0), burst(0, feed=8)])
    log.append([burst(1, frame=BIG)])
    assert log.segments == 2
    log.release(FEED, 1)
    log.release(8, 1)
    assert (log.segments, log.entries) == (1, 1)
    log.close()
    log = opened(disk)
    assert (dict(log.names), firsts(log)) == ({FEED: named()._replace(first=1)}, [1]), "and says where the feed ended"
    log.close()


def test_a_log_that_outlives_its_process_knows_where_feeds_ended_whose_bursts_are_gone() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=640), keep_unsynced=True)
    log.append([named(8), burst(0, 4, feed=8), burst(4, 3, feed=8)])
    log.append([burst(0, frame=BIG)])
    log.release(8, 7)
    log.release(FEED, 1)
    log.append([burst(1, frame=BIG)])
    log.append([burst(2, frame=BIG)], hold=False)
    log.release(FEED, 2)
    assert log.segments == 1, "no burst of feed 8 is on the disk"
    log.close(clean=False)
    log = opened(disk, small(segment_bytes=640), keep_unsynced=True)
    assert (log.end_of(8), log.end_of(FEED), log.end_of(9)) == (7, 3, 0)
    assert [(place.first, place.end, place.size) for place in log.places(FEED)] == [(2, 3, len(BIG))]
    log.forget(8)
    log.append([burst(3, frame=BIG)])
    log.forget(FEED)
    log.close()
    assert set(opened(disk, keep_unsynced=True).names) == {FEED}, "the last name of it is in the segment that stays"


def test_a_group_larger_than_a_segment_gets_its_own() -> None:
    disk = FakeDisk()
    log = begun(disk)
    log.append([burst(1, frame=bytes(5000)), burst(2)])
    assert (log.segments, firsts(log)) == (2, [0, 1, 2])
    log.append([burst(3)])
    assert log.bytes == sum(map(len, disk.contents.values()))
    log.close()
    assert reopened(disk) == [0, 1, 2, 3]


def test_a_segment_ends_when_it_is_old() -> None:
    clock = Clock()
    log = begun(FakeDisk(), clock=clock)
    clock.advance(59)
    log.append([burst(1)])
    assert log.segments == 1
    clock.advance(1)
    log.append([burst(2)])
    assert log.segments == 2
    log.close()


def test_an_old_segment_goes_on_where_there_is_no_room_for_another() -> None:
    clock = Clock()
    log = begun(FakeDisk(), small(bytes_max=2048), clock=clock)
    for first in range(1, 4):
        clock.advance(61)
        log.append([burst(first)])
    assert (log.segments, firsts(log)) == (2, [0, 1, 2, 3])
    log.close()


def test_many_segments_are_read_with_few_descriptors() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=256))
    for first in range(1, 100):
        log.append([burst(first, frame=bytes(64))])
        log.sync()
    assert (log.segments, firsts(log)) == (100, list(range(100)))
    assert disk.opened < 40
    log.close()
    assert disk.opened == 0


def test_segments_that_wait_for_a_sync_are_few() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=256))
    for first in range(1, 200):
        log.append([burst(first, frame=bytes(64))])
    assert disk.opened < 110
    log.close()


# Leaving.


def test_segments_leave_oldest_first_when_nobody_needs_them() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=512))
    log.append([named(8), burst(0, feed=8)])
    for first in range(1, 4):
        log.append([burst(first, frame=BIG)])
    log.release(FEED, 4)
    assert (log.segments, log.entries) == (4, 1), "the oldest is needed by another feed"
    log.release(8, 0)
    log.release(123, 5)
    assert log.segments == 4
    log.release(8, 1)
    assert (log.segments, log.entries, log.spans(FEED)) == (1, 0, [])
    assert segment_name(3) in "".join(disk.files)
    log.append([burst(3, frame=b"released"), burst(9)])
    assert firsts(log) == [9]
    log.close()


def test_released_bursts_leave_the_index_for_good() -> None:
    log = begun(FakeDisk(), small(segment_bytes=1 << 20, bytes_max=1 << 23))
    log.append([burst(first) for first in range(1, 3000)])
    log.release(FEED, 2000)
    assert (log.spans(FEED), log.entries) == ([(2000, 3000)], 1000)
    assert len(log._contents.feeds[FEED]._firsts) == 1000
    log.append([burst(3000)])
    assert log.find(FEED, 2500) == Span(FEED, 2500, 2501)
    log.close()


def test_a_segment_that_cannot_be_deleted_is_reported_and_tried_again() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=512))
    for first in range(1, 4):
        log.append([burst(first, frame=BIG)])
    disk.fail("unlink")
    with pytest.raises(SpillBrokenError, match="deleted"):
        log.release(FEED, 3)
    assert log.segments == 4
    log.release(FEED, 3)
    assert (log.segments, firsts(log)) == (1, [3])
    log.close()


def test_what_is_too_old_is_given_up_and_named() -> None:
    clock, disk = Clock(), FakeDisk()
    log = begun(disk, small(segment_bytes=512, age_s=100), clock=clock)
    log.append([burst(1), named(8), burst(4, 2, feed=8)])
    clock.advance(50)
    log.append([burst(2, frame=BIG)])
    log.release(FEED, 1)
    assert log.expire(clock.now_ns) == []
    clock.advance(110)
    assert sorted(log.expire(clock.now_ns)) == [Span(FEED, 1, 2), Span(8, 4, 6)]
    assert (firsts(log), log.entries) == ([2], 1)
    clock.advance(1000)
    assert log.expire(clock.now_ns) == [Span(FEED, 2, 3)]
    assert (log.segments, log.entries, log.spans(8)) == (0, 0, [])
    log.append([burst(3)])
    log.close()
    assert reopened(disk) == [3]


def test_what_is_given_up_is_told_even_if_the_next_deletion_fails() -> None:
    clock, disk = Clock(), FakeDisk()
    log = begun(disk, small(segment_bytes=512, age_s=100), clock=clock)
    for first in (1, 2):
        log.append([burst(first, frame=BIG)])
    clock.advance(200)
    disk.fail("unlink", 2)
    assert log.expire(clock.now_ns) == [Span(FEED, 0, 1)]
    disk.fail("unlink")
    with pytest.raises(SpillBrokenError):
        log.expire(clock.now_ns)
    assert firsts(log) == [1, 2]
    disk.fail("sync_directory")
    assert log.expire(clock.now_ns) == [Span(FEED, 1, 2), Span(FEED, 2, 3)]
    log.close()


# Opening and ending.


def test_a_locked_directory_is_refused_until_it_is_closed() -> None:
    disk = FakeDisk()
    log = begun(disk)
    with pytest.raises(SpillLockedError) as caught:
        opened(disk)
    assert caught.value.directory == str(WHERE)
    log.close()
    assert reopened(disk) == [0]


@pytest.mark.parametrize(
    ("operation", "nth", "error"),
    [
        ("enter", 1, StateDirectoryError),
        ("open", 1, StateDirectoryError),
        ("lock", 1, StateDirectoryError),
        ("names", 1, StateDirectoryError),
        ("names", 2, SpillBrokenError),
        ("open", 2, SpillBrokenError),
        ("open", 3, SpillBrokenError),
        ("size", 1, SpillBrokenError),
        ("size", 2, SpillBrokenError),
    ],
)
def test_a_log_that_cannot_be_opened_leaves_nothing_open(operation: str, nth: int, error: type[Exception]) -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=512))
    log.append([burst(1, frame=BIG)])
    log.close()
    disk.fail(operation, nth)
    with pytest.raises(error):
        opened(disk)
    assert disk.opened == 0
    assert reopened(disk) == [0, 1]


def test_a_spare_of_an_earlier_life_is_removed() -> None:
    disk = FakeDisk()
    begun(disk).abandon()
    assert f"{WHERE}/spare" in disk.files
    log = opened(disk)
    assert f"{WHERE}/spare" not in disk.files
    log.close()


def test_files_that_are_not_ours_are_left_alone() -> None:
    disk = FakeDisk()
    for name in ("seg-1.log", "seg-zz.log", "seg-ffffffffffffffff.log", "notes.txt", "SEG-0000000000000001.log"):
        disk.put(f"{WHERE}/{name}", b"not ours")
        assert segment_number(name) is None
    log = begun(disk)
    assert log.segments == 1
    log.destroy()
    assert len(disk.files) == 5
    assert disk.calls["remove"] == 0


def test_closing_and_destroying_twice_is_once_and_a_closed_log_says_so() -> None:
    disk = FakeDisk()
    log = begun(disk)
    log.close()
    log.close()
    log.destroy()
    assert reopened(disk) == [0]
    uses: list[Callable[[], object]] = [
        lambda: log.append([burst(1)]),
        lambda: log.read(FEED, 0),
        log.sync,
        lambda: log.release(FEED, 1),
        lambda: log.expire(0),
    ]
    for use in uses:
        with pytest.raises(ClosedError, match="spill log"):
            use()


def test_destroying_removes_everything() -> None:
    disk = FakeDisk()
    log = begun(disk, small(segment_bytes=512))
    log.append([burst(1, frame=BIG)])
    log.destroy()
    assert (disk.files, disk.opened, disk.calls["remove"]) == ({}, 0, 1)
    log.destroy()


@pytest.mark.parametrize(("operation", "nth"), [("unlink", 1), ("remove", 1), ("names", 1)])
def test_what_cannot_be_destroyed_is_reported_and_closed(operation: str, nth: int) -> None:
    disk = FakeDisk()
    log = begun(disk)
    disk.fail(operation, nth)
    with pytest.raises(SpillBrokenError):
        log.destroy()
    assert disk.opened == 0


def test_an_end_that_cannot_be_written_or_synced_is_reported_and_closed() -> None:
    for operation, nth, error in (("write", (1, 2), SpillFullError), ("sync", (1,), SpillBrokenError)):
        disk = FakeDisk()
        log = begun(disk)
        for each in nth:
            disk.fail(operation, each, errno.ENOSPC)
        with pytest.raises(error):
            log.close()
        assert disk.opened == 0
        log = opened(disk)
        assert firsts(log) == [0]
        assert log.ended == (frozenset() if operation == "write" else {1})
        log.close()


def test_a_segment_keeps_the_room_that_cannot_be_given_back_and_counts_it() -> None:
    disk = FakeDisk()
    log = begun(disk)
    disk.fail("truncate")
    log.append([burst(1, frame=bytes(700))])
    assert log.bytes == 3 * 1024
    log.close(clean=False)
    assert reopened(disk) == [0, 1]


def test_a_close_that_fails_loses_nothing() -> None:
    disk = FakeDisk()
    log = begun(disk)
    for nth in range(1, 4):
        disk.fail("close", nth)
    with pytest.raises(OSError, match="Input/output"):
        FakeDisk.asked(disk, "close")
    log.close(clean=False)
    assert reopened(disk) == [0]


def test_payloads_of_any_shape_are_their_bytes() -> None:
    from array import array

    log = begun(FakeDisk(), keep_unsynced=True)
    numbers = array("I", range(10))
    log.append([Entry(Kind.BURST, FEED, 1, 1, 1, bytearray(b"frame"), {1: memoryview(numbers)})])
    assert bytes(log.read(FEED, 1).payloads[1]) == numbers.tobytes()
    log.close()
