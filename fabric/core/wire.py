"""Frames: bursts and markers on DATA, messages on CONTROL, headed chunks on BULK. PROTOCOL.md specifies every byte.

All numbers are little-endian. Every frame ends with the XXH3-64 checksum of all bytes before it.

    DATA     feed u64 | "TF" | version u8 | kind u8 | flags u16 | codec u16 | incarnation u64 | first u64 |
             count u32 | schema u32 | published_ns i64 | columns or nonces | bodies | checksum u64
    CONTROL  "TF" | version u8 | kind u8 | reserved u32 | source u64 | incarnation u64 | msgpack array | checksum u64
    BULK     a frame like those of CONTROL, then the chunk as a second frame

The columns of a burst are whole arrays, one after the other: seeds i64, sequences i64, previous i64, lengths u32,
metadata lengths u32 (only if flagged), kinds u8. A record's body is its metadata (a msgpack map) and then its value.

`feed` stands first because SUB matches on a prefix. Decoding is total: any bytes give a value or `WireFormatError`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from itertools import accumulate, chain, pairwise
from operator import add, le, lt
from struct import Struct, pack, unpack, unpack_from
from struct import error as StructError
from typing import Any, NamedTuple

import msgpack
from xxhash import xxh3_64
from xxhash import xxh3_64_intdigest as checksum_of

from fabric.config import BURST_BYTES_MAX
from fabric.core.fields import FIELDS_BY_CODE, Kind
from fabric.core.seam import Buffer
from fabric.errors import WireFormatError

__all__ = [
    "ADDRESSED",
    "CONTROL_BYTES_MAX",
    "DATA_BYTES_MAX",
    "NONE",
    "SAMPLE_BLOCKS",
    "TOMBSTONE",
    "VERSION",
    "Burst",
    "Control",
    "Descriptor",
    "Drop",
    "Kind",
    "Slot",
    "checksum_of",
    "decode_control",
    "decode_data",
    "decode_descriptor",
    "encode_burst",
    "encode_columns",
    "encode_control",
    "encode_descriptor",
    "encode_marker",
    "feed_id",
    "feed_prefix",
    "member_id",
]

VERSION = 1
MAGIC = b"TF"
NONE = -1
"""`previous` of the first record of a lane."""

ADDRESSED = 0x80
"""This bit of a record's kind says that its body is a descriptor and the value lies with its publisher."""
TOMBSTONE = 0x7F
"""Kind of a record whose value was lost at its source (a failed copy from a device)."""

DATA_BYTES_MAX = BURST_BYTES_MAX + 64 * 1024
"""Largest frame on DATA: the records of a burst and their columns; the smallest record takes 29 bytes of columns."""
CONTROL_BYTES_MAX = 256 * 1024
"""Largest frame on CONTROL: a value below 64 KiB, its method and metadata, or a thousand feeds."""

BURST, MARKER = 1, 2
HAS_METADATA, HAS_ADDRESSED = 1, 2
_DATA = Struct("<Q2sBBHHQQIIq")
_CONTROL = Struct("<2sBBIQQ")
_TRAILER = Struct("<Q")
_DESCRIPTOR = Struct("<QQ")
_PLACED = Struct("<QQQIIII")
_U64_END = 2**64
OFFSET_END = 2**63
"""Offsets are 0 <= offset < OFFSET_END: `previous` is a signed column."""
SAMPLE_BLOCKS = 16
"""Blocks of 4 KiB in the sample that the checksum of a value in an arena covers: 5 us, however large it is."""
_ENTRIES_MAX = 16_384
"""Entries in one list of a message; the longest of ours is the farewell, one entry a feed. Bounds a hostile length."""
_COLUMN_BYTES = 8 + 8 + 8 + 4 + 1
assert (_DATA.size, _CONTROL.size, _DESCRIPTOR.size, _PLACED.size) == (48, 24, 16, 40)

RECORD_BYTES = _COLUMN_BYTES
"""What a record adds to a burst besides its body."""


class Drop(StrEnum):
    """Why something did not reach the application, or a frame was not taken.

    One enum for counters, metrics and letters.
    """

    TRUNCATED = "truncated"
    MAGIC = "magic"
    VERSION = "version"
    CHECKSUM = "checksum"
    KIND = "kind"
    SHAPE = "shape"
    STRANGER = "stranger"
    IMPOSTOR = "impostor"
    STALE = "stale"
    DUPLICATE = "duplicate"
    NOT_ASKED = "not_asked"
    NO_ROOM = "no_room"
    GAP = "gap"
    SUPERSEDED = "superseded"
    BEST_EFFORT = "best_effort"
    LOST_AT_SOURCE = "lost_at_source"
    UNDECODABLE = "undecodable"
    HANDLER_EXHAUSTED = "handler_exhausted"
    CORRUPT_AT_SOURCE = "corrupt_at_source"
    TOO_LARGE = "too_large"
    EXPIRED = "expired"
    REJECTED = "rejected"
    PARKED = "parked"
    BLOCKED = "blocked"
    GIVEN_UP = "given_up"


# Identity.


def member_id(name: str) -> int:
    """The u64 by which frames name a member: XXH3-64 of its name."""
    return checksum_of(name.encode())


def feed_id(name: str, incarnation: int, topic: str) -> int:
    """The u64 of a feed: XXH3-64 of publisher, incarnation and topic.

    Two feeds of one fabric meet with probability 2**-64.
    """
    return checksum_of(f"{name}\0{incarnation}\0{topic}".encode())


def feed_prefix(feed: int) -> bytes:
    """What SUB filters on: the first eight bytes of each DATA frame of this feed."""
    return feed.to_bytes(8, "little")


# DATA.


class Burst:
    """Consecutive records of one feed.

    Columns are unpacked on first use. `payloads` holds fetched values of addressed records, by offset.
    """

    __slots__ = (
        "_columns",
        "_layout",
        "_previous",
        "count",
        "end",
        "feed",
        "first",
        "flags",
        "frame",
        "has_addressed",
        "incarnation",
        "payloads",
        "published_ns",
        "size",
    )

    def __init__(
        self, frame: bytes, feed: int, incarnation: int, first: int, count: int, flags: int, published_ns: int
    ) -> None:
        self.frame, self.feed, self.incarnation = frame, feed, incarnation
        self.first, self.count, self.end, self.flags, self.published_ns = (
            first,
            count,
            first + count,
            flags,
            published_ns,
        )
        self.size = len(frame)
        self.has_addressed = bool(flags & HAS_ADDRESSED)
        """Whether any record's value lies with the publisher."""
        self._columns: tuple[Any, ...] | None = None
        self._layout: tuple[bytes, Sequence[int], tuple[int, ...] | None] | None = None
        self._previous: tuple[int, ...] | None = None
        self.payloads: dict[int, Any] | None = None

    def twin(self) -> Burst:
        """The same records, for another subscription: only what is fetched for them is its own."""
        twin = Burst(self.frame, self.feed, self.incarnation, self.first, self.count, self.flags, self.published_ns)
        twin._columns, twin._layout, twin._previous = self._columns, self._layout, self._previous
        return twin

    @property
    def columns(self) -> tuple[Any, ...]:
        """(seeds, sequences, kinds, starts, metadata lengths or None).

        `starts` has one entry more than records.
        """
        if self._columns is None:
            numbers = f"<{self.count}q"
            self._columns = (unpack(numbers, self.packed_seeds), unpack(numbers, self.packed_sequences), *self.layout)
        return self._columns

    @property
    def packed_seeds(self) -> memoryview:
        """The column of seeds, i64."""
        return memoryview(self.frame)[_DATA.size : _DATA.size + 8 * self.count]

    @property
    def packed_sequences(self) -> memoryview:
        """The column of sequences, i64."""
        return memoryview(self.frame)[_DATA.size + 8 * self.count : _DATA.size + 16 * self.count]

    @property
    def layout(self) -> tuple[bytes, Sequence[int], tuple[int, ...] | None]:
        """Kinds, starts and metadata lengths: the columns that say what lies where."""
        if self._layout is None:
            self._layout = self._lay_out()
        return self._layout

    def _lay_out(self) -> tuple[bytes, Sequence[int], tuple[int, ...] | None]:
        n, frame, at = self.count, self.frame, _DATA.size
        lengths = frame[at + 24 * n : at + 28 * n]
        at += 28 * n
        metadata, fits = None, True
        if self.flags & HAS_METADATA:
            metadata = unpack_from(f"<{n}I", frame, at)
            fits = all(map(le, metadata, unpack_from(f"<{n}I", lengths)))
            at += 4 * n
        kinds = frame[at : at + n]
        starts = _starts(at + n, lengths, n)
        if not fits or starts[-1] != len(frame) - _TRAILER.size:
            raise WireFormatError("lengths do not add up", reason=Drop.SHAPE)
        return kinds, starts, metadata

    def check(self) -> None:
        """Raise `WireFormatError` unless every row is possible: no negative numbers, flags that tell the truth.

        ASCII means: no byte has its highest bit, which is the sign of a number and the mark of an addressed record.
        """
        if self.layout[0].isascii() is self.has_addressed:
            raise WireFormatError("the flag of addressed records lies", reason=Drop.SHAPE)
        at = _DATA.size
        if not self.frame[at + 7 : at + 16 * self.count : 8].isascii():  # the highest bytes of seeds and sequences
            raise WireFormatError("a negative seed or sequence", reason=Drop.SHAPE)

    @property
    def previous(self) -> tuple[int, ...]:
        """The offset before each record in its lane.

        Only who takes a burst row by row looks at it, so it is checked here: raises `WireFormatError` unless lanes
        point backwards.
        """
        if self._previous is None:
            n = self.count
            previous = unpack_from(f"<{n}q", self.frame, _DATA.size + 16 * n)
            if min(previous) < NONE or not all(map(lt, previous, range(self.first, self.end))):
                raise WireFormatError("a lane that does not point backwards", reason=Drop.SHAPE)
            self._previous = previous
        return self._previous

    def bodies(self) -> Sequence[bytes]:
        """The values of all records. Raises nothing; call it only where no record has metadata."""
        starts, frame = self.layout[1], self.frame
        if isinstance(starts, range):  # one call of C for all
            return unpack_from(f"{starts.step}s" * self.count, frame, starts.start)
        return [frame[a:b] for a, b in pairwise(starts)]

    def body(self, index: int) -> bytes:
        """The value of one record, without its metadata."""
        _, starts, metadata = self.layout
        return self.frame[starts[index] + (metadata[index] if metadata else 0) : starts[index + 1]]

    def metadata(self, index: int) -> bytes:
        """The packed metadata of one record; empty if it has none."""
        _, starts, metadata = self.layout
        return self.frame[starts[index] : starts[index] + metadata[index]] if metadata else b""

    def __repr__(self) -> str:
        return f"Burst(feed={self.feed:016x}, offsets={self.first}..{self.end - 1}, bytes={self.size})"


def _starts(begin: int, lengths: bytes, n: int) -> Sequence[int]:
    """Where each of `n` bodies begins, and where the last one ends, from the column of their lengths."""
    if lengths == lengths[:4] * n and (length := int.from_bytes(lengths[:4], "little")):  # as most bursts are
        return range(begin, begin + n * length + 1, length)
    return tuple(accumulate(unpack_from(f"<{n}I", lengths), initial=begin))


def encode_burst(
    feed: int,
    incarnation: int,
    first: int,
    published_ns: int,
    seeds: Sequence[int],
    sequences: Sequence[int],
    previous: Sequence[int],
    kinds: Iterable[int],
    bodies: Sequence[bytes],
    metadata: Sequence[bytes] | None = None,
) -> bytes:
    """One DATA frame.

    `metadata`, if any record has some, holds packed maps beside the bodies, which are without them.
    """
    n, packed_kinds = len(bodies), bytes(kinds)
    flags = (HAS_METADATA if metadata else 0) | (0 if packed_kinds.isascii() else HAS_ADDRESSED)
    lengths: Iterable[int] = map(len, bodies)
    extra: tuple[bytes, ...] = ()
    pieces: Iterable[bytes] = bodies
    if metadata:
        sizes = tuple(map(len, metadata))
        lengths = map(add, sizes, map(len, bodies))
        extra = (pack(f"<{n}I", *sizes),)
        pieces = chain.from_iterable(zip(metadata, bodies, strict=True))
    columns = pack(f"<{n}q{n}q{n}q{n}I", *seeds, *sequences, *previous, *lengths)
    head = _DATA.pack(feed, MAGIC, VERSION, BURST, flags, 0, incarnation, first, n, 0, published_ns)
    frame = b"".join((head, columns, *extra, packed_kinds, *pieces))
    return frame + _TRAILER.pack(checksum_of(frame))


def encode_columns(
    feed: int,
    incarnation: int,
    first: int,
    count: int,
    published_ns: int,
    columns: bytes,
    kind: int,
    bodies: Buffer,
) -> bytes:
    """One DATA frame of records of one kind, whose columns are packed: seeds, sequences, previous, lengths."""
    head = _DATA.pack(feed, MAGIC, VERSION, BURST, 0, 0, incarnation, first, count, 0, published_ns)
    prefix = b"".join((head, columns, bytes((kind,)) * count))
    checksum = xxh3_64(prefix)
    checksum.update(bodies)
    return b"".join((prefix, bodies, _TRAILER.pack(checksum.intdigest())))


def encode_marker(feed: int, incarnation: int, end: int, published_ns: int, nonces: Sequence[int] = ()) -> bytes:
    """A DATA frame that tells the end of a feed and echoes the nonces of subscribers that join its push."""
    frame = _DATA.pack(feed, MAGIC, VERSION, MARKER, 0, 0, incarnation, end, len(nonces), 0, published_ns)
    frame += pack(f"<{len(nonces)}Q", *nonces)
    return frame + _TRAILER.pack(checksum_of(frame))


def decode_data(frame: bytes) -> tuple[Burst, None] | tuple[Burst, tuple[int, ...]]:
    """A burst and None; or, for a marker, an empty burst whose `first` is the feed's end, and the echoed nonces."""
    try:
        feed, magic, version, kind, flags, codec, incarnation, first, count, schema, published_ns = _DATA.unpack_from(
            frame
        )
    except StructError:
        raise WireFormatError(f"{len(frame)} bytes", reason=Drop.TRUNCATED) from None
    _check_head(frame, magic, version)
    if codec or schema or flags & ~(HAS_METADATA | HAS_ADDRESSED) or len(frame) > DATA_BYTES_MAX:
        raise WireFormatError("reserved bits are set", reason=Drop.SHAPE)
    if kind == MARKER:
        if flags or first >= OFFSET_END or len(frame) != _DATA.size + 8 * count + _TRAILER.size:
            raise WireFormatError("nonces do not add up", reason=Drop.SHAPE)
        return Burst(frame, feed, incarnation, first, 0, 0, published_ns), unpack_from(f"<{count}Q", frame, _DATA.size)
    if kind != BURST:
        raise WireFormatError(f"kind {kind}", reason=Drop.KIND)
    columns = _COLUMN_BYTES + (4 if flags & HAS_METADATA else 0)
    if not 0 < count <= (len(frame) - _DATA.size - _TRAILER.size) // columns or first + count >= OFFSET_END:
        raise WireFormatError(f"{count} records in {len(frame)} bytes", reason=Drop.SHAPE)
    return Burst(frame, feed, incarnation, first, count, flags, published_ns), None


def _check_head(frame: bytes, magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise WireFormatError("no frame of ours", reason=Drop.MAGIC)
    if version != VERSION:
        raise WireFormatError(f"version {version}, ours is {VERSION}", reason=Drop.VERSION)
    if len(frame) < _CONTROL.size + _TRAILER.size:
        raise WireFormatError(f"{len(frame)} bytes", reason=Drop.TRUNCATED)
    if _TRAILER.unpack_from(frame, len(frame) - _TRAILER.size)[0] != checksum_of(memoryview(frame)[: -_TRAILER.size]):
        raise WireFormatError("the bytes have changed", reason=Drop.CHECKSUM)


class Slot(NamedTuple):
    """A piece of its publisher's arena; `generation` is never used twice, nor 0."""

    segment: int
    number: int
    generation: int


class Descriptor(NamedTuple):
    """What the body of an addressed record says of its value."""

    size: int
    """In bytes, at least 1."""
    checksum: int
    """The XXH3-64 of the value, or of a sample of it."""
    sample: int = 0
    """How many blocks the sample has (`payloads.sampled_sum`); 0: the checksum is of all bytes."""
    slot: Slot | None = None
    """Where it lies in the arena of its publisher, for members of the same host."""


def encode_descriptor(size: int, checksum: int, sample: int = 0, slot: Slot | None = None) -> bytes:
    """The body of an addressed record: 16 bytes, or 40 if the value lies in an arena."""
    if slot is None:
        return _DESCRIPTOR.pack(size, checksum)
    return _PLACED.pack(size, checksum, slot.generation, slot.segment, slot.number, sample, 0)


def decode_descriptor(body: bytes) -> Descriptor:
    """What a descriptor says. Raises `WireFormatError`."""
    if len(body) == _DESCRIPTOR.size:
        found = Descriptor(*_DESCRIPTOR.unpack(body))
    elif len(body) == _PLACED.size:
        size, checksum, generation, segment, number, sample, reserved = _PLACED.unpack(body)
        if reserved or not generation or sample not in (0, SAMPLE_BLOCKS):
            raise WireFormatError("a slot that cannot be", reason=Drop.SHAPE)
        found = Descriptor(size, checksum, sample, Slot(segment, number, generation))
    else:
        raise WireFormatError(f"a descriptor of {len(body)} bytes", reason=Drop.SHAPE)
    if not found.size:
        raise WireFormatError("a descriptor of nothing", reason=Drop.SHAPE)
    return found


# CONTROL and the headers of BULK.


class Control:
    """A message on CONTROL or the header of a chunk: `fields` have the types of `FIELDS[kind]`."""

    __slots__ = ("fields", "incarnation", "kind", "source")

    def __init__(self, kind: Kind, source: int, incarnation: int, fields: Sequence[Any]) -> None:
        self.kind, self.source, self.incarnation, self.fields = kind, source, incarnation, fields

    def __repr__(self) -> str:
        return f"Control({self.kind.name}, {self.source:016x}@{self.incarnation}, {self.fields!r})"


def encode_control(kind: Kind, source: int, incarnation: int, *fields: object) -> bytes:
    """One CONTROL frame, or the header frame of a chunk."""
    frame: bytes = _CONTROL.pack(MAGIC, VERSION, kind, 0, source, incarnation) + msgpack.packb(fields)
    return frame + _TRAILER.pack(checksum_of(frame))


def decode_control(frame: bytes) -> Control:
    """The message in a CONTROL frame or chunk header."""
    try:
        magic, version, code, reserved, source, incarnation = _CONTROL.unpack_from(frame)
    except StructError:
        raise WireFormatError(f"{len(frame)} bytes", reason=Drop.TRUNCATED) from None
    _check_head(frame, magic, version)
    shape = FIELDS_BY_CODE.get(code)
    if shape is None or reserved:
        raise WireFormatError(f"kind {code}", reason=Drop.KIND)
    if len(frame) > CONTROL_BYTES_MAX:
        raise WireFormatError(f"{len(frame)} bytes", reason=Drop.SHAPE)
    body = memoryview(frame)[_CONTROL.size : -_TRAILER.size]
    try:
        fields = msgpack.unpackb(body, max_array_len=_ENTRIES_MAX, max_map_len=0, max_ext_len=0)
    except (ValueError, RecursionError):
        raise WireFormatError("no msgpack array", reason=Drop.SHAPE) from None
    if not shape[1].fits(fields):
        raise WireFormatError(f"fields of {shape[0].name}", reason=Drop.SHAPE)
    return Control(shape[0], source, incarnation, fields)
