"""Decoding is total, encoding and decoding are inverse, and no changed byte goes unseen."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.core.fields import FIELDS, Each
from fabric.core.wire import (
    ADDRESSED,
    Burst,
    Drop,
    Kind,
    decode_control,
    decode_data,
    decode_descriptor,
    encode_burst,
    encode_control,
    encode_descriptor,
    encode_marker,
)
from fabric.errors import WireFormatError
from tests.data.make_golden import frames
from tests.harness.bursts import resealed

GOLDEN = list(frames().values())
U64 = st.integers(0, 2**64 - 1)
I63 = st.integers(0, 2**63 - 1)


def values_of(wanted: Any) -> st.SearchStrategy[Any]:
    """Values of a type in a message's shape."""
    if isinstance(wanted, Each):
        return st.lists(shaped(wanted.shape), max_size=3)
    return {int: U64, str: st.text(max_size=10), bool: st.booleans(), bytes: st.binary(max_size=20)}[wanted]


def shaped(shape: tuple[Any, ...]) -> st.SearchStrategy[list[Any]]:
    return st.tuples(*map(values_of, shape)).map(list)


MESSAGES = st.sampled_from(list(Kind)).flatmap(lambda kind: st.tuples(st.just(kind), shaped(FIELDS[kind])))


def read(frame: bytes) -> None:
    """Decode in every way; a burst to its last column."""
    for decode in (decode_data, decode_control):
        try:
            decoded = decode(frame)
        except WireFormatError as error:
            assert error.fields["reason"] in set(Drop)
            continue
        if isinstance(decoded, tuple) and decoded[1] is None:
            look_at(decoded[0])


def look_at(burst: Burst) -> None:
    try:
        burst.check()
    except WireFormatError as error:
        assert error.fields["reason"] == Drop.SHAPE
        return
    assert all(len(burst.body(row)) + len(burst.metadata(row)) <= burst.size for row in range(burst.count))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_a_wire_format_error(frame: bytes) -> None:
    read(frame)
    if len(frame) >= 8:
        read(resealed(frame))


@settings(max_examples=300)
@given(st.sampled_from(GOLDEN), st.integers(0, 300), st.integers(0, 8), st.binary(max_size=8))
def test_a_frame_with_changed_bytes_is_refused_or_well_formed(frame: bytes, at: int, length: int, new: bytes) -> None:
    at %= len(frame)
    changed = frame[:at] + new + frame[at + length :]
    read(changed)
    if len(changed) >= 8:
        read(resealed(changed))


@given(st.sampled_from(GOLDEN), st.integers(0, 300), st.integers(1, 255))
def test_f37_no_single_changed_byte_goes_unseen(frame: bytes, at: int, flip: int) -> None:
    at %= len(frame)
    changed = bytearray(frame)
    changed[at] ^= flip
    for decode in (decode_data, decode_control):
        with pytest.raises(WireFormatError):
            decode(bytes(changed))


@given(MESSAGES, U64, U64)
def test_a_message_is_read_as_it_was_written(message: tuple[Kind, list[Any]], source: int, incarnation: int) -> None:
    kind, fields = message
    decoded = decode_control(encode_control(kind, source, incarnation, *fields))
    assert (decoded.kind, decoded.source, decoded.incarnation, decoded.fields) == (kind, source, incarnation, fields)


JUNK = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=10,
)


@settings(max_examples=200)
@given(st.sampled_from(list(Kind)), JUNK)
def test_any_packed_value_has_the_shape_of_its_kind_or_is_refused(kind: Kind, junk: object) -> None:
    head = encode_control(kind, 1, 1)[:24]
    frame = resealed(head + msgpack.packb(junk) + bytes(8))
    try:
        message = decode_control(frame)
    except WireFormatError as error:
        assert error.fields["reason"] == Drop.SHAPE
    else:
        assert isinstance(junk, list)
        assert len(message.fields) == len(FIELDS[kind])


@st.composite
def records(draw: st.DrawFn) -> tuple[int, list[tuple[int, int, int, int, bytes, bytes]]]:
    first = draw(st.integers(0, 2**62))
    count = draw(st.integers(1, 6))
    rows = [
        (
            draw(I63),
            draw(I63),
            draw(st.integers(-1, first + row - 1)),
            draw(st.sampled_from([1, 2, 1 | ADDRESSED])),
            draw(st.binary(max_size=20)),
            draw(st.binary(max_size=5)),
        )
        for row in range(count)
    ]
    return first, rows


@given(records(), U64, U64, st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_a_burst_is_read_as_it_was_written(
    given_rows: tuple[int, list[tuple[int, int, int, int, bytes, bytes]]],
    feed: int,
    life: int,
    when: int,
    annotated: bool,
) -> None:
    first, rows = given_rows
    seeds, sequences, previous, kinds, bodies, metadata = map(list, zip(*rows, strict=True))
    frame = encode_burst(
        feed, life, first, when, seeds, sequences, previous, kinds, bodies, metadata if annotated else None
    )
    burst, nonces = decode_data(frame)
    burst.check()
    assert nonces is None
    assert (burst.feed, burst.incarnation, burst.first, burst.end) == (feed, life, first, first + len(rows))
    assert (burst.published_ns, burst.size, burst.frame) == (when, len(frame), frame)
    assert [*map(list, burst.columns[:3]), list(burst.previous)] == [seeds, sequences, kinds, previous]
    assert burst.has_addressed == any(kind & ADDRESSED for kind in kinds)
    assert [burst.body(row) for row in range(burst.count)] == bodies
    assert [burst.metadata(row) for row in range(burst.count)] == (metadata if annotated else [b""] * len(rows))


@given(U64, U64, I63, st.lists(U64, max_size=10))
def test_a_marker_is_read_as_it_was_written(feed: int, life: int, end: int, nonces: list[int]) -> None:
    if end == 2**63:
        return
    marker, echoed = decode_data(encode_marker(feed, life, end, 0, nonces))
    assert (marker.feed, marker.incarnation, marker.first, marker.count) == (feed, life, end, 0)
    assert echoed == tuple(nonces)


@given(st.integers(1, 2**64 - 1), U64)
def test_a_descriptor_is_read_as_it_was_written(size: int, checksum: int) -> None:
    assert decode_descriptor(encode_descriptor(size, checksum)) == (size, checksum, 0, None)


@given(st.binary(max_size=40).filter(lambda body: len(body) != 16))
def test_a_descriptor_of_any_other_length_is_refused(body: bytes) -> None:
    with pytest.raises(WireFormatError, match="descriptor"):
        decode_descriptor(body)
