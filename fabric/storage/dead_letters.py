"""The store of dead letters: a SQLite file that any tool can read, in a private directory of one process.

    store = DeadLetterStore.open(directory, limits)
    with store.transaction():                    # all of it or nothing, one commit
        store.add(letter)
        store.remove(7)
    store.close()

One connection, one thread, a rollback journal always: WAL has a bug before SQLite 3.51.3 and would save half a
millisecond of a commit that many letters share. A damaged file is set aside, what can be read of it is kept, and a new
one begins (`salvage.py`). SQLite does not sum its pages, so every row carries a checksum.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from fabric.config import Letters
from fabric.errors import (
    FabricError,
    LettersDamagedError,
    LetterStoreBrokenError,
    LetterStoreError,
    LetterStoreFullError,
    LetterStoreLockedError,
)
from fabric.storage.disk import OS_DISK, Directory, DiskFile
from fabric.storage.letter_rows import COLUMNS, KEY, LETTERS_LOCK, OVERHEAD_BYTES, SCHEMA, LetterRow, from_row, to_row
from fabric.storage.salvage import PAGE_BYTES, is_head_sound, rows_in

__all__ = ["ASIDE", "DATABASE", "DeadLetterStore"]

log = logging.getLogger("fabric.storage")

DATABASE, NEW, ASIDE = "letters.db", "letters.new", "letters.damaged"
_JOURNAL = "-journal"
_SELECT = f'SELECT {", ".join(COLUMNS[:-1])}, "sum" FROM letters'
_INSERT = f"INSERT OR IGNORE INTO letters VALUES ({', '.join('?' * len(COLUMNS))})"
_KEY_AT = tuple(COLUMNS.index(name) for name in KEY)
_FIND_OVER = f"SELECT id FROM letters WHERE kind = 'over' AND {' AND '.join(f'{name} = ?' for name in KEY)}"


class DeadLetterStore:
    """The letters of one process; `open` makes one. Of one thread: that which opens it."""

    def __init__(self, path: Path | None, limits: Letters, directory: Directory | None, *, durable: bool) -> None:
        self._path, self._limits, self._directory, self._durable = path, limits, directory, durable
        self._lock: DiskFile | None = None
        self._connection: sqlite3.Connection | None = None
        self._thread = threading.get_ident()
        self._sizes: dict[int, int] = {}
        self._notices: dict[int, None] = {}
        self._over: dict[int, None] = {}
        """Rows of letters that were handled or given up, oldest first: no letters any more, and in no count."""
        self._undo: list[tuple[int, int | None, str]] = []
        """What this transaction has changed: of each row the size before, and its kind."""
        self.bytes = 0
        """Of all letters and notices, as `LetterRow.bytes` counts them."""
        self.damages = 0
        """How often damage was found."""
        self.notices_dropped = 0
        self.lost: list[int] = []
        """Ids of letters that damage took since somebody last looked and emptied this."""

    @classmethod
    def open(cls, path: Path | None, limits: Letters, *, durable: bool = True) -> DeadLetterStore:
        """Open the store in a private directory, made if it is not there; None: in memory.

        With `durable` a commit is on the disk when it returns; without it only in the operating system, which the death
        of the process does not touch.

        Raises:
            StateDirectoryError: the directory is not private or cannot be used.
            LetterStoreLockedError: somebody has it.
            LetterStoreBrokenError, LetterStoreFullError: the disk failed, or has no room to set damage aside.
        """
        directory = None if path is None else OS_DISK.enter(path)
        store = cls(path, limits, directory, durable=durable)
        try:
            store._begin()
        except BaseException:
            store.close()
            raise
        return store

    @property
    def where(self) -> str:
        """Its directory, for errors and logs."""
        return str(self._path) if self._path is not None else "memory"

    def __len__(self) -> int:
        return len(self._sizes) - len(self._notices)

    @property
    def remembered(self) -> int:
        """How many letters that are over are still remembered."""
        return len(self._over)

    # Opening.

    def _begin(self) -> None:
        if self._directory is None:
            with self._translated():
                self._connection = self._connect(":memory:")
                self._connection.execute(SCHEMA)
            return
        with self._translated():
            self._lock = self._directory.open(LETTERS_LOCK, create=True)
            self._lock.lock()
        if DATABASE not in self._names():
            self._build(())
        try:
            with self._translated():
                self._enter()
        except LettersDamagedError as error:
            self._rescue(error)

    def _names(self) -> list[str]:
        assert self._directory is not None, "a store in memory has no files"
        with self._translated():
            return self._directory.names()

    def _connect(self, where: str) -> sqlite3.Connection:
        connection = sqlite3.connect(where, isolation_level=None, timeout=0.0)
        level = "FULL" if self._durable else "OFF"
        limits = self._limits
        pages = (limits.bytes_max + limits.remembered_max * OVERHEAD_BYTES) * 5 // 4 // PAGE_BYTES + 64
        try:
            for pragma in (
                f"page_size = {PAGE_BYTES}",
                "trusted_schema = OFF",
                "cell_size_check = ON",
                "locking_mode = EXCLUSIVE",
                "journal_mode = TRUNCATE",
                f"synchronous = {level}",
                "secure_delete = ON",  # what was removed is not found again among what is salvaged
                "mmap_size = 0",
                f"max_page_count = {pages}",
            ):
                connection.execute(f"PRAGMA {pragma}").fetchall()
        except BaseException:
            connection.close()
            raise
        return connection

    def _enter(self) -> None:
        """Open the file that is there, and look at every byte of it."""
        assert self._directory is not None and self._path is not None, "a store in memory is made, not entered"
        with contextlib.closing(self._directory.open(DATABASE)) as file:
            if not is_head_sound(file):
                raise self._damaged("its head is another one")
        connection = self._connection = self._connect(str(self._path / DATABASE))
        found = [text for (text,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")]
        if found != [SCHEMA]:
            raise self._damaged("its schema is another one")
        (verdict,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(" ".join(verdict.split()))
        self._count(connection)

    def _count(self, connection: sqlite3.Connection) -> None:
        sizes: dict[int, int] = {}
        kinds: dict[str, dict[int, None]] = {"letter": {}, "notice": {}, "over": {}}
        for row in connection.execute(f"{_SELECT} ORDER BY id"):
            letter = from_row(row)
            if letter is None:
                raise self._damaged(f"letter {row[0]} is not what was written")
            kinds[letter.kind][letter.id] = None
            if letter.kind != "over":
                sizes[letter.id] = letter.bytes
        self._sizes, self._notices, self._over, self.bytes = sizes, kinds["notice"], kinds["over"], sum(sizes.values())

    # Damage.

    def _damaged(self, detail: str) -> LettersDamagedError:
        return LettersDamagedError(detail, directory=self.where)

    def _build(self, letters: Iterator[LetterRow] | tuple[()]) -> int:
        """A new file with these letters, under its own name only when it is whole; how many of them it has."""
        assert self._directory is not None and self._path is not None, "a store in memory is never built again"
        with self._translated():
            for name in (NEW, NEW + _JOURNAL):
                with contextlib.suppress(FileNotFoundError):
                    self._directory.unlink(name)
            self._directory.open(NEW, create=True).close()  # ours before SQLite gives it a wider mode
            connection = self._connect(str(self._path / NEW))
            try:
                connection.execute("BEGIN")
                connection.execute(SCHEMA)
                done = sum(connection.execute(_INSERT, to_row(letter)).rowcount for letter in letters)
                connection.execute("COMMIT")
            finally:
                connection.close()
            with contextlib.suppress(FileNotFoundError):
                self._directory.unlink(DATABASE + _JOURNAL)  # SQLite would play it into the new file
            self._directory.rename(NEW, DATABASE)
            self._directory.sync()
        return done

    def _rescue(self, why: LettersDamagedError) -> None:
        """Set the damaged file aside, keep what can be read of it, and go on with a new one."""
        assert self._directory is not None and self._path is not None
        self.damages += 1
        before = set(self._sizes)
        self._disconnect()
        with self._translated(), contextlib.closing(self._directory.open(DATABASE)) as file:
            found = (letter for _, row in rows_in(file, columns=len(COLUMNS)) if (letter := from_row(row)) is not None)
            aside = self._path / ASIDE
            aside.unlink(missing_ok=True)  # of an earlier damage: one is kept, or they would fill the disk
            os.link(self._path / DATABASE, aside)
            kept = self._build(found)
        with self._translated():
            self._enter()
        self.lost += sorted(before - self._sizes.keys())
        log.error("%s: set aside as %s, %d letters could be read", why, ASIDE, kept)

    def find_damage(self, error: LetterStoreError) -> bool:
        """Whether the error is damage that is mended now, so that the same may be tried again. Raises as `open`."""
        if not isinstance(error, LettersDamagedError) or self._directory is None:
            return False
        self._rescue(error)
        return True

    # Writing.

    @property
    def limits(self) -> Letters:
        """Its ceilings."""
        return self._limits

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What is changed in here is on disk when it ends, or nothing of it. Raises `LetterStoreError`s."""
        connection = self._ready()
        self._undo.clear()
        try:
            with self._translated():
                connection.execute("BEGIN IMMEDIATE")
            yield
            with self._translated():
                connection.execute("COMMIT")
        except BaseException:
            for number, size, kind in [*reversed(self._undo)]:
                self._take(number, size, kind)
            if self._connection is connection:  # not in a forked child, where it is the parent's
                with contextlib.suppress(sqlite3.Error):  # the first error counts; a broken connection has none open
                    connection.execute("ROLLBACK")
            raise

    def refusal(self, letter: LetterRow) -> LetterStoreFullError | None:
        """Which ceiling leaves no room for a letter or notice; None if there is room."""
        limits = self._limits
        if letter.kind != "notice" and len(self) >= limits.rows_max:
            return self._full(f"{limits.rows_max} letters")
        if self.bytes + letter.bytes > limits.bytes_max:
            return self._full(f"{limits.bytes_max} bytes")
        return None

    def __contains__(self, number: int) -> bool:
        return number in self._sizes

    def numbers(self) -> frozenset[int]:
        """The ids of all that is in it."""
        return frozenset(self._sizes)

    def add(self, letter: LetterRow) -> bool:
        """Keep a letter, or a notice; false if its record has one, which stays.

        Raises `LetterStoreFullError` at a ceiling, and other `LetterStoreError`s.
        """
        connection, refusal = self._ready(), self.refusal(letter)
        if refusal is not None:
            raise refusal
        if letter.kind == "notice":
            self._make_room_for_notice()
        with self._translated():
            done = connection.execute(_INSERT, to_row(letter)).rowcount or self._supersede(connection, letter)
        if done:
            self._take(letter.id, letter.bytes, letter.kind)
        return bool(done)

    def _supersede(self, connection: sqlite3.Connection, letter: LetterRow) -> int:
        """A record is a letter again after its first one was over: that one is forgotten."""
        row = to_row(letter)
        key = [row[at] for at in _KEY_AT]
        found = connection.execute(_FIND_OVER, key).fetchone()
        if found is None:
            return 0
        self.remove(found[0])
        return connection.execute(_INSERT, row).rowcount

    def _take(self, number: int, size: int | None, kind: str) -> int | None:
        """Count a row as so large, or as none; what it was before."""
        before = self._sizes.pop(number, None)
        was = "notice" if number in self._notices else "over" if number in self._over else "letter"
        self._undo.append((number, before, was))
        self._notices.pop(number, None)
        self._over.pop(number, None)
        self.bytes += (size or 0) - (before or 0)
        if size is not None:
            self._sizes[number] = size
        if kind == "over":
            self._over[number] = None
        elif kind == "notice" and size is not None:
            self._notices[number] = None
        return before

    def _make_room_for_notice(self) -> None:
        while len(self._notices) >= self._limits.notices_max:
            self.remove(next(iter(self._notices)))
            self.notices_dropped += 1

    def _full(self, detail: str) -> LetterStoreFullError:
        return LetterStoreFullError(detail, directory=self.where, used=self.bytes)

    def replace(self, letter: LetterRow) -> None:
        """Note in its row what became of a letter since. One that is gone stays gone. Raises `LetterStoreError`s."""
        if self.remove(letter.id):
            with self._translated():
                self._ready().execute(_INSERT, to_row(letter))
            self._take(letter.id, letter.bytes, letter.kind)

    def end(self, letter: LetterRow) -> None:
        """A letter is over, for its `reason`. One that is gone stays gone. Raises `LetterStoreError`s.

        Where letters outlive their process its row stays, without its value, so that the next life does not handle its
        record again; beyond `remembered_max` of them the oldest is forgotten.
        """
        if not self.remove(letter.id) or not self._durable:
            return
        over = replace(letter, kind="over", detail="", metadata=b"", value=b"", cut="")
        with self._translated():
            self._ready().execute(_INSERT, to_row(over))
        self._take(letter.id, None, "over")
        while len(self._over) > self._limits.remembered_max:
            self.remove(next(iter(self._over)))

    def remove(self, number: int) -> bool:
        """Let a letter go; whether it was there. Raises `LetterStoreError`s."""
        with self._translated():
            self._ready().execute("DELETE FROM letters WHERE id = ?", (number,))
        return self._take(number, None, "letter") is not None

    # Reading.

    def read(self, number: int) -> LetterRow:
        """One letter. Raises `LettersDamagedError` if it is gone or not what was written, other `LetterStoreError`s."""
        with self._translated():
            row = self._ready().execute(f"{_SELECT} WHERE id = ?", (number,)).fetchone()
        letter = None if row is None else from_row(row)
        if letter is None:
            raise self._damaged(f"letter {number} is {'gone' if row is None else 'not what was written'}")
        return letter

    def letters(self) -> Iterator[LetterRow]:
        """All of them, oldest first. Raises as `read`."""
        with self._translated():
            for row in self._ready().execute(f"{_SELECT} ORDER BY id"):
                letter = from_row(row)
                if letter is None:
                    raise self._damaged(f"letter {row[0]} is not what was written")
                yield letter

    # Ending.

    def _ready(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LetterStoreBrokenError("it is closed", directory=self.where)
        if threading.get_ident() != self._thread:
            raise LetterStoreBrokenError("it belongs to another thread", directory=self.where)
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def close(self) -> None:
        """Let go of the file. Twice is once."""
        self._disconnect()
        for held in (self._lock, self._directory):
            if held is not None:
                held.close()
        self._lock = self._directory = None

    def destroy(self) -> None:
        """Remove everything and close. Raises `LetterStoreBrokenError`; it is closed all the same."""
        directory = self._directory
        self._disconnect()
        try:
            if directory is not None:
                with self._translated():
                    for name in directory.names():
                        directory.unlink(name)
                    directory.remove()
        finally:
            self.close()

    def abandon(self) -> None:
        """In a forked child: never touch the parent's connection, not even by its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            # Its end would roll back what the parent is about to commit: it never ends, not even with the interpreter.
            import ctypes

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        self.close()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn the errors of SQLite and of the system into ours."""
        try:
            yield
        except FabricError:
            raise
        except BlockingIOError as error:
            raise LetterStoreLockedError(directory=self.where) from error
        except OSError as error:
            raise self._of_system(error) from error
        except (sqlite3.Error, OverflowError, UnicodeError) as error:  # the last two: what a damaged row decodes to
            raise self._of_sqlite(error) from error

    def _of_system(self, error: OSError) -> LetterStoreError:
        text = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self._full(text)
        return LetterStoreBrokenError(text, directory=self.where)

    def _of_sqlite(self, error: Exception) -> LetterStoreError:
        code = getattr(error, "sqlite_errorcode", -1) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return self._full(str(error))
        if code == sqlite3.SQLITE_BUSY:
            return LetterStoreLockedError(directory=self.where)
        if code in _BROKEN:
            return LetterStoreBrokenError(str(error), directory=self.where)
        return self._damaged(str(error))


_BROKEN = frozenset(
    {
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_MISUSE,
        sqlite3.SQLITE_CONSTRAINT,
        sqlite3.SQLITE_TOOBIG,
        sqlite3.SQLITE_INTERRUPT,
    }
)
"""What the disk or we ourselves did. All else that SQLite may say of a file that only we write is damage."""
