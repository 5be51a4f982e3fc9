"""What can still be read of a damaged SQLite file: every leaf page is looked at by itself, without its tree.

SQLite stops where its tree is broken. A letter has a checksum of its own, so any page that looks like a leaf may be
read: what fails its checksum is dropped. Pages and rows that were deleted hold zeros (`secure_delete`), so nothing
comes back that was removed. The format: https://www.sqlite.org/fileformat2.html, sections 1.6 and 2.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fabric.storage.disk import DiskFile

__all__ = ["PAGE_BYTES", "is_head_sound", "rows_in"]

PAGE_BYTES = 4096
_LEAF = 13
_FILE_HEADER_BYTES = 100
_INTEGERS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
"""Serial type -> bytes."""
_LOCAL_MAX = PAGE_BYTES - 35
_LOCAL_MIN = (PAGE_BYTES - 12) * 32 // 255 - 23
_OVERFLOW_BYTES = PAGE_BYTES - 4


_HEAD = b"SQLite format 3\0" + PAGE_BYTES.to_bytes(2, "big") + bytes((1, 1, 0, 64, 32, 32))
_SETTINGS = (4, 0, 0, 1, 0, 0, 0)
"""From byte 44: schema format, cache, vacuum, UTF-8, user version, vacuum, application; then zeros up to 92."""


def is_head_sound(file: DiskFile) -> bool:
    """Whether what never changes in the head of our files is as it was made; some of it SQLite just believes."""
    head = file.read(0, _FILE_HEADER_BYTES)
    settings = b"".join(number.to_bytes(4, "big") for number in _SETTINGS)
    return head[:24] == _HEAD and head[44:92] == settings.ljust(48, b"\0")


class _Pages:
    """The pages of one file, by number from 1."""

    def __init__(self, file: DiskFile) -> None:
        self._file = file
        self.count = -(-file.size() // PAGE_BYTES)

    def read(self, number: int) -> bytes:
        """One page; shorter at the end of a file that was cut, and empty where there is none."""
        if not 1 <= number <= self.count:
            return b""
        return self._file.read((number - 1) * PAGE_BYTES, PAGE_BYTES)


def rows_in(file: DiskFile, *, columns: int) -> Iterator[tuple[int, list[Any]]]:
    """(page, values) of every row with so many columns; the first, its primary key, is filled in.

    Total: any bytes give rows or nothing. The caller checks them. Raises `OSError` if the file cannot be read.
    """
    pages = _Pages(file)
    for number in range(2, pages.count + 1):  # the first page has the schema alone
        page = pages.read(number)
        if page[:1] != bytes([_LEAF]):
            continue
        cells = int.from_bytes(page[3:5], "big")
        for at in range(8, 8 + 2 * min(cells, PAGE_BYTES // 8), 2):
            try:
                row = _row(pages, page, int.from_bytes(page[at : at + 2], "big"), columns)
            except (IndexError, ValueError):  # it points outside, or holds what is no text
                continue
            if row is not None:
                yield number, row


def _row(pages: _Pages, page: bytes, at: int, columns: int) -> list[Any] | None:
    size, at = _varint(page, at)
    key, at = _varint(page, at)
    if size > pages.count * PAGE_BYTES:
        return None
    payload = _payload(pages, page, at, size)
    if len(payload) != size:
        return None
    end, at = _varint(payload, 0)
    kinds: list[int] = []
    while at < end and len(kinds) <= columns:
        kind, at = _varint(payload, at)
        kinds.append(kind)
    if len(kinds) != columns:
        return None
    values: list[Any] = []
    for kind in kinds:
        value, at = _value(payload, at, kind)
        values.append(value)
    values[0] = key
    return values


def _payload(pages: _Pages, page: bytes, at: int, size: int) -> bytes:
    if size <= _LOCAL_MAX:
        return page[at : at + size]
    local = _LOCAL_MIN + (size - _LOCAL_MIN) % _OVERFLOW_BYTES
    if local > _LOCAL_MAX:
        local = _LOCAL_MIN
    parts, left = [page[at : at + local]], size - local
    following = page[at + local : at + local + 4]
    while left > 0:
        overflow = pages.read(int.from_bytes(following, "big"))
        part = overflow[4 : 4 + min(left, _OVERFLOW_BYTES)]
        if not part:
            break
        parts.append(part)
        left -= len(part)
        following = overflow[:4]
    return b"".join(parts)


def _value(payload: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (8, 9):
        return kind - 8, at
    if kind in _INTEGERS:
        end = at + _INTEGERS[kind]
        return int.from_bytes(payload[at:end], "big", signed=True), end
    if kind < 12:
        return None, at
    end = at + (kind - 12) // 2
    data = payload[at:end]
    return (data.decode() if kind % 2 else data), end


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer here, and where it ends: seven bits a byte, all eight of the ninth. Raises `IndexError`."""
    value = 0
    for n in range(8):
        byte = data[at + n]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + n + 1
    return value << 8 | data[at + 8], at + 9
