"""Trees: lists, tuples, dicts and registered dataclasses with anything else as leaves.

A tree blob is `document length u32, zero u32, document, padding, buffers`. The document is msgpack: a list of lists
of at most 4,096 *tokens*, which read one after the other are the tree in pre-order. A token is a plain value (nil,
bool, int, float, str, bin: itself) or a list:

| token | meaning |
|---|---|
| `[0, n]`, `[1, n]` | list, tuple; n items follow |
| `[2, n]` | dict; n times key, value follow; keys are str, int or bool |
| `[3, name, [fields]]` | registered dataclass; one value for each field follows |
| `[4, bin]` | integer beyond 64 bits: two's complement, little endian |
| `[5, dtype code, shape, offset, nbytes]` | numpy array in a buffer |
| `[6, dtype code, shape, offset, nbytes]` | torch tensor in a buffer |
| `[7, dtype code, bin]` | numpy scalar |
| `[8, offset, nbytes]` | long bytes in a buffer |
| `[9, k]` | the very value of the k-th buffer token (5, 6 or 8) before this one: tied weights |

Offsets count from the first multiple of 64 after the document. Buffers lie in the order of their tokens, each at the
next multiple of 64, the gaps are zeros, and the blob ends with the last buffer; without buffers it ends with the
document.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final, NoReturn, TypeVar

import msgpack
import numpy as np

from fabric.errors import PayloadTooLargeError, UnsupportedValueError
from fabric.payloads.plans import (
    LEAVES,
    NUMPY_SCALARS,
    PLANNERS,
    ArraySource,
    BytesPlan,
    Plan,
    Source,
    byteslike,
    encode_text,
    load_tensors,
    numpy_code,
    refuse_value,
)
from fabric.payloads.schema import (
    ARRAY,
    CHUNK_TOKENS,
    DEPTH_MAX,
    DIMENSIONS_MAX,
    DOCUMENT_BYTES_MAX,
    TENSOR,
    TOKENS_MAX,
    TREE,
    TREE_HEAD,
    aligned,
)
from fabric.payloads.staging import CopiesPending, DeviceQueue, Failed, Pending, StagingError

LIST: Final = 0
TUPLE: Final = 1
DICT: Final = 2
RECORD: Final = 3
BIG_INTEGER: Final = 4
ARRAY_BUFFER: Final = 5
TENSOR_BUFFER: Final = 6
SCALAR: Final = 7
BYTES_BUFFER: Final = 8
SAME: Final = 9

LONG_BYTES: Final = 4096
"""Bytes of this length or more go into a buffer, where they are copied once instead of three times."""

_U8: Final = 2
_BUFFER_TAGS: Final = {ARRAY: ARRAY_BUFFER, TENSOR: TENSOR_BUFFER}

Class = TypeVar("Class", bound=type)


class Registration:
    """A dataclass that may travel: its name on the wire and the fields its constructor takes."""

    __slots__ = ("cls", "fields", "name")

    def __init__(self, cls: type, name: str) -> None:
        self.cls, self.name = cls, name
        self.fields = [field.name for field in dataclasses.fields(cls) if field.init]


BY_NAME: Final[dict[str, Registration]] = {}
BY_CLASS: Final[dict[type, Registration]] = {}


def register(cls: Class, name: str | None = None) -> Class:
    """Let instances of a dataclass travel; also a decorator.

    `name` is the one on the wire, the same for all members; default the class's own, at most 255 characters. Fields
    are sent by name, those of the constructor only, and decoding calls the constructor. Raises `TypeError` for what
    is no dataclass and `ValueError` for a name that is taken.
    """
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):  # type: ignore[redundant-expr]
        raise TypeError(f"{cls!r} is no dataclass")
    chosen = cls.__qualname__ if name is None else name
    if not 0 < len(chosen) <= 255:
        raise ValueError("a name has 1 to 255 characters")
    known = BY_NAME.get(chosen)
    if known is not None and known.cls is not cls:
        raise ValueError(f"{chosen!r} is the name of {known.cls.__qualname__} already")
    if cls in BY_CLASS and BY_CLASS[cls].name != chosen:
        raise ValueError(f"{cls.__qualname__} is registered as {BY_CLASS[cls].name!r} already")
    BY_NAME[chosen] = BY_CLASS[cls] = Registration(cls, chosen)
    PLANNERS[cls] = _plan_tree
    return cls


class TreePlan(Plan):
    """A document and the buffers behind it."""

    __slots__ = ("base", "document", "sources")

    def __init__(self, document: bytes, sources: list[tuple[int, Source]], size: int) -> None:
        self.kind, self.document, self.sources, self.size = TREE, document, sources, size
        self.base = aligned(TREE_HEAD.size + len(document))

    @property
    def on_device(self) -> bool:
        """Whether a buffer lies on a device."""
        return any(source.on_device for _, source in self.sources)

    def write(self, target: memoryview) -> None:
        """Write the document and copy every buffer once."""
        self._write_frame(target)
        for offset, source in self.sources:
            source.write(target, self.base + offset)

    def start(self, target: memoryview, queue: DeviceQueue) -> Pending | None:
        """Write the document, and copy the buffers or start their copies."""
        self._write_frame(target)
        pending: list[Pending] = []
        for offset, source in self.sources:
            try:
                one = source.start(target, self.base + offset, queue)
            except StagingError as error:  # the copies that were started still own the target
                one = Failed(error)
            if one is not None:
                pending.append(one)
        return CopiesPending(pending) if pending else None

    def _write_frame(self, target: memoryview) -> None:
        """The document and the zeros between the buffers: whoever had the memory before, nothing of his may leave."""
        written = TREE_HEAD.size + len(self.document)
        TREE_HEAD.pack_into(target, 0, len(self.document), 0)
        target[TREE_HEAD.size : written] = self.document
        for offset, source in self.sources:
            start = self.base + offset
            target[written:start] = bytes(start - written)
            written = start + source.nbytes


class Field(str):
    """A dataclass field in a path."""

    __slots__ = ()


class _Flattener:
    """Turns one value into tokens and buffers. `size` is a lower bound of the blob until the document is packed."""

    __slots__ = ("end", "limit", "path", "seen", "size", "sources", "tokens")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = TREE_HEAD.size
        self.end = 0
        self.tokens: list[Any] = []
        self.sources: list[tuple[int, Source]] = []
        self.seen: dict[object, tuple[int, object]] = {}  # holds the values, so that no address is used twice
        self.path: list[Any] = []

    def where(self) -> str:
        return "value" + "".join(f".{key}" if type(key) is Field else f"[{key!r}]" for key in self.path)

    def refuse(self, kind: str, advice: str) -> NoReturn:
        raise UnsupportedValueError(advice, kind=kind, where=self.where())

    def grow(self, nbytes: int) -> None:
        self.size += nbytes
        if self.size > self.limit:
            raise PayloadTooLargeError(size=self.size, limit=self.limit)

    def add(self, value: Any) -> None:  # noqa: ANN401
        """Append the tokens of one value."""
        handler = _ENCODERS.get(type(value)) or self._find(value)
        handler(self, value)

    def _find(self, value: Any) -> Callable[[_Flattener, Any], None]:  # noqa: ANN401
        cls = type(value)
        load_tensors()
        if cls in LEAVES:
            _ENCODERS[cls] = _add_buffer
        elif cls in BY_CLASS:
            _ENCODERS[cls] = _add_record
        else:
            refuse_value(value, self.where())
        return _ENCODERS[cls]

    def children(self, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Append the tokens of what a container holds; keys are for the path only."""
        path = self.path
        for key, value in pairs:
            path.append(key)
            self.add(value)
            path.pop()

    def count(self, tokens: int) -> None:
        """Account for a container and what it holds, before it is walked."""
        if len(self.path) >= DEPTH_MAX:
            self.refuse(f"a value nested deeper than {DEPTH_MAX} levels", "flatten it, or break its cycle")
        self.grow(tokens)
        if self.size > TOKENS_MAX and len(self.tokens) + tokens > TOKENS_MAX:
            self.refuse(f"a tree of more than {TOKENS_MAX} values", "send arrays instead of lists of numbers")

    def buffer(self, source: Source) -> int:
        """Place a buffer; returns its offset."""
        offset = aligned(self.end)
        self.grow(offset + source.nbytes - self.end)
        self.end = offset + source.nbytes
        self.sources.append((offset, source))
        return offset


def _add_plain(flat: _Flattener, value: Any) -> None:  # noqa: ANN401
    flat.tokens.append(value)


def _add_text(flat: _Flattener, value: str) -> None:
    flat.grow(len(value))
    if not value.isascii():
        encode_text(value, flat.where())
    flat.tokens.append(value)


def _add_integer(flat: _Flattener, value: int) -> None:
    if _INTEGER_MIN <= value <= _INTEGER_MAX:
        flat.tokens.append(value)
        return
    size = value.bit_length() // 8 + 1
    flat.grow(size)
    flat.tokens.append([BIG_INTEGER, value.to_bytes(size, "little", signed=True)])


def _add_bytes(flat: _Flattener, value: bytes | bytearray | memoryview) -> None:
    view = byteslike(value, flat.where()) if type(value) is not bytes else value
    size = len(view)
    if size < LONG_BYTES:
        flat.grow(size)
        flat.tokens.append(bytes(view))
        return
    # Equal objects are not tied: bytes have no identity, and a mutable one would lose its own.
    source = ArraySource(_U8, np.frombuffer(view, np.uint8))
    flat.tokens.append([BYTES_BUFFER, flat.buffer(source), size])


def _add_scalar(flat: _Flattener, value: np.generic) -> None:
    code = numpy_code(value.dtype, flat.where())
    flat.grow(value.itemsize)
    flat.tokens.append([SCALAR, code, np.asarray(value, value.dtype.newbyteorder("<")).tobytes()])


def _add_buffer(flat: _Flattener, value: Any) -> None:  # noqa: ANN401
    leaf = LEAVES[type(value)]
    source = leaf.source(value, flat.where() if flat.path else "value")
    if len(source.shape) > DIMENSIONS_MAX:
        flat.refuse(f"array of {len(source.shape)} dimensions", f"reshape it to {DIMENSIONS_MAX} or fewer")
    if source.nbytes:
        identity = leaf.identity(value)
        known = flat.seen.get(identity)
        if known is not None:
            flat.tokens.append([SAME, known[0]])
            return
        flat.seen[identity] = len(flat.sources), value
    tag = _BUFFER_TAGS[leaf.kind]
    offset = flat.buffer(source)
    flat.tokens.append([tag, source.code, source.shape, offset, source.nbytes])


def _sequence(tag: int) -> Callable[[_Flattener, Any], None]:
    def add(flat: _Flattener, value: list[Any] | tuple[Any, ...]) -> None:
        flat.count(1 + len(value))
        flat.tokens.append([tag, len(value)])
        kinds = set(map(type, value))
        if kinds <= _ATOMS or (kinds == _INTEGERS and min(value) >= _INTEGER_MIN and max(value) <= _INTEGER_MAX):
            flat.tokens.extend(value)  # fast path: long lists of numbers
        else:
            flat.children(enumerate(value))

    return add


_ATOMS: Final = frozenset((type(None), bool, float))
_INTEGERS: Final = frozenset((int,))
_INTEGER_MIN: Final = -(2**63)
_INTEGER_MAX: Final = 2**64 - 1
KEYS: Final = frozenset((str, int, bool))


def _add_dict(flat: _Flattener, value: dict[Any, Any]) -> None:
    flat.count(1 + 2 * len(value))
    flat.tokens.append([DICT, len(value)])
    if not KEYS.issuperset(map(type, value)):
        key = next(key for key in value if type(key) not in KEYS)
        flat.refuse(f"a dict with a key of type {type(key).__qualname__}", "use str, int or bool keys")
    flat.children(_with_keys(flat, value))


def _with_keys(flat: _Flattener, value: dict[Any, Any]) -> Iterable[tuple[Any, Any]]:
    for pair in value.items():
        flat.add(pair[0])
        yield pair


def _add_record(flat: _Flattener, value: Any) -> None:  # noqa: ANN401
    record = BY_CLASS[type(value)]
    flat.count(1 + len(record.fields))
    flat.tokens.append([RECORD, record.name, record.fields])
    flat.children((Field(name), getattr(value, name)) for name in record.fields)


_ENCODERS: Final[dict[type, Callable[[_Flattener, Any], None]]] = {
    type(None): _add_plain,
    bool: _add_plain,
    float: _add_plain,
    int: _add_integer,
    str: _add_text,
    bytes: _add_bytes,
    bytearray: _add_bytes,
    memoryview: _add_bytes,
    list: _sequence(LIST),
    tuple: _sequence(TUPLE),
    dict: _add_dict,
    OrderedDict: _add_dict,  # what `state_dict()` returns
    **dict.fromkeys(NUMPY_SCALARS, _add_scalar),
}


def _plan_tree(value: Any, limit: int) -> Plan:  # noqa: ANN401
    flat = _Flattener(limit)
    flat.add(value)
    tokens = flat.tokens
    document = msgpack.packb([tokens[at : at + CHUNK_TOKENS] for at in range(0, len(tokens), CHUNK_TOKENS)])
    if len(document) > DOCUMENT_BYTES_MAX:
        raise PayloadTooLargeError(size=len(document), limit=DOCUMENT_BYTES_MAX)
    size = TREE_HEAD.size + len(document)
    if flat.sources:
        size = aligned(size) + flat.end
    if size > limit:
        raise PayloadTooLargeError(size=size, limit=limit)
    if flat.sources:
        return TreePlan(document, flat.sources, size)
    return BytesPlan(TREE, size, TREE_HEAD.pack(len(document), 0) + document)


def _plan_atom(value: Any, limit: int) -> Plan:  # noqa: ANN401
    made = _ATOM_PLANS[value]
    if made.size > limit:
        raise PayloadTooLargeError(size=made.size, limit=limit)
    return made


_ATOM_PLANS: Final[dict[bool | None, Plan]] = {atom: _plan_tree(atom, 1024) for atom in (None, True, False)}

PLANNERS.update(dict.fromkeys((list, tuple, dict, OrderedDict), _plan_tree))
PLANNERS.update(dict.fromkeys((type(None), bool), _plan_atom))
