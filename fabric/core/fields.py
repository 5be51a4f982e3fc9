"""The messages: their kinds, and the types of the fields of each. PROTOCOL.md says what the fields mean."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

__all__ = ["FIELDS", "FIELDS_BY_CODE", "Each", "Kind", "Shape"]


class Kind(IntEnum):
    """Messages on CONTROL (below 64) and BULK (from 64)."""

    HELLO = 1
    REGISTER = 2
    REGISTERED = 3
    UNREGISTER = 4
    ACKNOWLEDGE = 5
    PULL = 6
    JOIN = 7
    HEARTBEAT = 8
    UNKNOWN = 9
    STATUS = 10
    FIN = 11
    FENCED = 12
    BYE = 13
    BOOKS = 14
    BOOKED = 15
    REQUEST = 16
    ACCEPTED = 17
    REPLY = 18
    HOLDS = 19
    FETCH = 20
    LEASED = 21
    RECALL = 22
    ROSTER_ASK = 24
    ROSTER = 25
    REPAIR = 64
    AVAILABLE = 65
    CHUNK = 66
    MISSING = 67


class Each:
    """A list whose entries all have the types `shape`."""

    def __init__(self, *shape: object) -> None:
        self.shape = shape


_CARD = (str, int, int, str, str, int, int, str, str, str)
_REGISTRATION = (int, str, str, str, bool, Each(int, int), str)

FIELDS: dict[Kind, tuple[Any, ...]] = {
    # a card: name, rank + 1 (0: an observer), world size, job, host, pid, version, endpoints of DATA, CONTROL, BULK;
    # then the incarnation of you that I saw, and my subscriptions
    Kind.HELLO: (*_CARD, int, Each(*_REGISTRATION)),
    # subscription, pattern, start, delivery, resume from 0, positions (feed, floor), name of one that outlives its
    # process, or nothing
    Kind.REGISTER: _REGISTRATION,
    # subscription, number of feeds that match it by now, some of them: (feed, topic, policy, join offset, end, first
    # available, incarnation, the incarnation whose feed comes before it or 0, ending: 0 open, 1 exact, 2 not known)
    Kind.REGISTERED: (int, int, Each(int, str, str, int, int, int, int, int, int)),
    # subscription; whether it stays owed if it has a name
    Kind.UNREGISTER: (int, bool),
    # (subscription, feed, floor)
    Kind.ACKNOWLEDGE: (Each(int, int, int),),
    # feed, token, credit in bytes, ranges
    Kind.PULL: (int, int, int, Each(int, int)),
    # feeds with their nonces
    Kind.JOIN: (Each(int, int),),
    # feeds with their ends; the incarnation of you that I saw
    Kind.HEARTBEAT: (Each(int, int), int),
    # a subscription that the publisher does not know
    Kind.UNKNOWN: (int,),
    # topic, incarnation that the subscriber is at
    Kind.STATUS: (str, int),
    # topic, that incarnation, the following one and its feed, first available and end of the old, whether that end is
    # exact
    Kind.FIN: (str, int, int, int, int, int, bool),
    # the newest incarnation of you that was seen
    Kind.FENCED: (int,),
    # feeds with their ends, and whether the next life has what is missing; whether this is the last of them
    Kind.BYE: (Each(int, int, bool), bool),
    # token, my books: (subscription, feed, join offset, end that I know of, floor, settled above it, whether I closed
    # the subscription, how many records came to which end)
    Kind.BOOKS: (int, Each(int, int, int, int, int, int, bool, Each(str, int))),
    # the token of the books that I have, whether I want what is new at once
    Kind.BOOKED: (int, bool),
    # request, the lowest that I still wait for, method, priority, milliseconds left, kind, metadata, blob (or a
    # descriptor, if the kind is addressed)
    Kind.REQUEST: (int, int, str, int, int, int, bytes, bytes),
    Kind.ACCEPTED: (int,),
    # request, whether it failed, kind, blob
    Kind.REPLY: (int, bool, int, bytes),
    # space, number, position, length, token, whether each chunk has to carry its checksum
    Kind.FETCH: (int, int, int, int, int, bool),
    # (feed, serial number, whether I wait for LEASED, below this offset I need no slot, but for these)
    Kind.HOLDS: (Each(int, int, bool, int, Each(int, int)),),
    # feeds with the serial numbers of HOLDS that asked: from now on those decide what is reused
    Kind.LEASED: (Each(int, int),),
    # feeds of which you have to tell me again what you hold, and below which offset no value comes that has not come
    Kind.RECALL: (Each(int, int),),
    Kind.ROSTER_ASK: (*_CARD, int),
    Kind.ROSTER: (Each(*_CARD, int),),
    # feed, token
    Kind.REPAIR: (int, int),
    # feed, token, first available, end, lost in between
    Kind.AVAILABLE: (int, int, int, int, Each(int, int)),
    # space, number, position, token, the chunk's checksum or 0
    Kind.CHUNK: (int, int, int, int, int),
    Kind.MISSING: (int, int, int),
}


class Shape:
    """What a list of fields must look like, prepared for a quick look: the types first, then the signs of numbers."""

    def __init__(self, wanted: tuple[Any, ...]) -> None:
        self._types = [list if isinstance(one, Each) else one for one in wanted]
        self._numbers = [index for index, one in enumerate(wanted) if one is int]
        self._lists = [(index, Shape(one.shape)) for index, one in enumerate(wanted) if isinstance(one, Each)]

    def fits(self, values: object) -> bool:
        """Whether these are such fields. msgpack's integers are below 2**64; they may be negative, ours are not."""
        if type(values) is not list or list(map(type, values)) != self._types:
            return False
        for index in self._numbers:
            if values[index] < 0:
                return False
        return not self._lists or all(shape.fits(entry) for index, shape in self._lists for entry in values[index])


FIELDS_BY_CODE = {int(kind): (kind, Shape(wanted)) for kind, wanted in FIELDS.items()}
