"""Values that need no torch: what comes back, what is refused, and what it costs in bytes."""

from __future__ import annotations

import enum
import math
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fabric import payloads
from fabric.errors import PayloadTooLargeError, SchemaError, UnsupportedValueError

LIMIT = 1 << 30


def blob_of(value: Any) -> tuple[int, memoryview]:
    made = payloads.plan(value, limit=LIMIT)
    dirty = bytearray(b"\xee" * (made.size + 5))
    made.write(memoryview(dirty))
    assert dirty[made.size :] == b"\xee" * 5
    assert bytes(dirty[: made.size]) == made.tobytes()
    return made.kind, memoryview(made.tobytes())


def through(value: Any, ownership: payloads.decoders.Ownership = "view") -> Any:
    kind, blob = blob_of(value)
    return payloads.decode(kind, blob, ownership=ownership)


def same(left: Any, right: Any) -> bool:
    """Equal in value and in every type; NaN equals itself, -0.0 is not 0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return (math.isnan(left) and math.isnan(right)) or (left, math.copysign(1, left)) == (
            right,
            math.copysign(1, right),
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    if isinstance(left, (np.ndarray, np.generic)):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    return bool(left == right)


PLAIN = [
    None,
    True,
    False,
    0,
    1,
    -1,
    127,
    128,
    -128,
    -129,
    2**63,
    -(2**63),
    2**64 - 1,
    2**64,
    -(2**63) - 1,
    10**400,
    -(10**400),
    0.0,
    -0.0,
    1.5,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "text",
    "größer 🌱",
    "\x00",
    b"",
    b"bytes",
    bytes(range(256)) * 64,
]


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("shape", ["alone", "in a list", "in a tuple", "in a dict"])
def test_plain_values_come_back_with_their_types(value: Any, shape: str) -> None:
    sent = {"alone": value, "in a list": [value, [value]], "in a tuple": (value,), "in a dict": {"key": value}}[shape]
    assert same(through(sent), sent)


@pytest.mark.parametrize("value", [bytearray(b"abc"), memoryview(b"abc"), memoryview(b"a_b_c_")[::1][:3]])
def test_bytes_like_values_become_bytes(value: Any) -> None:
    assert same(through(value), bytes(value))
    assert same(through([value]), [bytes(value)])


def test_a_memoryview_of_numbers_becomes_its_bytes() -> None:
    numbers = np.arange(5, dtype=np.int32)
    assert same(through(memoryview(numbers)), numbers.tobytes())  # type: ignore[arg-type]
    assert same(through([memoryview(numbers[:0])]), [b""])  # type: ignore[arg-type]


def test_a_memoryview_with_gaps_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match=r"value\[0\]: memoryview that is not contiguous.*send bytes"):
        payloads.plan([memoryview(b"abcdef")[::2]], limit=LIMIT)


def test_containers_keep_order_types_and_nesting() -> None:
    value = {"b": [1, (2, [3, ()]), {}], "a": ({}, []), True: "bool", 0: "int", -5: "negative", 2**70: "big"}
    assert same(through(value), value)


def test_true_and_one_stay_different_keys() -> None:
    assert list(map(type, through({True: 1, 2: 2}))) == [bool, int]
    assert list(map(type, through({1: 1, False: 2}))) == [int, bool]


def test_an_ordered_dict_becomes_a_dict() -> None:
    assert same(through(OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


def test_long_lists_of_numbers_survive_the_chunks_of_the_document() -> None:
    value = [list(range(10_000)), [0.5] * 5_000, ["x"] * 5_000, {str(key): [key] for key in range(5_000)}]
    assert same(through(value), value)


def test_a_list_with_one_integer_beyond_64_bits_survives() -> None:
    value = [1, 2, 2**64, -(2**63) - 1, 2**64 - 1, -(2**63)]
    assert same(through(value), value)


DTYPES = ["?", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (3, 4), (2, 0, 3), (1,) * 16])
@pytest.mark.parametrize("ownership", ["view", "own"])
def test_arrays_of_every_dtype_come_back(
    dtype: str, shape: tuple[int, ...], ownership: payloads.decoders.Ownership
) -> None:
    array = (np.arange(math.prod(shape)).reshape(shape) % 3).astype(dtype)
    assert same(through(array, ownership), array)
    assert same(through({"a": [array]}, ownership), {"a": [array]})


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_scalars_come_back_as_scalars_of_their_type(dtype: str) -> None:
    value = np.dtype(dtype).type(1)
    assert same(through(value), value)
    assert same(through((value, [value])), (value, [value]))


def test_a_0d_array_stays_an_array() -> None:
    assert isinstance(through(np.array(1.0)), np.ndarray)
    assert isinstance(through(np.float64(1.0)), np.float64)


def test_strides_and_byte_order_are_resolved() -> None:
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    for array in (base.T, base[::2, ::3], base[::-1], np.broadcast_to(base[0], (3, 6)), base.astype(">f4")):
        back = through(array)
        assert back.dtype == np.float32
        assert back.flags.c_contiguous
        assert np.array_equal(back, array)
        assert np.array_equal(through([array])[0], array)


def test_nan_payloads_of_arrays_survive_bit_by_bit() -> None:
    array = np.array([0x7FC00001, 0x7F800001, 0xFF800000], np.uint32).view(np.float32)
    assert same(through(array), array)


def test_views_are_read_only_and_own_memory_is_not() -> None:
    for value in (np.arange(5), [np.arange(5)]):
        view, own = through(value), through(value, "own")
        view, own = (view[0], own[0]) if isinstance(value, list) else (view, own)
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[0] = 1
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
        own[0] = 99


def test_a_view_is_made_without_a_copy() -> None:
    kind, blob = blob_of(np.arange(1000))
    assert np.shares_memory(payloads.decode(kind, blob), np.frombuffer(blob, np.uint8))


def test_unaligned_elements_are_copied_once() -> None:
    made = payloads.plan(np.arange(100.0), limit=LIMIT)
    shifted = memoryview(bytearray(made.size + 1))[1:]
    made.write(shifted)
    back = payloads.decode(made.kind, shifted)
    assert np.array_equal(back, np.arange(100.0))
    assert back.flags.aligned
    assert not back.flags.writeable


def test_a_writable_blob_gives_read_only_views_too() -> None:
    made = payloads.plan(np.arange(4), limit=LIMIT)
    target = bytearray(made.size)
    made.write(memoryview(target))
    assert not payloads.decode(made.kind, memoryview(target)).flags.writeable


def test_tied_arrays_are_sent_once_and_tied_again() -> None:
    array = np.arange(1000)
    kind, blob = blob_of({"one": array, "two": [array, array[:500]]})
    assert len(blob) < 1.6 * array.nbytes
    back = payloads.decode(kind, blob)
    assert back["one"] is back["two"][0]
    assert np.array_equal(back["two"][1], array[:500])


def test_long_bytes_in_a_tree_are_copied_once_into_a_buffer() -> None:
    value = {"image": b"i" * 100_000, "two": bytearray(b"j" * 5_000), "short": b"k"}
    assert through(value) == {"image": b"i" * 100_000, "two": b"j" * 5_000, "short": b"k"}


def test_buffers_of_a_tree_are_64_byte_aligned_and_gaps_are_zeros() -> None:
    value = [np.full(3, 255, np.uint8), np.full(5, 255, np.uint8)]
    kind, blob = blob_of(value)
    assert bytes(blob[-69:]) == b"\xff" * 3 + bytes(61) + b"\xff" * 5
    assert (len(blob) - 5) % 64 == 0
    assert kind == payloads.TREE


@payloads.register
@dataclass(frozen=True)
class Growth:
    seed: int
    weights: Any
    parent: Any = None
    label: str = field(init=False, default="derived")


@dataclass
class Unregistered:
    seed: int = 0


def test_registered_dataclasses_come_back() -> None:
    value = Growth(3, [1.5], parent=Growth(2, (None,)))
    assert same(through(value), value)
    assert same(through({"g": [value]}), {"g": [value]})


def test_an_unregistered_dataclass_is_refused_with_advice() -> None:
    with pytest.raises(UnsupportedValueError, match=r"value\['x'\].*Unregistered.*register its class"):
        payloads.plan({"x": Unregistered()}, limit=LIMIT)


def test_an_unknown_name_is_refused_on_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, blob = blob_of(Growth(1, 2))
    monkeypatch.delitem(payloads.trees.BY_NAME, "Growth")
    with pytest.raises(SchemaError, match="'Growth' is not registered"):
        payloads.decode(kind, blob)


def test_a_dataclass_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, blob = blob_of(Growth(1, 2))
    monkeypatch.setattr(payloads.trees.BY_NAME["Growth"], "fields", ["seed"])
    with pytest.raises(SchemaError, match="has other fields here"):
        payloads.decode(kind, blob)


def test_a_constructor_that_refuses_is_a_schema_error() -> None:
    @dataclass
    class Positive:
        number: int

        def __post_init__(self) -> None:
            if self.number < 0:
                raise ValueError("negative")

    payloads.register(Positive, "positive")
    value = Positive(1)
    value.number = -1
    kind, blob = blob_of(value)
    with pytest.raises(SchemaError, match="'positive' refused its fields: negative"):
        payloads.decode(kind, blob)


def test_registration_is_idempotent_and_names_are_unique() -> None:
    assert payloads.register(Growth) is Growth
    with pytest.raises(ValueError, match="'Growth' is the name of"):
        payloads.register(Unregistered, "Growth")
    with pytest.raises(ValueError, match="registered as 'Growth' already"):
        payloads.register(Growth, "Other")
    with pytest.raises(TypeError, match="no dataclass"):
        payloads.register(int)
    with pytest.raises(ValueError, match="1 to 255"):
        payloads.register(Unregistered, "")


class Colour(enum.IntEnum):
    RED = 1


Pair = namedtuple("Pair", "a b")

REFUSED = [
    ({1, 2}, "type set", "sorted"),
    (frozenset(), "type frozenset", "sorted"),
    (1j, "type complex", "complex128"),
    (object(), "type object", "send tensors"),
    (Colour.RED, "Colour", r"int\(value\)"),
    (Pair(1, 2), "Pair", r"tuple\(value\)"),
    (defaultdict(int), "defaultdict", r"dict\(value\)"),
    (np.array([object()]), "dtype object", "send a list"),
    (np.array(["a"]), "dtype <U1", "list of str"),
    (np.array([b"a"]), r"dtype \|S1", "list of bytes"),
    (np.array([0], "M8[s]"), "datetime64", "int64"),
    (np.zeros(1, [("x", "f4")]), "dtype", "dict of its fields"),
    (np.ma.masked_array([1]), "MaskedArray", "value.mask"),
    (np.zeros(2, np.longdouble), "dtype", "float64"),
    (np.longdouble(1), "longdouble", "float64"),
    (np.datetime64(0, "s"), "datetime64", "convert"),
    (np.str_("a"), "str_", r"str\(value\)"),
    (np.zeros((1,) * 17), "17 dimensions", "16 or fewer"),
    ("\ud800", "lone surrogates", "encode"),
    (len, "builtin_function", "send tensors"),
    (int, "type type", "send tensors"),
]


@pytest.mark.parametrize(("value", "kind", "advice"), REFUSED, ids=lambda part: repr(part)[:25])
def test_what_cannot_travel_is_refused_by_name_with_advice(value: Any, kind: str, advice: str) -> None:
    with pytest.raises(UnsupportedValueError, match=kind) as alone:
        payloads.plan(value, limit=LIMIT)
    assert alone.value.where == "value"  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedValueError, match=advice) as nested:
        payloads.plan({"a": [0, (value,)]}, limit=LIMIT)
    assert nested.value.where == "value['a'][1][0]"  # type: ignore[attr-defined]


def test_the_path_names_dataclass_fields() -> None:
    with pytest.raises(UnsupportedValueError) as caught:
        payloads.plan({7: Growth(1, {"w": {1}})}, limit=LIMIT)
    assert caught.value.where == "value[7].weights['w']"  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", [1.5, None, b"k", (1,), np.int64(1), Colour.RED])
def test_other_keys_are_refused(key: Any) -> None:
    with pytest.raises(UnsupportedValueError, match=r"dict with a key of type .* use str, int or bool keys"):
        payloads.plan([{key: 1}], limit=LIMIT)


def nested(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_64_levels_travel_and_65_are_refused() -> None:
    assert through(nested(64)) == nested(64)
    with pytest.raises(UnsupportedValueError, match="nested deeper than 64"):
        payloads.plan(nested(65), limit=LIMIT)


def test_a_cycle_is_refused() -> None:
    value: list[Any] = []
    value.append({"again": value})
    with pytest.raises(UnsupportedValueError, match="break its cycle"):
        payloads.plan(value, limit=LIMIT)


def test_too_many_values_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads.trees, "TOKENS_MAX", 100)
    payloads.plan([0] * 99, limit=LIMIT)
    with pytest.raises(UnsupportedValueError, match="more than 100 values"):
        payloads.plan([[0] * 60, [0] * 60], limit=LIMIT)


@pytest.mark.parametrize(
    "value",
    [
        *(b"x" * 100, bytearray(100), "x" * 100, "ö" * 60, 2**800, np.zeros(100), np.float64(1), [1] * 100),
        *(["x" * 100], {"x": b"y" * 100}, [np.zeros(100)], {"k" * 100: 1}, [2**900], None, 1.5),
    ],
    ids=lambda value: repr(value)[:15],
)
def test_the_limit_is_exact(value: Any) -> None:
    size = payloads.plan(value, limit=LIMIT).size
    assert payloads.plan(value, limit=size).size == size
    with pytest.raises(PayloadTooLargeError) as caught:
        payloads.plan(value, limit=size - 1)
    assert caught.value.limit == size - 1  # type: ignore[attr-defined]


def test_a_value_beyond_the_limit_is_not_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads.trees.msgpack, "packb", lambda _: pytest.fail("packed"))
    for value in ([np.zeros(1000)], [b"x" * 1000], ["x" * 1000], [0] * 1000, [[2**9000]]):
        with pytest.raises(PayloadTooLargeError):
            payloads.plan(value, limit=500)


def test_a_document_beyond_its_own_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads.trees, "DOCUMENT_BYTES_MAX", 50)
    with pytest.raises(PayloadTooLargeError):
        payloads.plan(["x" * 100], limit=LIMIT)


def test_numpy_metadata_of_a_dtype_is_dropped() -> None:
    array = np.arange(3, dtype=np.dtype("f4", metadata={"unit": "m"}))
    assert np.array_equal(through(array), array)


def test_the_kinds_and_heads_are_what_the_protocol_says() -> None:
    assert blob_of(b"ab") == (1, b"ab")
    assert blob_of("é") == (2, b"\xc3\xa9")
    assert blob_of(-2) == (3, b"\xfe")
    assert blob_of(200) == (3, b"\xc8\x00")
    assert blob_of(1.0) == (4, bytes(6) + b"\xf0\x3f")
    assert blob_of(np.array([[1, 2]], np.int16)) == (
        5,
        bytes([5, 2, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]) + bytes(15) + b"\x01\x00\x02\x00",
    )
    assert blob_of(np.uint8(7)) == (5, bytes([2, 0, 1]) + bytes(13) + b"\x07")
    assert blob_of(None) == (7, b"\x03\x00\x00\x00" + bytes(4) + b"\x91\x91\xc0")
    assert blob_of([1, "a"]) == (7, b"\x08" + bytes(7) + b"\x91\x93\x92\x00\x02\x01\xa1a")


def test_importing_payloads_loads_no_torch() -> None:
    code = "import sys, fabric.payloads, fabric.testing.devices; print(sorted({'torch', 'asyncio'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


def test_a_program_without_torch_is_never_made_to_load_it() -> None:
    code = (
        "import sys, numpy as np\nfrom fabric import payloads\n"
        "blob = payloads.plan({'a': np.zeros(3), 'b': [1, None]}, limit=1000).tobytes()\n"
        "payloads.own(payloads.decode(7, memoryview(blob)))\n"
        "try: payloads.plan({1}, limit=100)\nexcept TypeError: print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "False"
