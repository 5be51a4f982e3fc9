"""From blobs back to values: views of the blob, copies of it, or into memory that the caller has."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, Literal

import numpy as np

from fabric.errors import SchemaError
from fabric.payloads import trees
from fabric.payloads.schema import (
    ARRAY,
    BYTES,
    DEPTH_MAX,
    DTYPES,
    FLOAT,
    FLOAT_BLOB,
    INTEGER,
    SCALAR_FLAG,
    TENSOR,
    TEXT,
    TREE,
    Dtype,
    aligned,
    check_buffer,
    is_count,
    parse_array_head,
    parse_tree,
    refuse,
)

Ownership = Literal["view", "own"]


def decode(kind: int, blob: memoryview, *, ownership: Ownership = "view") -> Any:  # noqa: ANN401
    """The value of a blob (of bytes, in memory that will not change).

    `ownership="view"`: arrays and tensors are read-only views that keep `blob` alive; elements that are not aligned for
    their size are copied once. `"own"`: ordinary arrays and tensors with memory of their own. Tensors come to the CPU.
    Raises `SchemaError` for a blob that does not describe a value, or one that this process cannot make: unregistered
    dataclasses, tensors where torch is not installed.
    """
    decoder = _DECODERS.get(kind)
    if decoder is None:
        refuse(f"unknown kind {kind!r}")
    own = ownership != "view"
    if own and ownership != "own":
        raise ValueError(f"ownership is 'view' or 'own', not {ownership!r}")
    return decoder(blob, own)


def _decode_bytes(blob: memoryview, own: bool) -> bytes:
    return bytes(blob)


def _decode_text(blob: memoryview, own: bool) -> str:
    try:
        return str(blob, "utf-8")
    except UnicodeDecodeError as error:
        raise SchemaError(f"text is not UTF-8: {error}") from error


def _decode_integer(blob: memoryview, own: bool) -> int:
    if not len(blob):
        refuse("an integer takes a byte or more")
    return int.from_bytes(blob, "little", signed=True)


def _decode_float(blob: memoryview, own: bool) -> float:
    if len(blob) != FLOAT_BLOB.size:
        refuse(f"a float takes 8 bytes, not {len(blob)}")
    value: float = FLOAT_BLOB.unpack(blob)[0]
    return value


def _decode_array(blob: memoryview, own: bool) -> Any:  # noqa: ANN401
    dtype, shape, flags, start = parse_array_head(blob, kind=ARRAY)
    array = _array(blob, dtype, shape, start, own)
    return array[()] if flags == SCALAR_FLAG else array


def _array(blob: memoryview, dtype: Dtype, shape: tuple[int, ...], start: int, own: bool) -> np.ndarray[Any, Any]:
    count = math.prod(shape)
    if count == 0:
        return _empty(dtype, shape)
    # `numpy.ndarray(buffer=...)` would look through the owner of the memory to the array behind it, and not keep it.
    array: np.ndarray[Any, Any] = np.frombuffer(memoryview(blob).toreadonly(), dtype.carrier, count, start)
    array = array.reshape(shape)
    if own:
        return array.copy()
    if not array.flags.aligned:
        array = array.copy()
        array.flags.writeable = False
    return array


def _empty(dtype: Dtype, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    try:
        return np.empty(shape, dtype.carrier)
    except ValueError as error:  # numpy refuses empty arrays with huge dimensions
        raise SchemaError(f"no array of shape {list(shape)}: {error}") from error


def _decode_tensor(blob: memoryview, own: bool) -> Any:  # noqa: ANN401
    dtype, shape, _, start = parse_array_head(blob, kind=TENSOR)
    return _tensor(blob, dtype, shape, start, own)


def _tensor(blob: memoryview, dtype: Dtype, shape: tuple[int, ...], start: int, own: bool) -> Any:  # noqa: ANN401
    return tensors().decode_tensor(_array(blob, dtype, shape, start, own), dtype, own=own)


_torch_side: Any = None


def tensors() -> Any:  # noqa: ANN401 - a module
    """`fabric.payloads.tensors`, loaded when the first tensor arrives. Raises `SchemaError` without torch."""
    global _torch_side
    if _torch_side is None:
        try:
            _torch_side = import_module("fabric.payloads.tensors")
        except ImportError as error:
            raise SchemaError("the payload holds a torch tensor, and torch is not installed here") from error
    return _torch_side


class _Builder:
    """Builds one tree from its checked tokens."""

    __slots__ = ("base", "blob", "made", "own", "position", "tokens")

    def __init__(self, blob: memoryview, own: bool) -> None:
        self.tokens, end = parse_tree(blob)
        self.base = aligned(end)
        self.blob, self.own = blob, own
        self.position = 0
        self.made: list[Any] = []
        _check_buffers(self.tokens, end, len(blob))

    def value(self, depth: int) -> Any:  # noqa: ANN401
        """The value at the position."""
        if self.position >= len(self.tokens):
            refuse("the tree ends early")
        token = self.tokens[self.position]
        self.position += 1
        if type(token) is not list:
            return token
        builder = _BUILDERS.get(token[0]) if token and type(token[0]) is int else None
        if builder is None:
            refuse("unknown token")
        return builder(self, token, depth)

    def values(self, depth: int, count: object, *, each: int = 1) -> list[Any]:
        """`count` times `each` values from the position."""
        if type(count) is not int or count < 0:
            refuse(f"a count is an integer of 0 or more, not {count!r}")
        if depth >= DEPTH_MAX:
            refuse(f"nested deeper than {DEPTH_MAX} levels")
        count *= each
        segment = self.tokens[self.position : self.position + count]
        if len(segment) < count:
            refuse("the tree ends early")
        if list not in set(map(type, segment)):  # fast path: nothing but plain values
            self.position += count
            return segment
        return [self.value(depth + 1) for _ in range(count)]


def _check_buffers(tokens: list[Any], document_end: int, size: int) -> None:
    """Check that the buffers lie in order, without gap or overlap, to the end of the blob; before anything is made."""
    end = None
    for token in tokens:
        if type(token) is list and token and type(token[0]) is int and token[0] in _BUFFER_TOKENS:
            if len(token) != _BUFFER_TOKENS[token[0]]:
                refuse(f"a buffer token of {len(token)} fields")
            offset, nbytes = token[-2:]
            if token[0] != trees.BYTES_BUFFER:
                check_buffer(token[1], token[2], nbytes, native=token[0] == trees.ARRAY_BUFFER)
            if not is_count(offset, nbytes) or offset != aligned(end or 0):
                refuse(f"a buffer at {offset!r} of {nbytes!r} bytes, where {aligned(end or 0)} is next")
            end = offset + nbytes
    expected = document_end if end is None else aligned(document_end) + end
    if expected != size:
        refuse(f"the buffers end at {expected}, the blob at {size}")


_BUFFER_TOKENS: Final = {trees.ARRAY_BUFFER: 5, trees.TENSOR_BUFFER: 5, trees.BYTES_BUFFER: 3}


def _fields(token: list[Any], count: int) -> list[Any]:
    if len(token) != count + 1:
        refuse(f"token {token[0]} takes {count} fields, not {len(token) - 1}")
    return token[1:]


def _build_list(builder: _Builder, token: list[Any], depth: int) -> list[Any]:
    return builder.values(depth, *_fields(token, 1))


def _build_tuple(builder: _Builder, token: list[Any], depth: int) -> tuple[Any, ...]:
    return tuple(builder.values(depth, *_fields(token, 1)))


def _build_dict(builder: _Builder, token: list[Any], depth: int) -> dict[Any, Any]:
    flat = builder.values(depth, _fields(token, 1)[0], each=2)
    keys = flat[::2]
    if not trees.KEYS.issuperset(map(type, keys)):
        refuse("a dict has keys of str, int or bool")
    made = dict(zip(keys, flat[1::2], strict=True))
    if len(made) != len(keys):
        refuse("a dict has a key twice")
    return made


def _build_record(builder: _Builder, token: list[Any], depth: int) -> Any:  # noqa: ANN401
    name, fields = _fields(token, 2)
    if type(name) is not str or type(fields) is not list or not all(type(field) is str for field in fields):
        refuse("a dataclass has a name and a list of fields")
    record = trees.BY_NAME.get(name)
    if record is None:
        refuse(f"the dataclass {name[:255]!r} is not registered here")
    if len(set(fields)) != len(fields) or not set(fields).issubset(record.fields):
        refuse(f"{name!r} has other fields here: {', '.join(record.fields)}")
    return make_record(record, dict(zip(fields, builder.values(depth, len(fields)), strict=True)))


def make_record(record: trees.Registration, fields: dict[str, Any]) -> Any:  # noqa: ANN401
    """Call a registered constructor. Raises `SchemaError` for what it raises."""
    try:
        return record.cls(**fields)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SchemaError(f"{record.name!r} refused its fields: {error}") from error


def _build_big_integer(builder: _Builder, token: list[Any], depth: int) -> int:
    (digits,) = _fields(token, 1)
    if type(digits) is not bytes or not digits:
        refuse("an integer beyond 64 bits is a byte or more")
    return int.from_bytes(digits, "little", signed=True)


def _build_buffer(builder: _Builder, token: list[Any], depth: int) -> Any:  # noqa: ANN401
    tag, code, shape, offset, _ = token
    make = _array if tag == trees.ARRAY_BUFFER else _tensor
    made = make(builder.blob, DTYPES[code], tuple(shape), builder.base + offset, builder.own)
    builder.made.append(made)
    return made


def _build_scalar(builder: _Builder, token: list[Any], depth: int) -> Any:  # noqa: ANN401
    code, data = _fields(token, 2)
    dtype = DTYPES.get(code) if type(code) is int else None
    if dtype is None or not dtype.native or type(data) is not bytes or len(data) != dtype.carrier.itemsize:
        refuse("a numpy scalar is a dtype code and its bytes")
    return np.frombuffer(data, dtype.carrier)[0]


def _build_bytes(builder: _Builder, token: list[Any], depth: int) -> bytes:
    _, offset, nbytes = token
    start = builder.base + offset
    made = bytes(builder.blob[start : start + nbytes])
    builder.made.append(made)
    return made


def _build_same(builder: _Builder, token: list[Any], depth: int) -> Any:  # noqa: ANN401
    (index,) = _fields(token, 1)
    if type(index) is not int or not 0 <= index < len(builder.made):
        refuse(f"no buffer {index!r} to be the same as")
    return builder.made[index]


_BUILDERS: Final[dict[int, Callable[[_Builder, list[Any], int], Any]]] = {
    trees.LIST: _build_list,
    trees.TUPLE: _build_tuple,
    trees.DICT: _build_dict,
    trees.RECORD: _build_record,
    trees.BIG_INTEGER: _build_big_integer,
    trees.ARRAY_BUFFER: _build_buffer,
    trees.TENSOR_BUFFER: _build_buffer,
    trees.SCALAR: _build_scalar,
    trees.BYTES_BUFFER: _build_bytes,
    trees.SAME: _build_same,
}


def _decode_tree(blob: memoryview, own: bool) -> Any:  # noqa: ANN401
    builder = _Builder(blob, own)
    value = builder.value(0)
    if builder.position != len(builder.tokens):
        refuse(f"{len(builder.tokens) - builder.position} tokens are left over")
    return value


_DECODERS: Final[dict[int, Callable[[memoryview, bool], Any]]] = {
    BYTES: _decode_bytes,
    TEXT: _decode_text,
    INTEGER: _decode_integer,
    FLOAT: _decode_float,
    ARRAY: _decode_array,
    TENSOR: _decode_tensor,
    TREE: _decode_tree,
}
