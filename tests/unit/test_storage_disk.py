"""The real disk: private directories, locks, short writes, and a file system that is full."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fabric.config import MIB
from fabric.errors import SpillFullError, SpillLockedError, StateDirectoryError
from fabric.storage.disk import IOV_MAX, OS_DISK
from fabric.storage.spill import SpillLog
from tests.harness.children import Parent, child
from tests.harness.spills import burst, held, named, small


@pytest.fixture
def where(tmp_path: Path) -> Path:
    return tmp_path / "a" / "spill"


def test_a_directory_is_made_and_is_private(where: Path) -> None:
    OS_DISK.enter(where).close()
    assert where.stat().st_mode & 0o777 == 0o700
    again = OS_DISK.enter(where)
    again.remove()
    again.close()
    again.close()
    assert not where.exists()


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o777, 0o1720])
def test_f36_a_directory_that_others_may_enter_is_refused(where: Path, mode: int) -> None:
    where.mkdir(parents=True)
    where.chmod(mode)
    with pytest.raises(StateDirectoryError, match="chmod 700") as caught:
        OS_DISK.enter(where)
    assert caught.value.directory == str(where)


def test_f36_a_link_and_a_file_are_refused(where: Path, tmp_path: Path) -> None:
    OS_DISK.enter(where).close()
    (tmp_path / "link").symlink_to(where)
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"")
    for name in ("link", "dangling", "file"):
        with pytest.raises(StateDirectoryError, match="link or no directory"):
            OS_DISK.enter(tmp_path / name)
    with pytest.raises(StateDirectoryError):
        OS_DISK.enter(tmp_path / "file" / "below")
    with pytest.raises(StateDirectoryError, match="too long"):
        OS_DISK.enter(tmp_path / ("x" * 300))


def test_f36_the_directory_of_somebody_else_is_refused(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    OS_DISK.enter(where).close()
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(StateDirectoryError, match="belongs to user"):
        OS_DISK.enter(where)


def test_f36_a_segment_or_lock_that_is_a_link_is_not_followed(where: Path, tmp_path: Path) -> None:
    OS_DISK.enter(where).close()
    (tmp_path / "victim").write_bytes(b"precious")
    (where / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(StateDirectoryError):
        SpillLog.open(where, small())
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_a_file_is_written_read_cut_and_allocated(where: Path) -> None:
    directory = OS_DISK.enter(where)
    file = directory.open("one", create=True)
    assert file.write([b"abc", bytearray(b"de"), memoryview(b"f")], 4) == 6
    assert (file.read(0, 100), file.size()) == (b"\0\0\0\0abcdef", 10)
    file.allocate(4096)
    assert file.size() == 4096
    file.truncate(5)
    file.sync()
    file.close()
    file.close()
    assert (where / "one").stat().st_mode & 0o777 == 0o600
    directory.rename("one", "two")
    directory.sync()
    assert directory.names() == ["two"]
    assert directory.free_bytes() > 0
    again = directory.open("two")
    assert again.read(0, 9) == b"\0\0\0\0a"
    again.close()
    directory.unlink("two")
    with pytest.raises(FileNotFoundError):
        directory.open("two")
    directory.close()


def test_descriptors_are_closed_in_a_program_that_is_started(where: Path) -> None:
    directory = OS_DISK.enter(where)
    file = directory.open("one", create=True)
    assert not os.get_inheritable(file._fd) and not os.get_inheritable(directory._fd)  # type: ignore[attr-defined]
    file.close()
    directory.close()


def test_a_read_beyond_what_one_call_moves_goes_on(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fabric.storage.disk._READ_MOST", 4)
    directory = OS_DISK.enter(where)
    file = directory.open("one", create=True)
    file.write([b"0123456789"], 0)
    assert file.read(0, 100) == b"0123456789"
    assert file.read(1, 7) == b"1234567"
    file.close()
    directory.close()


def test_a_locked_directory_is_refused_to_this_process_too(where: Path) -> None:
    log = SpillLog.open(where, small())
    log.append([named(), burst(0)])
    with pytest.raises(SpillLockedError):
        SpillLog.open(where, small())
    with child(try_to_open, where=str(where)) as other:
        assert other.hear() == {"locked": True}, "our second attempt did not drop our lock"
    log.close()
    with child(try_to_open, where=str(where)) as other:
        assert other.hear() == {"locked": False}


def try_to_open(parent: Parent, *, where: str) -> None:
    try:
        SpillLog.open(Path(where), small()).close()
    except SpillLockedError:
        parent.say(locked=True)
    else:
        parent.say(locked=False)


def test_a_lock_whose_file_was_removed_meanwhile_is_no_lock(where: Path) -> None:
    directory = OS_DISK.enter(where)
    file = directory.open("lock", create=True)
    directory.unlink("lock")
    with pytest.raises(BlockingIOError):
        file.lock()
    file.close()
    directory.close()


def test_a_lock_that_the_system_refuses_as_permission_is_a_lock(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(SpillLockedError):
        SpillLog.open(where, small())


def contents(where: Path) -> list[tuple[str, bytes]]:
    """All but the lock: to open and close it here would drop it."""
    return sorted((path.name, path.read_bytes()) for path in where.iterdir() if path.name != "lock")


@pytest.mark.multiprocess
def test_a_forked_child_drops_nothing_of_its_parent(where: Path) -> None:
    log = SpillLog.open(where, small())
    log.append([named(), burst(0)])
    before = contents(where)
    pid = os.fork()
    if not pid:
        log.abandon()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert contents(where) == before
    with child(try_to_open, where=str(where)) as other:
        assert other.hear() == {"locked": True}
    assert held(log) == [burst(0)]
    log.close()


def test_a_log_on_the_real_disk_comes_back(where: Path) -> None:
    with_payload = burst(2, frame=b"x" * 3000, o2=b"p" * 2000)
    log = SpillLog.open(where, small(segment_bytes=4096), keep_unsynced=True)
    log.append([named(), burst(0), burst(1)])
    log.append([burst(at, frame=b"") for at in range(10, 10 + IOV_MAX)])
    log.append([with_payload])
    log.sync()
    assert log.bytes == sum(path.stat().st_size for path in where.iterdir() if path.name != "lock")
    log.close()
    again = SpillLog.open(where, small())
    assert held(again)[:2] == [burst(0), burst(1)]
    assert (held(again)[-1], again.entries) == (with_payload, 3 + IOV_MAX)
    again.destroy()
    assert not where.exists()


def limited(parent: Parent, *, where: str) -> None:
    """What RLIMIT_FSIZE does: a short write, then EFBIG, and no signal, since CPython ignores SIGXFSZ."""
    log = SpillLog.open(Path(where), small(segment_bytes=20_000))
    log.append([named(), burst(0)])
    assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    errors = []
    for _ in range(2):
        try:
            log.append([burst(1, frame=bytes(15_000))])
        except SpillFullError as error:
            errors.append(type(error.__cause__).__name__)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    log.append([burst(1, frame=b"there is room again")])
    parent.say(errors=errors, firsts=[entry.first for entry in held(log)], damage=len(log.damage))
    log.close()


@pytest.mark.multiprocess
def test_f32_a_file_that_may_not_grow_takes_nothing_and_recovers(where: Path) -> None:
    with child(limited, where=str(where)) as writer:
        assert writer.hear() == {"errors": ["OSError", "OSError"], "firsts": [0, 1], "damage": 0}
        assert writer.exit_code() == 0
    log = SpillLog.open(where, small())
    assert [bytes(entry.frame) for entry in held(log)] == [burst(0).frame, b"there is room again"]
    assert log.damage == ()
    log.close()


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    if os.geteuid():
        pytest.skip("mounting a tmpfs needs root")
    place = tmp_path / "tiny"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, b"size=1m,mode=0700"):
        pytest.skip(f"no tmpfs can be mounted here: {os.strerror(ctypes.get_errno())}")
    yield place
    assert libc.umount(str(place).encode()) == 0


def test_f31_a_full_disk_takes_nothing_and_recovers_when_space_returns(tiny: Path) -> None:
    where = tiny / "spill"
    log = SpillLog.open(where, small(bytes_max=8 * MIB, segment_bytes=256 * 1024))
    log.append([named()])
    first = 0
    with pytest.raises(SpillFullError) as caught:
        while True:
            log.append([burst(first, frame=b"%8d" % first * 4000)])
            first += 1
    assert first > 20, "nearly all of it was used"
    assert [entry.first for entry in held(log)] == list(range(first))
    assert isinstance(caught.value.__cause__, OSError) or "free_bytes_min" in str(caught.value)
    log.release(7, below=first // 2)
    log.append([burst(first, frame=b"%8d" % first * 4000)])
    log.close()
    again = SpillLog.open(where, small())
    assert again.damage == ()
    assert held(again)[-1].first == first
    again.close()
