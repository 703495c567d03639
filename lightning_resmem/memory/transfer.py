"""Tensors on their way between devices: each copy from a GPU waits for it, so few are made."""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")
# Bytes up to which a copy from a GPU goes to page-locked memory, which is faster; torch keeps such memory for good.
_PINNED_BYTES = 2**24


def moved(device: torch.device, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors on a device; several that come from one other device travel as one copy.

    Args:
        device: Where to; tensors that are there are returned as they are.
        *tensors: Of any shapes and dtypes.

    Examples:
        >>> moved(torch.device("cpu"), torch.tensor([1.5]), torch.tensor([[7]]))
        (tensor([1.5000]), tensor([[7]]))
    """
    if all(tensor.device == device for tensor in tensors):
        return tensors
    if len(tensors) == 1 or len({tensor.device for tensor in tensors}) > 1:
        return tuple(_copied(tensor, device) for tensor in tensors)
    # Wide dtypes first, so that each begins at a multiple of its size.
    order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())
    joined = torch.cat([tensors[place].contiguous().view(-1).view(torch.uint8) for place in order])
    parts = _copied(joined, device).split([tensors[place].nbytes for place in order])
    found = {place: part.view(tensors[place].dtype) for place, part in zip(order, parts, strict=True)}
    return tuple(found[place].view(tensor.shape) for place, tensor in enumerate(tensors))


def beside(like: Tensor, numbers: Sequence[float]) -> Tensor:
    """Numbers `(n,)` in the dtype and on the device of a tensor, for which nobody waits.

    Examples:
        >>> beside(torch.zeros(3, dtype=torch.float64), [0.5, 2.0])
        tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    made = torch.tensor(numbers, dtype=like.dtype, device=CPU)
    return (made.pin_memory() if like.is_cuda else made).to(like.device, non_blocking=True)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    if not (tensor.is_cuda and device == CPU and 0 < tensor.nbytes <= _PINNED_BYTES):
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU, pin_memory=True)
    pinned.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return pinned
