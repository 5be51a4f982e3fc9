"""Every error that the fabric raises: one root, leaves named by cause, typed fields instead of prepared sentences.

`ClosedError` means that *you* closed it, `BrokenError` that *it* broke (the original is `__cause__`),
`InternalError` that the fabric itself is wrong. `retriable` answers the caller's first question. All of them survive
pickling, because process pools pickle what they raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = [
    "BrokenError",
    "CircuitOpenError",
    "ClosedError",
    "ConfigError",
    "DamagedRecordError",
    "FabricError",
    "InternalError",
    "JoinTimeoutError",
    "LetterStoreBrokenError",
    "LetterStoreError",
    "LetterStoreFullError",
    "LetterStoreLockedError",
    "LettersDamagedError",
    "MutationError",
    "PayloadError",
    "PayloadTooLargeError",
    "ProtocolError",
    "QueueFullError",
    "ReceiveTimeoutError",
    "RemoteFailureError",
    "RendezvousError",
    "RequestError",
    "RequestTimeoutError",
    "SchemaError",
    "SeedError",
    "SpillBrokenError",
    "SpillError",
    "SpillFullError",
    "SpillLockedError",
    "StateDirectoryError",
    "SubscribeTimeoutError",
    "TopicError",
    "UnknownPeerError",
    "UnsupportedValueError",
    "VersionMismatchError",
    "WaitTimeoutError",
    "WireFormatError",
    "WrongProcessError",
    "WrongThreadError",
]


class FabricError(Exception):
    """The root of all errors of the fabric.

    Leaves take keyword fields, keep them as attributes, and build their message from `template`.
    """

    retriable: ClassVar[bool] = False
    """Whether the same call may succeed later without any change to the program."""

    template: ClassVar[str] = "{detail}"

    def __init__(self, detail: str = "", **fields: Any) -> None:  # noqa: ANN401 - the leaves' fields are of many types
        self.detail, self.fields = detail, fields
        self.__dict__.update(fields)
        super().__init__(self.template.format(detail=detail, **fields))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.detail, self.fields)


def _rebuild(kind: type[FabricError], detail: str, fields: dict[str, Any]) -> FabricError:
    return kind(detail, **fields)


# What the caller asked for is impossible.


class ConfigError(FabricError, ValueError):
    """A setting is impossible or not available yet. Field: `field`, the setting's name."""

    template = "{field}: {detail}"


class TopicError(FabricError, ValueError):
    """A topic or pattern is malformed. Field: `topic`, at most 80 characters of it."""

    template = "{topic!r}: {detail}"


class SeedError(FabricError, ValueError):
    """A seed is not an integer in 0 <= seed < 2**63. Field: `seed`."""

    template = "{seed!r} is no seed: {detail}"


class PayloadError(FabricError):
    """A value cannot travel, or a received payload cannot be decoded."""


class UnsupportedValueError(PayloadError, TypeError):
    """A value of a kind that the fabric refuses. Fields: `kind`, `where` in the value; the detail says what to do."""

    template = "{where}: {kind} cannot be published; {detail}"


class PayloadTooLargeError(PayloadError, ValueError):
    """The value would be larger than the limit; nothing was packed. Fields: `size`, `limit`, in bytes."""

    template = "the value takes {size} bytes, the limit is {limit}"


class SchemaError(PayloadError, ValueError):
    """A received payload does not describe a value: truncated, wrong type, or sizes that do not agree."""


class MutationError(FabricError):
    """A value may be changed, or was, after it was published; nothing was taken.

    Fields: `topic`, `seed`; `line`, where it was published, as `file:line`.
    """

    template = "{topic}, seed {seed}, published at {line}: {detail}"


class UnknownPeerError(FabricError, LookupError):
    """No member has this rank or name. Fields: `peer`, `known`."""

    template = "no member {peer!r}; known are {known}"


# Waiting came to its end.


class WaitTimeoutError(FabricError, TimeoutError):
    """A bounded wait ran out. Fields: `waited_s`, `state`, what was reached: peers, last offset, what is missing."""

    retriable = True
    template = "{detail} within {waited_s:g} s ({state})"


class ReceiveTimeoutError(WaitTimeoutError):
    """No message came in time."""


class SubscribeTimeoutError(WaitTimeoutError):
    """A live peer did not confirm the subscription in time; it is named in `state`."""


class JoinTimeoutError(WaitTimeoutError):
    """Not all members were met in time; the missing ones are named in `state`."""


class QueueFullError(FabricError):
    """There was no room, or the disk takes nothing, which then is the cause; nothing was taken.

    Fields: `queue`; `limit` and `used`, in bytes, of what may be owed in memory; `waited_s`.
    """

    retriable = True
    template = "{queue} takes nothing: {used} of {limit} bytes owed, waited {waited_s:g} s; nothing was taken{detail}"


class CircuitOpenError(FabricError):
    """A circuit breaker lets nothing through now; nothing was begun. Field: `state`, `open` or `half_open`."""

    retriable = True
    template = "the circuit breaker is {state}"


# Requests.


class RequestError(FabricError):
    """A request did not get its answer."""


class RequestTimeoutError(RequestError, WaitTimeoutError):
    """No answer before the deadline. `accepted` in `state` says whether the responder had taken the request."""

    retriable = True
    template = WaitTimeoutError.template


class RemoteFailureError(RequestError):
    """The responder's handler raised, or has no such method. Fields: `peer`, `kind`, the remote exception's name."""

    template = "{peer} failed: {kind}: {detail}"


# What a peer or the world did.


class ProtocolError(FabricError):
    """A peer sent something that the protocol forbids."""


class WireFormatError(ProtocolError):
    """A frame is malformed: its `reason` is one of the counted drop reasons."""

    template = "malformed frame ({reason}): {detail}"


class VersionMismatchError(ProtocolError):
    """A peer speaks another version of the protocol. Fields: `peer`, `ours`, `theirs`."""

    template = "{peer} speaks protocol version {theirs}, we speak {ours}"


class RendezvousError(FabricError):
    """The members could not find each other; the detail says what was tried."""


# The disk.


class SpillError(FabricError):
    """The spill log could not do what it was asked to. Field of all but `DamagedRecordError`: `directory`."""


class SpillFullError(SpillError):
    """There is no room: a ceiling, a quota or the disk; nothing was taken. Fields: `directory`, `used` in bytes."""

    retriable = True
    template = "the spill log in {directory} is full at {used} bytes: {detail}; nothing was taken"


class SpillBrokenError(SpillError):
    """The disk failed twice; what is not yet known to be durable may be lost. Field: `directory`."""

    template = "the spill log in {directory} broke: {detail}"


class SpillLockedError(SpillError):
    """Another process, or another log of this one, has the directory. Field: `directory`."""

    retriable = True
    template = "the spill log in {directory} is in use"


class DamagedRecordError(SpillError):
    """A record on disk is not what was written.

    Fields: `segment`, `position` and `size` of the bad range in bytes; `feed`, `first` and `end` of the burst.
    """

    template = "record {first} of feed {feed} is damaged (segment {segment}, {size} bytes at {position}): {detail}"


class StateDirectoryError(SpillError):
    """The directory is not private or cannot be used; the detail says what to do. Field: `directory`."""

    template = "{directory} cannot hold state: {detail}"


class LetterStoreError(FabricError):
    """The store of dead letters could not do what it was asked to. Field: `directory`."""


class LetterStoreFullError(LetterStoreError):
    """There is no room: a ceiling, a quota or the disk; nothing was taken. Fields: `directory`, `used` in bytes."""

    retriable = True
    template = "the dead letters in {directory} are full at {used} bytes: {detail}; nothing was taken"


class LetterStoreBrokenError(LetterStoreError):
    """The disk or the database failed, or it is used where it must not be; nothing was taken. Field: `directory`."""

    template = "the dead letters in {directory} broke: {detail}"


class LetterStoreLockedError(LetterStoreError):
    """Another process, or another store of this one, has the directory. Field: `directory`."""

    retriable = True
    template = "the dead letters in {directory} are in use"


class LettersDamagedError(LetterStoreError):
    """A letter is gone, or not what was written. Field: `directory`."""

    template = "dead letters in {directory} are damaged: {detail}"


# The state of the object.


class ClosedError(FabricError):
    """You closed it. Field: `what`."""

    template = "{what} is closed"


class BrokenError(FabricError):
    """It broke; the original error is the cause. Field: `what`."""

    template = "{what} broke: {detail}"


class WrongThreadError(FabricError, RuntimeError):
    """A `Subscription` or loan is used by two threads or tasks, or an asynchronous fabric away from its event loop.

    Fields: `owner`, `caller`, names of threads or tasks.
    """

    template = "it is in use by thread {owner}, not {caller}"


class WrongProcessError(FabricError, RuntimeError):
    """A fabric is used in a forked child. Fields: `opened_in`, `used_in`, process ids."""

    template = "this fabric belongs to process {opened_in}; {used_in} was forked from it and must join for itself"


class InternalError(FabricError):
    """An invariant of the fabric failed: a bug of ours."""


def shortened(names: Sequence[object], *, most: int = 8) -> str:
    """A list for an error message, cut after `most` entries."""
    text = ", ".join(map(str, names[:most]))
    return text if len(names) <= most else f"{text} and {len(names) - most} more"
