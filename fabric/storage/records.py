r"""The format of a segment: its head, its entries, and the scanner that finds them again. Little-endian.

    segment   head, a copy of the head, entries, zeros to the end of what was allocated
    head      "TFSPILL\0" | version u32 | flags u32 | number u64 | created_ns u64 | previous_end u64 | id 16 bytes |
              XXH3-64 of all before it
    entry     "TFE\1" | kind u32 | feed u64 | incarnation u64 | first u64 | records u32 | frame bytes u32 |
              payloads u32 | reserved u32 | body bytes u64 | body sum u64 | header sum u64 | body | zeros to 8 bytes
    body      table: (offset u64, bytes u64) for each payload | frame | payloads

Both sums are XXH3-64, seeded with XXH3-64 of the segment's id: stale bytes of a recycled file never validate. The
header's seed has its position added: neither do bytes that the disk put elsewhere, nor a payload that holds a copy
of this very segment. A header that stands proves its length and its offsets, so that a damaged body is a gap that is
known exactly, and the scanner goes on behind it. `previous_end` says how far the segment before was written: what is
missing there is found missing, and what a failed write left behind it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from struct import Struct
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from xxhash import xxh3_64
from xxhash import xxh3_64_intdigest as checksum_of

__all__ = [
    "ENTRY_BYTES",
    "HEAD_BYTES",
    "Bad",
    "Entry",
    "Good",
    "Header",
    "Kind",
    "MalformedEntryError",
    "Read",
    "Reason",
    "SegmentHead",
    "decode_body",
    "decode_head",
    "encode_group",
    "encode_head",
    "most_bytes",
    "owned",
    "read_entry",
    "scan",
]

Bytes: TypeAlias = bytes | bytearray | memoryview
Read: TypeAlias = Callable[[int, int], bytes]
"""So many bytes from a position, fewer where the file ends."""

VERSION = 1
_SEGMENT = Struct("<8sIIQQQ16sQ")
_SEGMENT_MAGIC = b"TFSPILL\0"
HEAD_BYTES = 2 * _SEGMENT.size
"""The head stands twice: without its id nothing in a segment can be verified."""
_FIRST = 1

_ENTRY = Struct("<4sIQQQIIIIQQ")
_SUM = Struct("<Q")
_PAYLOAD = Struct("<QQ")
MAGIC = b"TFE\1"
ENTRY_BYTES = _ENTRY.size + _SUM.size
"""What an entry adds to its body, besides at most seven bytes of padding."""
_PADS = tuple(bytes(size) for size in range(8))
_OFFSET_END = 2**63
"""As on the wire. Bounds what a sealed but nonsensical header could make of the index."""
_CHUNK = 1 << 20
"""Read and summed at a time: a scan holds so much, whatever a length says."""
_ZEROS = bytes(_CHUNK)
assert (_SEGMENT.size, ENTRY_BYTES) == (64, 72)


class Kind(IntEnum):
    """What an entry is. A reader keeps and skips kinds that it does not know."""

    FEED = 1
    """A feed begins or is named again; the frame says which topic and policy."""
    BURST = 2
    END = 3
    """The incarnation ended and had written everything."""


class Reason(StrEnum):
    """What is wrong with a range of a segment."""

    HEAD = "head"
    """Neither head of the segment can be read: nothing in it can."""
    HEADER = "header"
    """No entry begins here."""
    BODY = "body"
    """The header stands, the sum of the body is wrong."""
    CUT = "cut"
    """The header stands, the segment ends before the body does."""
    MISSING = "missing"
    """The segment is gone, or shorter than its successor says."""
    UNREADABLE = "unreadable"
    """The disk answered with an error."""


class Entry(NamedTuple):
    """One thing to keep: a burst and the payloads of its addressed records, by offset."""

    kind: int
    feed: int
    incarnation: int
    first: int
    records: int
    frame: Bytes
    payloads: Mapping[int, Bytes] = MappingProxyType({})

    @property
    def end(self) -> int:
        """The offset behind its last record."""
        return self.first + self.records


class MalformedEntryError(ValueError):
    """The bytes are not the entry that was asked for; its arguments are the `Reason` and the size of the bad range."""

    def __init__(self, reason: Reason, size: int = ENTRY_BYTES) -> None:
        self.reason, self.size = reason, size
        super().__init__(reason, size)


# The head of a segment.


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHead:
    """Who a segment is."""

    number: int
    created_ns: int
    """Wall clock: it is compared over restarts."""
    identity: bytes
    previous_end: int
    """Where the segment before ends, in bytes; 0 if there was none."""
    first: bool
    """Whether a log began its life with it: the segment before may end in what a crash cut short."""

    @property
    def seed(self) -> int:
        """Of the sums in this segment. One bit less than a sum, so that a position can be added."""
        return checksum_of(self.identity) >> 1


def encode_head(head: SegmentHead) -> bytes:
    """The head and its copy."""
    flags = _FIRST if head.first else 0
    packed = _SEGMENT.pack(
        _SEGMENT_MAGIC, VERSION, flags, head.number, head.created_ns, head.previous_end, head.identity, 0
    )[: -_SUM.size]
    return (packed + _SUM.pack(checksum_of(packed))) * 2


def decode_head(data: bytes) -> tuple[SegmentHead | None, list[int]]:
    """The head, if one of the two can be read, and the positions of those that cannot.

    A segment of another version has no head that we can read.
    """
    found = [_decode_one(data[at : at + _SEGMENT.size]) for at in (0, _SEGMENT.size)]
    bad = [copy * _SEGMENT.size for copy, head in enumerate(found) if head is None]
    return found[0] or found[1], bad


def _decode_one(data: bytes) -> SegmentHead | None:
    if len(data) != _SEGMENT.size:
        return None
    magic, version, flags, number, created_ns, previous_end, identity, total = _SEGMENT.unpack(data)
    if magic != _SEGMENT_MAGIC or version != VERSION or total != checksum_of(data[: -_SUM.size]):
        return None
    return SegmentHead(
        number=number,
        created_ns=created_ns,
        identity=identity,
        previous_end=previous_end,
        first=bool(flags & _FIRST),
    )


# Entries.


class Header(NamedTuple):
    """What stands before the body of an entry; verified."""

    kind: int
    feed: int
    incarnation: int
    first: int
    records: int
    frame: int
    payloads: int
    body: int
    total: int

    @property
    def size(self) -> int:
        """Bytes of the whole entry."""
        return ENTRY_BYTES + self.body + (-self.body & 7)

    @property
    def end(self) -> int:
        """The offset behind its last record."""
        return self.first + self.records


def encode_group(entries: Iterable[Entry], seed: int, position: int) -> tuple[list[Bytes], list[int], int]:
    """The parts to write at `position`, where each entry begins, and where the last one ends.

    Frames and payloads are not copied.
    """
    parts: list[Bytes] = []
    positions: list[int] = []
    add, pack, pack_sum = parts.append, _ENTRY.pack, _SUM.pack
    for kind, feed, incarnation, first, records, frame, payloads in entries:
        positions.append(position)
        size = body = len(frame)
        if payloads:
            pieces = _body(frame, payloads)
            body = sum(map(len, pieces))
            total = _sum_of(pieces, seed)
        else:
            pieces = [frame] if body else []
            total = checksum_of(frame, seed)
        head = pack(MAGIC, kind, feed, incarnation, first, records, size, len(payloads), 0, body, total)
        add(head + pack_sum(checksum_of(head, seed + position)))
        parts += pieces
        pad = -body & 7
        if pad:
            add(_PADS[pad])
        position += ENTRY_BYTES + body + pad
    return parts, positions, position


def most_bytes(entries: Sequence[Entry]) -> int:
    """What these entries take at most; found without summing them."""
    frames = sum([len(entry.frame) for entry in entries])
    payloads = [data for entry in entries if entry.payloads for data in entry.payloads.values()]
    sizes = [memoryview(data).nbytes + _PAYLOAD.size for data in payloads]
    return frames + sum(sizes) + len(entries) * (ENTRY_BYTES + 7)


def owned(entry: Entry) -> Entry:
    """An entry whose bytes nobody else can change: those that are bytes already are not copied."""
    payloads = {offset: bytes(payload) for offset, payload in entry.payloads.items()}
    return entry._replace(frame=bytes(entry.frame), payloads=payloads)


def _body(frame: Bytes, payloads: Mapping[int, Bytes]) -> list[Bytes]:
    views = {offset: memoryview(payload).cast("B") for offset, payload in payloads.items()}
    table = b"".join(_PAYLOAD.pack(offset, len(view)) for offset, view in views.items())
    return [piece for piece in (table, frame, *views.values()) if len(piece)]


def _sum_of(pieces: Iterable[Bytes], seed: int) -> int:
    digest = xxh3_64(seed=seed)
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def _header(data: Bytes, at: int, seed: int, position: int) -> Header | None:
    """The header in `data` at `at`, which stands in the segment at `position`; None if it is none."""
    if at + ENTRY_BYTES > len(data) or data[at : at + 4] != MAGIC:
        return None
    fields = bytes(data[at : at + _ENTRY.size])
    if _SUM.unpack_from(data, at + _ENTRY.size)[0] != checksum_of(fields, seed + position):
        return None
    _, kind, feed, incarnation, first, records, frame, payloads, _, body, total = _ENTRY.unpack(fields)
    if first + records > _OFFSET_END:
        return None
    return Header(kind, feed, incarnation, first, records, frame, payloads, body, total)


def decode_body(header: Header, body: bytes) -> Entry:
    """The entry with this header and verified body. Payloads are views of the body.

    Raises:
        MalformedEntryError: the table does not fit the body.
    """
    begin = _PAYLOAD.size * header.payloads
    end = begin + header.frame
    if end > len(body):
        raise MalformedEntryError(Reason.BODY, header.size)
    frame = body if end == len(body) and not begin else body[begin:end]
    payloads: dict[int, Bytes] = {}
    view = memoryview(body)
    for offset, size in _PAYLOAD.iter_unpack(view[:begin]):
        payloads[offset] = view[end : end + size]
        end += size
    if end != len(body):
        raise MalformedEntryError(Reason.BODY, header.size)
    return Entry(header.kind, header.feed, header.incarnation, header.first, header.records, frame, payloads)


def read_entry(read: Read, seed: int, position: int, limit: int) -> tuple[Header, Entry]:
    """The entry at this position of a segment that ends at `limit`, verified.

    Raises:
        MalformedEntryError: it is damaged.
    """
    header = _header(read(position, ENTRY_BYTES), 0, seed, position)
    if header is None:
        raise MalformedEntryError(Reason.HEADER)
    if position + header.size > limit:
        raise MalformedEntryError(Reason.CUT, limit - position)
    body = read(position + ENTRY_BYTES, header.body)
    if len(body) != header.body or checksum_of(body, seed) != header.total:
        raise MalformedEntryError(Reason.BODY, header.size)
    return header, decode_body(header, body)


# Scanning.


class Good(NamedTuple):
    """A whole entry."""

    position: int
    header: Header


class Bad(NamedTuple):
    """A range that holds no whole entry. The header, where it stands, says what was lost."""

    position: int
    size: int
    reason: Reason
    header: Header | None = None


def scan(read: Read, seed: int, limit: int, *, exact: bool) -> Iterator[Good | Bad]:
    """What is in a segment between its heads and `limit`, in order.

    Args:
        read: Reads the file.
        seed: Of the segment.
        limit: Where the segment ends; with `exact`, where its last entry ends, as its successor says.
        exact: Otherwise zeros at the end are room that was not used, and no damage.
    """
    scanner = _Scanner(read, seed, limit)
    position = HEAD_BYTES
    try:
        while position < limit:
            header = scanner.header(position)
            if header is not None:
                found = scanner.judge(position, header)
                yield found
                position += header.size
                continue
            following, written = scanner.next_header(position)
            if following is None and not exact:
                if written is not None:
                    yield Bad(position, written - position, Reason.HEADER)
                return
            end = limit if following is None else following
            yield Bad(position, end - position, Reason.HEADER)
            position = end
    except OSError:
        yield Bad(position, limit - position, Reason.UNREADABLE)


class _Scanner:
    """Reads a segment through one chunk that moves with it."""

    __slots__ = ("_chunk", "_limit", "_read", "_seed", "_start")

    def __init__(self, read: Read, seed: int, limit: int) -> None:
        self._read, self._seed, self._limit = read, seed, limit
        self._chunk, self._start = b"", 0

    def _get(self, position: int, size: int) -> tuple[bytes, int]:
        """A buffer, and where in it these bytes begin; it may end early where the file does."""
        at = position - self._start
        if at < 0 or at + size > len(self._chunk):
            self._chunk = self._read(position, min(_CHUNK, self._limit - position))
            self._start, at = position, 0
        return self._chunk, at

    def header(self, position: int) -> Header | None:
        data, at = self._get(position, ENTRY_BYTES)
        return _header(data, at, self._seed, position)

    def judge(self, position: int, header: Header) -> Good | Bad:
        """Whether the body of this entry is what its header says."""
        size = min(header.size, self._limit - position)
        if size < header.size:
            return Bad(position, size, Reason.CUT, header)
        begin = position + ENTRY_BYTES
        whole = self._sum(begin, header.body) == header.total and self.zeros(begin + header.body, position + size)
        return Good(position, header) if whole else Bad(position, size, Reason.BODY, header)

    def _sum(self, begin: int, size: int) -> int:
        if size <= _CHUNK:
            data, at = self._get(begin, size)
            return checksum_of(memoryview(data)[at : at + size], self._seed)
        chunks = (self._read(at, min(_CHUNK, begin + size - at)) for at in range(begin, begin + size, _CHUNK))
        return _sum_of(chunks, self._seed)

    def zeros(self, begin: int, end: int) -> bool:
        """Whether these fewer than eight bytes are there and all zero."""
        data, at = self._get(begin, end - begin)
        return data[at : at + end - begin] == _PADS[end - begin]

    def next_header(self, position: int) -> tuple[int | None, int | None]:
        """Where the next entry begins; if there is none, where the last byte before the limit ends that is not zero.

        Only a header that stands counts: 64 bits of its sum, in this segment, at this position. What a payload holds
        cannot pass for one, so the search never reads a byte twice.
        """
        written = None
        while position < self._limit:
            chunk = self._read(position, min(_CHUNK, self._limit - position))
            if chunk != _ZEROS[: len(chunk)]:
                following = self._find(chunk, position)
                if following is not None:
                    return following, None
                written = position + len(chunk.rstrip(b"\0"))
            position += _CHUNK
        return None, written

    def _find(self, chunk: bytes, start: int) -> int | None:
        at = chunk.find(MAGIC)
        while at >= 0:
            if not (start + at) & 7 and self.header(start + at) is not None:
                return start + at
            at = chunk.find(MAGIC, at + 1)
        return None
