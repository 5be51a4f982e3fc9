"""What the application receives: messages, requests and replies. Values decode on first use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fabric.core.guards import Retry
from fabric.core.wire import ADDRESSED
from fabric.errors import FabricError
from fabric.payloads import BYTES, decode, decode_into, own, unpack_metadata

if TYPE_CHECKING:
    from fabric.core.lanes import InboundFeed
    from fabric.core.wire import Burst

__all__ = ["HeldMessage", "Message", "RedrivenFeed", "Reply", "Request", "TriedMessage", "messages_of"]


class RedrivenFeed:
    """What stands for the feed of a dead letter that comes again: the feed itself may be long over."""

    __slots__ = ("floor", "incarnation", "letter", "parked", "source", "subscription", "topic")

    latest = False

    def __init__(
        self, letter: int, subscription: int, source: str, topic: str, incarnation: int, offset: int, *, parked: bool
    ) -> None:
        self.letter, self.subscription, self.source, self.topic = letter, subscription, source, topic
        self.incarnation, self.floor, self.parked = incarnation, offset, parked


class Message:
    """One record as it was received.

    `value` is a view into received memory as long as `own()` was not called: arrays are read-only, tensors are
    inference tensors. A view keeps the whole burst or payload alive.
    """

    __slots__ = ("_burst", "_feed", "_row", "seed", "sequence", "value")

    attempt = 1
    """Which attempt of its handler this is, from 1."""

    value: Any
    """What was published. Reading it raises `SchemaError` if it cannot be decoded."""

    def __init__(self, burst: Burst, row: int, feed: InboundFeed | RedrivenFeed, seed: int, sequence: int) -> None:
        self._burst, self._row, self._feed = burst, row, feed
        self.seed = seed
        """The seed that it was published under."""
        self.sequence = sequence
        """Its number in its lane, dense from 0 in each incarnation."""

    if not TYPE_CHECKING:  # which would allow any attribute

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever was published
            """Decode the value when it is read first: its slot is empty until then, and costs no call afterwards."""
            if name != "value":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)
            kind = self._burst.columns[2][self._row]
            is_plain = kind == BYTES
            self.value = self._burst.body(self._row) if is_plain else decode(kind & ~ADDRESSED, self._blob())
            return self.value

    def _blob(self) -> memoryview:
        burst, row = self._burst, self._row
        if burst.columns[2][row] & ADDRESSED:
            assert burst.payloads is not None, "an addressed record is handed over with its payload"
            return memoryview(burst.payloads[burst.first + row])
        return memoryview(burst.body(row))

    @property
    def redelivered(self) -> bool:
        """Whether it is a dead letter that comes again, late: what followed it in its lane went on without it."""
        feed = self._feed
        return type(feed) is RedrivenFeed and not feed.parked

    @property
    def offset(self) -> int:
        """Its position in its feed."""
        return self._burst.first + self._row

    @property
    def topic(self) -> str:
        """The topic that it was published on."""
        return self._feed.topic

    @property
    def source(self) -> str:
        """The name of the member that published it, `rank-3` for a rank."""
        return self._feed.source

    @property
    def incarnation(self) -> int:
        """Which life of that member."""
        return self._feed.incarnation

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts that were published beside the value. Raises `SchemaError`."""
        return unpack_metadata(self._burst.metadata(self._row))

    @property
    def published_ns(self) -> int:
        """When its burst was closed, in nanoseconds of its publisher's wall clock; for people, not for order."""
        return self._burst.published_ns

    def own(self) -> Any:  # noqa: ANN401 - whatever was published
        """The value in ordinary memory of its own, writable, independent of what was received."""
        self.value = own(self.value)
        return self.value

    def copy_into(self, into: Any) -> Any:  # noqa: ANN401 - a tensor, an array, or a tree of them
        """Copy the value into given tensors or arrays, whole or not at all.

        Raises `SchemaError` if shapes or types differ.
        """
        return decode_into(self._burst.columns[2][self._row] & ~ADDRESSED, self._blob(), into)

    def acknowledge(self) -> None:
        """It is handled, and with it all that precede it in its lane. Without effect unless `acknowledge="manual"`."""

    def reject(self, reason: str) -> None:
        """It will not be handled: it becomes a dead letter; all that precede it in its lane are handled.

        Without effect unless `acknowledge="manual"`.
        """

    def __repr__(self) -> str:
        return f"Message({self.source}/{self.topic}, seed={self.seed}, sequence={self.sequence})"


def messages_of(
    burst: Burst, feed: InboundFeed | RedrivenFeed, rows: Sequence[int], left: Iterator[int]
) -> Iterator[Message]:
    """A message for each of `rows`, none a tombstone; `left` iterates over them, and is used up as far as they are."""
    seeds, sequences, kinds, _, metadata = burst.columns
    if isinstance(rows, range) and metadata is None and kinds.count(BYTES) == len(kinds):
        part = slice(rows.start, rows.stop)
        return _plain_messages(burst, feed, left, seeds[part], sequences[part], burst.bodies()[part])
    return (Message(burst, row, feed, seeds[row], sequences[row]) for row in left)


def _plain_messages(
    burst: Burst,
    feed: InboundFeed | RedrivenFeed,
    rows: Iterator[int],
    seeds: Sequence[int],
    sequences: Sequence[int],
    bodies: Sequence[bytes],
) -> Iterator[Message]:
    """A message for each of `rows`, which is used up; beside them lie their seeds, sequences and values.

    Fast path: `Message(...)` would cost a call for each, a third more in all.
    """
    new = Message.__new__
    for row, seed, sequence, body in zip(rows, seeds, sequences, bodies, strict=False):
        message = new(Message)
        message._burst, message._row, message._feed = burst, row, feed
        message.seed, message.sequence, message.value = seed, sequence, body
        yield message


_RETRY = Retry(100_000_000, 10_000_000_000)
"""In nanoseconds. A handler that raised is tried again within 0.1 s, and then within twice as long each time
(reliability notes, section 4.11), but never after more than 10 s: attempts may be many. Full jitter: what it called may
have failed for the handlers of all members at once."""


class HeldMessage(Message):
    """A message in the hand of an application that acknowledges by itself."""

    __slots__ = ("_settle",)

    def __init__(
        self, burst: Burst, row: int, feed: InboundFeed | RedrivenFeed, settle: Callable[[Message, str | None], None]
    ) -> None:
        super().__init__(burst, row, feed, burst.columns[0][row], burst.columns[1][row])
        self._settle = settle

    def acknowledge(self) -> None:
        """It is handled, and with it all that precede it in its lane."""
        self._settle(self, None)

    def reject(self, reason: str) -> None:
        """It becomes a dead letter with this reason; all that precede it in its lane are handled."""
        self._settle(self, reason)


class TriedMessage(Message):
    """A message as a handler sees it; it may be tried again."""

    __slots__ = ("attempt", "retry", "ticket")

    def __init__(self, burst: Burst, row: int, feed: InboundFeed | RedrivenFeed) -> None:
        super().__init__(burst, row, feed, burst.columns[0][row], burst.columns[1][row])
        self.attempt = 1
        self.retry = _RETRY
        self.ticket = 0
        """Of the breaker of its handler, for this attempt."""

    @property
    def lane(self) -> tuple[str, str, int, bool]:
        """Source, topic and seed: its lane, whichever life of its publisher it comes from; and whether it was a letter.

        Such a one never waits for those that came after it: they may wait for the room that it leaves in the store.
        """
        feed = self._feed
        return feed.source, feed.topic, self.seed, type(feed) is RedrivenFeed


class Request:
    """A peer's request as a handler sees it."""

    __slots__ = ("_blob", "_kind", "_metadata", "deadline_ns", "method", "source")

    def __init__(
        self, source: str, method: str, kind: int, blob: memoryview, metadata: bytes, deadline_ns: int
    ) -> None:
        self.source, self.method, self.deadline_ns = source, method, deadline_ns
        self._kind, self._blob, self._metadata = kind, blob, metadata

    @property
    def value(self) -> Any:  # noqa: ANN401 - whatever was sent
        """What was sent, as a view. Raises `SchemaError`."""
        return decode(self._kind, self._blob)

    def own(self) -> Any:  # noqa: ANN401 - whatever was sent
        """What was sent, in memory of its own."""
        return own(self.value)

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts beside the value."""
        return unpack_metadata(self._metadata)

    def __repr__(self) -> str:
        return f"Request({self.method}, from {self.source})"


class Reply:
    """The answer to a request."""

    __slots__ = ("_blob", "_kind", "source")

    def __init__(self, source: str, kind: int, blob: memoryview) -> None:
        self.source, self._kind, self._blob = source, kind, blob

    @property
    def value(self) -> Any:  # noqa: ANN401 - whatever was returned
        """What the responder returned, as a view. Raises `SchemaError`."""
        return decode(self._kind, self._blob)

    def own(self) -> Any:  # noqa: ANN401 - whatever was returned
        """What the responder returned, in memory of its own."""
        return own(self.value)

    def __repr__(self) -> str:
        return f"Reply(from {self.source})"


Outcome = Reply | FabricError
