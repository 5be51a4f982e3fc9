"""Values that outlive their blob: `own`, and `decode_into`, which writes all or nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fabric import payloads
from fabric.errors import SchemaError, UnsupportedValueError
from tests.unit.test_payloads_values import Growth, blob_of, through


def into(value: Any, room: Any) -> Any:
    return payloads.decode_into(*blob_of(value), room)


def test_own_copies_arrays_and_keeps_types_and_ties() -> None:
    array = np.arange(3)
    back = payloads.own(through([array, (array, {"k": array, 1: "x"}), Growth(1, array)]))
    back[0][0] = 7
    assert back[1][0] is back[0] is back[1][1]["k"] is back[2].weights
    assert type(back[1]) is tuple
    assert array[0] == 0


def test_own_copies_what_the_caller_made_himself() -> None:
    array = np.arange(3)
    assert payloads.own([array])[0] is not array
    assert payloads.own("text") == "text"


def test_an_array_is_received_into_an_array() -> None:
    for room in (np.zeros((2, 3)), np.zeros((3, 2)).T, np.zeros((4, 6))[::2, ::2], np.zeros((2, 3), ">f8")):
        assert into(np.arange(6.0).reshape(2, 3), room) is room
        assert np.array_equal(room, np.arange(6.0).reshape(2, 3))


def test_a_tree_is_received_into_a_tree() -> None:
    room = {"w": np.zeros(3), "list": [np.zeros(2), "old"], "tuple": (np.zeros(1), 1), "g": Growth(0, np.zeros(2))}
    sent = {"w": np.ones(3), "list": [np.ones(2), "new"], "tuple": (np.ones(1), None), "g": Growth(5, np.ones(2))}
    back = into(sent, room)
    assert back["w"] is room["w"]
    assert back["tuple"][0] is room["tuple"][0]
    assert back["g"].weights is room["g"].weights
    assert (back["list"][1], back["tuple"][1], back["g"].seed) == ("new", None, 5)
    assert [room["w"].tolist(), room["list"][0].tolist()] == [[1.0] * 3, [1.0] * 2]


def test_plain_values_are_returned() -> None:
    assert into("text", None) == "text"
    assert into(np.float32(2), 0) == np.float32(2)


SENT = {"a": np.ones(3), "b": [np.ones(2), 1]}


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({"a": np.zeros(3), "b": [np.zeros(3), 1]}, r"into\['b'\]\[0\] is float64 of shape \(3,\)"),
        ({"a": np.zeros(3), "b": [np.zeros(2, np.float32), 1]}, r"into\['b'\]\[0\] is float32"),
        ({"a": np.zeros(3), "b": [np.zeros(2)]}, r"into\['b'\] is list of 1"),
        ({"a": np.zeros(3), "b": (np.zeros(2), 1)}, r"into\['b'\] is tuple"),
        ({"a": np.zeros(3), "b": [5, 1]}, r"into\['b'\]\[0\] is of type int"),
        ({"a": np.zeros(3), "b": [np.zeros(2), np.zeros(1)]}, r"into\['b'\]\[1\] is ndarray"),
        ({"a": np.zeros(3), "c": [np.zeros(2), 1]}, "into is dict"),
        ({"a": np.zeros(3)}, "into is dict of 1"),
        ([np.zeros(3)], "into is list"),
        (None, "into is NoneType"),
    ],
)
def test_nothing_is_written_when_the_structure_differs(other: Any, where: str) -> None:
    with pytest.raises(SchemaError, match=where):
        into(SENT, other)
    if isinstance(other, dict):
        assert other["a"].tolist() == [0.0] * 3


def test_keys_of_another_type_are_another_structure() -> None:
    with pytest.raises(SchemaError, match="into is dict"):
        into({True: np.ones(1)}, {1: np.zeros(1)})
    with pytest.raises(SchemaError, match="into is int"):
        into(Growth(1, 2), 5)


def test_nothing_is_written_when_a_later_array_cannot_be_written() -> None:
    locked = np.zeros(2)
    locked.flags.writeable = False
    for bad, kind in ((locked, "read-only"), (np.lib.stride_tricks.as_strided(np.zeros(1), (2,), (0,)), "broadcast")):
        room = {"a": np.zeros(3), "b": [bad, 1]}
        with pytest.raises(UnsupportedValueError, match=kind):
            into(SENT, room)
        assert room["a"].tolist() == [0.0] * 3  # type: ignore[union-attr]


def test_one_array_cannot_take_two_parts() -> None:
    room = np.zeros(3)
    with pytest.raises(SchemaError, match="takes another part"):
        into([np.ones(3), np.ones(3) * 2], [room, room])
    assert room.tolist() == [0.0] * 3
    shared = np.ones(3)
    assert into([shared, shared], [room, room])[0].tolist() == [1.0] * 3


def test_a_bad_blob_writes_nothing() -> None:
    kind, blob = blob_of(np.ones(3))
    room = np.zeros(3)
    with pytest.raises(SchemaError):
        payloads.decode_into(kind, blob[:-1], room)
    assert room.tolist() == [0.0] * 3


@pytest.mark.torch
class TestTensors:
    torch: Any

    @pytest.fixture(autouse=True)
    def needs_torch(self) -> None:
        type(self).torch = pytest.importorskip("torch")

    def test_a_tensor_is_received_into_a_tensor(self) -> None:
        torch = self.torch
        for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
            value = torch.arange(6).reshape(2, 3).to(dtype)
            for room in (torch.zeros(2, 3, dtype=dtype), torch.zeros(3, 2, dtype=dtype).t()):
                assert into(value, room) is room
                assert room.float().tolist() == value.float().tolist()

    def test_a_parameter_and_a_conjugate_view_can_take_a_tensor(self) -> None:
        torch = self.torch
        parameter = torch.nn.Parameter(torch.zeros(3))
        assert into(torch.ones(3), parameter) is parameter
        assert parameter.tolist() == [1.0] * 3
        base = torch.zeros(1, dtype=torch.complex64)
        into(torch.tensor([1 + 2j]), base.conj())
        assert base.tolist() == [1 - 2j]

    def test_a_model_is_received_into_its_state(self) -> None:
        torch = self.torch
        one, two = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        into(one.state_dict(), two.state_dict())
        assert torch.equal(one.weight, two.weight)

    def test_what_cannot_take_a_tensor_is_refused_and_nothing_written(self) -> None:
        torch = self.torch
        with torch.inference_mode():
            inference = torch.zeros(2)
        first = torch.zeros(3)
        for bad, error in (
            (torch.zeros(3), SchemaError),
            (torch.zeros(2, dtype=torch.float64), SchemaError),
            (np.zeros(2, np.float32), SchemaError),
            (torch.zeros(1).expand(2), UnsupportedValueError),
            (inference, UnsupportedValueError),
            (torch.zeros(2, device="meta"), UnsupportedValueError),
        ):
            with pytest.raises(error, match=r"into\[1\]"):
                into([torch.ones(3), torch.ones(2)], [first, bad])
            assert first.tolist() == [0.0] * 3

    def test_a_view_of_ours_cannot_take_anything_even_in_inference_mode(self) -> None:
        torch = self.torch
        with torch.inference_mode(), pytest.raises(UnsupportedValueError, match="read-only view"):
            into(torch.ones(2), through(torch.zeros(2)))
