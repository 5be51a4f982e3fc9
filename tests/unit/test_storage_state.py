"""What a member keeps between its lives, on a fake disk."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from fabric.errors import SpillBrokenError, SpillError, StateDirectoryError
from fabric.storage import state as state_module
from fabric.storage.spill import Entry, Kind
from fabric.storage.state import FeedName, KeptFeed, MemberState, read_owner
from fabric.testing.disks import FakeDisk
from tests.harness.spills import burst, identities, small

WHERE = Path("/state/member-1")
FEED = 7


class Clock:
    now_ns = 10**18


def begun(disk: FakeDisk, *, boot: str = "boot-1", now_ns: int = 10**18) -> MemberState:
    return MemberState.open(
        WHERE, small(), name="rank-0", boot=boot, disk=disk, wall_ns=lambda: now_ns, identity=identities()
    )


def name_of(state: MemberState, feed: int = FEED, *, policy: str = "durable", sync: str = "process") -> Entry:
    return Entry(Kind.FEED, feed, state.incarnation, 0, 0, FeedName("a.b", policy, sync).encode())


def fill(state: MemberState, **options: Any) -> None:
    state.log.append([name_of(state, **options)], hold=False)
    for first in (0, 2, 4):
        state.log.append([burst(first, 2)._replace(incarnation=state.incarnation)], hold=False)


def kept(state: MemberState) -> KeptFeed:
    (feed,) = state.feeds()
    return feed


def test_f28_a_life_begins_above_the_last_whatever_the_clock_says() -> None:
    disk = FakeDisk()
    first = begun(disk)
    first.abandon()
    second = begun(disk, now_ns=5)
    assert (first.incarnation, second.incarnation) == (10**18, 10**18 + 1)
    second.abandon()


def test_f28_a_lost_life_file_is_made_good_by_the_log() -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state)
    state.abandon()
    disk.content(f"{WHERE}/life")[:] = b"not json"
    again = begun(disk, now_ns=5)
    assert again.incarnation == 10**18 + 1
    assert not kept(again).exact, "whether the power was lost is not known"
    again.abandon()


def test_a_killed_life_is_known_to_its_end() -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state)
    state.log.release(FEED, 2)
    state.save_registrations(b"who")
    state.abandon()
    again = begun(disk)
    feed = kept(again)
    assert feed == KeptFeed(FEED, state.incarnation, FeedName("a.b", "durable", "process"), 6, True, feed.bursts)
    assert [pair[:2] for pair in feed.bursts][-2:] == [(2, 4), (4, 6)]
    assert again.registrations == b"who"
    assert read_owner(WHERE, disk=disk) == "rank-0"
    assert read_owner(Path("/nowhere"), disk=disk) is None
    again.abandon()


@pytest.mark.parametrize(
    ("policy", "sync", "clean", "exact"),
    [
        ("durable", "process", False, False),
        ("durable", "power", False, True),
        ("durable", "process", True, True),
        ("reliable", "", True, False),
    ],
)
def test_f05_after_another_boot_only_what_was_synced_ends_for_certain(
    policy: str, sync: str, clean: bool, exact: bool
) -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state, policy=policy, sync=sync)
    state.close() if clean else state.abandon()
    for boot in ("boot-2", "boot-2"):  # the judgement stays
        again = begun(disk, boot=boot)
        assert kept(again).exact is exact
        again.abandon()


@pytest.mark.parametrize(("hurt", "exact", "end"), [("body", True, 6), ("header", False, 4), ("cut", True, 4)])
def test_what_the_last_entry_was_is_told_from_what_never_was(hurt: str, exact: bool, end: int) -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state)
    state.abandon()
    (path,) = [path for path in disk.files if "seg-" in path]
    content = disk.content(path)
    at = content.rfind(b"TFE\1")
    if hurt == "body":
        content[at + 80] ^= 1
    elif hurt == "header":
        content[at + 20] ^= 1
    else:
        content[at + 30 :] = bytes(len(content) - at - 30)
    again = begun(disk)
    assert (kept(again).exact, kept(again).end) == (exact, end)
    again.abandon()


def test_a_clean_end_of_a_job_that_owes_nothing_leaves_nothing() -> None:
    disk = FakeDisk()
    state = begun(disk)
    state.kept = False
    fill(state)
    state.log.release(FEED, 6)
    state.save_registrations(b"who", outlives=False)
    state.close()
    assert [path for path in disk.files if str(WHERE) in path] == []


@pytest.mark.parametrize("owes", ["records", "a name"])
def test_a_clean_end_keeps_what_is_owed(owes: str) -> None:
    disk = FakeDisk()
    state = begun(disk)
    state.kept = False
    fill(state)
    if owes == "a name":
        state.log.release(FEED, 6)
        state.save_registrations(b"who", outlives=True)
    state.close()
    again = begun(disk)
    assert again.log.ended == {state.incarnation}
    again.abandon()


def test_a_segment_that_was_begun_in_vain_is_not_the_one_that_knows_the_ends() -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state)
    state.log.sync()
    for nth in (1, 3):  # the second write is the head of the segment that is begun
        disk.fail("write", nth, errno.ENOSPC)
    with pytest.raises(SpillError):
        state.log.append([burst(6)._replace(incarnation=state.incarnation)])
    disk.mend()
    state.log.release(FEED, 7)
    state.abandon()
    again = begun(disk)
    assert kept(again).end >= 6
    again.abandon()


def test_a_second_life_that_saves_nothing_keeps_what_the_first_one_saved() -> None:
    disk = FakeDisk()
    state = begun(disk)
    state.save_registrations(b"who", outlives=True)
    state.abandon()
    again = begun(disk)
    again.kept = False
    again.close()
    assert begun(disk).registrations == b"who"


@pytest.mark.parametrize("name", ["life", "registrations"])
def test_any_byte_that_changed_and_any_suffix_that_is_cut_is_told(name: str, caplog: pytest.LogCaptureFixture) -> None:
    disk = FakeDisk()
    state = begun(disk)
    fill(state)
    state.save_registrations(b"who is owed what")
    state.abandon()
    path = str(WHERE / name)
    whole = bytes(disk.content(path))
    hurt = [whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in range(len(whole))]
    hurt += [whole[:end] for end in range(1, len(whole))]
    for data in hurt:
        disk.content(path)[:] = data
        caplog.clear()
        again = begun(disk)
        assert "cannot be read in" in caplog.text
        assert (again.registrations is None) is (name == "registrations")
        assert (kept(again).exact, kept(again).end) == (name == "registrations", 6)
        assert again.incarnation > state.incarnation
        again.abandon()
        disk.content(str(WHERE / "life"))[:] = whole if name == "life" else disk.content(str(WHERE / "life"))


@pytest.mark.parametrize("nth", [1, 2])
def test_what_cannot_be_read_now_may_be_there_and_no_life_begins(nth: int) -> None:
    disk = FakeDisk()
    state = begun(disk)
    state.save_registrations(b"who")
    state.abandon()
    disk.fail("read", nth)
    with pytest.raises(SpillBrokenError, match="a new life cannot begin"):
        begun(disk)
    disk.mend()
    again = begun(disk)
    assert again.registrations == b"who"
    again.abandon()


def test_the_state_of_another_member_is_refused_and_left_alone() -> None:
    disk = FakeDisk()
    begun(disk).abandon()
    before = {path: bytes(disk.content(path)) for path in disk.files}
    with pytest.raises(StateDirectoryError, match="it is the state of rank-0, not of rank-1"):
        MemberState.open(WHERE, small(), name="rank-1", boot="boot-1", disk=disk, identity=identities())
    assert {path: bytes(disk.content(path)) for path in disk.files} == before


def test_registrations_that_could_not_be_read_again_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "_FILE_BYTES_MAX", 1000)
    disk = FakeDisk()
    state = begun(disk)
    state.save_registrations(bytes(1000))
    with pytest.raises(SpillBrokenError, match="takes 1001 bytes"):
        state.save_registrations(bytes(1001))
    state.abandon()
    assert begun(disk).registrations == bytes(1000)


def test_only_the_latest_of_many_ends_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "FEEDS_REMEMBERED_MAX", 2)
    disk = FakeDisk()
    state = begun(disk)
    for feed in range(1, 6):
        state.log.append([name_of(state, feed)], hold=False)
    fill(state)
    state.abandon()
    again = begun(disk)
    assert [feed.feed for feed in again.feeds()] == [4, 5, FEED]
    again.abandon()


def test_a_disk_that_fails_is_told_and_what_was_saved_stays() -> None:
    disk = FakeDisk()
    state = begun(disk)
    state.save_registrations(b"before")
    disk.fail("sync")
    with pytest.raises(SpillBrokenError, match="who is owed what"):
        state.save_registrations(b"after")
    state.abandon()
    disk.fail("rename")
    with pytest.raises(SpillBrokenError, match="a new life cannot begin"):
        begun(disk)
    again = begun(disk)
    assert again.registrations == b"before"
    again.abandon()


def test_an_older_log_names_the_topic_alone() -> None:
    assert FeedName.decode(b"topic") == FeedName("topic", "reliable", "")
