"""A disk in memory that fails when the test says so, and that remembers everything it was asked to do.

    disk = FakeDisk()
    disk.fail("sync", 2, errno.EIO)              # the second sync of a file from now on
    log = SpillLog.open(WHERE, limits, disk=disk)
    ...
    after = disk.crashed(len(disk.steps))        # the disk as a crash now may leave it: nothing unsynced survived

`crashed` replays any prefix of what was done into a new disk. What was not synced may be lost in any subset, the last
write may be torn at any byte, a file whose directory was not synced may be missing, and the size of a file may have
reached the disk without its data. With everything surviving it is the death of the process alone.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fabric.errors import StateDirectoryError
from fabric.storage.disk import IOV_MAX, Bytes, Directory, DiskFile

__all__ = ["FakeDisk", "Step"]

_OF_DATA = frozenset({"write", "truncate", "allocate"})
_OF_NAMES = frozenset({"create", "rename", "unlink"})


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that changed the disk, or made changes durable: `sync` (of a file), `sync_directory`.

    Or failed to: `sync_failed` (of a file).
    """

    verb: str
    inode: int
    """Of the file, or of the directory's sync: its number."""
    name: str = ""
    """Path of what was made, renamed to, or removed."""
    old: str = ""
    position: int = 0
    data: bytes = b""
    """What was written."""
    size: int = 0
    """Truncated or allocated to."""


@dataclass(slots=True)
class FakeDisk:
    """Everything is public: tests look inside, and change bytes as a failing disk would."""

    capacity: int | None = None
    """Bytes that fit on it, over all files; beyond it ENOSPC, after what still fits."""
    write_most: int | None = None
    """No call writes more: short writes."""
    files: dict[str, int] = field(default_factory=dict)
    """Inode by path."""
    contents: dict[int, bytearray] = field(default_factory=dict)
    """By inode; an open file outlives its name."""
    steps: list[Step] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    """How often each operation was asked for."""
    opened: int = 0
    """Files and directories that are open now."""
    _failures: dict[tuple[str, int], int] = field(default_factory=dict)
    _locked: set[int] = field(default_factory=set)
    _directories: set[str] = field(default_factory=set)

    def fail(self, operation: str, nth: int = 1, code: int = errno.EIO) -> None:
        """Let the nth call from now on fail.

        Operations: open, write, read, size, truncate, allocate, sync, names, rename, unlink, sync_directory,
        free_bytes, remove.
        """
        self._failures[operation, self.calls[operation] + nth] = code

    def mend(self) -> None:
        """What was to fail and was not asked for does not fail any more."""
        self._failures.clear()

    def asked(self, operation: str) -> None:
        """Count a call, and fail it if that was ordered."""
        self.calls[operation] += 1
        code = self._failures.pop((operation, self.calls[operation]), None)
        if code is not None:
            raise OSError(code, os.strerror(code))

    def enter(self, directory: Path) -> Directory:
        """Open a directory; here everybody is private."""
        try:
            self.asked("enter")
        except OSError as error:
            raise StateDirectoryError(error.strerror or "", directory=str(directory)) from error
        self._directories.add(str(directory))
        self.opened += 1
        return _FakeDirectory(self, str(directory))

    def content(self, path: Path | str) -> bytearray:
        """The bytes of a file, to look at and to change."""
        return self.contents[self.files[str(path)]]

    def put(self, path: Path | str, data: bytes) -> None:
        """Place a file, as if it had always been there."""
        inode = self.files.setdefault(str(path), self.unused())
        self.contents[inode] = bytearray(data)
        self._directories.add(str(Path(path).parent))

    def unused(self) -> int:
        """An inode that no file has or had."""
        return max(self.contents, default=-1) + 1

    def copy(self) -> FakeDisk:
        """Another disk with the same files, and nothing asked of it yet."""
        copied = FakeDisk(files=dict(self.files), contents={at: bytearray(data) for at, data in self.contents.items()})
        copied._directories = set(self._directories)
        return copied

    @property
    def used(self) -> int:
        """Bytes that are taken; what has no name and is not open would be free, so unnamed files do not count."""
        return sum(len(self.contents[inode]) for inode in set(self.files.values()))

    # Crashes.

    def crashed(
        self,
        upto: int,
        survives: Callable[[int], bool] = lambda _: False,
        *,
        torn: int | None = None,
        filled: bool = False,
        start: FakeDisk | None = None,
    ) -> FakeDisk:
        """The disk as a crash after `upto` steps leaves it.

        Args:
            upto: So many steps happened.
            survives: Whether a step that no sync covers reached the disk all the same.
            torn: Of the last step, if it is a write, only so many bytes were written.
            filled: A lost write may have made its file longer: zeros stand there.
            start: The disk before the first step; default: an empty one.
        """
        after = start.copy() if start is not None else FakeDisk()
        after._directories |= self._directories
        done = self.steps[:upto]
        durable = _durable(done)
        for at, step in enumerate(done):
            kept = at in durable or survives(at)
            if torn is not None and at == upto - 1 and step.verb == "write":
                _apply(after, Step("write", step.inode, position=step.position, data=step.data[:torn]))
            elif kept:
                _apply(after, step)
            elif filled and step.verb == "write":
                _grow(after, step.inode, step.position + len(step.data))
        return after


def _durable(steps: Sequence[Step]) -> set[int]:
    """The steps that a later sync covers."""
    found: set[int] = set()
    synced: set[int] = set()
    names = False
    for at in range(len(steps) - 1, -1, -1):
        step = steps[at]
        if step.verb == "sync":
            synced.add(step.inode)
        elif step.verb == "sync_failed":  # Linux takes for clean what it failed to write: no later sync covers it
            synced.discard(step.inode)
        elif step.verb == "sync_directory":
            names = True
        elif (step.verb in _OF_NAMES and names) or (step.verb in _OF_DATA and step.inode in synced):
            found.add(at)
    return found


def _grow(disk: FakeDisk, inode: int, size: int) -> bytearray:
    data = disk.contents.setdefault(inode, bytearray())
    data.extend(bytes(max(0, size - len(data))))
    return data


def _apply(disk: FakeDisk, step: Step) -> None:
    if step.verb == "write":
        _grow(disk, step.inode, step.position)[step.position : step.position + len(step.data)] = step.data
    elif step.verb == "allocate":
        _grow(disk, step.inode, step.size)
    elif step.verb == "truncate":
        del _grow(disk, step.inode, step.size)[step.size :]
    elif step.verb == "unlink":
        disk.files.pop(step.name, None)
    elif step.verb in _OF_NAMES:
        disk.files.pop(step.old, None)
        disk.files[step.name] = step.inode
        disk.contents.setdefault(step.inode, bytearray())


class _FakeFile:
    """An open file of a fake disk."""

    def __init__(self, disk: FakeDisk, inode: int) -> None:
        self._disk, self._inode, self._open, self._locked = disk, inode, True, False
        disk.opened += 1

    def _data(self, operation: str) -> bytearray:
        assert self._open, f"{operation} of a closed file"
        self._disk.asked(operation)
        return self._disk.contents[self._inode]

    def write(self, parts: Sequence[Bytes], position: int) -> int:
        data = self._data("write")
        assert 0 < len(parts) <= IOV_MAX
        whole = b"".join(parts)
        room = len(whole) if self._disk.write_most is None else min(len(whole), self._disk.write_most)
        if self._disk.capacity is not None:
            free = self._disk.capacity - self._disk.used
            room = min(room, max(0, len(data) - position) + max(0, free))
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        step = Step("write", self._inode, position=position, data=whole[:room])
        _apply(self._disk, step)
        self._disk.steps.append(step)
        return room

    def read(self, position: int, size: int) -> bytes:
        return bytes(self._data("read")[position : position + size])

    def size(self) -> int:
        return len(self._data("size"))

    def truncate(self, size: int) -> None:
        self._data("truncate")
        self._step(Step("truncate", self._inode, size=size))

    def allocate(self, size: int) -> None:
        more = size - len(self._data("allocate"))
        if self._disk.capacity is not None and self._disk.used + more > self._disk.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._step(Step("allocate", self._inode, size=size))

    def _step(self, step: Step) -> None:
        _apply(self._disk, step)
        self._disk.steps.append(step)

    def sync(self) -> None:
        try:
            self._data("sync")
        except OSError:
            self._disk.steps.append(Step("sync_failed", self._inode))
            raise
        self._disk.steps.append(Step("sync", self._inode))

    def lock(self) -> None:
        self._data("lock")
        if self._inode in self._disk._locked:
            raise BlockingIOError(errno.EAGAIN, "locked")
        self._disk._locked.add(self._inode)
        self._locked = True

    def is_locked(self) -> bool:
        return not self._locked and self._inode in self._disk._locked

    def close(self) -> None:
        if self._open:
            self._open = False
            self._disk.opened -= 1
            if self._locked:
                self._disk._locked.discard(self._inode)
            self._disk.asked("close")


class _FakeDirectory:
    """An open directory of a fake disk."""

    def __init__(self, disk: FakeDisk, path: str) -> None:
        self._disk, self._path, self._open = disk, path, True

    def _name(self, name: str) -> str:
        assert "/" not in name
        return f"{self._path}/{name}"

    def _asked(self, operation: str) -> None:
        assert self._open, f"{operation} in a closed directory"
        self._disk.asked(operation)

    def names(self) -> list[str]:
        self._asked("names")
        head = self._path + "/"
        return [path.removeprefix(head) for path in self._disk.files if path.startswith(head)]

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        self._asked("open")
        path = self._name(name)
        if path not in self._disk.files:
            if not create:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            self._step(Step("create", self._disk.unused(), name=path))
        return _FakeFile(self._disk, self._disk.files[path])

    def _step(self, step: Step) -> None:
        _apply(self._disk, step)
        self._disk.steps.append(step)

    def rename(self, old: str, new: str) -> None:
        self._asked("rename")
        inode = self._disk.files[self._name(old)]
        self._step(Step("rename", inode, name=self._name(new), old=self._name(old)))

    def unlink(self, name: str) -> None:
        self._asked("unlink")
        if self._name(name) not in self._disk.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        self._step(Step("unlink", self._disk.files[self._name(name)], name=self._name(name)))

    def sync(self) -> None:
        self._asked("sync_directory")
        self._disk.steps.append(Step("sync_directory", 0))

    def is_there(self) -> bool:
        return True

    def free_bytes(self) -> int:
        self._asked("free_bytes")
        return 1 << 62 if self._disk.capacity is None else self._disk.capacity - self._disk.used

    def remove(self) -> None:
        self._asked("remove")
        self._disk._directories.discard(self._path)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._disk.opened -= 1
