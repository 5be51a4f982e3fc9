"""What is in the hand of handlers, in one page of a file that is mapped into memory.

A record is noted before its handler starts. The kernel keeps the page when the process is killed, so the next life
knows which records were in hand, and how often: one that kills its process again and again is counted. Nothing is
synced: it survives the process, not the host, whose loss of power is no message's fault.

A letter that was handled is noted, too, until its store has written that it is over: who is killed between the two does
not handle it again.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import struct
import threading
from pathlib import Path

from xxhash import xxh3_64_intdigest

from fabric.errors import LetterStoreBrokenError, LetterStoreError, LetterStoreFullError
from fabric.storage.letter_rows import LetterKey

__all__ = ["HAND", "SLOTS", "HandPage", "key_of"]

log = logging.getLogger("fabric.storage")

HAND = "hand"
SLOTS = 1023
"""Records in hand at once, those included that waited for another attempt when their process died."""
_HEAD = b"tensor-fabric: in hand, form 1\0\0"
_SLOT = struct.Struct("<QIIQ8x")
"""Key, attempts, whether it was handled, checksum."""
_NOTED = struct.Struct("<QII")
_EMPTY = bytes(_SLOT.size)
_BYTES = len(_HEAD) + SLOTS * _SLOT.size


class HandPage:
    """The page of one process; `open` makes one. The caller keeps others out by the lock of the store beside it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._map: mmap.mmap | None = mapped
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self.suspects: dict[int, int] = {}
        """Attempts by key of what an earlier life had in hand when it ended, and this one has not settled."""
        self.finished: set[int] = set()
        """Keys of letters that were handled, and of which no store has said yet that it knows."""
        self._lock = threading.Lock()
        """Handlers note, subscriptions finish, and the storage thread forgets."""
        self.overflows = 0
        """Records that were not noted, because more were in hand than there are slots."""

    @classmethod
    def open(cls, directory: Path) -> HandPage:
        """Map the page of a directory, made if it is not there; one that is damaged begins anew, loudly.

        Raises:
            LetterStoreFullError: the disk has no room for 32 KiB.
            LetterStoreBrokenError: it cannot be opened or mapped.
        """
        try:
            page = cls(_map(directory / HAND))
        except OSError as error:
            raise _translated(error, directory) from error
        page._look(str(directory))
        return page

    def _look(self, where: str) -> None:
        page = self._map
        assert page is not None
        if page[: len(_HEAD)] != _HEAD:
            if any(page[:]):  # a copy: a map is iterated as bytes objects, none of which is false
                log.error("what was in hand in %s is damaged: nothing of it is counted", where)
            page[:] = _HEAD.ljust(_BYTES, b"\0")
        damaged = 0
        for at in range(len(_HEAD), _BYTES, _SLOT.size):
            slot = page[at : at + _SLOT.size]
            key, attempts, handled, checksum = _SLOT.unpack(slot)
            if slot != _EMPTY and (checksum != xxh3_64_intdigest(slot[: _NOTED.size]) or key in self._slots):
                damaged += 1
                page[at : at + _SLOT.size] = slot = _EMPTY
            if slot == _EMPTY:
                self._free.append(at)
                continue
            self._slots[key] = at
            if handled:
                self.finished.add(key)
            else:
                self.suspects[key] = attempts
        if damaged:
            log.error("%d records that were in hand in %s cannot be read: they are not counted", damaged, where)

    def note(self, key: int, attempts: int) -> None:
        """This attempt of a record begins."""
        with self._lock:
            self._write(key, attempts, handled=0)

    def finish(self, key: int) -> None:
        """This letter was handled: until it is forgotten, that outlives the process."""
        with self._lock:
            self.suspects.pop(key, None)
            if self._write(key, 0, handled=1):
                self.finished.add(key)

    def _write(self, key: int, attempts: int, *, handled: int) -> bool:
        at = self._slots.get(key)
        if at is None:
            if not (self._free or self._forget_one()):
                self.overflows += 1
                return False
            at = self._slots[key] = self._free.pop()
        if self._map is not None:
            noted = _NOTED.pack(key, attempts, handled)
            _SLOT.pack_into(self._map, at, key, attempts, handled, xxh3_64_intdigest(noted))
        return True

    def _forget_one(self) -> bool:
        """Make room: the suspect with the fewest attempts has most of them left."""
        if not self.suspects:
            return False
        self._free_slot(min(self.suspects, key=self.suspects.__getitem__))
        return True

    def forget(self, key: int) -> None:
        """The record is settled, or the store knows that the letter was handled."""
        with self._lock:
            self._free_slot(key)

    def _free_slot(self, key: int) -> None:
        at = self._slots.pop(key, None)
        self.suspects.pop(key, None)
        self.finished.discard(key)
        if at is not None:
            self._free.append(at)
            if self._map is not None:
                self._map[at : at + _SLOT.size] = _EMPTY

    def begin(self, key: int) -> int:
        """How often an earlier life had this record in hand when it died. It is no suspect any more, but noted."""
        if not self.suspects:
            return 0
        with self._lock:
            return self.suspects.pop(key, 0)

    def clear(self) -> None:
        """Forget all that this life had in hand: it ends well. What an earlier one left stays suspect."""
        for key in self._slots.keys() - self.suspects.keys() - self.finished:
            self.forget(key)

    def close(self) -> None:
        """Unmap it; in a forked child, too. Twice is once."""
        page, self._map = self._map, None
        if page is not None:
            page.close()


def key_of(key: LetterKey) -> int:
    """The number of a record in the page: two of them meet with probability 2**-64."""
    subscription, source, incarnation, topic, offset = key
    return xxh3_64_intdigest(f"{subscription}\0{source}\0{incarnation}\0{topic}\0{offset}".encode())


def _map(path: Path) -> mmap.mmap:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        size = os.fstat(fd).st_size
        if size != _BYTES:
            if size:
                log.error("what was in hand in %s has another size: nothing of it is counted", path.parent)
            os.ftruncate(fd, 0)
        os.posix_fallocate(fd, 0, _BYTES)  # a write into a page without a block would end the process (SIGBUS)
        return mmap.mmap(fd, _BYTES)
    finally:
        os.close(fd)


def _translated(error: OSError, directory: Path) -> LetterStoreError:
    text, where = error.strerror or str(error), str(directory)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return LetterStoreFullError(text, directory=where, used=0)
    return LetterStoreBrokenError(text, directory=where)
