"""Bad blobs: every one of them is a SchemaError, before anything of its claimed size is allocated."""

from __future__ import annotations

import random
import struct
from typing import Any

import msgpack
import numpy as np
import pytest

from fabric import payloads
from fabric.errors import SchemaError
from fabric.payloads.schema import ARRAY, FLOAT, INTEGER, TENSOR, TEXT, TREE

LIMIT = 1 << 30


def array_blob(
    code: int = 11, shape: tuple[int, ...] = (2,), data: bytes = bytes(8), flags: int = 0, **over: int
) -> bytes:
    head = struct.pack(f"<BBHI{len(shape)}q", code, over.get("ndim", len(shape)), flags, over.get("zero", 0), *shape)
    return head + bytes(-len(head) % 16) + data


def tree_blob(
    tokens: Any, buffers: bytes = b"", *, chunks: bool = True, length: int | None = None, zero: int = 0
) -> bytes:
    document = msgpack.packb([tokens] if chunks else tokens)
    blob = struct.pack("<II", len(document) if length is None else length, zero) + document
    return blob + bytes(-len(blob) % 64) + buffers if buffers else blob


def refused(kind: int, blob: bytes, match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        payloads.decode(kind, memoryview(blob))
    with pytest.raises(SchemaError, match=match):
        payloads.decode(kind, memoryview(blob), ownership="own")


def test_the_blobs_of_this_file_are_good_without_their_faults() -> None:
    assert payloads.decode(ARRAY, memoryview(array_blob())).tolist() == [0.0, 0.0]
    tokens = [[0, 3], [5, 2, [3], 0, 3], [8, 64, 2], [9, 0]]
    back = payloads.decode(TREE, memoryview(tree_blob(tokens, b"abc" + bytes(61) + b"de")))
    assert back[0].tolist() == [97, 98, 99]
    assert back[1] == b"de"
    assert back[2] is back[0]


@pytest.mark.parametrize("kind", [0, 8, 255, -1, None])
def test_an_unknown_kind_is_refused(kind: Any) -> None:
    refused(kind, b"", "unknown kind")


def test_an_unknown_ownership_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="ownership"):
        payloads.decode(TEXT, memoryview(b""), ownership="mine")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "blob", "match"),
    [
        (TEXT, b"\xff", "not UTF-8"),
        (TEXT, b"\xed\xa0\x80", "not UTF-8"),
        (INTEGER, b"", "a byte or more"),
        (FLOAT, b"1234567", "takes 8 bytes"),
        (FLOAT, b"123456789", "takes 8 bytes"),
        (ARRAY, b"", "takes 16 bytes or more"),
        (ARRAY, array_blob()[:15], "takes 16 bytes or more"),
        (ARRAY, array_blob(shape=(1, 2))[:20], "takes 32 bytes"),
        (ARRAY, array_blob(ndim=17), "17 dimensions"),
        (ARRAY, array_blob(code=0), "unknown dtype code 0"),
        (ARRAY, array_blob(code=22), "unknown dtype code 22"),
        (ARRAY, array_blob(code=13, data=bytes(4)), "numpy has no bfloat16"),
        (TENSOR, array_blob(code=99), "unknown dtype code 99"),
        (ARRAY, array_blob(zero=1), "unknown flags"),
        (ARRAY, array_blob(flags=2), "unknown flags"),
        (ARRAY, array_blob(flags=1), "unknown flags"),
        (TENSOR, array_blob(shape=(), data=bytes(4), flags=1), "unknown flags"),
        (ARRAY, array_blob(data=bytes(7)), "takes 8 bytes, the blob has 7"),
        (ARRAY, array_blob(data=bytes(9)), "takes 8 bytes, the blob has 9"),
        (TENSOR, array_blob(shape=(-2,)), "negative dimension"),
        (ARRAY, array_blob(shape=(-2, -1)), "negative dimension"),
        (ARRAY, array_blob(shape=(2**62, 4)), "beyond any memory"),
        (ARRAY, array_blob(shape=(2**62, 2**62, 2**62, 4), data=b""), "beyond any memory"),
        (TENSOR, array_blob(shape=(0, 2**62, 2**62), data=b""), "beyond any memory"),
        (TENSOR, array_blob(shape=(2**40,)), "takes 4398046511104 bytes"),
    ],
)
def test_a_malformed_plain_blob_is_refused(kind: int, blob: bytes, match: str) -> None:
    refused(kind, blob, match)


def numpy_tokens(*, code: Any = 2, shape: Any = (3,), offset: Any = 0, nbytes: Any = 3) -> list[Any]:
    return [[5, code, shape, offset, nbytes]]


BUFFER = b"abc"


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (b"", "8 bytes or more"),
        (tree_blob([None], zero=1), "a document of"),
        (tree_blob([None], length=99), "a document of 99 bytes"),
        (tree_blob([None], length=2**32 - 1), "a document of"),
        (struct.pack("<II", 1, 0) + b"\xc1", "not msgpack"),
        (struct.pack("<II", 2, 0) + b"\x91\xc0", "no list of chunks"),
        (struct.pack("<II", 5, 0) + b"\xdd\xff\xff\xff\xff", "not msgpack within the limits.*max_array_len"),
        (struct.pack("<II", 3, 0) + b"\x91\x91\x92", "not msgpack"),
        (struct.pack("<II", 4, 0) + b"\x91\x91\xc0\xc0", "not msgpack"),
        (struct.pack("<II", 4, 0) + b"\x91\x91\xa1\xff", "not msgpack"),
        (tree_blob({}, chunks=False), "no list of chunks"),
        (tree_blob([{1: 2}]), "max_map_len"),
        (tree_blob([msgpack.ExtType(5, b"x")]), "max_ext_len"),
        (tree_blob([msgpack.ExtType(5, b"")]), "type that the format does not have"),
        (tree_blob([msgpack.Timestamp(1)]), "max_ext_len"),
        (tree_blob([]), "ends early"),
        (tree_blob([1, 2]), "1 tokens are left over"),
        (tree_blob([[]]), "unknown token"),
        (tree_blob([[10]]), "unknown token"),
        (tree_blob([[-1, 1]]), "unknown token"),
        (tree_blob([[True, 0]]), "unknown token"),
        (tree_blob([["x", 0]]), "unknown token"),
        (tree_blob([[[1], 0]]), "unknown token"),
        (tree_blob([[0]]), "takes 1 fields"),
        (tree_blob([[0, 1, 2], 1]), "takes 1 fields"),
        (tree_blob([[0, -1]]), "a count is"),
        (tree_blob([[0, True], 1]), "a count is"),
        (tree_blob([[0, "1"], 1]), "a count is"),
        (tree_blob([[1, 2], 1]), "ends early"),
        (tree_blob([[2, 2**63], 1, 1]), "ends early"),
        (tree_blob([[2, 1], None, 1]), "keys of str, int or bool"),
        (tree_blob([[2, 1], 1.5, 1]), "keys of str, int or bool"),
        (tree_blob([[2, 1], [1, 0], 1]), "keys of str, int or bool"),
        (tree_blob([[2, 2], "a", 1, "a", 2]), "a key twice"),
        (tree_blob([[2, 2], 1, 1, True, 2]), "a key twice"),
        (tree_blob([[3, "never registered", []]]), "not registered here"),
        (tree_blob([[3, 5, []]]), "a name and a list"),
        (tree_blob([[3, "x", [1]], 1]), "a name and a list"),
        (tree_blob([[3, "x"]]), "takes 2 fields"),
        (tree_blob([[4, "x"]]), "beyond 64 bits"),
        (tree_blob([[4, b""]]), "beyond 64 bits"),
        (tree_blob([[7, 11, b"abc"]]), "a numpy scalar is"),
        (tree_blob([[7, 13, b"ab"]]), "a numpy scalar is"),
        (tree_blob([[7, True, b"a"]]), "a numpy scalar is"),
        (tree_blob([[7, [], b"a"]]), "a numpy scalar is"),
        (tree_blob([[9, 0]]), "no buffer 0"),
        (tree_blob([[9, -1]]), "no buffer -1"),
        (tree_blob([[0, 2], [9, 0], [8, 0, 3]], BUFFER), "no buffer 0"),
        (tree_blob([[5]]), "a buffer token of 1 fields"),
        (tree_blob([[5, 2, [3]]], BUFFER), "a buffer token of 3 fields"),
        (tree_blob([[8, 2, [3], 0, 3]], BUFFER), "a buffer token of 5 fields"),
        (tree_blob(numpy_tokens(code=13, nbytes=6), bytes(6)), "numpy has no bfloat16"),
        (tree_blob(numpy_tokens(code="2"), BUFFER), "unknown dtype code"),
        (tree_blob(numpy_tokens(code=True), BUFFER), "unknown dtype code"),
        (tree_blob(numpy_tokens(shape=3), BUFFER), "a shape is"),
        (tree_blob(numpy_tokens(shape=[3.0]), BUFFER), "a shape is"),
        (tree_blob(numpy_tokens(shape=[-3]), BUFFER), "a shape is"),
        (tree_blob(numpy_tokens(shape=[True, 3]), BUFFER), "a shape is"),
        (tree_blob(numpy_tokens(shape=[1] * 17), BUFFER), "a shape is"),
        (tree_blob(numpy_tokens(shape=[2**64 - 1, 2**64 - 1]), BUFFER), "beyond any memory"),
        (tree_blob(numpy_tokens(shape=[4]), BUFFER), "does not take 3 bytes"),
        (tree_blob(numpy_tokens(nbytes=3.0), BUFFER), "does not take"),
        (tree_blob(numpy_tokens(offset=1), BUFFER), "a buffer at 1"),
        (tree_blob(numpy_tokens(offset=64), BUFFER), "a buffer at 64"),
        (tree_blob(numpy_tokens(offset=0.0), BUFFER), "a buffer at 0.0"),
        (tree_blob(numpy_tokens(offset=False), BUFFER), "a buffer at False"),
        (tree_blob(numpy_tokens(), BUFFER + b"x"), "the buffers end at"),
        (tree_blob(numpy_tokens(), BUFFER[:2]), "the buffers end at"),
        (
            tree_blob([[0, 2], *numpy_tokens() * 2], BUFFER + bytes(61) + BUFFER),
            "a buffer at 0 of 3 bytes, where 64 is",
        ),
        (tree_blob([[8, 0, -1]], BUFFER), "a buffer at"),
        (tree_blob([[8, 0, 2**60]], BUFFER), "the buffers end at"),
        (tree_blob([1], BUFFER), "the buffers end at"),
    ],
)
def test_a_malformed_tree_is_refused(blob: bytes, match: str) -> None:
    refused(TREE, blob, match)


def test_a_tree_nested_too_deeply_is_refused() -> None:
    payloads.decode(TREE, memoryview(tree_blob([[0, 1]] * 63 + [[0, 0]])))
    refused(TREE, tree_blob([[0, 1]] * 64 + [[0, 0]]), "nested deeper than 64")
    refused(TREE, tree_blob([[2, 1], [2, 0]] * 70), "deeper than 64|ends early|keys of")


def test_a_document_nested_too_deeply_for_msgpack_is_refused() -> None:
    refused(TREE, struct.pack("<II", 5000, 0) + b"\x91" * 5000, "not msgpack")


def test_nested_false_lengths_allocate_little() -> None:
    bomb = b"\x91\x91" + b"\xdc\x0f\xff" * 1000
    refused(TREE, struct.pack("<II", len(bomb), 0) + bomb, "not msgpack")


def test_a_chunk_has_at_most_4096_tokens() -> None:
    payloads.decode(TREE, memoryview(tree_blob([[0, 4095]] + [1] * 4095)))
    refused(TREE, tree_blob([[0, 4096]] + [1] * 4096), "4097 exceeds max_array_len")


def test_too_many_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads.schema, "TOKENS_MAX", 3)
    refused(TREE, tree_blob([[0, 3], 1, 2, 3]), "4 tokens, the most is 3")


def samples() -> list[tuple[int, bytes]]:
    values: list[Any] = [
        np.arange(6, dtype=np.int16).reshape(2, 3),
        np.float32(2),
        {"a": [1, 2.5, None, (True, "x")], "w": np.ones(3), 5: np.int8(1), "big": 2**90, "b": b"z" * 5000},
    ]
    plans = [payloads.plan(value, limit=LIMIT) for value in values]
    return [(made.kind, made.tobytes()) for made in plans]


@pytest.mark.parametrize(("kind", "blob"), samples(), ids=["array", "scalar", "tree"])
def test_every_truncation_is_refused(kind: int, blob: bytes) -> None:
    for length in [*range(min(len(blob), 300)), len(blob) - 1]:
        with pytest.raises(SchemaError):
            payloads.decode(kind, memoryview(blob[:length]))


@pytest.mark.parametrize(("kind", "blob"), samples(), ids=["array", "scalar", "tree"])
def test_flipped_bytes_raise_nothing_but_schema_errors(kind: int, blob: bytes) -> None:
    chance = random.Random(5)
    for _ in range(3000):
        hurt = bytearray(blob)
        for _ in range(chance.randint(1, 3)):
            hurt[chance.randrange(min(len(hurt), 120))] = chance.randrange(256)
        try:
            payloads.decode(kind, memoryview(bytes(hurt)))
        except SchemaError:
            continue
