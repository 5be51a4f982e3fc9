"""The seam to the operating system: what the spill log asks of a disk, and the real one. Tests play faults behind it.

Everything happens in one directory that stays open: a name cannot be turned into another file by whoever may rename
the directories above it. Files are 0600, never followed through a link, and closed in a program that is started.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from fabric.errors import StateDirectoryError

__all__ = ["IOV_MAX", "OS_DISK", "Bytes", "Directory", "Disk", "DiskFile", "OsDisk"]

Bytes: TypeAlias = bytes | bytearray | memoryview

IOV_MAX = max(16, os.sysconf("SC_IOV_MAX"))
"""Most parts of one write: 1,024 on Linux. Where the limit is unknown (-1), POSIX grants 16."""
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_FLOCK = struct.Struct("@hhqqi0q")
"""`struct flock` of 64-bit Linux: type, whence, start, length, owner (fcntl(2))."""
_READ_MOST = 1 << 30
"""Linux moves at most 2 GiB less a page in one call."""


class DiskFile(Protocol):
    """One open file. Everything may raise `OSError`."""

    def write(self, parts: Sequence[Bytes], position: int) -> int:
        """Write at most `IOV_MAX` parts with one call, which may stop early; how many bytes it wrote."""

    def read(self, position: int, size: int) -> bytes:
        """So many bytes, fewer where the file ends."""

    def size(self) -> int:
        """Where the file ends."""

    def truncate(self, size: int) -> None:
        """Let the file end here, and give back what lay behind."""

    def allocate(self, size: int) -> None:
        """Take the blocks for so many bytes now: a write into them cannot find the disk full."""

    def sync(self) -> None:
        """Return when the data, and what is needed to find it, is on the disk."""

    def lock(self) -> None:
        """Lock it for this process until it is closed; `BlockingIOError` if somebody has it."""

    def is_locked(self) -> bool:
        """Whether another process has locked it."""

    def close(self) -> None:
        """Close it. Twice is once."""


class Directory(Protocol):
    """One open directory. Names hold no slash. Everything may raise `OSError`."""

    def names(self) -> list[str]:
        """What is in it."""

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        """Open a file, with `create` also one that is not there yet."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in one step."""

    def unlink(self, name: str) -> None:
        """Remove a file."""

    def sync(self) -> None:
        """Return when names that were made, changed and removed are on the disk."""

    def is_there(self) -> bool:
        """Whether nobody has removed it."""

    def free_bytes(self) -> int:
        """What this user may still write to the file system."""

    def remove(self) -> None:
        """Remove the directory, which must be empty."""

    def close(self) -> None:
        """Close it. Twice is once."""


class Disk(Protocol):
    """Where directories come from."""

    def enter(self, directory: Path) -> Directory:
        """Open a private directory, made if it is not there.

        Raises:
            StateDirectoryError: it is a link, somebody else's, open to others, or cannot be used.
        """


_locked: set[tuple[int, int, int]] = set()
"""Process, device and inode of the files locked here. A record lock does not keep its own process out, and is lost
when *any* descriptor of the file is closed: a locked file is not opened again. The process id makes a forked child,
which inherits this set and not the locks, start from nothing."""


class OsFile:
    """A file of the operating system."""

    __slots__ = ("_directory", "_fd", "_key", "_name")

    def __init__(self, directory: int, name: str, flags: int) -> None:
        self._directory, self._name, self._key = directory, name, (0, 0, 0)
        self._fd = os.open(name, flags, 0o600, dir_fd=directory)

    def write(self, parts: Sequence[Bytes], position: int) -> int:
        return os.pwritev(self._fd, parts, position)

    def read(self, position: int, size: int) -> bytes:
        data = os.pread(self._fd, min(size, _READ_MOST), position)
        if size <= _READ_MOST or len(data) < _READ_MOST:
            return data
        return data + self.read(position + len(data), size - len(data))

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def allocate(self, size: int) -> None:
        os.posix_fallocate(self._fd, 0, size)

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def lock(self) -> None:
        # A record lock and not flock: a forked child shares an flock, and would keep it after our end.
        import fcntl

        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # POSIX lets the system choose between EACCES and EAGAIN
            raise BlockingIOError(error.errno, error.strerror) from error
        mine = os.fstat(self._fd)
        key = os.getpid(), mine.st_dev, mine.st_ino
        if _identity(self._directory, self._name) != key:
            raise BlockingIOError(errno.EAGAIN, "its owner removed it just now")
        _locked.add(key)
        self._key = key

    def is_locked(self) -> bool:
        import fcntl

        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        return bool(_FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            _locked.discard(self._key)
            os.close(fd)


def _identity(directory: int, name: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return os.getpid(), found.st_dev, found.st_ino


class OsDirectory:
    """A directory of the operating system."""

    __slots__ = ("_fd", "_path")

    def __init__(self, path: Path, fd: int) -> None:
        self._path, self._fd = path, fd

    def names(self) -> list[str]:
        return os.listdir(self._fd)

    def open(self, name: str, *, create: bool = False) -> DiskFile:
        if _identity(self._fd, name) in _locked:
            raise BlockingIOError(errno.EAGAIN, "this process holds its lock")
        return OsFile(self._fd, name, _FLAGS | os.O_CREAT if create else _FLAGS)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._fd)

    def sync(self) -> None:
        os.fsync(self._fd)

    def is_there(self) -> bool:
        return os.fstat(self._fd).st_nlink > 0

    def free_bytes(self) -> int:
        found = os.fstatvfs(self._fd)
        return found.f_bavail * found.f_frsize

    def remove(self) -> None:
        self._path.rmdir()

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OsDisk:
    """The disk of the operating system."""

    __slots__ = ()

    def enter(self, directory: Path) -> Directory:
        """Open a private directory; see `Disk`."""
        try:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700, parents=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise StateDirectoryError(_why(error), directory=str(directory)) from error
        try:
            _check_private(directory, os.fstat(fd))
        except StateDirectoryError:
            os.close(fd)
            raise
        return OsDirectory(directory, fd)


def _why(error: OSError) -> str:
    # O_NOFOLLOW with O_DIRECTORY says ENOTDIR of a link on Linux, ELOOP elsewhere.
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        return "it is a link or no directory; name the directory itself"
    return error.strerror or str(error)


def _check_private(directory: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise StateDirectoryError(f"it belongs to user {found.st_uid}", directory=str(directory))
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(found.st_mode):04o}"
        raise StateDirectoryError(f"others may enter it (mode {mode}); chmod 700", directory=str(directory))


OS_DISK = OsDisk()
