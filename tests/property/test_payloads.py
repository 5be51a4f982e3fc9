"""Any value comes back as it was, and any bytes are a value or a SchemaError."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fabric import payloads
from fabric.errors import PayloadTooLargeError, SchemaError
from tests.unit.test_payloads_values import same, through

DTYPES = st.sampled_from(["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
)
SCALARS = DTYPES.flatmap(lambda dtype: hnp.from_dtype(np.dtype(dtype)))
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.binary())
KEYS = st.one_of(TEXT, st.integers(), st.booleans())
VALUES = st.recursive(
    st.one_of(PLAIN, ARRAYS, SCALARS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=6),
        st.lists(inner, max_size=6).map(tuple),
        st.dictionaries(KEYS, inner, max_size=6),
    ),
    max_leaves=20,
)


@given(VALUES)
def test_any_value_comes_back_with_all_its_types(value: Any) -> None:
    assert same(through(value), value)
    assert same(through(value, "own"), value)
    assert same(payloads.own(through(value)), value)


@given(VALUES, st.integers(0, 400))
def test_the_limit_is_kept_exactly(value: Any, limit: int) -> None:
    size = payloads.plan(value, limit=1 << 30).size
    try:
        assert payloads.plan(value, limit=limit).size == size <= limit
    except PayloadTooLargeError:
        assert size > limit


@given(st.integers(0, 8), st.binary(max_size=200))
def test_any_bytes_are_a_value_or_a_schema_error(kind: int, blob: bytes) -> None:
    with contextlib.suppress(SchemaError):
        payloads.decode(kind, memoryview(blob))


@given(VALUES, st.data())
def test_a_damaged_blob_is_a_value_or_a_schema_error(value: Any, data: st.DataObject) -> None:
    made = payloads.plan(value, limit=1 << 30)
    blob = bytearray(made.tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if blob:
            blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(SchemaError):
        payloads.decode(made.kind, memoryview(bytes(blob)))
