"""Torch tensors: every dtype and stride, ties, views that refuse to be written, and what is refused."""

from __future__ import annotations

import gc
import mmap
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fabric import payloads
from fabric.errors import SchemaError, UnsupportedValueError
from tests.unit.test_payloads_values import LIMIT, blob_of, through

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

NAMES = [row.name for row in payloads.schema.DTYPES.values() if hasattr(torch, row.name)]
BYTE_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensor_of(name: str, shape: tuple[int, ...]) -> Any:
    """A tensor of any dtype with bytes that differ, made without the operators that some dtypes lack."""
    dtype = getattr(torch, name)
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.arange(count, dtype=np.uint8) % (2 if name == "bool" else 97)
    if count == 0:
        return torch.zeros(shape, dtype=BYTE_OF.get(dtype.itemsize, dtype)).view(dtype)
    if name == "complex128":
        return torch.from_numpy(raw.view(np.complex128).reshape(shape).copy())
    return torch.from_numpy(raw.copy()).view(BYTE_OF[dtype.itemsize]).view(dtype).reshape(shape)


def bits(tensor: Any) -> bytes:
    tensor = payloads.own(tensor)
    if tensor.numel() == 0:
        return b""
    if tensor.dtype == torch.complex128:
        return bytes(tensor.numpy().tobytes())
    return bytes(tensor.view(BYTE_OF[tensor.dtype.itemsize]).contiguous().numpy().tobytes())


def same(left: Any, right: Any) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and bits(left) == bits(right)


@pytest.mark.parametrize("ownership", ["view", "own"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3), (1,) * 16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_every_dtype_come_back(
    name: str, shape: tuple[int, ...], ownership: payloads.decoders.Ownership
) -> None:
    tensor = tensor_of(name, shape)
    back = through(tensor, ownership)
    assert type(back) is torch.Tensor
    assert same(back, tensor)
    assert same(through({"w": [tensor]}, ownership)["w"][0], tensor)
    assert back.is_inference() == (ownership == "view")


@pytest.mark.parametrize("name", NAMES)
def test_strided_tensors_are_sent_in_order(name: str) -> None:
    base = tensor_of(name, (4, 6))
    for tensor in (base.t(), base[1:3, ::2], base[0].expand(3, 6)):
        back = through(tensor)
        assert back.is_contiguous()
        assert same(back, tensor)


def test_a_strided_tensor_is_written_to_an_unaligned_target() -> None:
    tensor = torch.arange(24.0).reshape(4, 6).t()
    made = payloads.plan(tensor, limit=LIMIT)
    target = memoryview(bytearray(made.size + 1))[1:]
    made.write(target)
    assert torch.equal(payloads.decode(made.kind, target), tensor)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_conjugation_and_negation_are_resolved(dtype: Any) -> None:
    base = torch.complex(torch.arange(3.0), torch.arange(3.0) + 1).to(dtype)
    for tensor in (base.conj(), base.conj().imag, base.conj().imag[::2], base.imag, base[::2].conj()):
        back = through(tensor)
        assert not back.is_conj()
        assert not back.is_neg()
        assert torch.equal(back, tensor)


def test_half_complex_numbers_are_conjugated_too() -> None:
    parts = torch.arange(6, dtype=torch.float16).reshape(3, 2) + 1
    tensor = parts.view(torch.int32).view(torch.complex32).reshape(3).conj()
    assert tensor.is_conj()
    for one, expected in ((tensor, [[1, -2], [3, -4], [5, -6]]), (tensor[::2], [[1, -2], [5, -6]])):
        back = through(one)
        assert back.dtype == torch.complex32
        assert torch.view_as_real(back).tolist() == expected


def test_parameters_become_plain_tensors_without_gradient() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 3))
    computed = parameter * 2
    for value in (parameter, parameter.t(), computed, torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))):
        for ownership in ("view", "own"):
            back = through(value, ownership)
            assert type(back) is torch.Tensor
            assert not back.requires_grad
            assert torch.equal(back, value.detach())


def test_special_floats_survive() -> None:
    tensor = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    assert same(through(tensor), tensor)


WRITES = [
    lambda view: view.add_(1),
    lambda view: view.__setitem__(0, 5),
    lambda view: view[1:].zero_(),
    lambda view: view.view(2, 2).fill_(1),
    lambda view: torch.add(view, 1, out=view),
    lambda view: torch._foreach_add_([view], 1),
    lambda view: view.detach().add_(1),
    lambda view: view.data.add_(1),
    lambda view: torch.inference_mode()(lambda: view.add_(1))(),
    lambda view: view.data_ptr(),
    lambda view: view.untyped_storage().fill_(0),
]


@pytest.mark.parametrize("write", WRITES, ids=range(len(WRITES)))
def test_in_place_operations_on_a_view_raise_and_write_nothing(write: Any) -> None:
    ones = torch.ones(4)
    for view in (through(ones), through([ones])[0], through(ones.bfloat16())):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            write(view)
        assert view.tolist() == [1.0] * 4


def test_an_in_place_operation_raises_before_it_touches_a_read_only_mapping(tmp_path: Path) -> None:
    made = payloads.plan(torch.ones(4), limit=LIMIT)
    (tmp_path / "blob").write_bytes(made.tobytes())
    with (tmp_path / "blob").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    view = payloads.decode(made.kind, memoryview(mapping))
    with pytest.raises(RuntimeError):
        view.add_(1)
    assert view.sum().item() == 4.0


def test_a_received_view_can_be_published_again_and_stays_tied() -> None:
    view = through({"a": torch.arange(6.0).reshape(2, 3)})["a"]
    assert torch.equal(through(view), torch.arange(6.0).reshape(2, 3))
    one, two, three = through([view, view, view.t()])
    assert one is two
    assert torch.equal(three, view.t())


def test_a_torch_that_cannot_refuse_writes_gets_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads.decoders.tensors(), "_refuse_writes", None)
    kind, blob = blob_of(torch.ones(4))
    view = payloads.decode(kind, blob)
    with torch.inference_mode():
        view.add_(1)
    assert payloads.decode(kind, blob).tolist() == [1.0] * 4


def test_saving_a_view_for_backward_raises() -> None:
    view = through(torch.ones(4))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        torch.ones(4, requires_grad=True) * view
    with pytest.raises(RuntimeError, match="requires_grad"):
        view.requires_grad_(True)


def test_views_can_be_read_by_every_means() -> None:
    view = through(torch.arange(4.0))
    assert (view + 1).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert view.mean().item() == 1.5
    assert (torch.ones(4, requires_grad=True) + view).sum().item() == 10.0


def test_own_gives_ordinary_tensors() -> None:
    for value in (through(torch.ones(4), "own"), payloads.own(through(torch.ones(4)))):
        value.add_(1)
        (torch.ones(4, requires_grad=True) * value).sum().backward()
        assert value.requires_grad_(True).requires_grad


def test_own_gives_ordinary_tensors_even_within_inference_mode() -> None:
    with torch.inference_mode():
        values = through(torch.ones(4), "own"), payloads.own(through(torch.ones(4)))
    for value in values:
        value.add_(1)
        assert value.tolist() == [2.0] * 4


def test_a_view_is_made_without_a_copy_and_keeps_its_blob() -> None:
    class Owner(np.ndarray[Any, Any]):
        pass

    made = payloads.plan(torch.arange(1000), limit=LIMIT)
    owner = np.frombuffer(made.tobytes(), np.uint8).copy().view(Owner)
    alive = weakref.ref(owner)
    address = owner.__array_interface__["data"][0]
    view = payloads.decode(made.kind, memoryview(owner))  # type: ignore[arg-type]
    assert payloads.decoders._array(memoryview(owner), payloads.schema.DTYPES[9], (1000,), 16, False).ctypes.data == (
        address + 16
    )
    part = view[10:20]
    del owner, view
    gc.collect()
    assert alive() is not None
    assert part.tolist() == list(range(10, 20))
    del part
    gc.collect()
    assert alive() is None


def test_unaligned_elements_are_copied_once() -> None:
    made = payloads.plan(torch.arange(9), limit=LIMIT)
    target = memoryview(bytearray(made.size + 1))[1:]
    made.write(target)
    back = payloads.decode(made.kind, target)
    assert back.is_inference()
    assert back.tolist() == list(range(9))


def test_decoding_warns_of_nothing_and_changes_no_filter() -> None:
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.set_warn_always(True)
        try:
            for name in NAMES:
                through(tensor_of(name, (3, 2)).t())
        finally:
            torch.set_warn_always(False)
    assert [str(one.message) for one in caught if "writable" in str(one.message)] == []
    assert warnings.filters == before


def test_the_way_without_dlpack_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise BufferError("Cannot export readonly array since signalling readonly is unsupported by DLPack.")

    monkeypatch.setattr(torch, "from_dlpack", refuse)
    for name in NAMES:
        for shape in ((3, 4), (0,), ()):
            tensor = tensor_of(name, shape)
            back = through(tensor)
            assert same(back, tensor)
            assert back.is_inference()


def test_tied_weights_are_sent_once_and_tied_again() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(100, 16)
            self.head = torch.nn.Linear(16, 100, bias=False)
            self.head.weight = self.embedding.weight

    state = Tied().state_dict()
    kind, blob = blob_of(state)
    assert len(blob) < 1.2 * 100 * 16 * 4
    for ownership in ("view", "own"):
        back = payloads.decode(kind, blob, ownership=ownership)
        assert back["embedding.weight"] is back["head.weight"]
    owned = payloads.own(payloads.decode(kind, blob))
    assert owned["embedding.weight"] is owned["head.weight"]
    model = Tied()
    model.load_state_dict(payloads.decode(kind, blob))
    assert torch.equal(model.head.weight, state["head.weight"])


def test_what_only_looks_tied_is_not_tied() -> None:
    base = torch.complex(torch.ones(4), torch.ones(4))
    back = through([base, base.conj(), base.view(2, 2), base[:2], torch.empty(0), torch.empty(0)])
    assert len({id(one) for one in back}) == 6
    assert back[1].tolist() == base.conj().resolve_conj().tolist()
    square = torch.arange(4.0).reshape(2, 2)
    one, two = through([square, square.t()])
    assert torch.equal(two, one.t())
    assert one is not two
    array, tensor = through([square.numpy(), square])
    assert isinstance(array, np.ndarray)
    assert isinstance(tensor, torch.Tensor)


def test_a_state_dict_of_1000_tensors_survives() -> None:
    state = {f"layers.{index}.weight": torch.full((index % 7, 3), float(index)) for index in range(1000)}
    back = through(state)
    assert list(back) == list(state)
    assert all(same(back[key], state[key]) for key in state)


def test_optimizer_state_survives() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, betas=(0.8, 0.9))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    back = through(state, "own")
    assert back["param_groups"] == state["param_groups"]
    assert isinstance(back["param_groups"][0]["betas"], tuple)
    assert list(back["state"]) == [0, 1]
    for key, moments in state["state"].items():
        assert all(same(back["state"][key][name], moment) for name, moment in moments.items())
    optimizer.load_state_dict(back)
    optimizer.step()


class Labelled(torch.Tensor):
    pass


def vmapped() -> Any:
    caught: list[Any] = []

    def inner(tensor: Any) -> Any:
        with pytest.raises(UnsupportedValueError) as refusal:
            payloads.plan(tensor, limit=LIMIT)
        caught.append(refusal.value)
        return tensor

    torch.func.vmap(inner)(torch.ones(2, 2))
    return caught[0]


def quiet(make: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


REFUSED = [
    (lambda: torch.eye(3).to_sparse(), "layout torch.sparse_coo", "to_dense"),
    (lambda: torch.eye(3).to_sparse_csr(), "layout torch.sparse_csr", "to_dense"),
    (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "quint8|quantised", "view|int_repr"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "nested", "unbind"),
    (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "Nested", "unbind"),
    (lambda: torch.ones(3, device="meta"), "meta tensor", "has data"),
    (lambda: torch.ones(3).as_subclass(Labelled), "Labelled", "plain tensor"),
    (lambda: torch.nn.parameter.UninitializedParameter(), "Uninitialized", "first forward"),
    (lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2), "float4_e2m1fn_x2", "whole-byte"),
    (lambda: torch.ones((1,) * 17), "17 dimensions", "16 or fewer"),
    (lambda: torch.Size([1]), "Size", "tuple"),
    (lambda: torch.float32, "dtype", "str"),
    (lambda: torch.nn.Linear(1, 1), "Linear", "send tensors"),
    (lambda: torch.Generator(), "Generator", "send tensors"),
]


@pytest.mark.parametrize(("make", "kind", "advice"), REFUSED, ids=[row[1] for row in REFUSED])
def test_other_tensors_are_refused_by_name_with_advice(make: Any, kind: str, advice: str) -> None:
    value = quiet(make)
    for sent, where in ((value, "value"), ({"w": value}, "value['w']")):
        with pytest.raises(UnsupportedValueError, match=kind) as caught:
            quiet(lambda sent=sent: payloads.plan(sent, limit=LIMIT))
        assert caught.value.where == where  # type: ignore[attr-defined]
        assert any(word in caught.value.detail for word in advice.split("|"))


def test_a_tensor_within_a_transformation_is_refused() -> None:
    assert "without storage" in str(vmapped())


def test_a_fake_tensor_is_refused() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        value = torch.ones(3)
    with pytest.raises(UnsupportedValueError, match=r"FakeTensor.*real tensors"):
        payloads.plan(value, limit=LIMIT)


def test_a_dtype_that_this_torch_lacks_is_a_schema_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, blob = blob_of(torch.ones(2, dtype=torch.bfloat16))
    monkeypatch.delitem(payloads.decoders.tensors()._TORCH_DTYPES, 13)
    with pytest.raises(SchemaError, match="this torch has no bfloat16"):
        payloads.decode(kind, blob)


def test_without_torch_a_tensor_is_a_schema_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    kind, blob = blob_of(torch.ones(2))
    monkeypatch.setattr(payloads.decoders, "_torch_side", None)
    monkeypatch.setattr(payloads.decoders, "import_module", missing)
    with pytest.raises(SchemaError, match="torch is not installed"):
        payloads.decode(kind, blob)


def test_a_default_device_does_not_move_what_is_decoded() -> None:
    with torch.device("meta"):
        for ownership in ("view", "own"):
            back = through(torch.ones(3, device="cpu"), ownership)
            assert back.device.type == "cpu"
            assert through(torch.ones(3, 2, device="cpu").t()).tolist() == [[1.0] * 3] * 2
