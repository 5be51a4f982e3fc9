"""Who subscribed to what of ours, and the form in which that outlives this process (RULES P3, S1, S9).

A subscription without a name is as long-lived as the life of its member; one with a name is owed what it misses until
it is ended or expires. A member with state writes them down before it confirms them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import msgpack

from fabric.config import Start
from fabric.core.feeds import Reader
from fabric.core.fields import Each, Shape
from fabric.core.members import NAME_BYTES_MAX, Context, Peer, S
from fabric.core.wire import Drop
from fabric.errors import TopicError
from fabric.topics import Pattern, compile_pattern

__all__ = ["Registration", "Registrations"]

REGISTRATIONS_PER_PEER_MAX = 4096
"""Subscriptions that one peer may hold here."""
UNMET_NS = 60 * S
RESTORED = -(2**62)
"""A subscription without a name, of an earlier life of ours, has this number less its own until its member comes."""
NUMBER_MAX = 2**62
"""Of a subscription, as its member gives it."""
_SAVED = Shape((int, Each(str, int, int, str, str, str, Each(int, int))))
"""The life that saved them, and of each: member, number, its life, name, pattern, start, and (feed, position)."""


class Registration:
    """A subscription of a member.

    `joins`: where its present session began in each feed that it is owed, or where it stood when that was written down;
    a repeated HELLO gets the same answer. `unproven`: those of which the subscriber has not said that it knows; they
    are told again.
    """

    __slots__ = (
        "absent_ns",
        "best_effort",
        "from_start",
        "incarnation",
        "joins",
        "name",
        "pattern",
        "reader",
        "saved",
        "since",
        "start",
        "unproven",
    )

    def __init__(
        self, reader: Reader, incarnation: int, pattern: Pattern, start: str, best_effort: bool, from_start: bool
    ) -> None:
        self.reader, self.incarnation, self.pattern, self.start = reader, incarnation, pattern, start
        self.best_effort, self.from_start, self.name = best_effort, from_start, ""
        self.joins: dict[int, int] = {}
        self.unproven: dict[int, None] = {}
        self.absent_ns = 0
        """Since when nobody has it open; 0 if somebody has."""
        self.saved = 0
        """The write that it waits for before it is confirmed; 0 if none."""
        self.since = 0
        """The life of ours in which its present session began; 0 if it is new. Of the feeds of that life, and of later
    ones, those that do not stand in `joins` it is owed from 0."""

    def forget(self, feed: int) -> None:
        """It is done with this feed."""
        self.joins.pop(feed, None)
        self.unproven.pop(feed, None)


class Registrations:
    """All of them, by member and number. One that nobody has open has a number below 0: nobody waits for it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._all: dict[str, dict[int, Registration]] = {}
        self._absent = 0
        self.persists = False
        """Whether they outlive this process."""
        self.changed = False
        """Whether what is on disk is behind."""

    def __iter__(self) -> Iterator[Registration]:
        return (registration for some in self._all.values() for registration in some.values())

    def of(self, member: str) -> dict[int, Registration]:
        """Those of a member, by number."""
        return self._all.get(member, {})

    def is_confirmed(self, member: str, number: int) -> bool:
        """Whether it does not wait for the disk."""
        registration = self.of(member).get(number)
        return registration is not None and not registration.saved

    def opened(self, peer: Peer, fields: list[Any]) -> tuple[Registration, bool, Reader] | None:
        """The registration that these fields of REGISTER mean, whether this session of it is new, and who read before.

        None if they are not sound; that is counted.
        """
        number, text, start, delivery, from_start, _, name = fields
        mine = self._all.setdefault(peer.name, {})
        known = mine.get(number)
        if known is not None and known.incarnation == peer.incarnation and known.name == name:
            return known, False, known.reader
        if name:
            known = next((one for one in mine.values() if one.name == name and one.pattern.text == text), None)
        else:
            known = mine.get(RESTORED - number)
            known = known if known is not None and known.incarnation == peer.incarnation else None
        if known is not None:
            former = known.reader
            self._move(known, number)
            known.incarnation, known.absent_ns, self.changed = peer.incarnation, 0, True
            return known, True, former
        if len(mine) >= REGISTRATIONS_PER_PEER_MAX:
            self._context.counts[Drop.NO_ROOM] += 1
            return None
        if number > NUMBER_MAX or len(name.encode(errors="replace")) > NAME_BYTES_MAX:
            self._context.counts[Drop.SHAPE] += 1
            return None
        try:
            pattern, start = compile_pattern(text), Start(start)
        except (TopicError, ValueError):
            self._context.counts[Drop.SHAPE] += 1
            return None
        reader = peer.name, number
        made = Registration(reader, peer.incarnation, pattern, start, delivery == "best_effort", bool(from_start))
        made.name = name
        mine[number] = made
        self.changed |= not made.best_effort
        return made, True, reader

    def _move(self, registration: Registration, number: int) -> None:
        member, before = registration.reader
        mine = self._all[member]
        del mine[before]
        registration.reader = member, number
        mine[number] = registration

    def leave(self, registration: Registration) -> None:
        """Nobody has it open any more; it has a name, and stays."""
        self._absent -= 1
        self._move(registration, self._absent)
        registration.absent_ns = self._context.now
        registration.unproven.clear()

    def overdue(self, absent_ns: int) -> list[Registration]:
        """Those that nobody has had open for so long; without a name, and met in no life of ours, a minute is long."""
        now, unmet_ns = self._context.now, min(absent_ns, UNMET_NS)
        return [one for one in self if one.absent_ns and now - one.absent_ns > (absent_ns if one.name else unmet_ns)]

    def drop(self, member: str, number: int) -> Registration | None:
        """It ended."""
        dropped = self._all.get(member, {}).pop(number, None)
        self.changed |= dropped is not None and not dropped.best_effort
        return dropped

    # On disk.

    def pack(self, position_of: Callable[[Registration, int], int]) -> bytes:
        """What is owed to whom. What is acknowledged after this counts again in the next life (P3)."""
        self.changed = False
        rows = [
            (
                one.reader[0],
                _number_of(one),
                one.incarnation,
                one.name,
                one.pattern.text,
                str(one.start),
                [(feed, position_of(one, feed)) for feed in one.joins],
            )
            for one in self
            if not one.best_effort
        ]
        packed: bytes = msgpack.packb((self._context.incarnation, rows))
        return packed

    def restore(self, packed: bytes | None) -> bool:
        """What an earlier life packed; whether it could be read. None: it could not. Empty: there was nothing."""
        if packed == b"":
            return True
        try:
            fields: Any = msgpack.unpackb(packed) if packed is not None else None
            if not _SAVED.fits(fields):
                raise ValueError(fields)
            restored = [self._restored(fields[0], *row) for row in fields[1]]
        except (ValueError, TypeError, TopicError):
            self._context.counts["registrations_unreadable"] += 1
            return False
        for registration in restored:
            member, number = registration.reader
            if registration.name or member != self._context.name:  # or it was ours, and ended with that life
                self._all.setdefault(member, {})[number] = registration
        return True

    def _restored(
        self,
        since: int,
        member: str,
        number: int,
        incarnation: int,
        name: str,
        text: str,
        start: str,
        joins: list[list[int]],
    ) -> Registration:
        if name:
            self._absent -= 1
        number = self._absent if name else RESTORED - number
        restored = Registration((member, number), incarnation, compile_pattern(text), Start(start), False, True)
        restored.name, restored.absent_ns = name, max(1, self._context.now)
        restored.since = since
        restored.joins.update((feed, position) for feed, position in joins)
        return restored


def _number_of(registration: Registration) -> int:
    """The one that its member gave; 0 if nobody has it open."""
    number = registration.reader[1]
    return number if number >= 0 else 0 if registration.name else RESTORED - number
