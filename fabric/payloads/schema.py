"""What a payload may look like: kinds, dtype codes, heads and limits, and the checks of every received blob.

A *blob* is the bytes of one value, self-describing given its *kind*:

| kind | name | blob |
|---|---|---|
| 1 | bytes | the bytes themselves |
| 2 | text | UTF-8 |
| 3 | integer | two's complement, little endian, one byte or more |
| 4 | float | IEEE 754 binary64, little endian |
| 5 | array | array head, then the elements: a numpy array or, by flag, a numpy scalar |
| 6 | tensor | array head, then the elements: a torch tensor |
| 7 | tree | everything else; see `trees.py` |

The *array head* is little endian: `dtype code u8, ndim u8, flags u16, zero u32, ndim x dimension i64`, padded with
zeros to a multiple of 16 bytes. Elements follow in C order, little endian, to the end of the blob. Flag 1 (arrays
only, ndim 0) says that the value is a numpy scalar; other flags are refused.

| code | dtype | code | dtype | code | dtype |
|---|---|---|---|---|---|
| 1 | bool | 8 | uint64 | 15 | complex64 |
| 2 | uint8 | 9 | int64 | 16 | complex128 |
| 3 | int8 | 10 | float16 | 17 | float8_e4m3fn |
| 4 | uint16 | 11 | float32 | 18 | float8_e4m3fnuz |
| 5 | int16 | 12 | float64 | 19 | float8_e5m2 |
| 6 | uint32 | 13 | bfloat16 | 20 | float8_e5m2fnuz |
| 7 | int32 | 14 | complex32 | 21 | float8_e8m0fnu |

Codes 13, 14 and 17 to 21 exist in torch only. Kinds and codes are part of the wire format: they are never renumbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Any, Final, NamedTuple, NoReturn

import msgpack
import numpy as np

from fabric.errors import SchemaError

BYTES: Final = 1
TEXT: Final = 2
INTEGER: Final = 3
FLOAT: Final = 4
ARRAY: Final = 5
TENSOR: Final = 6
TREE: Final = 7

SCALAR_FLAG: Final = 1
"""Array head flag: the value is a numpy scalar."""

DIMENSIONS_MAX: Final = 16
"""Dimensions of an array or tensor."""

DEPTH_MAX: Final = 64
"""Containers within containers of a tree."""

TOKENS_MAX: Final = 2_000_000
"""Tokens of a tree: one for each leaf, key and container."""

CHUNK_TOKENS: Final = 4096
"""Tokens in one msgpack array.

msgpack allocates an array before it reads its elements, so nested false lengths would multiply; its stack holds 1,024
levels, and 1,024 x 4,096 x 8 bytes = 32 MiB is harmless.
"""

DOCUMENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""The msgpack part of a tree, in bytes: names and plain leaves, never tensors."""

HEAD_ALIGNMENT: Final = 16
"""Elements of an array or tensor start at a multiple of this many bytes from the start of the blob."""

BUFFER_ALIGNMENT: Final = 64
"""Buffers of a tree start at a multiple of this many bytes from the start of the blob: a cache line."""

TREE_HEAD: Final = Struct("<II")
"""Bytes of the msgpack document, zero."""

FLOAT_BLOB: Final = Struct("<d")

_EXTENT_MAX: Final = 2**63


class Dtype(NamedTuple):
    """One element type of the wire format.

    `carrier` is the numpy dtype that moves its bytes: the type itself where numpy has it (`native`), otherwise an
    integer of the same size.
    """

    code: int
    name: str
    carrier: np.dtype[Any]
    native: bool


_NATIVE: Final = (
    (1, "bool", "?"),
    (2, "uint8", "|u1"),
    (3, "int8", "|i1"),
    (4, "uint16", "<u2"),
    (5, "int16", "<i2"),
    (6, "uint32", "<u4"),
    (7, "int32", "<i4"),
    (8, "uint64", "<u8"),
    (9, "int64", "<i8"),
    (10, "float16", "<f2"),
    (11, "float32", "<f4"),
    (12, "float64", "<f8"),
    (15, "complex64", "<c8"),
    (16, "complex128", "<c16"),
)
_TORCH_ONLY: Final = (
    (13, "bfloat16", "<i2"),
    (14, "complex32", "<i4"),
    (17, "float8_e4m3fn", "|u1"),
    (18, "float8_e4m3fnuz", "|u1"),
    (19, "float8_e5m2", "|u1"),
    (20, "float8_e5m2fnuz", "|u1"),
    (21, "float8_e8m0fnu", "|u1"),
)

DTYPES: Final[dict[int, Dtype]] = {
    code: Dtype(code, name, np.dtype(carrier), native)
    for rows, native in ((_NATIVE, True), (_TORCH_ONLY, False))
    for code, name, carrier in rows
}
"""Dtype code -> element type."""

ARRAY_HEADS: Final[tuple[Struct, ...]] = tuple(
    Struct(f"<BBHI{ndim}q{-(8 + 8 * ndim) % HEAD_ALIGNMENT}x") for ndim in range(DIMENSIONS_MAX + 1)
)
"""Number of dimensions -> the array head, padding included."""


class Head(NamedTuple):
    """A checked array head: element type, shape, flags, and where the elements start."""

    dtype: Dtype
    shape: tuple[int, ...]
    flags: int
    start: int


def aligned(offset: int) -> int:
    """The next multiple of 64 bytes."""
    return -(-offset // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def refuse(detail: str) -> NoReturn:
    """Raise `SchemaError`."""
    raise SchemaError(detail)


def parse_array_head(blob: memoryview, *, kind: int) -> Head:
    """Read and check the head of an array or tensor blob, and that the elements fill the rest of it exactly.

    Raises `SchemaError`.
    """
    size = len(blob)
    ndim = blob[1] if size >= HEAD_ALIGNMENT else refuse(f"an array head takes 16 bytes or more, not {size}")
    if ndim > DIMENSIONS_MAX:
        refuse(f"{ndim} dimensions, the most is {DIMENSIONS_MAX}")
    head = ARRAY_HEADS[ndim]
    if size < head.size:
        refuse(f"the head of {ndim} dimensions takes {head.size} bytes, the blob has {size}")
    code, _, flags, zero, *dimensions = head.unpack_from(blob)
    dtype = DTYPES.get(code)
    if dtype is None:
        refuse(f"unknown dtype code {code}")
    if kind == ARRAY and not dtype.native:
        refuse(f"numpy has no {dtype.name}")
    if zero or (flags and (flags != SCALAR_FLAG or kind != ARRAY or ndim)):
        refuse(f"unknown flags {flags}, {zero}")
    nbytes = extent(dtype, dimensions)
    if head.size + nbytes != size:
        refuse(f"{dtype.name} of shape {dimensions} takes {nbytes} bytes, the blob has {size - head.size}")
    return Head(dtype, tuple(dimensions), flags, head.size)


def extent(dtype: Dtype, shape: Sequence[int]) -> int:
    """The bytes that `shape` takes, in Python's integers; an empty shape may not hide an impossible dimension.

    Raises `SchemaError`.
    """
    empty, product = False, dtype.carrier.itemsize
    for dimension in shape:
        if dimension > 0:
            product *= dimension
        elif dimension == 0:
            empty = True
        else:
            refuse(f"negative dimension in {list(shape)}")
    if product >= _EXTENT_MAX:
        refuse(f"shape {list(shape)} is beyond any memory")
    return 0 if empty else product


def parse_tree(blob: memoryview) -> tuple[list[Any], int]:
    """Read the tokens of a tree; returns them with the position where its buffers start.

    The tokens are plain values and lists; what the lists say is still to be checked. Raises `SchemaError`.
    """
    size = len(blob)
    if size < TREE_HEAD.size:
        refuse(f"a tree takes 8 bytes or more, not {size}")
    length, zero = TREE_HEAD.unpack_from(blob)
    end = TREE_HEAD.size + length
    if zero or length > DOCUMENT_BYTES_MAX or end > size:
        refuse(f"a document of {length} bytes in a tree of {size}")
    chunks = unpack(blob[TREE_HEAD.size : end])
    if type(chunks) is not list or any(type(chunk) is not list for chunk in chunks):
        refuse("the document is no list of chunks")
    tokens = chunks[0] if len(chunks) == 1 else [token for chunk in chunks for token in chunk]
    if len(tokens) > TOKENS_MAX:
        refuse(f"{len(tokens)} tokens, the most is {TOKENS_MAX}")
    if not _TOKEN_TYPES.issuperset(map(type, tokens)):
        refuse("a token is of a type that the format does not have")
    return tokens, end


_TOKEN_TYPES: Final = frozenset((type(None), bool, int, float, str, bytes, list))


def unpack(document: memoryview) -> Any:  # noqa: ANN401 - msgpack may hold anything; the caller checks
    """Read one msgpack document under explicit limits. Raises `SchemaError`."""
    size = len(document)
    try:
        return msgpack.unpackb(
            document,
            raw=False,
            use_list=True,
            strict_map_key=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=CHUNK_TOKENS,
            max_map_len=0,
            max_ext_len=0,
        )
    except ValueError as error:
        raise SchemaError(f"not msgpack within the limits: {error}") from error


def is_count(*values: object) -> bool:
    """Whether all are integers (no bools) and none is negative."""
    return all(type(value) is int and value >= 0 for value in values)


def check_buffer(dtype_code: object, shape: object, nbytes: object, *, native: bool) -> None:
    """Check the description of one array (`native`) or tensor in a tree. Raises `SchemaError`."""
    dtype = DTYPES.get(dtype_code) if type(dtype_code) is int else None
    if dtype is None:
        refuse(f"unknown dtype code {dtype_code!r}")
    if native and not dtype.native:
        refuse(f"numpy has no {dtype.name}")
    if type(shape) is not list or len(shape) > DIMENSIONS_MAX or not is_count(*shape):
        refuse("a shape is a list of at most 16 dimensions of 0 or more")
    if not is_count(nbytes) or extent(dtype, shape) != nbytes:
        refuse(f"{dtype.name} of shape {shape} does not take {nbytes!r} bytes")


def overlaps(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether two elements may share memory: no if every stride steps over all that the smaller ones span.

    Shape and strides in the same unit for all dimensions; one that only looks like it overlaps is reported too.
    """
    span = 0
    steps = sorted((abs(stride), size) for stride, size in zip(strides, shape, strict=True) if size > 1)
    for stride, dimension in steps:
        if stride <= span:
            return 0 not in shape
        span += stride * (dimension - 1)
    return False
