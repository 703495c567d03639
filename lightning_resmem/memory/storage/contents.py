"""Whether the rows of a saved memory can be: a checksum only says that they are what was written."""

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_resmem.errors import StorageError
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.tasks import Multiclass, Multilabel, Task

# Entries that are looked at at a time: so few that torch does not share them among threads, which costs more here.
_ENTRIES = 2**15


def check_contents(path: str | os.PathLike[str], task: Task, values: Values, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for rows that no memory holds.

    Args:
        path: Of the memory, for messages.
        task: Says what a target is.
        values: Of the memory's kind and width.
        tensors: Of its rows, by name; shapes were checked.

    Raises:
        StorageError: If ids are not ascending from 0, a label is no class, or a number is none.
    """
    last = -1
    for ids in _blocks(tensors["ids"]):
        if int(ids[0]) <= last or not bool((ids[1:] > ids[:-1]).all()):
            raise _impossible(path, "ids are negative or not ascending")
        last = int(ids[-1])
    labels = values.labels if isinstance(task, Multiclass) else ()
    for label in labels:
        lowest, highest = _range(tensors[label])
        if lowest < 0 or highest >= values.num_outputs:
            bad = int(lowest if lowest < 0 else highest)
            raise _impossible(path, f"values.num_outputs is {values.num_outputs}, the files hold class {bad} ({label})")
    if "times" in tensors and any(bool(block.isnan().any()) for block in _blocks(tensors["times"])):
        raise _impossible(path, "times holds NaN")
    for name in ("keys", *values.names):
        if name in labels:
            continue
        if name == "targets" and isinstance(task, Multilabel):
            lowest, highest = _range(tensors[name])
            if not (lowest >= 0 and highest <= 1):
                raise _impossible(path, f"targets are between {lowest} and {highest}, not within [0, 1]")
        elif name == "log_tail":  # of a row that keeps all its probabilities it is -inf
            if not _range(tensors[name])[1] < torch.inf:
                raise _impossible(path, f"{name} holds NaN or infinite entries")
        elif not _is_finite(tensors[name]):
            raise _impossible(path, f"{name} holds NaN or infinite entries")


def _impossible(path: str | os.PathLike[str], problem: str) -> StorageError:
    return StorageError(f"{os.fspath(path)} is damaged: {problem}. Restore it from a backup, or memorize again.")


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    yield from tensor.split(max(1, _ENTRIES // max(1, tensor[:1].numel())))


def _range(tensor: Tensor) -> tuple[float, float]:
    """The smallest and the largest entry; NaN, if one is."""
    ends = [torch.stack(block.aminmax()).double() for block in _blocks(tensor)]
    lowest, highest = torch.stack(ends).unbind(dim=1)
    return float(lowest.amin()), float(highest.amax())


def _is_finite(tensor: Tensor) -> bool:
    # The sum is finite almost always, and one reduction is much cheaper than a mask of the tensor.
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or all(bool(block.isfinite().all()) for block in _blocks(tensor))
