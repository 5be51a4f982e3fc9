"""Arrays and tensors over memory that is lent: written in place by the application, and taken back when it is done.

What is lent has no memory of its own. Taking it back leaves it without elements, so that nothing can be written through
it any more; views of it that live on keep the memory in use, which is how they are found.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from math import prod
from typing import Any, Final, NamedTuple

import numpy as np

from fabric.errors import SchemaError, UnsupportedValueError
from fabric.payloads.decoders import tensors
from fabric.payloads.plans import ArraySource, BufferPlan, Source, numpy_code, plan_buffer
from fabric.payloads.schema import ARRAY, DTYPES, TENSOR, extent

__all__ = ["Form", "is_referred_to", "lend", "plan_loan", "plan_snapshot", "take_back"]


class Form(NamedTuple):
    """What will be lent: its kind, the head of its blob, and the blob's bytes."""

    kind: int
    head: bytes
    size: int
    code: int
    shape: tuple[int, ...]


class _Wanted(Source):
    """Elements that nobody has written yet."""

    __slots__ = ()

    def __init__(self, code: int, shape: tuple[int, ...]) -> None:
        self.code, self.shape, self.nbytes = code, shape, prod(shape) * DTYPES[code].carrier.itemsize


def plan_loan(shape: int | Sequence[int], dtype: Any, limit: int) -> Form:  # noqa: ANN401 - numpy's or torch's
    """The form of an array (numpy dtype, or its name) or tensor (torch dtype) of at most `limit` bytes with its head.

    Raises `UnsupportedValueError` for a dtype or shape that cannot travel, and `PayloadTooLargeError`.
    """
    kind, code = _kind_of(dtype)
    sizes = _shape_of(shape, code)
    planned = plan_buffer(kind, _Wanted(code, sizes), limit)
    return Form(kind, planned.head, planned.size, code, sizes)


def _kind_of(dtype: Any) -> tuple[int, int]:  # noqa: ANN401
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(dtype, torch.dtype):
        return TENSOR, tensors().dtype_code(dtype, "dtype")
    try:
        known = np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise UnsupportedValueError(
            "give a numpy or torch dtype", kind=f"dtype of type {type(dtype).__qualname__}", where="dtype"
        ) from error
    return ARRAY, numpy_code(known, "dtype")


def _shape_of(shape: int | Sequence[int], code: int) -> tuple[int, ...]:
    try:
        sizes = (operator.index(shape),) if not isinstance(shape, Sequence) else tuple(map(operator.index, shape))
        extent(DTYPES[code], sizes)
    except (TypeError, SchemaError) as error:
        raise UnsupportedValueError("give integers of 0 or more", kind="impossible shape", where="shape") from error
    return sizes


def lend(form: Form, target: memoryview) -> Any:  # noqa: ANN401 - an array or a tensor
    """Write the head into `target`, and give out the elements behind it, as they are."""
    start = len(form.head)
    target[:start] = form.head
    array: np.ndarray[Any, Any] = np.ndarray(form.shape, DTYPES[form.code].carrier, target, start)
    return array if form.kind == ARRAY else tensors().lend_tensor(array, form.code)


_REFERENCES: Final = 3
"""Of the loan, of the variable of the `with` statement, and the parameter of `getrefcount`."""


def is_referred_to(holder: Any) -> bool:  # noqa: ANN401
    """Whether more than one variable refers to `holder.value`, what was lent.

    An array over a tensor, a tensor over an array, DLPack and autograd may keep its address and refer to nothing but
    the object itself: where it is emptied under them, the memory would count as free while they can write to it.
    """
    if sys.getrefcount(holder.value) > _REFERENCES:
        return True
    uses = getattr(holder.value, "_use_count", None)  # of a tensor, by others than Python's object
    return uses is not None and uses() > 1


def take_back(value: Any) -> None:  # noqa: ANN401
    """Leave what was lent without elements: an array of shape (0,) that cannot be written, a tensor of shape (0,)."""
    if isinstance(value, np.ndarray):
        value.__setstate__((1, (0,), value.dtype, False, b""))  # type: ignore[arg-type]
        value.flags.writeable = False
    else:
        tensors().empty_tensor(value)


def plan_snapshot(form: Form, target: memoryview) -> BufferPlan:
    """A plan that copies what was written so far."""
    array: np.ndarray[Any, Any] = np.ndarray(form.shape, DTYPES[form.code].carrier, target, len(form.head))
    return BufferPlan(form.kind, form.head, ArraySource(form.code, array))
