"""Frames: each way in which one is refused, with its reason."""

from __future__ import annotations

import struct

import msgpack
import pytest

from fabric.core.wire import (
    CONTROL_BYTES_MAX,
    DATA_BYTES_MAX,
    HAS_ADDRESSED,
    HAS_METADATA,
    NONE,
    Control,
    Drop,
    Kind,
    decode_control,
    decode_data,
    decode_descriptor,
    encode_burst,
    encode_control,
    encode_descriptor,
    encode_marker,
    feed_id,
    feed_prefix,
    member_id,
)
from fabric.errors import WireFormatError
from tests.harness.bursts import Numbering, burst_of, resealed


def refused(decode: object, frame: bytes) -> str:
    with pytest.raises(WireFormatError) as caught:
        decode(frame)  # type: ignore[operator]
    return str(caught.value.fields["reason"])


def changed(frame: bytes, at: int, form: str, value: int) -> bytes:
    packed = bytearray(frame)
    struct.pack_into(form, packed, at, value)
    return resealed(bytes(packed))


BURST = encode_burst(7, 1, 5, 0, [1, 2], [0, 0], [NONE, NONE], [1, 1], [b"a", b"b"])
NOTED = encode_burst(7, 1, 5, 0, [1, 2], [0, 0], [NONE, NONE], [1, 1], [b"a", b"b"], [b"\x80", b""])
MARKER = encode_marker(7, 1, 5, 0, [1])
HELLO = encode_control(Kind.UNKNOWN, 1, 1, 3)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", Drop.TRUNCATED),
        (BURST[:40], Drop.TRUNCATED),
        (BURST[:8] + b"XX" + BURST[10:], Drop.MAGIC),
        (changed(BURST, 10, "<B", 2), Drop.VERSION),
        (BURST[:-1] + bytes([BURST[-1] ^ 1]), Drop.CHECKSUM),
        (changed(BURST, 11, "<B", 3), Drop.KIND),
        (changed(BURST, 12, "<H", 4), Drop.SHAPE),
        (changed(BURST, 14, "<H", 1), Drop.SHAPE),
        (changed(BURST, 32, "<I", 0), Drop.SHAPE),
        (changed(BURST, 32, "<I", 2**32 - 1), Drop.SHAPE),
        (changed(BURST, 36, "<I", 1), Drop.SHAPE),
        (changed(BURST, 24, "<Q", 2**63 - 2), Drop.SHAPE),
        (resealed(BURST + bytes(DATA_BYTES_MAX)), Drop.SHAPE),
        (changed(MARKER, 32, "<I", 2), Drop.SHAPE),
        (changed(MARKER, 24, "<Q", 2**63), Drop.SHAPE),
        (changed(MARKER, 12, "<H", 1), Drop.SHAPE),
    ],
)
def test_a_data_frame_is_refused_with_its_reason(frame: bytes, reason: Drop) -> None:
    assert refused(decode_data, frame) == reason


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"", Drop.TRUNCATED),
        (HELLO[:20], Drop.TRUNCATED),
        (HELLO[:28], Drop.TRUNCATED),
        (b"XX" + HELLO[2:], Drop.MAGIC),
        (changed(HELLO, 2, "<B", 9), Drop.VERSION),
        (HELLO[:-1] + bytes([HELLO[-1] ^ 1]), Drop.CHECKSUM),
        (changed(HELLO, 3, "<B", 250), Drop.KIND),
        (changed(HELLO, 4, "<I", 1), Drop.KIND),
        (changed(HELLO, 3, "<B", Kind.STATUS), Drop.SHAPE),
        (encode_control(Kind.UNKNOWN, 1, 1, -1), Drop.SHAPE),
        (encode_control(Kind.UNKNOWN, 1, 1, True), Drop.SHAPE),
        (encode_control(Kind.UNREGISTER, 1, 1, 3, 4), Drop.SHAPE),
        (encode_control(Kind.ACKNOWLEDGE, 1, 1, 3), Drop.SHAPE),
        (encode_control(Kind.ACKNOWLEDGE, 1, 1, [(1, 2)]), Drop.SHAPE),
        (encode_control(Kind.ACKNOWLEDGE, 1, 1, [(1, 2, 3)] * 16_385), Drop.SHAPE),
        (encode_control(Kind.REPLY, 1, 1, 1, False, 1, bytes(CONTROL_BYTES_MAX)), Drop.SHAPE),
        (resealed(HELLO[:24] + b"\x80" + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + msgpack.packb([{}]) + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + msgpack.packb([{"a": 1}]) + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + msgpack.packb([msgpack.ExtType(1, b"x")]) + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + b"\x91" * 5000 + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + b"\xdd\xff\xff\xff\xff" + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + b"\x91\xa1\xff" + bytes(8)), Drop.SHAPE),
        (resealed(HELLO[:24] + b"\x91\x01\x01" + bytes(8)), Drop.SHAPE),
    ],
)
def test_a_message_is_refused_with_its_reason(frame: bytes, reason: Drop) -> None:
    assert refused(decode_control, frame) == reason


def test_columns_beyond_the_frame_are_refused_before_they_are_read() -> None:
    tight = encode_burst(7, 1, 5, 0, [1], [0], [NONE], [1], [b""])
    assert refused(decode_data, changed(tight, 12, "<H", HAS_METADATA)) == Drop.SHAPE


@pytest.mark.parametrize(
    ("frame", "at", "form", "value"),
    [
        (BURST, 48 + 48, "<I", 2),  # lengths that do not end at the checksum
        (NOTED, 48 + 56, "<I", 3),  # metadata longer than its record
        (BURST, 48, "<q", -1),  # a negative seed
        (BURST, 48 + 16, "<q", -1),  # a negative sequence
        (BURST, 48 + 32, "<q", -2),  # previous below none
        (BURST, 48 + 32, "<q", 5),  # a record that waits for itself
        (BURST, 12, "<H", HAS_ADDRESSED),  # the flag without such a record
        (BURST, 48 + 56, "<B", 0x81),  # such a record without the flag
    ],
)
def test_a_burst_with_impossible_rows_is_refused(frame: bytes, at: int, form: str, value: int) -> None:
    burst = burst_of(changed(frame, at, form, value))
    with pytest.raises(WireFormatError) as caught:
        burst.check()
        assert not burst.previous
    assert caught.value.fields["reason"] == Drop.SHAPE


def test_a_burst_without_metadata_has_none_and_shows_its_offsets() -> None:
    burst = Numbering(feed=255).burst([1, 1])
    assert (burst.metadata(0), burst.body(1), burst.has_addressed) == (b"", b"1", False)
    assert repr(burst) == f"Burst(feed=00000000000000ff, offsets=0..1, bytes={burst.size})"


def test_a_message_shows_what_it_is() -> None:
    assert repr(Control(Kind.ACCEPTED, 255, 3, [1])) == "Control(ACCEPTED, 00000000000000ff@3, [1])"


def test_names_and_feeds_are_found_by_their_numbers() -> None:
    assert member_id("a") != member_id("b")
    feeds = {feed_id("a", 1, "t"), feed_id("a", 2, "t"), feed_id("b", 1, "t"), feed_id("a", 1, "u")}
    assert len(feeds) == 4
    assert encode_marker(7, 1, 5, 0).startswith(feed_prefix(7))


def test_a_descriptor_of_nothing_is_refused() -> None:
    assert decode_descriptor(encode_descriptor(1, 2)) == (1, 2, 0, None)
    assert refused(decode_descriptor, encode_descriptor(0, 2)) == Drop.SHAPE
