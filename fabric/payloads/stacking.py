"""Values that are alike, as one array or tensor: a column of them, without looking at each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from fabric.payloads.decoders import tensors
from fabric.payloads.schema import ARRAY, BYTES, DTYPES, TENSOR, parse_array_head

__all__ = ["Rows", "stack"]

Rows = np.ndarray[Any, np.dtype[np.uint8]]
"""Blobs of one length: a row each."""


def stack(kind: int, parts: Sequence[Rows], *, own: bool) -> Any:  # noqa: ANN401 - an array or a tensor
    """The values of these blobs, all of this kind, along a new first dimension; None if they are not alike.

    Alike are bytes of one length, which come as uint8, and arrays or tensors of one dtype and shape. The memory is
    theirs alone, and can be written if `own`. Raises `SchemaError` for what is no array or tensor.
    """
    first, count = parts[0][0], sum(map(len, parts))
    dtype, shape, start = DTYPES[2], first.shape, 0
    if kind in (ARRAY, TENSOR):
        dtype, shape, _, start = parse_array_head(memoryview(first.tobytes()), kind=kind)
    elif kind != BYTES:
        return None
    if any(rows.shape[1] != len(first) or (rows[:, :start] != first[:start]).any() for rows in parts):
        return None
    elements: Rows = np.empty((count, len(first) - start), np.uint8)
    np.concatenate([rows[:, start:] for rows in parts], out=elements)
    array = np.frombuffer(cast("Any", elements), dtype.carrier).reshape(count, *shape) if elements.size else None
    if array is None:
        array = np.empty((count, *shape), dtype.carrier)
    array.flags.writeable = own
    return tensors().decode_tensor(array, dtype, own=own) if kind == TENSOR else array
