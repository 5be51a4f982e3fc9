"""What is written in place is, byte for byte, what a publication of the same value would have copied."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fabric import payloads
from fabric.errors import PayloadTooLargeError, UnsupportedValueError
from fabric.payloads.schema import DTYPES

torch = pytest.importorskip("torch", reason="half of the dtypes are torch's")

LIMIT = 1 << 20
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
KNOWN = [row for row in DTYPES.values() if hasattr(torch, row.name)]


class Holder:
    """Who lends."""

    def __init__(self, value: object) -> None:
        self.value = value


@pytest.mark.torch
@given(st.sampled_from(KNOWN), SHAPES, st.booleans(), st.data())
def test_a_loan_holds_the_blob_of_its_value(
    row: object, shape: tuple[int, ...], tensor: bool, data: st.DataObject
) -> None:
    name, native, itemsize = row.name, row.native, row.carrier.itemsize  # type: ignore[attr-defined]
    dtype = getattr(torch, name) if tensor or not native else np.dtype(name)
    form = payloads.plan_loan(shape, dtype, LIMIT)
    target = memoryview(bytearray(form.size))
    value = payloads.lend(form, target)
    content = data.draw(st.binary(min_size=1, max_size=64))
    count = int(np.prod(shape, dtype=np.int64)) * itemsize
    written = (content * (count // len(content) + 1))[:count]
    if name == "bool":
        written = bytes(byte & 1 for byte in written)
    target[len(form.head) :] = written
    planned = payloads.plan(value, limit=LIMIT)
    assert (planned.kind, planned.size, planned.tobytes()) == (form.kind, form.size, target.tobytes())
    holder = Holder(value)
    del planned, value
    payloads.take_back(holder.value)
    assert tuple(holder.value.shape) == (0,)  # type: ignore[attr-defined]
    assert target[len(form.head) :] == written, "emptying writes nothing"


@pytest.mark.parametrize("dtype", ["float32", np.float32, np.dtype(">f4"), "<i8"])
def test_a_numpy_dtype_may_be_named(dtype: object) -> None:
    form = payloads.plan_loan(3, dtype, LIMIT)
    assert form.shape == (3,)
    assert payloads.lend(form, memoryview(bytearray(form.size))).dtype.byteorder in "=|"


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, -1), "f4"),
        ((2.5,), "f4"),
        (None, "f4"),
        ("ab", "f4"),
        ((1 << 40, 1 << 40), "f4"),
        ((0, 1 << 63), "f4"),
        ((1,) * 17, "f4"),
        (3, "U4"),
        (3, object),
        (3, "datetime64[s]"),
        (3, "no such"),
        (3, 7),
        (3, torch.quint8),
    ],
)
def test_what_cannot_travel_is_not_lent(shape: object, dtype: object) -> None:
    with pytest.raises(UnsupportedValueError):
        payloads.plan_loan(shape, dtype, LIMIT)  # type: ignore[arg-type]


def test_the_limit_holds_with_the_head() -> None:
    assert payloads.plan_loan(LIMIT - 16, "u1", LIMIT).size == LIMIT
    with pytest.raises(PayloadTooLargeError):
        payloads.plan_loan(LIMIT - 15, "u1", LIMIT)


def aliases() -> dict[str, object]:
    """Ways to refer to what was lent beside the one variable, by tensor and by array."""
    weight = torch.ones(4, requires_grad=True)
    return {
        "a variable": lambda value: value,
        "dlpack": lambda value: np.from_dlpack(value),
        "a buffer": lambda value: (
            memoryview(value) if isinstance(value, np.ndarray) else torch.utils.dlpack.to_dlpack(value)
        ),
        "the other library": lambda value: torch.from_numpy(value) if isinstance(value, np.ndarray) else [value],
        "autograd": lambda value: (value * weight).sum() if not isinstance(value, np.ndarray) else value.ctypes,
    }


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [torch.float32, "float32"], ids=str)
@pytest.mark.parametrize("way", aliases())
def test_whatever_refers_to_the_object_itself_is_seen(dtype: object, way: str) -> None:
    form = payloads.plan_loan(4, dtype, LIMIT)
    target = memoryview(bytearray(form.size))
    holder = Holder(payloads.lend(form, target))
    value = holder.value
    assert not payloads.is_referred_to(holder)
    alias = aliases()[way](value)  # type: ignore[operator]
    assert payloads.is_referred_to(holder)
    del alias
    assert not payloads.is_referred_to(holder)
