"""What a test left behind: threads, and descriptors of the kinds that the fabric opens."""

from __future__ import annotations

import os
import stat
import tempfile
import threading
from collections.abc import Iterator

# Kinds of descriptors that the fabric opens. Others (a library's cache, /dev/urandom) are opened once and stay.
_OURS = ("socket:", "anon_inode:[eventfd]", "anon_inode:[eventpoll]", "anon_inode:[pidfd]", "/memfd:", "/dev/shm/")


class Snapshot:
    """The threads and descriptors of this process at one moment."""

    __slots__ = ("_descriptors", "_threads")

    def __init__(self) -> None:
        self._threads, self._descriptors = set(threading.enumerate()), set(_descriptors())

    def left(self) -> list[str]:
        """What is there now and was not then, by name."""
        threads = [
            f"thread {thread.name}"
            for thread in threading.enumerate()
            # Libraries keep daemon threads for good; ours must end with their fabric.
            if thread not in self._threads and (not thread.daemon or thread.name.startswith("fabric"))
        ]
        opened = sorted(
            f"descriptor {number} of {target}" for number, _, target in {*_descriptors()} - self._descriptors
        )
        return [*threads, *opened]


def _descriptors() -> Iterator[tuple[int, int, str]]:
    """Number, inode and target of each open descriptor of our kinds."""
    for name in os.listdir("/proc/self/fd"):
        try:
            target, status = os.readlink(f"/proc/self/fd/{name}"), os.stat(int(name))
        except OSError:
            continue  # the listing's own descriptor
        if target.startswith(_OURS) or (stat.S_ISREG(status.st_mode) and _is_test_data(target)):
            yield int(name), status.st_ino, target


def _is_test_data(target: str) -> bool:
    """A file in a test's own folder; pytest's capture files, also temporary, lie outside and are deleted."""
    return target.startswith((f"{tempfile.gettempdir()}/tf-", f"{tempfile.gettempdir()}/pytest-of-"))
