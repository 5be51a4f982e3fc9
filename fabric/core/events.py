"""What crosses the seam: events (what happened, past participles) go in, commands (what to do, imperatives) come out.

All are per burst, never per record. Buffers pass untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from fabric.config import Delivery, Policy, Start
from fabric.core.cards import Card

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed
    from fabric.core.wire import Burst

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Bytes that pass the core untouched."""

__all__ = [
    "AppendRecords",
    "BeginFeed",
    "BeginPayload",
    "Broadcast",
    "Buffer",
    "BulkReceived",
    "BurstClosed",
    "Card",
    "CompleteRequest",
    "ConnectPeer",
    "ControlReceived",
    "DataReceived",
    "Deliver",
    "DisconnectPeer",
    "DropPayload",
    "EndFeed",
    "ExecuteRequest",
    "FeedOpened",
    "FinishPayload",
    "FollowFeed",
    "IntakeStopped",
    "LoadRecords",
    "MessagesSettled",
    "PayloadChecked",
    "PeerAnnounced",
    "PeerDied",
    "PlaceChunk",
    "ProbePeer",
    "RecordsLoaded",
    "ReplyIssued",
    "ReportFenced",
    "ReportGap",
    "ReportPeer",
    "RequestAbandoned",
    "RequestIssued",
    "RoomNeeded",
    "RosterAsked",
    "SendBulk",
    "SendControl",
    "SubscriptionClosed",
    "SubscriptionOpened",
    "TimePassed",
    "UnfollowFeed",
    "WriteFailed",
    "WriteFinished",
]


# Events: what the application did.


@dataclass(frozen=True, slots=True)
class FeedOpened:
    """A publisher begins a feed on `topic`."""

    topic: str
    policy: Policy


@dataclass(frozen=True, slots=True)
class BurstClosed:
    """A publisher closed a burst: `count` records from offset `first` on.

    `payloads`: values of addressed records by offset.
    """

    topic: str
    first: int
    count: int
    frame: bytes
    payloads: Mapping[int, Buffer] | None
    seeds: tuple[int, ...] = ()
    """The seed of each record; only `latest` feeds need them."""
    room: int = 0
    """What its publisher had reserved for it, in bytes; the engine's account, not the core's."""


@dataclass(frozen=True, slots=True)
class RoomNeeded:
    """A `drop_oldest` publisher needs `size` bytes: the oldest owed bursts of its feed give way for everybody."""

    topic: str
    size: int


@dataclass(frozen=True, slots=True)
class SubscriptionOpened:
    """The application subscribes."""

    subscription: int
    pattern: str
    start: Start
    delivery: Delivery
    seeds: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class SubscriptionClosed:
    """The application is done with a subscription."""

    subscription: int


@dataclass(frozen=True, slots=True)
class MessagesSettled:
    """The application settled offsets `first <= offset < end` of a feed that were in its hand.

    `size` bytes of room return.
    """

    feed: InboundFeed
    first: int
    end: int
    handled: int
    size: int
    dropped: Mapping[str, int] | None = None
    """Records in that range that were not handled, by reason."""


@dataclass(frozen=True, slots=True)
class RequestIssued:
    """The application asks a peer. `payload` holds the value of an addressed request."""

    request: int
    peer: str
    method: str
    priority: int
    deadline_ns: int
    kind: int
    metadata: bytes
    blob: bytes
    payload: Buffer | None = None


@dataclass(frozen=True, slots=True)
class RequestAbandoned:
    """Nobody waits for this request of ours any more."""

    request: int


@dataclass(frozen=True, slots=True)
class ReplyIssued:
    """A handler of ours finished a peer's request."""

    peer: str
    incarnation: int
    request: int
    failed: bool
    kind: int
    blob: bytes
    payload: Buffer | None = None


@dataclass(frozen=True, slots=True)
class IntakeStopped:
    """The application closes: feeds end where they are; what is owed may still be fetched until `BYE` is sent."""

    say_bye: bool = False


# Events: what the world did.


@dataclass(frozen=True, slots=True)
class DataReceived:
    """A frame came on DATA."""

    frame: bytes
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class ControlReceived:
    """A frame came on CONTROL. `peer` is the authenticated name of its sender, or None."""

    frame: bytes
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class BulkReceived:
    """A header and perhaps a chunk came on BULK."""

    header: bytes
    chunk: Buffer | None
    peer: str | None = None


@dataclass(frozen=True, slots=True)
class PeerAnnounced:
    """The rendezvous, or a roster, names a member."""

    card: Card


@dataclass(frozen=True, slots=True)
class PeerDied:
    """A process is proven dead; silence is no proof."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class RosterAsked:
    """We ask an address (connected under the name `peer`) for the roster."""

    peer: str


@dataclass(frozen=True, slots=True)
class PayloadChecked:
    """A payload is complete and compared with its checksum."""

    space: int
    number: int
    payload: Buffer | None
    """The bytes, or None if they are not what their publisher sent."""


@dataclass(frozen=True, slots=True)
class RecordsLoaded:
    """The disk answers `LoadRecords`."""

    topic: str
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WriteFinished:
    """All bursts of the feed below offset `end` are on disk."""

    topic: str
    end: int


@dataclass(frozen=True, slots=True)
class WriteFailed:
    """The disk refused; `reason` says why."""

    topic: str
    reason: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """The deadline that `next_deadline_ns` named is here."""


# Commands.


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Send on DATA. A `marker` waits until the subscriptions that reached the socket are in force."""

    frame: bytes
    marker: bool = False


@dataclass(frozen=True, slots=True)
class SendControl:
    """Send on CONTROL; may be lost, the protocol repeats what matters."""

    peer: str
    frame: bytes


@dataclass(frozen=True, slots=True)
class SendBulk:
    """Send on BULK, after what is queued there for this peer."""

    peer: str
    header: bytes
    chunk: Buffer | None


@dataclass(frozen=True, slots=True)
class FollowFeed:
    """Receive DATA of this feed."""

    feed: int


@dataclass(frozen=True, slots=True)
class UnfollowFeed:
    """Receive DATA of this feed no longer."""

    feed: int


@dataclass(frozen=True, slots=True)
class ConnectPeer:
    """Connect, or reconnect, to this member under `key`."""

    key: str
    card: Card


@dataclass(frozen=True, slots=True)
class DisconnectPeer:
    """Forget the connections to `key`."""

    key: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Hand over records of a burst to a subscription: `rows`, or all if None.

    `size` bytes of room are taken until settled.
    """

    subscription: int
    feed: InboundFeed
    burst: Burst
    rows: tuple[int, ...] | None
    size: int
    covers: tuple[int, int] | None = None
    """The offsets that are settled with these rows; None: the rows alone."""


@dataclass(frozen=True, slots=True)
class BeginFeed:
    """A feed begins for this subscription, at its join offset."""

    subscription: int
    source: str
    topic: str
    incarnation: int
    join: int


@dataclass(frozen=True, slots=True)
class ReportGap:
    """Offsets `first <= offset < end` of a feed can no longer be had.

    `end` is None for an open gap up to an unknown end.
    """

    subscription: int
    source: str
    topic: str
    incarnation: int
    first: int
    end: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class EndFeed:
    """This feed is over for this subscription: its publisher closed or died, and all of it is settled."""

    subscription: int
    source: str
    topic: str


@dataclass(frozen=True, slots=True)
class BeginPayload:
    """Make room for a payload of `size` bytes."""

    space: int
    number: int
    size: int


@dataclass(frozen=True, slots=True)
class PlaceChunk:
    """Put a chunk at `position` of a payload."""

    space: int
    number: int
    position: int
    chunk: Buffer


@dataclass(frozen=True, slots=True)
class FinishPayload:
    """All bytes of a payload are there: compare its XXH3-64 and answer with `PayloadChecked`."""

    space: int
    number: int
    checksum: int


@dataclass(frozen=True, slots=True)
class DropPayload:
    """Give up a payload that was begun."""

    space: int
    number: int


@dataclass(frozen=True, slots=True)
class ExecuteRequest:
    """Run the handler of a method for a peer, once. An addressed value lies in the payload (space, request)."""

    peer: str
    incarnation: int
    request: int
    method: str
    priority: int
    deadline_ns: int
    kind: int
    metadata: bytes
    blob: bytes
    space: int | None = None


@dataclass(frozen=True, slots=True)
class CompleteRequest:
    """A request of ours is over. `outcome`: "reply", "failure", "timeout", "gone".

    `accepted`: the responder is known to have it.
    """

    request: int
    outcome: str
    accepted: bool
    kind: int = 0
    blob: bytes = b""
    space: int | None = None


@dataclass(frozen=True, slots=True)
class ReportPeer:
    """A peer's state changed: "joined", "up", "suspect", "down", "left", "dead", "version"."""

    name: str
    state: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReportFenced:
    """A newer incarnation of this very member exists: it must stop publishing."""

    newest: int


@dataclass(frozen=True, slots=True)
class ProbePeer:
    """Find out whether this silent process of the same host is dead; answer with `PeerDied` if it is."""

    card: Card


@dataclass(frozen=True, slots=True)
class AppendRecords:
    """Write a burst to the spill log; answer with `WriteFinished` or `WriteFailed`."""

    topic: str
    first: int
    frame: bytes
    payloads: Mapping[int, Buffer] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadRecords:
    """Read bursts from the spill log; answer with `RecordsLoaded`."""

    topic: str
    first: int
    end: int
