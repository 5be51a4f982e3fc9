"""Bursts for tests: a publisher's numbering, without the publisher."""

from __future__ import annotations

from collections.abc import Sequence

from fabric.core.wire import (
    ADDRESSED,
    NONE,
    Burst,
    checksum_of,
    decode_data,
    encode_burst,
    encode_control,
    encode_descriptor,
)

RAW = 1
"""A payload kind; the core does not look into values."""


class Numbering:
    """Numbers records as a publisher does: offsets in the feed, sequence and previous in each lane."""

    def __init__(self, feed: int = 7, incarnation: int = 1) -> None:
        self.feed, self.incarnation, self.end = feed, incarnation, 0
        self.rows: list[tuple[int, int, int]] = []
        """(seed, sequence, previous) of every record so far, by offset."""
        self._last: dict[int, tuple[int, int]] = {}

    def frame(
        self,
        seeds: Sequence[int],
        bodies: Sequence[bytes] | None = None,
        *,
        payloads: dict[int, bytes] | None = None,
        metadata: Sequence[bytes] | None = None,
    ) -> bytes:
        """The next burst: one record for each seed. `payloads`, by row, are addressed."""
        first, payloads = self.end, payloads or {}
        for seed in seeds:
            sequence, previous = self._last.get(seed, (-1, NONE))
            self.rows.append((seed, sequence + 1, previous))
            self._last[seed] = (sequence + 1, self.end)
            self.end += 1
        values = list(bodies) if bodies is not None else [b"%d" % (first + row) for row in range(len(seeds))]
        kinds = [RAW] * len(seeds)
        for row, payload in payloads.items():
            values[row], kinds[row] = encode_descriptor(len(payload), checksum_of(payload)), RAW | ADDRESSED
        rows = self.rows[first:]
        return encode_burst(
            self.feed,
            self.incarnation,
            first,
            0,
            [seed for seed, _, _ in rows],
            [sequence for _, sequence, _ in rows],
            [previous for _, _, previous in rows],
            kinds,
            values,
            metadata,
        )

    def burst(self, seeds: Sequence[int], *, payloads: dict[int, bytes] | None = None) -> Burst:
        """The next burst, as its receiver sees it."""
        return burst_of(self.frame(seeds, payloads=payloads))


def burst_of(frame: bytes) -> Burst:
    """A frame of a burst, decoded."""
    burst, nonces = decode_data(frame)
    assert nonces is None
    return burst


def resealed(frame: bytes) -> bytes:
    """The frame with the right checksum for what it holds now."""
    return frame[:-8] + checksum_of(frame[:-8]).to_bytes(8, "little")


__all__ = ["RAW", "Numbering", "burst_of", "encode_control", "resealed"]
