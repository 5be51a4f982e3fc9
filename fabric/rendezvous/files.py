"""Private files: directories that only we can enter, and small files that are whole or not there.

No text of a peer becomes a path: names are digests or numbers. Nothing follows a symbolic link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import stat
from pathlib import Path

from fabric.errors import RendezvousError

__all__ = ["digest", "private_directory", "read_small", "remove", "write_whole"]

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_ATTEMPTS = 8

_counter = itertools.count()


def digest(*texts: str) -> str:
    """16 hex digits that stand for these texts in a path."""
    joined = b"\0".join(text.encode("utf-8", "surrogatepass") for text in texts)
    return hashlib.blake2s(joined, digest_size=8).hexdigest()


def private_directory(path: Path) -> Path:
    """This directory, made if it is missing, and certain to be ours alone.

    Raises:
        RendezvousError: It cannot be made, is a link, belongs to another user, or others may enter it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        status = path.lstat()
    except OSError as error:
        raise RendezvousError(f"the directory {str(path)!r} cannot be used: {error.strerror}") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise RendezvousError(f"{str(path)!r} must be a directory of user {os.geteuid()} that no other may enter")
    return path


def write_whole(path: Path, text: str) -> None:
    """Write a file of mode 0600 so that a reader sees all of it or what was there before.

    Raises:
        RendezvousError: It cannot be written.
    """
    temporary = path.with_name(f".{os.getpid()}-{next(_counter)}.tmp")
    try:
        for attempt in range(_ATTEMPTS):
            private_directory(path.parent)  # another member may have tidied it away between the two calls
            try:
                _write(temporary, text.encode("utf-8"))
                temporary.replace(path)
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
            else:
                return
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RendezvousError(f"a card cannot be written to {str(path.parent)!r}: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    with open(os.open(path, _CREATE, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # on a shared file system the rename may be seen before the bytes


def read_small(path: Path, limit: int) -> bytes | None:
    """The bytes of a regular file of ours, or None if there is none.

    Raises:
        RendezvousError: It is no regular file of ours, has more than `limit` bytes, or cannot be read.
    """
    try:
        with open(os.open(path, _OPEN), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise RendezvousError("its file is not ours")
            data = file.read(limit + 1)
    except OSError as error:
        if error.errno in _GONE:
            return None
        raise RendezvousError(f"its file cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise RendezvousError(f"its file has more than {limit} bytes")
    return data


def remove(path: Path) -> None:
    """Remove a file, and its directory if that was the last; what is gone already is well."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        path.parent.rmdir()
