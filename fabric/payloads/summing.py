"""Copying and summing in one go: a block is summed while the cache still holds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeAlias, cast

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BLOCK_BYTES", "Digest", "copy_summed", "sampled_sum"]

Bytes: TypeAlias = bytes | bytearray | memoryview
Digest = xxh3_64
"""XXH3-64 of what it was given so far."""

BLOCK_BYTES: Final = 256 * 1024
"""Copied, then summed, at a time: well inside a second-level cache of 512 KiB or more. 16 MiB took 1.2 ms so, and
1.65 to 2.0 ms as a copy and then a sum (two-core AMD EPYC, L2 1 MiB a core)."""


def copy_summed(target: Bytes, source: Bytes, digest: xxh3_64) -> None:
    """Copy all bytes of `source` to the beginning of `target`, and add to the digest what lies there then.

    Both are contiguous. What is summed is the copy: the source may be changed by others meanwhile.
    """
    to, of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    for begin in range(0, len(of), BLOCK_BYTES):
        piece = of[begin : begin + BLOCK_BYTES]
        block = to[begin : begin + len(piece)]
        np.copyto(block, piece)
        digest.update(cast("Buffer", block))


SAMPLE_BYTES: Final = 4096
"""A block of a sample: a page."""


def sampled_sum(view: memoryview, blocks: int) -> int:
    """The XXH3-64 of `blocks` pages of a value, the first and the last of them at its ends, the others evenly between.

    Block i begins at i * s, with s = (size - 4096) // (blocks - 1); the last `size - 4096 - (blocks - 1) * s` bytes are
    not looked at unless they lie in a block. Of a value with no more bytes than that, of all of it.
    """
    size = view.nbytes
    if size <= blocks * SAMPLE_BYTES:
        return xxh3_64_intdigest(view)
    stride = (size - SAMPLE_BYTES) // (blocks - 1)
    sample = np.ndarray((blocks, SAMPLE_BYTES), np.uint8, buffer=view, strides=(stride, 1))
    return xxh3_64_intdigest(sample.tobytes())
