"""Values that outlive their blob: copies, and copies into memory that the caller has."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from fabric.errors import SchemaError, UnsupportedValueError
from fabric.payloads import trees
from fabric.payloads.decoders import decode, make_record, tensors
from fabric.payloads.schema import overlaps


def _is_tensor(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


# Copies.


def own(value: Any) -> Any:  # noqa: ANN401
    """A deep copy of a decoded value: ordinary arrays and tensors with memory of their own, ties kept.

    Tensors stay on their device and lose gradients. Values that nobody can change are returned as they are.
    """
    return _own(value, {})


def _own(value: Any, known: dict[int, Any]) -> Any:  # noqa: ANN401
    copier = _COPIERS.get(type(value))
    if copier is not None:
        return copier(value, known)
    if type(value) in trees.BY_CLASS:
        record = trees.BY_CLASS[type(value)]
        return make_record(record, {name: _own(getattr(value, name), known) for name in record.fields})
    if not isinstance(value, np.ndarray) and not _is_tensor(value):
        return value
    copy = known.get(id(value))
    if copy is None:
        copy = known[id(value)] = value.copy() if isinstance(value, np.ndarray) else tensors().own_tensor(value)
    return copy


def _own_dict(value: dict[Any, Any], known: dict[int, Any]) -> dict[Any, Any]:
    return {key: _own(item, known) for key, item in value.items()}


_COPIERS: Final[dict[type, Callable[[Any, dict[int, Any]], Any]]] = {
    list: lambda value, known: [_own(item, known) for item in value],
    tuple: lambda value, known: tuple(_own(item, known) for item in value),
    dict: _own_dict,
    OrderedDict: _own_dict,
}


# Into memory that the caller has.


class _Match:
    """Walks a decoded value and what shall take it side by side; nothing is written before all of it fits."""

    __slots__ = ("copies", "taken")

    def __init__(self) -> None:
        self.copies: list[tuple[Any, Any]] = []
        self.taken: dict[object, int] = {}

    def match(self, view: Any, into: Any, where: str) -> Any:  # noqa: ANN401
        """What the caller gets for `view`: his own buffer, or the plain value. Raises before anything is written."""
        if isinstance(view, np.ndarray):
            return self._take(view, into, _check_array(view, into, where), where)
        if _is_tensor(view):
            tensors().check_room(into, view, where)
            return self._take(view, into, tensors().place(into), where)
        if isinstance(view, (list, tuple)):
            return self._sequence(view, into, where)
        if isinstance(view, dict):
            return self._dict(view, into, where)
        if type(view) in trees.BY_CLASS:
            return self._record(view, into, where)
        if isinstance(into, (np.ndarray, list, tuple, dict)) or _is_tensor(into):
            raise _differs(view, into, where)
        return view

    def _take(self, view: Any, into: Any, place: object, where: str) -> Any:  # noqa: ANN401
        if view.size if isinstance(view, np.ndarray) else view.numel():
            if self.taken.setdefault(place, id(view)) != id(view):
                raise SchemaError(f"{where} is memory that takes another part of the payload too")
            self.copies.append((into, view))
        return into

    def _sequence(self, view: Any, into: Any, where: str) -> Any:  # noqa: ANN401
        if type(into) is not type(view) or len(into) != len(view):
            raise _differs(view, into, where)
        items = zip(view, into, strict=True)
        return type(view)([self.match(one, two, f"{where}[{index}]") for index, (one, two) in enumerate(items)])

    def _dict(self, view: dict[Any, Any], into: Any, where: str) -> dict[Any, Any]:  # noqa: ANN401
        if type(into) not in (dict, OrderedDict) or _typed(view) != _typed(into):
            raise _differs(view, into, where)
        return {key: self.match(item, into[key], f"{where}[{key!r}]") for key, item in view.items()}

    def _record(self, view: Any, into: Any, where: str) -> Any:  # noqa: ANN401
        if type(into) is not type(view):
            raise _differs(view, into, where)
        record = trees.BY_CLASS[type(view)]
        parts = {
            name: self.match(getattr(view, name), getattr(into, name), f"{where}.{name}") for name in record.fields
        }
        return make_record(record, parts)


def _typed(keys: Any) -> set[tuple[type, Any]]:  # noqa: ANN401
    return {(type(key), key) for key in keys}


def _differs(view: object, into: object, where: str) -> SchemaError:
    def told(value: object) -> str:
        size = f" of {len(value)}" if isinstance(value, (list, tuple, dict)) else ""
        return f"{type(value).__qualname__}{size}"

    return SchemaError(f"{where} is {told(into)}, the payload {told(view)} with the same keys required")


def _check_array(view: np.ndarray[Any, Any], into: Any, where: str) -> object:  # noqa: ANN401
    """Check that an array can take another; returns where it lies."""
    if not isinstance(into, np.ndarray):
        raise SchemaError(f"{where} is of type {type(into).__qualname__}, the payload is a numpy array")
    if into.dtype.newbyteorder("<") != view.dtype or into.shape != view.shape:
        raise SchemaError(f"{where} is {into.dtype} of shape {into.shape}, the payload {view.dtype} of {view.shape}")
    if not into.flags.writeable:
        raise UnsupportedValueError("receive into one that can be written", kind="read-only array", where=where)
    if overlaps(into.shape, into.strides):
        raise UnsupportedValueError("receive into its contiguous form", kind="broadcast array", where=where)
    address: int = into.__array_interface__["data"][0]
    return address


def decode_into(kind: int, blob: memoryview, into: Any) -> Any:  # noqa: ANN401
    """Decode into memory that the caller has: a tensor (on any device), an array, or a tree of them.

    Arrays and tensors must agree in dtype and shape, containers in type, length and keys. Plain values in a tree are
    not compared: the sender's are in the returned value, whose arrays and tensors are those of `into`. Raises
    `SchemaError` when they do not agree and `UnsupportedValueError` when `into` cannot be written; in both cases
    nothing has been written.
    """
    matching = _Match()
    value = matching.match(decode(kind, blob), into, "into")
    for target, view in matching.copies:
        if isinstance(target, np.ndarray):
            np.copyto(target, view)
        else:
            tensors().fill(target, view)
    return value
