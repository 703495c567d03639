"""What tensors are made while something runs: how much it holds at once."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Made(TorchDispatchMode):
    """Notes how many elements of four bytes each tensor has that an operation returns; views and repeats are none.

    Attributes:
        elements: Ascending.
    """

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, torch.UntypedStorage] = {}  # kept: what is freed would give its address to the next

    @property
    def elements(self) -> list[int]:
        return sorted(storage.nbytes() // 4 for storage in self._held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id_of(tensor) for tensor in args if isinstance(tensor, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and id_of(tensor) not in given:
                self._held[id_of(tensor)] = tensor.untyped_storage()
        return result


def id_of(tensor: torch.Tensor) -> int:
    """What a tensor and its views have in common."""
    return tensor.untyped_storage().data_ptr()
