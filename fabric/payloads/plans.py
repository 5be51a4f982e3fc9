"""Plans: what will be written, how large it is, and the one copy that writes it; for everything that needs no torch.

A plan refers to the value's memory. It is made and written within one publish; nothing may change the value in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, cast

import numpy as np
from xxhash import xxh3_64_intdigest

from fabric.errors import PayloadTooLargeError, UnsupportedValueError
from fabric.payloads.schema import (
    ARRAY,
    ARRAY_HEADS,
    BYTES,
    DIMENSIONS_MAX,
    DTYPES,
    FLOAT,
    FLOAT_BLOB,
    INTEGER,
    SCALAR_FLAG,
    TEXT,
)
from fabric.payloads.staging import DeviceQueue, Pending
from fabric.payloads.summing import Digest, copy_summed

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Plan:
    """How one value is written. `kind` and `size` (bytes of the blob) are known before anything is copied."""

    __slots__ = ("kind", "size")

    kind: int
    size: int

    @property
    def on_device(self) -> bool:
        """Whether some of the value lies on a device, so that `start` may leave copies under way."""
        return False

    def write(self, target: memoryview) -> None:
        """Write the blob into the first `size` bytes of `target` (writable, of bytes, at least that long).

        The value's memory is copied once. For values on a device this waits; see `start`.
        """
        raise NotImplementedError

    def write_summed(self, target: memoryview) -> int:
        """As `write`; returns the XXH3-64 of the blob."""
        self.write(target)
        return xxh3_64_intdigest(target[: self.size])

    def tobytes(self) -> bytes:
        """The blob as bytes."""
        target = bytearray(self.size)
        self.write(memoryview(target))
        return bytes(target)

    def start(self, target: memoryview, queue: DeviceQueue) -> Pending | None:
        """Write what the processor can reach, and start the copies from devices through `queue`.

        Returns None when the blob is complete. Otherwise `target` belongs to the copies until the `Pending` is done.
        """
        self.write(target)
        return None


class BytesPlan(Plan):
    """A blob that exists already."""

    __slots__ = ("data",)

    def __init__(self, kind: int, size: int, data: bytes | memoryview) -> None:
        self.kind, self.size, self.data = kind, size, data

    def write(self, target: memoryview) -> None:
        """Copy the bytes."""
        target[: self.size] = self.data

    def tobytes(self) -> bytes:
        """The bytes themselves, without a copy where they are bytes already."""
        return bytes(self.data)


class Source:
    """The elements of one array or tensor, and how they get into a blob in C order, little endian.

    `code` is the dtype code, `nbytes` the bytes written.
    """

    __slots__ = ("code", "nbytes", "shape")

    code: int
    nbytes: int
    shape: tuple[int, ...]
    on_device: ClassVar[bool] = False

    def write(self, target: memoryview, offset: int) -> None:
        """Copy the elements to `offset` of `target`."""
        raise NotImplementedError

    def plain(self) -> memoryview | None:
        """The elements as they will lie in the blob, where they lie so already."""
        return None

    def start(self, target: memoryview, offset: int, queue: DeviceQueue) -> Pending | None:
        """Copy now, or start the copy through `queue`."""
        self.write(target, offset)
        return None


class ArraySource(Source):
    """Elements that numpy can reach, with any strides and byte order."""

    __slots__ = ("array",)

    def __init__(self, code: int, array: np.ndarray[Any, Any]) -> None:
        self.code, self.array, self.shape, self.nbytes = code, array, array.shape, array.nbytes

    def write(self, target: memoryview, offset: int) -> None:
        """Copy the elements; numpy converts strides and byte order on the way and releases the GIL for large ones."""
        np.copyto(np.ndarray(self.shape, DTYPES[self.code].carrier, target, offset), self.array)

    def plain(self) -> memoryview | None:
        """The elements themselves, if they are contiguous and little endian."""
        array = self.array
        if not array.flags.c_contiguous or array.dtype != DTYPES[self.code].carrier:
            return None
        return memoryview(cast("Buffer", array.reshape(-1).view(np.uint8)))


class BufferPlan(Plan):
    """One array or tensor: a head and its elements."""

    __slots__ = ("head", "source")

    def __init__(self, kind: int, head: bytes, source: Source) -> None:
        self.kind, self.head, self.source = kind, head, source
        self.size = len(head) + source.nbytes

    @property
    def on_device(self) -> bool:
        """Whether the elements lie on a device."""
        return self.source.on_device

    def write(self, target: memoryview) -> None:
        """Write the head and copy the elements."""
        head = self.head
        start = len(head)
        target[:start] = head
        self.source.write(target, start)

    def write_summed(self, target: memoryview) -> int:
        """As `write`; the elements are summed as they are copied, where that is one plain copy."""
        elements = self.source.plain()
        if elements is None:
            return super().write_summed(target)
        digest, start = Digest(self.head), len(self.head)
        target[:start] = self.head
        copy_summed(target[start : self.size], elements, digest)
        return digest.intdigest()

    def start(self, target: memoryview, queue: DeviceQueue) -> Pending | None:
        """Write the head, and copy the elements or start their copy."""
        start = len(self.head)
        target[:start] = self.head
        return self.source.start(target, start, queue)


class Leaf(NamedTuple):
    """How values of one type become a `Source`: `source` makes it, `identity` is equal for values that are tied."""

    kind: int
    source: Callable[[Any, str], Source]
    identity: Callable[[Any], object]


LEAVES: Final[dict[type, Leaf]] = {}
"""Types whose values are buffers. `tensors.py` adds torch's when torch is there; fakes of devices add theirs."""

PLANNERS: Final[dict[type, Callable[[Any, int], Plan]]] = {}
"""Type -> its planner: `planner(value, limit)`. `trees.py` adds the containers."""


def plan(value: object, *, limit: int) -> Plan:
    """Plan the payload of `value`, of at most `limit` bytes.

    Raises `UnsupportedValueError` for a value that cannot travel and `PayloadTooLargeError` before anything is packed.
    """
    planner = PLANNERS.get(type(value))
    if planner is None:
        planner = find_planner(value)
    return planner(value, limit)


def find_planner(value: object, where: str = "value") -> Callable[[Any, int], Plan]:
    """The slow path of the table: load torch's rows if the program uses torch, otherwise refuse."""
    load_tensors()
    planner = PLANNERS.get(type(value))
    if planner is None:
        refuse_value(value, where)
        raise AssertionError  # pragma: no cover - refuse_value always raises
    return planner


def load_tensors() -> None:
    """Enter torch's types into the tables, if the program has imported torch."""
    if "torch" in sys.modules:
        import_module("fabric.payloads.tensors")


def register_leaf(cls: type, leaf: Leaf) -> None:
    """Let values of `cls` travel as buffers, alone and in trees."""
    LEAVES[cls] = leaf
    kind, source = leaf.kind, leaf.source

    def planner(value: Any, limit: int) -> Plan:  # noqa: ANN401 - any type that someone registers
        return plan_buffer(kind, source(value, "value"), limit)

    PLANNERS[cls] = planner


def plan_buffer(kind: int, source: Source, limit: int, flags: int = 0) -> BufferPlan:
    """The plan of one array or tensor."""
    shape = source.shape
    if len(shape) > DIMENSIONS_MAX:
        raise UnsupportedValueError(
            f"reshape it to {DIMENSIONS_MAX} or fewer", kind=f"array of {len(shape)} dimensions", where="value"
        )
    made = BufferPlan(kind, ARRAY_HEADS[len(shape)].pack(source.code, len(shape), flags, 0, *shape), source)
    if made.size > limit:
        raise PayloadTooLargeError(size=made.size, limit=limit)
    return made


# Bytes, text and numbers: budget 1 us a record.


def _plan_bytes(value: bytes, limit: int) -> Plan:
    size = len(value)
    if size > limit:
        raise PayloadTooLargeError(size=size, limit=limit)
    return BytesPlan(BYTES, size, value)


def _plan_byteslike(value: bytearray | memoryview, limit: int) -> Plan:
    view = byteslike(value, "value")
    if view.nbytes > limit:
        raise PayloadTooLargeError(size=view.nbytes, limit=limit)
    return BytesPlan(BYTES, view.nbytes, view)


def byteslike(value: bytes | bytearray | memoryview, where: str) -> memoryview:
    """A flat view of bytes. Raises `UnsupportedValueError` for a memoryview with gaps."""
    view = memoryview(value)
    if not view.c_contiguous:
        raise UnsupportedValueError("send bytes(value)", kind="memoryview that is not contiguous", where=where)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B") if view.nbytes else memoryview(b"")


def encode_text(value: str, where: str) -> bytes:
    """UTF-8. Raises `UnsupportedValueError` for lone surrogates."""
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedValueError(
            "encode it to bytes with errors='surrogateescape'", kind="str with lone surrogates", where=where
        ) from error


def _plan_text(value: str, limit: int) -> Plan:
    if len(value) > limit:
        raise PayloadTooLargeError(size=len(value), limit=limit)
    data = encode_text(value, "value")
    if len(data) > limit:
        raise PayloadTooLargeError(size=len(data), limit=limit)
    return BytesPlan(TEXT, len(data), data)


def _plan_integer(value: int, limit: int) -> Plan:
    # The magnitude's bits and a sign bit; -2**(8k - 1) would fit one bit less, and may take the longer form.
    size = value.bit_length() // 8 + 1
    if size > limit:
        raise PayloadTooLargeError(size=size, limit=limit)
    return BytesPlan(INTEGER, size, value.to_bytes(size, "little", signed=True))


def _plan_float(value: float, limit: int) -> Plan:
    if limit < FLOAT_BLOB.size:
        raise PayloadTooLargeError(size=FLOAT_BLOB.size, limit=limit)
    return BytesPlan(FLOAT, FLOAT_BLOB.size, FLOAT_BLOB.pack(value))


PLANNERS.update(
    {
        bytes: _plan_bytes,
        bytearray: _plan_byteslike,
        memoryview: _plan_byteslike,
        str: _plan_text,
        int: _plan_integer,
        float: _plan_float,
    }
)


# numpy.

CODES: Final[dict[str, int]] = {dtype.name: code for code, dtype in DTYPES.items()}
"""Name of an element type -> its code."""

_NUMPY_CODES: Final[dict[np.dtype[Any], int]] = {
    order: code
    for code, dtype in DTYPES.items()
    if dtype.native
    for order in (dtype.carrier, dtype.carrier.newbyteorder(">"))
}

_NUMPY_ADVICE: Final[dict[str, str]] = {
    "O": "send a list, or convert it to a numeric dtype",
    "M": "send value.view('int64') and the unit as metadata",
    "m": "send value.view('int64') and the unit as metadata",
    "S": "send a list of bytes",
    "U": "send a list of str",
    "V": "send a dict of its fields' arrays, or a view of a numeric dtype",
}


def numpy_code(dtype: np.dtype[Any], where: str) -> int:
    """The dtype code of a numpy dtype. Raises `UnsupportedValueError`."""
    code = _NUMPY_CODES.get(dtype)
    if code is None:
        code = _NUMPY_CODES.get(np.dtype(dtype.str)) if dtype.kind in "?biufc" else None  # drops dtype.metadata
    if code is None:
        advice = _NUMPY_ADVICE.get(dtype.kind, "convert it to float64 or complex128")
        raise UnsupportedValueError(advice, kind=f"numpy array of dtype {dtype}", where=where)
    return code


def _array_source(value: np.ndarray[Any, Any], where: str) -> Source:
    dtype = value.dtype
    return ArraySource(_NUMPY_CODES.get(dtype) or numpy_code(dtype, where), value)


def _array_identity(value: np.ndarray[Any, Any]) -> object:
    face = value.__array_interface__
    return (ARRAY, face["data"][0], face["typestr"], value.shape, value.strides)


def _plan_scalar(value: np.generic, limit: int) -> Plan:
    array = np.asarray(value)
    return plan_buffer(ARRAY, ArraySource(numpy_code(array.dtype, "value"), array), limit, SCALAR_FLAG)


register_leaf(np.ndarray, Leaf(ARRAY, _array_source, _array_identity))
register_leaf(np.memmap, Leaf(ARRAY, _array_source, _array_identity))

NUMPY_SCALARS: Final = frozenset(dtype.carrier.type for dtype in DTYPES.values() if dtype.native) | {
    np.longlong,
    np.ulonglong,
}
"""Types of numpy scalars that travel; where C's `long long` is a type of its own it comes back as int64."""

PLANNERS.update(dict.fromkeys(NUMPY_SCALARS, _plan_scalar))


# What is refused, and what to do instead.

_ADVICE: Final[dict[str, str]] = {
    "set": "send sorted(value) or list(value)",
    "frozenset": "send sorted(value) or list(value)",
    "complex": "send numpy.complex128(value)",
    "MaskedArray": "send a dict of value.data and value.mask",
    "Size": "send tuple(value)",
    "dtype": "send str(value)",
    "device": "send str(value)",
    "UninitializedParameter": "send it after the first forward pass",
    "UninitializedBuffer": "send it after the first forward pass",
    "DTensor": "send value.to_local(), or value.full_tensor()",
    "NestedTensor": "send a list of value.unbind()",
    "FakeTensor": "send real tensors only",
}
_BASES: Final[tuple[tuple[type, str], ...]] = (
    (bool, "send bool(value)"),
    (int, "send int(value)"),
    (float, "send float(value)"),
    (str, "send str(value)"),
    (bytes, "send bytes(value)"),
    (dict, "send dict(value)"),
    (list, "send list(value)"),
    (tuple, "send tuple(value)"),
    (np.ndarray, "send numpy.asarray(value)"),
    (np.generic, "convert it to float64, complex128, int64, bytes or str"),
)


def refuse_value(value: object, where: str) -> None:
    """Raise `UnsupportedValueError` with the type's name and what to do instead."""
    cls = type(value)
    advice = _ADVICE.get(cls.__name__)
    if advice is None:
        advice = next((text for base, text in _BASES if issubclass(cls, base)), None)
    if advice is None and hasattr(cls, "__dataclass_fields__"):
        advice = "register its class with fabric.payloads.register"
    if advice is None and hasattr(cls, "__torch_function__"):
        advice = "send a plain tensor"
    name = cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
    raise UnsupportedValueError(
        advice or "send tensors, arrays, numbers, text, bytes, or lists, tuples and dicts of them",
        kind=f"a value of type {name}",
        where=where,
    )
