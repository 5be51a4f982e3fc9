"""Metadata: small facts beside a value, as a map of msgpack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgpack

from fabric.errors import PayloadTooLargeError, SchemaError, UnsupportedValueError

__all__ = ["METADATA_BYTES_MAX", "pack_metadata", "unpack_metadata"]

METADATA_BYTES_MAX: Final = 16 * 1024
"""Of one record or request, packed."""


def pack_metadata(metadata: Mapping[str, object]) -> bytes:
    """A map of small facts as msgpack.

    Raises `UnsupportedValueError` for other keys and values, `PayloadTooLargeError`.
    """
    for key in metadata:
        if not isinstance(key, str):
            raise UnsupportedValueError("use str keys", kind="a key that is no str", where="metadata")
    try:
        packed: bytes = msgpack.packb(dict(metadata))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UnsupportedValueError(str(error), kind="something that is no plain value", where="metadata") from error
    if len(packed) > METADATA_BYTES_MAX:
        raise PayloadTooLargeError(size=len(packed), limit=METADATA_BYTES_MAX)
    return packed


def unpack_metadata(packed: bytes) -> dict[str, Any]:
    """The map in packed metadata. Raises `SchemaError`."""
    if not packed:
        return {}
    try:
        metadata = msgpack.unpackb(packed, raw=False, strict_map_key=True, max_ext_len=0)
    except (ValueError, RecursionError) as error:
        raise SchemaError(f"metadata: {error}") from error
    if not isinstance(metadata, dict):
        raise SchemaError("metadata is no map")
    return metadata
