"""The spill log on a disk that fails when it is told to: all or nothing, one truth, and no error of another kind."""

from __future__ import annotations

import errno

import pytest

from fabric.errors import (
    DamagedRecordError,
    SpillBrokenError,
    SpillFullError,
)
from fabric.storage.spill import Reason, Span
from fabric.testing.disks import FakeDisk
from tests.harness.spills import (
    BIG,
    FEED,
    WHERE,
    Clock,
    begun,
    burst,
    firsts,
    held,
    named,
    opened,
    path,
    reopened,
    small,
)

# Faults.


@pytest.mark.parametrize("operation", ["write", "open", "allocate", "rename", "sync_directory", "free_bytes", "sync"])
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_f32_one_failure_is_mended_and_two_are_reported(operation: str, nth: int, code: int) -> None:
    expected = SpillFullError if code == errno.ENOSPC else SpillBrokenError
    for twice in (False, True):
        disk = FakeDisk()
        log = begun(disk, small(segment_bytes=512))
        for extra in range(8 if twice else 1):
            disk.fail(operation, nth + extra, code)
        try:
            log.append([burst(1, frame=BIG), burst(2)])
        except expected as error:
            assert twice and isinstance(error.__cause__, OSError)
            assert firsts(log) == [0]
        else:
            assert firsts(log) == [0, 1, 2]
        disk._failures.clear()
        log.append([burst(3)])
        known = firsts(log)
        assert known in ([0, 1, 2, 3], [0, 3])
        log.close()
        assert reopened(disk) == known
        assert disk.opened == 0


def test_f32_short_writes_are_continued() -> None:
    disk = FakeDisk(write_most=7)
    log = begun(disk)
    log.append([burst(1, o1=bytes(100)), burst(2, frame=b"")])
    disk.write_most = 0
    with pytest.raises(SpillBrokenError, match="takes no more"):
        log.append([burst(3)])
    disk.write_most = None
    log.append([burst(3)])
    assert firsts(log) == [0, 1, 2, 3]
    log.close()
    assert reopened(disk) == [0, 1, 2, 3]


def test_f32_a_segment_that_failed_is_never_written_or_synced_again() -> None:
    disk = FakeDisk()
    log = begun(disk)
    bad = disk.files[path(0)]
    disk.fail("write")
    log.append([burst(1)])
    known = len(disk.steps)
    log.append([burst(2)])
    log.close()
    assert not [step for step in disk.steps[known:] if step.inode == bad and step.verb != "sync_directory"]
    assert reopened(disk) == [0, 1, 2]


def test_f32_a_failed_sync_is_mended_elsewhere_from_what_was_kept() -> None:
    disk = FakeDisk()
    log = begun(disk, keep_unsynced=True)
    changing = bytearray(b"payload")
    log.append([burst(1)._replace(payloads={1: memoryview(changing)})])
    changing[:] = b"changed"
    disk.fail("sync")
    log.sync()
    assert (log.segments, firsts(log)) == (2, [0, 1])
    assert held(log)[1] == burst(1, o1=b"payload")
    after = disk.crashed(len(disk.steps))
    log.close()
    found = opened(after)
    assert firsts(found) == [0, 1]
    found.close()


def test_f32_only_what_was_not_synced_is_kept_and_written_again() -> None:
    disk = FakeDisk()
    log = begun(disk, keep_unsynced=True)
    log.sync()
    log.append([burst(1)])
    disk.fail("sync")
    log.sync()
    places = [log._contents.exactly(FEED, first) for first in (0, 1)]
    assert [place.segment for place in places if place is not None] == [0, 1]
    log.close()


def test_f32_what_a_dead_process_left_unsynced_is_durable_once_it_is_found() -> None:
    disk = FakeDisk()
    log = begun(disk, keep_unsynced=True)
    log.append([burst(1, frame=bytes(900))])
    log.abandon()
    log = opened(disk, keep_unsynced=True)
    after = disk.crashed(len(disk.steps))
    log.close()
    assert reopened(after) == [0, 1]


def test_f32_a_sealed_segment_that_cannot_be_synced_is_mended_and_expires_without_a_loss() -> None:
    disk, clock = FakeDisk(), Clock()
    log = begun(disk, small(age_s=100), keep_unsynced=True, clock=clock)
    log.append([burst(1, frame=bytes(900))])
    disk.fail("sync")
    clock.advance(59)
    log.sync()
    assert (log.segments, firsts(log)) == (3, [0, 1])
    clock.advance(102)
    assert log.expire(clock.now_ns) == []
    assert (log.segments, firsts(log), log.damage) == (1, [0, 1], ())
    log.close()


def test_f32_two_failed_syncs_are_reported_until_one_holds_everything() -> None:
    disk = FakeDisk()
    log = begun(disk, keep_unsynced=True)
    disk.fail("sync", 1)
    disk.fail("sync", 3)  # the second one is that of the new segment's head
    with pytest.raises(SpillBrokenError) as caught:
        log.sync()
    assert isinstance(caught.value.__cause__, OSError)
    log.append([burst(1)])
    log.sync()
    after = disk.crashed(len(disk.steps))
    log.close()
    assert reopened(disk) == [0, 1]
    found = opened(after)
    assert firsts(found) == [0, 1]
    found.close()


def test_f32_without_what_was_kept_a_failed_sync_is_reported_once() -> None:
    disk = FakeDisk()
    log = begun(disk)
    disk.fail("sync")
    with pytest.raises(SpillBrokenError):
        log.sync()
    log.append([burst(1)])
    log.sync()
    disk.fail("write")
    log.append([burst(2)])
    with pytest.raises(SpillBrokenError, match="went bad before"):
        log.append([burst(3)])
        disk.fail("write")
        log.append([burst(4)])
        log.sync()
    log.close()
    assert reopened(disk) == [0, 1, 2, 3, 4]


def test_f32_a_write_that_failed_takes_what_was_not_synced_elsewhere_at_the_next_sync() -> None:
    disk = FakeDisk()
    log = begun(disk, keep_unsynced=True)
    disk.fail("write")
    log.append([burst(1)])
    log.sync()
    after = disk.crashed(len(disk.steps))
    log.close()
    found = opened(after)
    assert sorted(firsts(found)) == [0, 1]
    found.close()


def test_f31_a_disk_that_is_full_at_rotation_takes_nothing_and_recovers() -> None:
    disk = FakeDisk(capacity=2048 + 100)
    log = begun(disk)
    log.append([burst(1, frame=bytes(600))])
    log.append([burst(2, frame=bytes(600))])
    for _ in range(2):
        with pytest.raises(SpillFullError, match="free_bytes_min"):
            log.append([burst(3, frame=bytes(600))])
    log.append([burst(3)])
    disk.capacity = 10_000
    log.append([burst(4, frame=bytes(600))])
    assert firsts(log) == [0, 1, 2, 3, 4]
    log.close()
    assert reopened(disk) == [0, 1, 2, 3, 4]


def test_f31_no_room_for_the_spare_is_no_failure_yet() -> None:
    disk = FakeDisk()
    log = opened(disk)
    disk.fail("allocate", 2, errno.ENOSPC)
    log.append([named(), burst(0)])
    assert f"{WHERE}/spare" not in disk.files
    log.append([burst(1, frame=bytes(900))])
    assert f"{WHERE}/spare" in disk.files
    log.close()
    assert f"{WHERE}/spare" not in disk.files


def test_the_ceiling_holds_for_all_files() -> None:
    disk = FakeDisk()
    log = begun(disk, small(bytes_max=4096))
    with pytest.raises(SpillFullError, match="bytes_max") as caught:
        for first in range(1, 100):
            log.append([burst(first, frame=BIG)])
            assert log.bytes <= 4096
    assert (caught.value.used, caught.value.directory) == (log.bytes, str(WHERE))
    known = firsts(log)
    log.release(FEED, known[3])
    log.append([burst(100, frame=BIG)])
    assert firsts(log) == [*(first for first in known if first >= known[3]), 100]
    log.close()


def test_what_is_on_a_full_disk_can_be_read() -> None:
    disk = FakeDisk()
    begun(disk).close()
    disk.capacity = disk.used
    log = opened(disk)
    assert firsts(log) == [0]
    with pytest.raises(SpillFullError):
        log.append([burst(1)])
    log.close()


# Damage that is met when reading.


def test_f34_a_burst_that_was_damaged_after_recovery_is_named_when_it_is_read() -> None:
    disk = FakeDisk()
    log = begun(disk)
    log.append([burst(1, 2, frame=bytes(40)), burst(3)])
    content = disk.content(path(0))
    content[content.index(burst(0).frame) + 60 + 72] ^= 1
    assert firsts(log) == [0, 3]
    for _ in range(2):
        with pytest.raises(DamagedRecordError) as caught:
            log.read(FEED, 1)
    error = caught.value
    assert (error.segment, error.feed, error.first, error.end) == (0, FEED, 1, 3)
    (damage,) = log.damage
    assert (damage.reason, damage.lost, damage.size) == (Reason.BODY, Span(FEED, 1, 3), error.size)
    disk.fail("read")
    with pytest.raises(DamagedRecordError, match="unreadable"):
        log.read(FEED, 0)
    log.close()


def test_f34_another_entry_in_its_place_is_not_given_for_it() -> None:
    log = begun(FakeDisk())
    log.append([burst(1)])
    log._contents.feeds[FEED]._positions[1] = log._contents.feeds[FEED]._positions[0]
    with pytest.raises(DamagedRecordError, match="header"):
        log.read(FEED, 1)
    log.close()


def test_a_name_that_cannot_be_read_when_it_is_needed_is_damage() -> None:
    disk = FakeDisk()
    begun(disk).close()
    disk.fail("read", 3)  # the head, the chunk, and then the name
    log = opened(disk)
    assert (dict(log.names), [damage.reason for damage in log.damage]) == ({}, [Reason.BODY])
    assert firsts(log) == [0]
    log.close()


def test_a_head_that_cannot_be_read_is_damage() -> None:
    disk = FakeDisk()
    begun(disk).close()
    disk.fail("read")
    log = opened(disk)
    assert [(damage.reason, damage.torn) for damage in log.damage] == [(Reason.HEAD, False)]
    assert log.expire(Clock().now_ns) == []
    log.close()
