"""Values of dead letters that are too large for a row: in the spill log, until their letter is over."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fabric.config import Letters as Limits
from fabric.core.disk import AppendRecords, ReleaseRecords
from fabric.core.wire import ADDRESSED
from fabric.engine.letter_forms import message_of
from fabric.engine.lettering import Desk, EndLetter, LetterKeeper, LoadLetters, ReadLetters, WriteLetter
from fabric.engine.storing import EXPIRY_NS, Storekeeper
from fabric.errors import DamagedRecordError, LettersDamagedError, LetterStoreBrokenError
from fabric.message import Message
from fabric.payloads import BYTES
from fabric.storage.dead_letters import DeadLetterStore
from fabric.storage.letter_rows import SPILLED, LetterRow
from fabric.storage.spill import SpillLog
from fabric.storage.state import LETTERS_FEED, MemberState
from fabric.testing.disks import FakeDisk
from tests.harness.letters import letter
from tests.harness.spills import WHERE, Clock, small

HEAD = 100
LIMITS = Limits(record_bytes_max=HEAD, value_bytes_max=10_000, values_bytes_max=20_000)


class Bench:
    """A desk on a fake disk, with or without state; one more life with `again`."""

    def __init__(self, path: Path | None = None, *, stateful: bool = False, **settings: int) -> None:
        self.path, self.stateful, self.limits = path, stateful, small(**settings)
        self.disk, self.clock = FakeDisk(), Clock()
        self.cuts: dict[int, str] = {}
        self.written: list[int] = []
        self.begin()

    def begin(self) -> None:
        """A life."""
        self.state = self._open_state() if self.stateful else None
        self.spill = Storekeeper(1, self._open, lambda: self.clock.now_ns, self.state)
        self.letters = LetterKeeper(self._open_letters, lambda: 0)
        self.letters.cut = self.cuts.__setitem__
        self.desk = Desk(self.spill, self.letters)
        self.loaded: list[LetterRow] = []
        self.desk.work([LoadLetters(lambda rows, _: self.loaded.extend(rows))])

    def _open_state(self) -> MemberState:
        clock = self.clock
        return MemberState.open(
            WHERE, self.limits, name="rank-0", boot="1", disk=self.disk, wall_ns=lambda: clock.now_ns
        )

    def _open(self) -> SpillLog:
        return SpillLog.open(WHERE, self.limits, disk=self.disk, clock=lambda: self.clock.now_ns)

    def _open_letters(self) -> DeadLetterStore:
        return DeadLetterStore.open(self.path, LIMITS, durable=self.stateful)

    def end(self) -> None:
        """It is killed."""
        self.letters._opened().close()
        self.letters._store = None
        self.desk.abandon()

    @property
    def log(self) -> SpillLog:
        log = self.spill._log
        assert log is not None
        return log

    @property
    def kept(self) -> list[int]:
        return [place.first for place in self.log.places(LETTERS_FEED)]

    def write(self, number: int, size: int = 5000, **others: Any) -> LetterRow:
        value = bytes([number]) * size
        row = replace(letter(number, value, **others), value=value[:HEAD], cut=SPILLED)
        self.desk.work([WriteLetter(row, lambda: self.written.append(number), memoryview(value))])
        return row

    def read(self, number: int) -> Any:
        answers: list[Any] = []
        self.desk.work([ReadLetters((number,), answers.extend)])
        return answers[0]

    def damage(self, number: int) -> None:
        """One bit of a value changes on the disk."""
        for content in map(self.disk.content, [path for path in self.disk.files if "seg-" in path]):
            at = content.find(bytes([number]) * 1000)
            if at >= 0:
                content[at] ^= 1


def test_a_large_value_lies_in_the_log_until_its_letter_is_over_whatever_came_before() -> None:
    bench = Bench()
    assert bench.spill._log is None, "a member without large letters has no log"
    rows = [bench.write(number) for number in (1, 2, 3)]
    assert (bench.written, bench.kept, bench.spill.values.bytes) == ([1, 2, 3], [1, 2, 3], 15_000)
    assert [bench.read(number).value for number in (1, 2, 3)] == [bytes([number]) * 5000 for number in (1, 2, 3)]
    assert bench.letters._opened().read(2).value == rows[1].value, "the row has the head"
    bench.desk.work([EndLetter(rows[1])])
    assert (bench.kept, 2 in bench.spill.values, bench.read(3).value[:1]) == ([1, 3], False, b"\3")
    bench.desk.work([EndLetter(rows[0]), EndLetter(rows[2])])
    assert (bench.kept, bench.log.entries, bench.spill.values.bytes, bench.cuts) == ([], 0, 0, {})
    bench.desk.close()
    assert not bench.disk.files


def test_it_comes_again_as_the_addressed_record_that_it_was() -> None:
    bench = Bench()
    bench.write(7, value_kind=BYTES, metadata=b"\x81\xa1a\x01")
    item = message_of(bench.read(7), 1)
    message = Message(item.burst, 0, item.feed, 0, 0)
    assert item.burst.columns[2][0] & ADDRESSED and item.burst.size < 200, "the value is not copied into it"
    assert (message.value, message.metadata) == (b"\7" * 5000, {"a": 1})


def test_all_together_have_a_ceiling_and_beyond_it_the_head_stays_and_says_why() -> None:
    bench = Bench()
    rows = [bench.write(number, 9000) for number in (1, 2, 3)]
    assert (bench.written, bench.kept) == ([1, 2, 3], [1, 2])
    why = "letters.values_bytes_max is used up: 18000 of 20000 bytes"
    assert bench.cuts == {3: why}
    found = bench.read(3)
    assert (found.cut, found.value, found.is_cut) == (why, rows[2].value, True)
    bench.desk.work([EndLetter(rows[0])])
    bench.write(4, 9000)
    assert bench.kept == [2, 4]


def test_a_disk_that_refuses_leaves_the_head_and_does_not_hold_the_letter_back() -> None:
    bench = Bench()
    for nth in (1, 2):
        bench.disk.fail("write", nth, errno.ENOSPC)
    bench.write(1)
    bench.disk.mend()
    assert (bench.written, bench.read(1).is_cut) == ([1], True)
    assert "the spill log refused its value" in bench.cuts[1]
    bench.write(2)
    assert bench.read(2).value == b"\2" * 5000
    alone = LetterKeeper(bench._open_letters, lambda: 0)
    alone.cut = bench.cuts.__setitem__
    alone.work([WriteLetter(letter(9, cut=SPILLED), lambda: None, memoryview(b"x"))])
    assert bench.cuts[9] == "there is no spill log"


def test_a_row_that_is_refused_is_tried_again_and_its_value_is_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()

    def refuse(*_: object) -> bool:
        raise LetterStoreBrokenError("no", directory="x")

    with monkeypatch.context() as patch:
        patch.setattr(DeadLetterStore, "add", refuse)
        bench.write(1)
    assert (bench.written, bench.kept, bench.letters.due_ns is None) == ([], [1], False)
    writes = bench.disk.calls["write"]
    bench.desk.work([])
    assert (bench.written, bench.kept, bench.disk.calls["write"]) == ([1], [1], writes)


def test_what_the_log_gives_up_for_its_age_is_told_and_the_letter_stays() -> None:
    bench = Bench(age_s=10, segment_age_s=1)
    bench.write(1)
    bench.write(2)
    bench.clock.now_ns += 12 * EXPIRY_NS
    assert bench.desk.work([]) == [], "the core knows nothing of this feed"
    why = "the spill log gave its value up for its age"
    assert (bench.cuts, bench.spill.values.bytes) == ({1: why, 2: why}, 0)
    assert bench.read(1).is_cut and len(bench.letters._opened()) == 2


def test_damage_leaves_the_head_and_a_disk_that_fails_to_read_leaves_all(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.write(1)
    bench.write(2)
    bench.disk.fail("read")
    assert isinstance(bench.read(1), DamagedRecordError)
    bench.disk.mend()
    assert (bench.read(1).value, bench.cuts) == (b"\1" * 5000, {})
    bench.damage(1)
    assert bench.read(1).cut == bench.cuts[1] == "its value was damaged in the spill log"
    assert bench.kept == [2] and "dead letter 1 has only the head" in caplog.text
    assert bench.read(1).is_cut and bench.read(2).value == b"\2" * 5000


def test_another_value_under_the_same_number_is_not_taken_for_the_letters() -> None:
    bench = Bench()
    row = bench.write(1)
    store = bench.letters._opened()
    with store.transaction():
        store.replace(replace(row, checksum=row.checksum ^ 1))
    assert bench.read(1).is_cut and bench.kept == []


def test_letters_alone_do_not_hold_up_a_log_that_fills() -> None:
    bench = Bench(segment_bytes=8192, bytes_max=16 * 8192)
    bench.write(1, 3000)

    def append(number: int) -> None:
        bench.desk.work([AppendRecords(number, "a.b", 7, number - 1, 1, bytes(3000), {})])
        bench.desk.work([ReleaseRecords(7, number)])

    for number in range(1, 100):
        append(number)
        bench.clock.now_ns += 2 * EXPIRY_NS
        bench.desk.work([])
        assert bench.log.bytes < bench.limits.bytes_max and bench.spill.error is None
    assert bench.read(1).value == b"\1" * 3000 and bench.kept == [1]
    bench.desk.work([EndLetter(letter(1))])
    assert bench.log.segments == 1


def test_the_next_life_has_the_values_and_serves_them_to_nobody(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "letters", stateful=True)
    rows = {number: bench.write(number) for number in (1, 2, 3)}
    bench.damage(2)
    assert bench.disk.calls["sync"] >= 3, "a letter is on the disk, and so is its value"
    bench.end()
    bench.begin()
    assert bench.state is not None and bench.state.feeds() == []
    assert {row.id: row.cut for row in bench.loaded} == {
        1: SPILLED,
        2: "the spill log has its value no more",
        3: SPILLED,
    }
    assert [bench.read(number).value[:1] for number in (1, 3)] == [b"\1", b"\3"] and bench.read(2).is_cut
    store = bench.letters._opened()
    with store.transaction():
        store.end(rows[1])
    bench.end()  # before its value was let go
    bench.begin()
    assert (bench.kept, bench.spill.values.bytes) == ([3], 5000)
    bench.state.kept = False
    bench.state.save_registrations(b"", outlives=False)
    assert bench.log.entries == 1, "a log with nothing but a letter's value is owed"
    bench.desk.work([EndLetter(rows[3])])
    assert bench.log.entries == 0
    bench.end()


def test_a_value_that_was_moved_lies_in_one_place_for_the_next_life(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "letters", stateful=True, segment_bytes=8192, bytes_max=16 * 8192)
    row = bench.write(1, 3000)
    for number in range(1, 9):
        bench.desk.work([AppendRecords(number, "a.b", 7, number - 1, 1, bytes(3000), {})])
    bench.spill.values._append(bench.log.read(LETTERS_FEED, 1))
    bench.end()
    bench.begin()
    before = bench.log.segments
    bench.desk.work([ReleaseRecords(7, 8)])
    assert before > bench.log.segments, "its first copy holds nothing up"
    assert bench.read(1).value == b"\1" * 3000
    bench.desk.work([EndLetter(row)])
    assert (bench.log.entries, bench.log.segments) == (0, 1)
    bench.end()


def test_what_others_need_in_front_of_the_log_is_not_moved() -> None:
    bench = Bench(segment_bytes=8192, bytes_max=16 * 8192)
    bench.write(1, 3000)
    for number in range(1, 30):
        bench.desk.work([AppendRecords(number, "a.b", 7, number - 1, 1, bytes(3000), {})])
        bench.clock.now_ns += 2 * EXPIRY_NS
        bench.desk.work([])
    (place,) = bench.log.places(LETTERS_FEED)
    assert (place.segment, bench.log.held_up(LETTERS_FEED)) == (0, [])


def test_a_sync_that_fails_is_said_and_the_next_one_mends_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path / "letters", stateful=True)
    for nth in (2, 3, 4):
        bench.disk.fail("sync", nth)
    bench.write(1)
    bench.disk.mend()
    assert "dead letter 1 would not survive a loss of power" in caplog.text
    assert (bench.written, bench.read(1).value) == ([1], b"\1" * 5000)
    bench.write(2)
    assert bench.log._unsynced == [] and not bench.log._adrift
    bench.end()


def test_a_letter_that_damage_took_leaves_nothing_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    bench.write(1)
    bench.write(2)

    def mend(store: DeadLetterStore, _: Any) -> bool:
        with store.transaction():
            store.remove(1)
        store.lost = [1]
        return True

    monkeypatch.setattr(DeadLetterStore, "find_damage", mend)
    store = bench.letters._opened()
    with monkeypatch.context() as patch:
        patch.setattr(store, "read", lambda number: (_ for _ in ()).throw(LettersDamagedError("x", directory="x")))
        bench.read(1)
    assert bench.kept == [2]
