"""The bytes of the protocol: golden files hold every kind of frame, so that no change of them goes unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from fabric.core.wire import Kind, decode_control, decode_data
from tests.data.make_golden import FEED, FIELDS, INCARNATION, SOURCE, frames

DATA = Path(__file__).parents[1] / "data"
FRAMES = frames()


def as_lists(value: object) -> object:
    return [as_lists(entry) for entry in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_the_bytes_that_it_always_had(name: str) -> None:
    assert FRAMES[name] == (DATA / f"{name}.bin").read_bytes()


def test_every_kind_has_a_golden_file_and_every_file_a_kind() -> None:
    assert set(FIELDS) == set(Kind)
    assert {path.stem for path in DATA.glob("*.bin")} == set(FRAMES)


@pytest.mark.parametrize("kind", Kind)
def test_a_golden_message_is_read_as_it_was_written(kind: Kind) -> None:
    link = "control" if kind < Kind.REPAIR else "bulk"
    message = decode_control((DATA / f"{link}_{kind.name.lower()}.bin").read_bytes())
    assert (message.kind, message.source, message.incarnation) == (kind, SOURCE, INCARNATION)
    assert message.fields == as_lists(FIELDS[kind])


def test_a_golden_burst_is_read_as_it_was_written() -> None:
    burst, nonces = decode_data((DATA / "data_burst_with_metadata.bin").read_bytes())
    assert nonces is None
    assert (burst.feed, burst.incarnation, burst.first, burst.count, burst.end) == (FEED, INCARNATION, 5, 3, 8)
    assert (*burst.columns[:2], burst.previous) == ((17, 18, 17), (2, 0, 3), (4, -1, 5))
    assert [burst.body(row) for row in range(3)] == [b"first", b"", b"third"]
    assert [burst.metadata(row) for row in range(3)] == [b"\x81\xa4step\x07", b"", b"\x80"]


def test_a_golden_marker_is_read_as_it_was_written() -> None:
    marker, nonces = decode_data((DATA / "data_marker.bin").read_bytes())
    assert (marker.feed, marker.incarnation, marker.first, marker.count) == (FEED, INCARNATION, 17, 0)
    assert nonces == (99, 2**64 - 1)
