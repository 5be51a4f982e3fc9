"""What crosses the seam: events (what happened, past participles) go in, commands (what to do, imperatives) come out.

All are per burst, never per record. Buffers pass untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fabric.config import Delivery, Policy, Start
from fabric.core.cards import Card
from fabric.core.disk import (
    AppendRecords,
    LoadRecords,
    PastFeed,
    RecordsExpired,
    RecordsLoaded,
    ReleaseRecords,
    SaveRegistrations,
    StateRecovered,
    WriteFailed,
    WriteFinished,
)
from fabric.core.seam import Buffer, crossing

if TYPE_CHECKING:
    from fabric.core.cursors import Cursor
    from fabric.core.lanes import InboundFeed
    from fabric.core.wire import Burst

__all__ = [
    "AppendRecords",
    "BeginFeed",
    "BeginPayload",
    "BooksWanted",
    "Broadcast",
    "Buffer",
    "BulkReceived",
    "BurstClosed",
    "Card",
    "CompleteRequest",
    "ConnectPeer",
    "ControlReceived",
    "CursorCommitted",
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
    "PastFeed",
    "PayloadChecked",
    "PayloadStarved",
    "PeerAnnounced",
    "PeerDied",
    "PlaceChunk",
    "ProbePeer",
    "RecordsExpired",
    "RecordsLoaded",
    "ReleaseRecords",
    "ReplyIssued",
    "ReportFenced",
    "ReportGap",
    "ReportPeer",
    "RequestAbandoned",
    "RequestIssued",
    "RoomNeeded",
    "RosterAsked",
    "SaveRegistrations",
    "SendBulk",
    "SendControl",
    "StateRecovered",
    "SubscriptionClosed",
    "SubscriptionOpened",
    "TimePassed",
    "UnfollowFeed",
    "WriteFailed",
    "WriteFinished",
]


# Events: what the application did.


@crossing
class FeedOpened:
    """A publisher begins a feed on `topic`."""

    topic: str
    policy: Policy
    spills: bool = False
    """Whether what is owed of it continues on disk when memory is full."""
    sync: str = ""
    """What a durable feed survives, `process` or `power`."""


@crossing
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


@crossing
class RoomNeeded:
    """A publisher needs `size` bytes.

    Under `drop_oldest` the oldest owed bursts of its feed give way for everybody; under `spill` they go to disk.
    """

    topic: str
    size: int


@crossing
class SubscriptionOpened:
    """The application subscribes."""

    subscription: int
    pattern: str
    start: Start
    delivery: Delivery
    seeds: frozenset[int] | None
    name: str = ""
    """Of one that outlives its process; its publishers owe it what it misses meanwhile."""
    cursor: Cursor | None = None
    """Where the application's checkpoint stands. If given, publishers are told of nothing that is not committed."""


@crossing
class SubscriptionClosed:
    """The application is done with a subscription. One with a name stays owed unless it is `forgotten`."""

    subscription: int
    forgotten: bool = False


@crossing
class CursorCommitted:
    """The application saved this cursor: what lies below it is not needed again."""

    subscription: int
    cursor: Cursor


@crossing
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


@crossing
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


@crossing
class RequestAbandoned:
    """Nobody waits for this request of ours any more."""

    request: int


@crossing
class ReplyIssued:
    """A handler of ours finished a peer's request."""

    peer: str
    incarnation: int
    request: int
    failed: bool
    kind: int
    blob: bytes
    payload: Buffer | None = None


@crossing
class IntakeStopped:
    """The application closes: feeds end where they are; what is owed may still be fetched until `BYE` is sent."""

    say_bye: bool = False


@crossing
class BooksWanted:
    """The application closes, and waits for what its readers have to say of what they read."""


# Events: what the world did.


@crossing
class DataReceived:
    """A frame came on DATA."""

    frame: bytes
    peer: str | None = None


@crossing
class ControlReceived:
    """A frame came on CONTROL. `peer` is the authenticated name of its sender, or None."""

    frame: bytes
    peer: str | None = None


@crossing
class BulkReceived:
    """A header and perhaps a chunk came on BULK."""

    header: bytes
    chunk: Buffer | None
    peer: str | None = None


@crossing
class PeerAnnounced:
    """The rendezvous, or a roster, names a member."""

    card: Card


@crossing
class PeerDied:
    """A process is proven dead; silence is no proof."""

    name: str
    incarnation: int


@crossing
class RosterAsked:
    """We ask an address (connected under the name `peer`) for the roster."""

    peer: str


@crossing
class PayloadChecked:
    """A payload is complete and compared with its checksum."""

    space: int
    number: int
    payload: Buffer | None
    """The bytes, or None if they are not what their publisher sent."""


@crossing
class PayloadStarved:
    """There was no memory to put a payload together; what came of it is gone."""

    space: int
    number: int


@crossing
class TimePassed:
    """The deadline that `next_deadline_ns` named is here."""


# Commands.


@crossing
class Broadcast:
    """Send on DATA. A `marker` waits until the subscriptions that reached the socket are in force."""

    frame: bytes
    marker: bool = False


@crossing
class SendControl:
    """Send on CONTROL; may be lost, the protocol repeats what matters."""

    peer: str
    frame: bytes


@crossing
class SendBulk:
    """Send on BULK after what is queued for this peer, or in place of what is `about` the same."""

    peer: str
    header: bytes
    chunk: Buffer | None
    about: tuple[int, ...]


@crossing
class FollowFeed:
    """Receive DATA of this feed."""

    feed: int


@crossing
class UnfollowFeed:
    """Receive DATA of this feed no longer."""

    feed: int


@crossing
class ConnectPeer:
    """Connect, or reconnect, to this member under `key`."""

    key: str
    card: Card


@crossing
class DisconnectPeer:
    """Forget the connections to `key`."""

    key: str


@crossing
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


@crossing
class BeginFeed:
    """A feed begins for this subscription, at its join offset."""

    subscription: int
    source: str
    topic: str
    incarnation: int
    join: int


@crossing
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


@crossing
class EndFeed:
    """This feed is over for this subscription: its publisher closed or died, and all of it is settled."""

    subscription: int
    source: str
    topic: str


@crossing
class BeginPayload:
    """Make room for a payload of `size` bytes."""

    space: int
    number: int
    size: int


@crossing
class PlaceChunk:
    """Put a chunk at `position` of a payload."""

    space: int
    number: int
    position: int
    chunk: Buffer


@crossing
class FinishPayload:
    """All bytes are there: compare the XXH3-64 of all, or of a `sample`, and answer with `PayloadChecked`."""

    space: int
    number: int
    checksum: int
    sample: int = 0


@crossing
class DropPayload:
    """Give up a payload that was begun."""

    space: int
    number: int


@crossing
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


@crossing
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


@crossing
class ReportPeer:
    """A peer's state changed: "joined", "up", "suspect", "down", "left", "dead", "version"."""

    name: str
    state: str
    detail: str = ""


@crossing
class ReportFenced:
    """A newer incarnation of this very member exists: it must stop publishing."""

    newest: int


@crossing
class ProbePeer:
    """Find out whether this silent process of the same host is dead; answer with `PeerDied` if it is."""

    card: Card
