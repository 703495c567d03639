"""A second device for tests on a CPU: tensors that torch takes for those of another device, and that do hold numbers.

They say that they are on `meta`, the only device beside the CPU that every build of torch can index and cast on. What a
GPU refuses is refused (operations on tensors of two devices, `.numpy()`), and what makes the host wait for a GPU is
noted: numbers that are read, sizes that depend on numbers, copies from and to the device.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("meta")
_PACKAGE = Path(__file__).parents[1] / "lightning_resmem"
_aten = torch.ops.aten

# The shape of what these return depends on numbers, so that the host reads some: all but the first are documented to.
_SIZED = {
    _aten.bincount.default: "bincount",
    _aten.equal.default: "equal",
    _aten.masked_select.default: "masked_select",
    _aten.nonzero.default: "nonzero",
    _aten._unique2.default: "unique",
    _aten.repeat_interleave.Tensor: "repeat_interleave",
    _aten.unique_consecutive.default: "unique_consecutive",
    _aten.unique_dim.default: "unique",
}
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor)
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


class OnGpu(Tensor):
    """A tensor of the simulated GPU; its numbers are in `held`."""

    held: Tensor
    is_meta = False

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGpu":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
            requires_grad=held.requires_grad,
        )
        tensor.held = held
        return tensor

    def __repr__(self) -> str:
        return f"OnGpu({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor of the simulated GPU to numpy: use Tensor.cpu() first.")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _check_one_device(func, args, kwargs)
        on_cpu = {**kwargs, "device": torch.device("cpu")} if "device" in kwargs else kwargs
        found = func(*_held(args), **_held(on_cpu))
        to_host = func is _aten._to_copy.default and kwargs.get("device", DEVICE) != DEVICE
        if to_host or (func is _aten.copy_.default and not isinstance(args[0], OnGpu)):
            return found
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, _on_gpu, found))


class SimulatedGpu(TorchDispatchMode):
    """While it is entered, tensors made on `DEVICE` hold numbers, and `waits` says what a host would have waited for.

    Attributes:
        waits: One line for each: what it was, and the line of the package that asked for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._ignored = 0

    @contextmanager
    def ignoring(self) -> Iterator[None]:
        """Note nothing for a while."""
        self._ignored += 1
        try:
            yield
        finally:
            self._ignored -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        device = kwargs.get("device")
        to_gpu = device is not None and device.type == DEVICE.type
        if any(isinstance(tensor, OnGpu) for tensor in tensors):
            what = _wait(func, tensors, device)
        else:
            what = "copy to the GPU" if to_gpu and func in _COPIES and not kwargs.get("non_blocking") else None
        if what is not None and not self._ignored:
            self.waits.append(f"{what} at {_asked()}")
        if to_gpu and not any(isinstance(tensor, OnGpu) for tensor in tensors):
            return tree_map_only(Tensor, _on_gpu, func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


@contextmanager
def simulated_gpu() -> Iterator[SimulatedGpu]:
    """A second device for a while."""
    autocast = torch.autocast

    def without_gpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if device_type == DEVICE.type else autocast(device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, SimulatedGpu() as gpu:
        patch.setattr(torch, "autocast", without_gpu)  # which knows no numbers on `meta`
        yield gpu


def _held(values: Any) -> Any:
    return tree_map_only(OnGpu, lambda tensor: tensor.held, values)


def _on_gpu(tensor: Tensor) -> OnGpu:
    return tensor if isinstance(tensor, OnGpu) else OnGpu(tensor)


def _check_one_device(func: Any, args: Any, kwargs: Any) -> None:
    """A GPU takes single numbers from the CPU, and copies what is an index; nothing else."""
    if func in _COPIES or func in _INDEXING:
        return
    flat, _ = tree_flatten((args, kwargs))
    if any(isinstance(value, Tensor) and not isinstance(value, OnGpu) and value.ndim for value in flat):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found {DEVICE} and cpu.")


def _wait(func: Any, tensors: list[Tensor], device: torch.device | None) -> str | None:
    """What the host waits for in an operation on tensors of which some are on the GPU."""
    if func is _aten._local_scalar_dense.default:
        return "a number is read"
    if func in _SIZED:
        return _SIZED[func]
    if func is _aten._to_copy.default and device is not None and device.type != DEVICE.type:
        return "copy from the GPU"
    if func is _aten.copy_.default and len({isinstance(tensor, OnGpu) for tensor in tensors}) > 1:
        return "copy between devices"
    if func in _INDEXING:
        if any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            return "a mask as an index"
        if any(not isinstance(tensor, OnGpu) and tensor.ndim for tensor in tensors[1:]):
            return "copy of an index to the GPU"
    return None


def _asked() -> str:
    """The innermost line of the package that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        if Path(frame.filename).is_relative_to(_PACKAGE):
            return f"{Path(frame.filename).relative_to(_PACKAGE)}:{frame.lineno} {frame.line}"
    return "a line of no package of ours"
