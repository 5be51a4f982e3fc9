"""Torch tensors: the only file here that touches torch, and it is imported only after the program imported torch.

**Views.** A decoded tensor is an inference tensor over read-only memory, made through DLPack, which passes numpy's
read-only arrays on without a warning (`torch.frombuffer` and `torch.from_numpy` warn). That alone protects nothing:
torch writes first and refuses an in-place operation on an inference tensor afterwards, which in a read-only mapping is
SIGSEGV (seen with torch 2.13). The storage is therefore told to refuse every mutable access to its data, as fake
tensors do: in-place operations raise `RuntimeError` before they write, also through `detach()`, `data`, views and
within `inference_mode()`; so does what hands out a writable address: `numpy()`, `data_ptr()`, `from_dlpack`,
`torch.save`. Being an inference tensor it cannot be saved for backward. Everything that only reads works. `own()`
gives an ordinary tensor. A torch without that switch gets a copy.

**Snapshots from a device.** The copy to the host must read what the caller's stream computed before the publish, and
nothing that it computes after. The tensor is therefore copied on the device first, on the caller's current stream: it
is ordered between the two, costs a few microseconds at the memory's own rate, and the transfer to the host, a hundred
times slower, runs on a side stream beside the training. To let the caller's stream wait for the transfer instead
would take no memory but put the slow link into the training step; that is done only for tensors too large to
duplicate.
"""

from __future__ import annotations

import time
from typing import Any, Final

import numpy as np
import torch

from fabric.errors import SchemaError, UnsupportedValueError
from fabric.payloads.plans import ArraySource, Leaf, Source, register_leaf
from fabric.payloads.schema import DTYPES, TENSOR, Dtype, overlaps
from fabric.payloads.staging import DeviceQueue, Pending, StagingError, wait_until

_TORCH_DTYPES: Final[dict[int, torch.dtype]] = {
    code: getattr(torch, row.name) for code, row in DTYPES.items() if hasattr(torch, row.name)
}
_CODES: Final[dict[torch.dtype, int]] = {dtype: code for code, dtype in _TORCH_DTYPES.items()}
_CARRIERS: Final[dict[torch.dtype, torch.dtype]] = {
    _TORCH_DTYPES[code]: getattr(torch, row.carrier.name)
    for code, row in DTYPES.items()
    if not row.native and code in _TORCH_DTYPES
}
_refuse_writes: Final = getattr(torch._C, "_set_throw_on_mutable_data_ptr", None)
_DEVICES: Final = frozenset(("cuda",))


class TensorSource(Source):
    """A tensor that numpy cannot reach as it is: strided, conjugated, negated, or on a device."""

    __slots__ = ("tensor",)

    def __init__(self, code: int, tensor: torch.Tensor) -> None:
        self.code, self.tensor, self.shape = code, tensor, tuple(tensor.shape)
        self.nbytes = tensor.numel() * tensor.itemsize

    def write(self, target: memoryview, offset: int) -> None:
        """Copy straight into the target; torch resolves strides, conjugation and devices on the way."""
        if self.nbytes == 0:
            return
        elements = np.ndarray(self.shape, DTYPES[self.code].carrier, target, offset)
        if elements.flags.aligned:
            _over(elements, self.code).copy_(self.tensor)
        else:
            room = torch.empty(self.shape, dtype=self.tensor.dtype, device="cpu").copy_(self.tensor)
            np.copyto(elements, _carried(room))


class CudaSource(TensorSource):
    """A tensor on a CUDA device."""

    __slots__ = ()

    on_device = True

    def start(self, target: memoryview, offset: int, queue: DeviceQueue) -> Pending | None:
        """Start the copy through `queue`."""
        if self.nbytes == 0:
            return None
        return queue.copy(self.tensor, target[offset : offset + self.nbytes])


def _over(elements: np.ndarray[Any, Any], code: int) -> torch.Tensor:
    """An ordinary tensor over writable memory."""
    tensor = torch.from_numpy(elements)
    return tensor if DTYPES[code].native else tensor.view(_TORCH_DTYPES[code])


def _carried(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    carrier = _CARRIERS.get(tensor.dtype)
    array: np.ndarray[Any, Any] = (tensor if carrier is None else tensor.view(carrier)).numpy()
    return array


def _source(tensor: torch.Tensor, where: str) -> Source:
    code = _CODES.get(tensor.dtype)
    if code is None:
        _refuse(tensor, where)
        raise AssertionError  # pragma: no cover - _refuse always raises here
    # Fast path: numpy refuses everything that is not plain memory.
    try:
        if tensor.requires_grad:
            tensor = tensor.detach()
        array = _carried(tensor)
    except (RuntimeError, TypeError):
        return _general_source(code, tensor, where)
    if array.flags.c_contiguous:
        return ArraySource(code, array)
    return TensorSource(code, tensor)


def _general_source(code: int, tensor: torch.Tensor, where: str) -> Source:
    _refuse(tensor, where)
    with torch.no_grad():
        tensor = tensor.detach()
        if tensor.device.type in _DEVICES:
            return CudaSource(code, tensor)
        if tensor.device.type != "cpu":
            tensor = tensor.cpu()
        if tensor.dtype == torch.complex32 and tensor.is_conj():
            tensor = _conjugated(tensor)
        try:
            tensor.untyped_storage()  # raises for wrappers without storage
            return TensorSource(code, tensor)
        except (NotImplementedError, RuntimeError) as error:
            raise UnsupportedValueError(
                "send tensors with memory of their own, outside torch.func and compilation",
                kind="tensor without storage",
                where=where,
            ) from error


def _conjugated(tensor: torch.Tensor) -> torch.Tensor:
    """Conjugate half complex numbers by hand: torch has few operators for them, and warns of those."""
    parts = torch.view_as_real(tensor.conj()).clone(memory_format=torch.contiguous_format)
    parts[..., 1].neg_()
    return parts.view(torch.int32).reshape(tensor.shape).view(torch.complex32)


_LAYOUT_ADVICE: Final = "send value.to_dense(), or a dict of its indices and values"


def _refuse(tensor: torch.Tensor, where: str) -> None:
    """Raise `UnsupportedValueError` for tensors that are not plain memory of a known dtype."""
    refused = (
        (tensor.is_nested, "nested tensor", "send a list of value.unbind()"),
        (tensor.layout is not torch.strided, f"tensor of layout {tensor.layout}", _LAYOUT_ADVICE),
        (tensor.is_quantized, "quantised tensor", "send value.int_repr() with its scale and zero point"),
        (tensor.is_meta, "meta tensor", "send a tensor that has data"),
        (tensor.dtype not in _CODES, f"tensor of dtype {tensor.dtype}", "send a view of a whole-byte dtype"),
    )
    for applies, kind, advice in refused:
        if applies:
            raise UnsupportedValueError(advice, kind=kind, where=where)


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are one and the same: memory, type, shape, strides, and the lazy bits."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.device.type == "meta":
        return id(tensor)
    address: object
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # a view of ours, which hands out no address
        address = tensor.untyped_storage()._cdata, tensor.storage_offset()
    bits = tensor.is_conj(), tensor.is_neg()
    return TENSOR, tensor.device, address, tensor.dtype, tensor.shape, tensor.stride(), bits


def decode_tensor(array: np.ndarray[Any, Any], dtype: Dtype, *, own: bool) -> torch.Tensor:
    """The tensor over a decoded array of its carrier dtype: ordinary over `own` memory, otherwise for reading only."""
    target = _TORCH_DTYPES.get(dtype.code)
    if target is None:
        raise SchemaError(f"this torch has no {dtype.name}")
    if own:
        with torch.inference_mode(False):
            return _over(array, dtype.code)
    with torch.inference_mode():
        if _refuse_writes is None:
            return _over(array.copy(), dtype.code)
        try:
            tensor = torch.from_dlpack(array)
        except BufferError:  # torch or numpy from before DLPack could say that memory is read-only
            tensor = torch.from_numpy(np.asarray(_Alias(array)))
        _refuse_writes(tensor)
        return tensor if dtype.native else tensor.view(target)


class _Alias:
    """Read-only memory that says it is writable, for the one who makes an inference tensor of it."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        face = dict(array.__array_interface__)
        face["data"] = face["data"][0], False
        self.array, self.__array_interface__ = array, face


def own_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor with memory of its own, on the same device, without gradient."""
    with torch.inference_mode(False), torch.no_grad():
        if tensor.dtype in _CARRIERS:
            return tensor.detach().view(_CARRIERS[tensor.dtype]).clone().view(tensor.dtype)
        return tensor.detach().clone()


def dtype_code(dtype: torch.dtype, where: str) -> int:
    """The dtype code of a torch dtype. Raises `UnsupportedValueError`."""
    code = _CODES.get(dtype)
    if code is None:
        raise UnsupportedValueError("use a whole-byte dtype", kind=f"tensor of dtype {dtype}", where=where)
    return code


def lend_tensor(array: np.ndarray[Any, Any], code: int) -> torch.Tensor:
    """An ordinary tensor over an array of its carrier dtype, which refers to nothing but the tensor's memory."""
    with torch.inference_mode(False):
        return _over(array, code)


def empty_tensor(tensor: torch.Tensor) -> None:
    """Leave a tensor without memory, whatever became of it in autograd."""
    with torch.inference_mode(False), torch.no_grad():
        tensor.set_()  # type: ignore[call-overload]


def check_room(into: object, view: torch.Tensor, where: str) -> None:
    """Check that the decoded `view` can be copied into `into`, without a write.

    Raises `SchemaError` when type, dtype or shape differ, `UnsupportedValueError` when the tensor cannot be written.
    """
    if not isinstance(into, torch.Tensor):
        raise SchemaError(f"{where} is of type {type(into).__qualname__}, the payload is a torch tensor")
    if into.dtype != view.dtype or into.shape != view.shape:
        raise SchemaError(
            f"{where} is {into.dtype} of shape {tuple(into.shape)}, the payload {view.dtype} of {tuple(view.shape)}"
        )
    _refuse(into, where)
    if into.is_inference() and not torch.is_inference_mode_enabled():
        raise UnsupportedValueError("receive into an ordinary tensor", kind="inference tensor", where=where)
    if overlaps(tuple(into.shape), into.stride()):
        raise UnsupportedValueError("receive into its contiguous form", kind="expanded tensor", where=where)


def fill(into: torch.Tensor, view: torch.Tensor) -> None:
    """Copy a decoded tensor into a checked one, on whatever device."""
    with torch.no_grad():
        into.detach().copy_(view)


def place(tensor: torch.Tensor) -> object:
    """Where a tensor lies: equal for tensors that would be written twice."""
    try:
        return tensor.device, tensor.data_ptr()
    except RuntimeError as error:
        raise UnsupportedValueError("receive into an ordinary tensor", kind="read-only view", where="into") from error


def allocate_pinned(size: int) -> np.ndarray[Any, Any]:
    """Page-locked host memory of `size` bytes, which a device reads and writes on its own."""
    room: np.ndarray[Any, Any] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return room


class _CudaPending:
    """One transfer to the host: an event on the side stream. Holds source and target until it is over."""

    __slots__ = ("_done", "_held")

    def __init__(self, done: torch.cuda.Event, held: tuple[torch.Tensor, ...]) -> None:
        self._done, self._held = done, held

    def poll(self) -> bool:
        try:
            finished: bool = self._done.query()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise StagingError(f"the copy from the device failed: {error}") from error
        if finished:
            self._held = ()
        return finished

    def wait(self, *, timeout_s: float = 30.0) -> None:
        wait_until(self.poll, timeout_s, clock=time.monotonic)


class CudaQueue:
    """Copies from CUDA devices to pinned host memory on one side stream per device; see the top of this file.

    `duplicate_bytes_max`: tensors up to this size are copied on the device first; larger ones, and those for which the
    device has no memory, make the caller's stream wait (counted in `waited`).
    """

    def __init__(self, *, duplicate_bytes_max: int = 256 * 1024 * 1024) -> None:
        self._duplicate_bytes_max = duplicate_bytes_max
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.duplicated = 0
        self.waited = 0

    def copy(self, tensor: torch.Tensor, target: memoryview) -> Pending:
        """Start the copy of `tensor`, in C order, into `target`; ordered after the caller's work so far.

        Raises `StagingError` when it cannot be started, and during the capture of a CUDA graph, which would replay it.
        """
        try:
            if torch.cuda.is_current_stream_capturing():
                raise StagingError("publish outside the capture of a CUDA graph")
            return self._copy(tensor.detach(), target)
        except RuntimeError as error:
            raise StagingError(f"the copy from the device could not start: {error}") from error

    def _copy(self, tensor: torch.Tensor, target: memoryview) -> Pending:
        device, code = tensor.device, _CODES[tensor.dtype]
        host = _over(np.ndarray(tuple(tensor.shape), DTYPES[code].carrier, target), code)
        current = torch.cuda.current_stream(device)
        side = self._streams.get(device)
        if side is None:
            side = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            source = self._duplicate(tensor)
            side.wait_event(current.record_event())
            with torch.cuda.stream(side):
                host.copy_(source, non_blocking=True)
                done = side.record_event()
        source.record_stream(side)
        if source is tensor:
            current.wait_event(done)
        return _CudaPending(done, (source, host))

    def _duplicate(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device and on the caller's stream, or the tensor itself where that is too much."""
        if tensor.nbytes <= self._duplicate_bytes_max:
            try:
                twin = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
            except torch.cuda.OutOfMemoryError:
                pass
            else:
                self.duplicated += 1
                return twin
        self.waited += 1
        return tensor


for _class in (torch.Tensor, torch.nn.Parameter):
    register_leaf(_class, Leaf(TENSOR, _source, _identity))
