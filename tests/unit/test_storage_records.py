"""The format of a segment: its bytes, and what a reader makes of any others."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fabric.storage.records import (
    ENTRY_BYTES,
    HEAD_BYTES,
    Bad,
    Entry,
    Good,
    Header,
    Kind,
    MalformedEntryError,
    Reason,
    SegmentHead,
    decode_body,
    decode_head,
    encode_group,
    encode_head,
    most_bytes,
    read_entry,
    scan,
)
from tests.harness.spills import burst, named, plain

HEAD = SegmentHead(number=5, created_ns=10**18, identity=bytes(range(16)), previous_end=4096, first=True)


def segment(*entries: Entry, head: SegmentHead = HEAD) -> bytes:
    parts, _, end = encode_group(entries, head.seed, HEAD_BYTES)
    data = encode_head(head) + b"".join(parts)
    assert len(data) == end <= HEAD_BYTES + most_bytes(entries)
    return data


def reader(data: bytes):  # noqa: ANN201
    return lambda position, size: data[position : position + size]


def found(data: bytes, *, exact: bool = False) -> list[Good | Bad]:
    return list(scan(reader(data), HEAD.seed, len(data), exact=exact))


def test_the_bytes_of_a_segment_are_these() -> None:
    golden = (
        "54465350494c4c00"
        "01000000"
        "01000000"
        "0500000000000000"
        "000064a7b3b6e00d"
        "0010000000000000"
        "000102030405060708090a0b0c0d0e0f"
    )
    data = segment(Entry(Kind.BURST, 7, 3, 40, 2, b"frame", {41: b"payload"}))
    assert data[:56].hex() == golden
    assert data[:64] == data[64:128]
    entry = data[128:]
    assert entry[:4] == b"TFE\x01"
    assert entry[4:56].hex() == (
        "02000000070000000000000003000000000000002800000000000000020000000500000001000000000000001c00000000000000"
    )
    assert entry[72:].hex() == "29000000000000000700000000000000" + b"framepayload".hex() + "00000000"
    assert entry[56:72].hex() == "eef2b29fccdcf8d68994e194a492aafc"


def test_a_head_says_who_the_segment_is() -> None:
    assert decode_head(encode_head(HEAD)) == (HEAD, [])
    other = SegmentHead(number=2**62, created_ns=0, identity=bytes(16), previous_end=0, first=False)
    assert decode_head(encode_head(other)) == (other, [])
    assert decode_head(b"") == (None, [0, 64])
    spoiled = bytearray(encode_head(HEAD))
    spoiled[70] ^= 1
    assert decode_head(bytes(spoiled)) == (HEAD, [64])


def test_a_head_of_another_version_is_not_read() -> None:
    from xxhash import xxh3_64_intdigest

    data = bytearray(encode_head(HEAD)[:56])
    data[8] = 2
    data += xxh3_64_intdigest(bytes(data)).to_bytes(8, "little")
    assert decode_head(bytes(data * 2)) == (None, [0, 64])


@given(
    st.lists(
        st.builds(
            Entry,
            st.sampled_from([Kind.FEED, Kind.BURST, Kind.END, 77]),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**62),
            st.integers(0, 2**32 - 1),
            st.binary(max_size=40),
            st.dictionaries(st.integers(0, 2**64 - 1), st.binary(max_size=20), max_size=3),
        ),
        max_size=6,
    )
)
def test_entries_come_back_as_they_went_in(entries: list[Entry]) -> None:
    data = segment(*entries)
    read = reader(data)
    goods = found(data, exact=True)
    assert found(data + bytes(1000)) == goods
    back = [plain(read_entry(read, HEAD.seed, good.position, len(data))[1]) for good in goods]
    assert back == entries
    assert all(good.position % 8 == 0 for good in goods)


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_bytes_give_entries_or_damage(data: bytes) -> None:
    for exact in (True, False):
        items = found(encode_head(HEAD) + data, exact=exact)
        assert all(isinstance(item, Bad) for item in items)
        assert bool(items) == (bool(data) if exact else any(data))


def test_a_payload_that_holds_a_copy_of_the_segment_is_not_mistaken_for_it() -> None:
    copy = segment(burst(0), burst(1), burst(2))
    data = bytearray(segment(burst(0, frame=copy[HEAD_BYTES:]), burst(1)))
    data[HEAD_BYTES] ^= 1
    bad, good = found(bytes(data))
    assert isinstance(bad, Bad) and bad.reason is Reason.HEADER
    assert isinstance(good, Good) and good.header.first == 1


def test_large_bodies_are_summed_in_pieces_and_never_read_at_once() -> None:
    entry = burst(0, frame=bytes(3 << 20), o0=bytes(range(256)) * 8192)
    data = bytearray(segment(entry, burst(1)))
    sizes: list[int] = []

    def read(position: int, size: int) -> bytes:
        sizes.append(size)
        return bytes(data[position : position + size])

    assert [type(item) for item in scan(read, HEAD.seed, len(data), exact=True)] == [Good, Good]
    assert max(sizes) <= 1 << 20
    data[5 << 19] ^= 4
    assert [type(item) for item in scan(read, HEAD.seed, len(data), exact=True)] == [Bad, Good]
    data[HEAD_BYTES + 20] ^= 4  # now its header does not stand: what follows is searched for
    assert [type(item) for item in scan(read, HEAD.seed, len(data), exact=True)] == [Bad, Good]


def test_garbage_that_looks_like_headers_everywhere_is_searched_once() -> None:
    calls = 0
    data = encode_head(HEAD) + b"TFE\1\2\0\0\0" * 20_000

    def read(position: int, size: int) -> bytes:
        nonlocal calls
        calls += 1
        return data[position : position + size]

    (bad,) = scan(read, HEAD.seed, len(data), exact=True)
    assert (bad.position, calls < 40) == (HEAD_BYTES, True)


def test_a_scan_goes_over_the_end_of_a_chunk() -> None:
    entries = [burst(at, frame=bytes(1000 + at % 9)) for at in range(3000)]
    data = bytearray(segment(*entries))
    assert len(data) > 3 << 20
    assert [item.header.first for item in found(bytes(data)) if isinstance(item, Good)] == list(range(3000))
    data[HEAD_BYTES:-2000] = b"\xff" * (len(data) - HEAD_BYTES - 2000)
    bad, good = found(bytes(data), exact=True)
    assert isinstance(bad, Bad) and isinstance(good, Good) and good.header.first == 2999


def test_a_disk_that_cannot_be_read_is_damage() -> None:
    data = segment(burst(0), burst(1))

    def read(position: int, size: int) -> bytes:
        raise OSError(5, "Input/output error")

    assert list(scan(read, HEAD.seed, len(data), exact=True)) == [
        Bad(HEAD_BYTES, len(data) - HEAD_BYTES, Reason.UNREADABLE)
    ]


def test_reading_one_entry_says_what_is_wrong_with_it() -> None:
    data = segment(named(), burst(0, o0=b"payload"))
    begin = len(segment(named()))

    def reason(data: bytes, limit: int) -> tuple[Reason, int]:
        with pytest.raises(MalformedEntryError) as caught:
            read_entry(reader(data), HEAD.seed, begin, limit)
        return caught.value.reason, caught.value.size

    size = len(data) - begin
    assert reason(data[:-8], len(data)) == (Reason.BODY, size)
    assert reason(data, len(data) - 8) == (Reason.CUT, size - 8)
    assert reason(data[: begin + 20], len(data)) == (Reason.HEADER, ENTRY_BYTES)


@pytest.mark.parametrize(("frame", "payloads", "size"), [(20, 0, 10), (5, 1, 10), (5, 0, 10), (0, 1, 17)])
def test_a_table_that_does_not_fit_its_body_is_refused(frame: int, payloads: int, size: int) -> None:
    header = Header(Kind.BURST, 1, 1, 0, 1, frame, payloads, size, 0)
    with pytest.raises(MalformedEntryError):
        decode_body(header, bytes(size))


def test_an_offset_beyond_the_wire_is_no_header() -> None:
    data = segment(Entry(Kind.BURST, 1, 1, 2**63 - 1, 2, b""))
    assert [type(item) for item in found(data)] == [Bad]
