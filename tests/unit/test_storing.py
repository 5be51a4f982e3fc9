"""What the engine asks of its disk, and what comes of it."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fabric.config import Letters, Spill
from fabric.core.disk import (
    AppendRecords,
    LoadedBurst,
    LoadRecords,
    RecordsExpired,
    RecordsLoaded,
    ReleaseRecords,
    WriteFailed,
    WriteFinished,
)
from fabric.engine.lettering import ChangeLetter
from fabric.engine.storing import EXPIRY_NS, NoStore, Outcome, Storekeeper, ThreadedStore
from fabric.errors import SpillBrokenError, SpillFullError, StateDirectoryError
from fabric.storage.home import base_of, open_home, open_letters, sweep
from fabric.storage.spill import SpillLog
from fabric.testing.disks import FakeDisk
from tests.harness.spills import WHERE, Clock, small
from tests.harness.waiting import until
from tests.unit.test_dispatch import engine_of

FEED = 7


def append(number: int, *, size: int = 10, feed: int = FEED) -> AppendRecords:
    """The burst of one record at offset `number - 1`."""
    return AppendRecords(number, "a.b", feed, number - 1, 1, bytes([number]) * size, {})


class Kept:
    """A storekeeper on a fake disk."""

    def __init__(self, **settings: int) -> None:
        self.disk, self.clock, self.opened = FakeDisk(), Clock(), 0
        self.limits = small(**settings)
        self.keeper = Storekeeper(1, self._open, lambda: self.clock.now_ns)

    def _open(self) -> SpillLog:
        self.opened += 1
        return SpillLog.open(WHERE, self.limits, disk=self.disk, clock=lambda: self.clock.now_ns)


def test_appends_that_wait_together_are_one_write_and_come_back_as_they_were() -> None:
    kept = Kept()
    assert kept.opened == 0, "a member that never spills has no log"
    payloads = {4: b"large"}
    with_value = AppendRecords(5, "a.b", FEED, 4, 1, b"frame", payloads)
    assert kept.keeper.work([*map(append, range(1, 5)), with_value]) == [WriteFinished(5)]
    assert (kept.opened, kept.disk.calls["write"]) == (1, 2), "the head of the segment, and all bursts"
    (segment,) = [path for path in kept.disk.files if "seg-" in path]
    assert bytes(kept.disk.content(segment)).count(b"a.b") == 1, "a feed is named once"
    (loaded,) = kept.keeper.work([LoadRecords(FEED, (4, 1))])
    assert loaded == RecordsLoaded(FEED, (LoadedBurst(4, b"frame", payloads), LoadedBurst(1, b"\2" * 10, None)))


def test_everything_is_done_in_order() -> None:
    kept = Kept()
    wishes = [append(1), LoadRecords(FEED, (0,)), append(2), ReleaseRecords(FEED, 2), append(3)]
    first, loaded, second, third = kept.keeper.work(wishes)
    assert (first, second, third) == (WriteFinished(1), WriteFinished(2), WriteFinished(3))
    assert isinstance(loaded, RecordsLoaded)
    assert kept.keeper.work([]) == []


def test_a_full_disk_is_said_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    kept.keeper.work([append(1)])
    for nth in (2, 3):
        for again in range(1, 7):  # the group, and each alone; a log tries twice
            kept.disk.fail("write", again, errno.ENOSPC)
        failed = kept.keeper.work([append(nth), append(nth + 1)])
        assert [(type(one), one.first) for one in failed] == [(WriteFailed, nth), (WriteFailed, nth + 1)]
        assert "space" in failed[0].reason
        assert isinstance(kept.keeper.error, SpillFullError)
    assert kept.keeper.work([append(5)]) == [WriteFinished(5)]
    assert kept.keeper.error is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "takes records again" in caplog.messages[-1]
    assert kept.keeper.work([LoadRecords(FEED, (0, 4))])[0].bursts[1].frame == b"\5" * 10


def test_of_a_group_that_does_not_fit_as_much_is_taken_as_there_is_room_for() -> None:
    kept = Kept(bytes_max=3 * 1024)
    *failed, finished = kept.keeper.work([append(number, size=400) for number in range(1, 20)])
    assert [one.first for one in failed] == list(range(4, 20))
    assert finished == WriteFinished(19), "of the others"
    (loaded,) = kept.keeper.work([LoadRecords(FEED, (0, 1, 2))])
    assert all(burst.frame for burst in loaded.bursts)


def test_what_is_too_large_does_not_hold_up_what_is_behind_it() -> None:
    kept = Kept(bytes_max=8 * 1024)
    *failed, finished = kept.keeper.work([append(1), append(2, size=9_000), append(3), append(4)])
    assert [one.first for one in failed] == [2]
    assert finished == WriteFinished(4)
    (loaded,) = kept.keeper.work([LoadRecords(FEED, (0, 2, 3))])
    assert [burst.frame for burst in loaded.bursts] == [bytes([number]) * 10 for number in (1, 3, 4)]
    assert kept.keeper.error is not None
    assert kept.keeper.error.__traceback__ is None, "it would keep what was refused in memory"


def test_what_was_given_up_after_it_was_asked_for_is_lost_and_breaks_nothing() -> None:
    kept = Kept(age_s=10, segment_age_s=1)
    kept.keeper.work([append(1)])
    kept.clock.now_ns += 12_000_000_000
    expired, loaded = kept.keeper.work([LoadRecords(FEED, (0,))])
    assert expired == RecordsExpired(FEED, 0, 1)
    assert loaded == RecordsLoaded(FEED, (LoadedBurst(0, None, None, lost=True),))


def test_a_read_that_fails_is_not_damage() -> None:
    kept = Kept()
    kept.keeper.work([append(1)])
    kept.disk.fail("read")
    (loaded,) = kept.keeper.work([LoadRecords(FEED, (0,))])
    assert loaded.bursts == (LoadedBurst(0, None, None, lost=False),)
    assert kept.keeper.work([LoadRecords(FEED, (0,))])[0].bursts[0].frame == b"\1" * 10


def test_a_log_that_cannot_be_opened_is_opened_again() -> None:
    kept = Kept()
    kept.disk.fail("enter", 1, errno.EACCES)
    (failed,) = kept.keeper.work([append(1)])
    assert isinstance(failed, WriteFailed)
    assert isinstance(kept.keeper.error, StateDirectoryError)
    assert kept.keeper.work([append(1)]) == [WriteFinished(1)]


def test_a_damaged_burst_is_answered_without_a_frame(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept()
    kept.keeper.work([append(1, size=100), append(2)])
    (path,) = [path for path in kept.disk.files if "seg-" in path]
    at = bytes(kept.disk.content(path)).index(b"\1" * 100)
    kept.disk.content(path)[at] ^= 1
    (loaded,) = kept.keeper.work([LoadRecords(FEED, (0, 1))])
    assert [burst.frame for burst in loaded.bursts] == [None, b"\2" * 10]
    assert [burst.lost for burst in loaded.bursts] == [True, False]
    assert "cannot be read" in caplog.text


def test_what_nobody_fetched_for_too_long_is_given_up_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Kept(age_s=10, segment_age_s=1)
    kept.keeper.work([append(1), append(2)])
    kept.clock.now_ns += 2_000_000_000
    kept.keeper.work([append(3)])
    kept.clock.now_ns += 10_000_000_000
    assert kept.keeper.work([]) == [RecordsExpired(FEED, 0, 2)]
    monkeypatch.setattr(SpillLog, "expire", lambda log, now: 1 // 0)
    kept.clock.now_ns += EXPIRY_NS // 2
    assert kept.keeper.work([]) == [], "not looked for all the time"
    assert kept.keeper.work([LoadRecords(FEED, (2,))])[0].bursts[0].frame == b"\3" * 10


def test_a_disk_that_deletes_nothing_is_only_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(age_s=10, segment_age_s=1)
    kept.keeper.work([append(1)])
    kept.clock.now_ns += 2_000_000_000
    kept.keeper.work([append(2)])
    kept.disk.fail("unlink")
    assert kept.keeper.work([ReleaseRecords(FEED, 1)]) == []
    kept.disk.fail("unlink")
    kept.clock.now_ns += 20_000_000_000
    assert kept.keeper.work([]) == []
    kept.disk.fail("unlink")
    kept.keeper.close()
    assert len(caplog.records) == 3


def test_the_log_is_removed_at_the_end_and_twice_is_once() -> None:
    kept = Kept()
    kept.keeper.close()
    kept.keeper.work([append(1)])
    kept.keeper.close()
    kept.keeper.close()
    kept.keeper.abandon()
    assert kept.disk.files == {}
    assert kept.disk.opened == 0


def test_a_forked_child_touches_nothing() -> None:
    kept = Kept()
    kept.keeper.work([append(1)])
    files = dict(kept.disk.files)
    kept.keeper.abandon()
    assert (kept.disk.files, kept.disk.opened) == (files, 0)


def test_an_engine_without_a_disk_is_refused_every_write() -> None:
    told: list[object] = []
    store = NoStore(told.append)
    store.ask(append(3))
    store.ask(ReleaseRecords(FEED, 1))
    store.close()
    store.abandon()
    assert told == [WriteFailed(3, 3, "there is no disk")]
    assert store.error is None


# The thread.


def test_the_thread_begins_with_the_first_wish_and_ends_with_the_log() -> None:
    kept, engine, told = Kept(), engine_of("rank-0"), []
    engine.submit = told.append  # type: ignore[method-assign]
    store = ThreadedStore(engine, kept.keeper)
    before = threading.active_count()
    store.close()
    assert threading.active_count() == before
    for number in range(1, 400):
        store.ask(append(number % 200 + 1, feed=number))
    until(lambda: len(told) > 0 and told[-1] == WriteFinished(200) and told.count(WriteFinished(200)) >= 1)
    assert store.error is None
    store.close()
    store.close()
    assert threading.active_count() == before
    assert kept.disk.files == {}


def test_a_defect_in_the_thread_breaks_the_engine_instead_of_letting_all_wait() -> None:
    engine = engine_of("rank-0")
    store = ThreadedStore(engine, Storekeeper(1, lambda: 1 // 0, lambda: 0))  # type: ignore[arg-type, return-value]
    store.ask(append(1))
    until(lambda: isinstance(engine.broken, ZeroDivisionError))
    store.close()


# Where it lies.


def test_f61_what_the_killed_left_is_swept_and_what_lives_is_not(tmp_path: Path) -> None:
    limits = Spill(directory=tmp_path / "disk", free_bytes_min=1)
    assert sweep(limits) == 0
    alive = open_home(limits, "job", "rank-0", 1)
    dead = open_home(limits, "job", "rank-1", 1)
    dead.abandon()
    (tmp_path / "disk" / "notes").mkdir(mode=0o700)
    assert len(list((tmp_path / "disk").iterdir())) == 3
    assert sweep(limits) == 1
    assert sweep(limits) == 0
    alive.destroy()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["notes"]


def test_f68_no_text_of_a_user_becomes_a_path(tmp_path: Path) -> None:
    limits = Spill(directory=tmp_path / "disk", free_bytes_min=1)
    log = open_home(limits, "../../job", "rank/../0", 1)
    (found,) = (tmp_path / "disk").iterdir()
    assert found.name.startswith("life-")
    assert stat.S_IMODE(found.stat().st_mode) == 0o700
    log.destroy()


def test_the_default_is_a_directory_of_this_user_among_the_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert base_of(Spill()) == tmp_path / f"tensor-fabric-spill-{os.geteuid()}"


def test_f36_a_base_that_others_may_enter_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tmp_path / "disk"
    base.mkdir()
    base.chmod(0o777)
    with pytest.raises(StateDirectoryError):
        open_home(Spill(directory=base), "job", "rank-0", 1)
    assert sweep(Spill(directory=base)) == 0
    assert "not looked for" in caplog.text


def test_what_cannot_be_swept_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tmp_path / "disk"
    base.mkdir(mode=0o700)
    (base / f"life-{'0' * 16}").mkdir(mode=0o755)
    assert sweep(Spill(directory=base)) == 0
    assert "cannot be removed" in caplog.text


def test_a_disk_that_fails_twice_is_broken() -> None:
    kept = Kept()
    for nth in (1, 2):
        kept.disk.fail("write", nth)
    kept.keeper.work([append(1)])
    assert isinstance(kept.keeper.error, SpillBrokenError)


def test_a_machine_without_temporary_files_joins_and_is_told_when_it_spills(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr("fabric.storage.home.tempfile", SimpleNamespace(gettempdir=nowhere))
    assert sweep(Spill()) == 0
    keeper = Storekeeper(1, lambda: open_home(Spill(), "job", "rank-0", 1), lambda: 0)
    assert isinstance(keeper.work([append(1)])[0], WriteFailed)
    assert isinstance(keeper.error, StateDirectoryError)
    assert "not looked for" in caplog.text


def test_a_disk_that_fails_for_a_while_does_not_fill_its_ceiling_with_unused_room() -> None:
    kept = Kept()
    kept.keeper.work([append(1)])
    kept.disk.fail("write", 1)
    kept.disk.fail("write", 3)  # the head of the next segment is written in between
    assert isinstance(kept.keeper.work([append(2)])[0], WriteFailed)
    for _ in range(10):
        kept.disk.fail("write", 2)
        kept.disk.fail("write", 4)
        assert isinstance(kept.keeper.work([append(2)])[0], WriteFailed)
    assert kept.keeper.work([append(2)]) == [WriteFinished(2)]
    assert kept.disk.used < 10 * kept.limits.segment_bytes, "twenty segments were begun"


def test_an_idle_member_looks_for_what_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric.engine.storing.IDLE_S", 0.01)
    kept, engine, told = Kept(age_s=10, segment_age_s=1), engine_of("rank-0"), []
    engine.submit = told.append  # type: ignore[method-assign]
    store = ThreadedStore(engine, kept.keeper)
    store.ask(append(1))
    until(lambda: told == [WriteFinished(1)])
    kept.clock.now_ns += 12_000_000_000
    until(lambda: told[1:] == [RecordsExpired(FEED, 0, 1)])
    store.close()


class Slow:
    """A keeper that is told when to go on, and notes what it was asked."""

    error = None
    due_ns = None

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), []  # type: ignore[var-annotated]

    def work(self, wishes: Iterable[object]) -> list[Outcome]:
        self.asked.append([type(wish) for wish in wishes])
        assert self.go.wait(10)
        return []

    def close(self) -> None:
        self.asked.append(["closed"])

    def abandon(self) -> None:
        """Nothing."""


def test_letters_that_wait_are_written_at_the_end_and_what_spills_is_not() -> None:
    keeper = Slow()
    store = ThreadedStore(engine_of("rank-0"), keeper)
    store.ask(append(1))
    until(lambda: keeper.asked)
    store.ask(append(2))
    store.ask(ChangeLetter(1, "rejected", "", 1))
    closing = threading.Thread(target=store.close)
    closing.start()
    until(lambda: store._thread is None and not store._wishes.empty())
    keeper.go.set()
    closing.join(10)
    assert keeper.asked == [[AppendRecords], [ChangeLetter], ["closed"]]


def test_letters_of_a_killed_member_are_swept_and_those_of_a_living_one_are_not(tmp_path: Path) -> None:
    limits = Spill(directory=tmp_path / "base")
    killed = open_letters(limits, Letters(), "job", "rank-0", 1)
    living = open_letters(limits, Letters(), "job", "rank-0", 2)
    assert sweep(limits) == 0
    killed.close()
    assert sweep(limits) == 1
    assert len(os.listdir(tmp_path / "base")) == 1
    living.destroy()
    assert os.listdir(tmp_path / "base") == []
    kept = open_letters(limits, Letters(), "job", "rank-0", 3, tmp_path / "state")
    kept.close()
    assert sweep(limits) == 0 and (tmp_path / "state").exists()
