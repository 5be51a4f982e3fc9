"""Frames and values, written from PROTOCOL.md alone; section numbers refer to it. What is malformed fails the test."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import msgpack
import numpy as np
from xxhash import xxh3_64_intdigest as xxh3

VERSION = 1
HELLO, REGISTER, REGISTERED, UNREGISTER, ACKNOWLEDGE, PULL, JOIN, HEARTBEAT = range(1, 9)
BYE, REQUEST, ACCEPTED, REPLY, FETCH = 13, 16, 17, 18, 20
ROSTER_ASK, ROSTER = 24, 25
REPAIR, AVAILABLE, CHUNK, MISSING = 64, 65, 66, 67

DATA_HEAD = struct.Struct("<Q2sBBHHQQIIq")  # section 3
MESSAGE_HEAD = struct.Struct("<2sBBIQQ")  # section 4
CHECKSUM = struct.Struct("<Q")
DESCRIPTOR = struct.Struct("<QQ")
HAS_METADATA = 1
ADDRESSED = 0x80


# Section 1: names.


def member_id(name: str) -> int:
    return xxh3(name.encode())


def feed_id(name: str, incarnation: int, topic: str) -> int:
    return xxh3(f"{name}\0{incarnation}\0{topic}".encode())


def reply_space(requester: int, incarnation: int, responder: int) -> int:
    return xxh3(f"reply\0{requester}\0{incarnation}\0{responder}".encode())


# Section 3: DATA.


@dataclass(frozen=True)
class Record:
    """One record as it travelled."""

    offset: int
    seed: int
    sequence: int
    previous: int
    kind: int
    metadata: dict[str, Any]
    body: bytes


@dataclass(frozen=True)
class Data:
    """A burst with its records, or a marker with its nonces."""

    feed: int
    incarnation: int
    first: int
    end: int
    records: tuple[Record, ...] = ()
    nonces: tuple[int, ...] | None = None


def unsealed(frame: bytes) -> bytes:
    """The frame without its checksum, which must be right."""
    assert CHECKSUM.unpack(frame[-8:])[0] == xxh3(frame[:-8]), "the frame was changed"
    return frame[:-8]


def decode_data(frame: bytes) -> Data:
    body = unsealed(frame)
    feed, magic, version, kind, flags, codec, incarnation, first, count, schema, _ = DATA_HEAD.unpack_from(body)
    assert (magic, version, codec, schema) == (b"TF", VERSION, 0, 0)
    if kind == 2:
        return Data(feed, incarnation, first, first, (), struct.unpack_from(f"<{count}Q", body, DATA_HEAD.size))
    assert kind == 1
    at = DATA_HEAD.size

    def column(dtype: str) -> list[int]:
        nonlocal at
        values = np.frombuffer(body, dtype, count, at)
        at += values.nbytes
        return [int(value) for value in values]

    seeds, sequences, previous, lengths = column("<i8"), column("<i8"), column("<i8"), column("<u4")
    packed = column("<u4") if flags & HAS_METADATA else [0] * count
    kinds = column("u1")
    records = []
    for row in range(count):
        middle, end = at + packed[row], at + lengths[row]
        metadata = msgpack.unpackb(body[at:middle]) if packed[row] else {}
        records.append(
            Record(first + row, seeds[row], sequences[row], previous[row], kinds[row], metadata, body[middle:end])
        )
        at = end
    assert at == len(body)
    return Data(feed, incarnation, first, first + count, tuple(records))


# Section 4: messages.


@dataclass(frozen=True)
class Message:
    """A message on CONTROL, or the header of one on BULK."""

    kind: int
    source: int
    incarnation: int
    fields: list[Any]


def encode_message(kind: int, source: int, incarnation: int, *fields: Any) -> bytes:
    frame = MESSAGE_HEAD.pack(b"TF", VERSION, kind, 0, source, incarnation) + msgpack.packb(fields)
    return frame + CHECKSUM.pack(xxh3(frame))


def decode_message(frame: bytes) -> Message:
    body = unsealed(frame)
    magic, version, kind, reserved, source, incarnation = MESSAGE_HEAD.unpack_from(body)
    assert (magic, version, reserved) == (b"TF", VERSION, 0)
    return Message(kind, source, incarnation, msgpack.unpackb(body[MESSAGE_HEAD.size :]))


# Section 6: values.

DTYPES = {
    **dict(enumerate(("?", "u1", "i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8"), start=1)),
    13: "<u2",  # bfloat16: its bits
    14: "<u4",  # complex32: its bits
    15: "<c8",
    16: "<c16",
    **dict.fromkeys(range(17, 22), "u1"),  # float8 of five kinds: their bits
}


def decode_value(kind: int, blob: bytes) -> Any:
    """The value of a blob; tensors as numpy arrays, dataclasses as (name, dict of fields)."""
    return _KINDS[kind](blob)


def _array(blob: bytes) -> Any:
    code, dimensions, flags, zero = struct.unpack_from("<BBHI", blob)
    shape = struct.unpack_from(f"<{dimensions}q", blob, 8)
    start = -(-(8 + 8 * dimensions) // 16) * 16
    assert zero == 0
    array = np.frombuffer(blob[start:], DTYPES[code]).reshape(shape)
    return array[()] if flags == 1 else array


class _Tree:
    def __init__(self, blob: bytes) -> None:
        length, zero = struct.unpack_from("<II", blob)
        assert zero == 0
        self.blob, self.base = blob, -(-(8 + length) // 64) * 64
        self.tokens = iter([token for chunk in msgpack.unpackb(blob[8 : 8 + length]) for token in chunk])
        self.buffers: list[Any] = []

    def value(self) -> Any:
        token = next(self.tokens)
        return self.of(*token) if isinstance(token, list) else token

    def of(self, tag: int, *rest: Any) -> Any:
        if tag in (5, 6):
            code, shape, offset, size = rest
            assert size == prod(shape) * np.dtype(DTYPES[code]).itemsize
            array = np.frombuffer(self._bytes(offset, size), DTYPES[code])
            return self._note(array.reshape(shape))
        if tag == 8:
            return self._note(self._bytes(*rest))
        if tag == 3:
            name, fields = rest
            return name, {field: self.value() for field in fields}
        return _TOKENS[tag](self, *rest)

    def _bytes(self, offset: int, size: int) -> bytes:
        return self.blob[self.base + offset : self.base + offset + size]

    def _note(self, value: Any) -> Any:
        self.buffers.append(value)
        return value


_TOKENS: dict[int, Callable[..., Any]] = {
    0: lambda tree, n: [tree.value() for _ in range(n)],
    1: lambda tree, n: tuple(tree.value() for _ in range(n)),
    2: lambda tree, n: {tree.value(): tree.value() for _ in range(n)},
    4: lambda tree, digits: int.from_bytes(digits, "little", signed=True),
    7: lambda tree, code, data: np.frombuffer(data, DTYPES[code])[0],
    9: lambda tree, k: tree.buffers[k],
}
_KINDS: dict[int, Callable[[bytes], Any]] = {
    1: bytes,
    2: lambda blob: str(blob, "utf-8"),
    3: lambda blob: int.from_bytes(blob, "little", signed=True),
    4: lambda blob: struct.unpack("<d", blob)[0],
    5: _array,
    6: _array,
    7: lambda blob: _Tree(blob).value(),
}
