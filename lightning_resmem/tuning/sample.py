"""The tuning rows that a sweep is computed on: as many as its columns leave time for."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_resmem.memory.answers import evenly_spaced
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.single_rows import fetch_neighbors
from lightning_resmem.memory.values.sparse import SparseValues

# Rows x columns of all ranks that are computed for every setting: a minute of one core for a thousand settings.
ENTRIES = 2**22
# The same of a GPU.
_GPU_ENTRIES = 2**26
# Multiples of it, less their whole parts, are spread evenly over [0, 1).
_GOLDEN = (5**0.5 - 1) / 2
# Rows whose neighbours' classes are counted.
_PROBED = 64


def sampled(keys: Tensor, columns: int, gather: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Which rows of this rank are computed on, a mask `(V,)`; None for all.

    They are evenly spaced in the order of their keys, over all ranks: the same ones for any number of these, but for
    rows with equal keys, of which as large a share is kept as of others.

    Args:
        keys: Of the rows, shape `(V,)`.
        columns: Of the rows, over all ranks.
        gather: Concatenates a tensor `(n, ...)` over all ranks.
    """
    device = keys.device
    keys = keys.nan_to_num(nan=torch.inf).cpu()
    all_keys = gather(keys).cpu()
    most = max(1, (_GPU_ENTRIES if device.type == "cuda" else ENTRIES) // columns)
    if len(all_keys) <= most:
        return None
    distinct, counts = all_keys.unique(return_counts=True)
    chosen = torch.searchsorted(distinct, evenly_spaced(all_keys.sort().values, most))
    share = chosen.bincount(minlength=len(distinct)) / counts
    turns = torch.arange(len(keys), dtype=torch.float64) * _GOLDEN % 1  # evenly spread, whichever rows are looked at
    kept: Tensor = turns < share[torch.searchsorted(distinct, keys)]
    return kept.to(device)


def count_columns(memory: ResidualMemory, ids: Tensor, num_outputs: int, gather: Callable[[Tensor], Tensor]) -> int:
    """How many columns a sweep has about: classes that neighbours tell something of, where their outputs are cut.

    Args:
        memory: Filled.
        ids: Of the neighbours of this rank's rows, shape `(V, k)`.
        num_outputs: `C`.
        gather: As for `sampled`.
    """
    told = 0
    if len(ids):
        values, positions = fetch_neighbors(memory, evenly_spaced(ids, min(len(ids), _PROBED)))
        told = num_outputs
        if isinstance(values, SparseValues) and values.is_cut and len(values):
            near = positions.clamp_min(0)
            classes = torch.cat([values.classes[near].long().flatten(1), values.targets[near]], dim=1)
            told = max(len(row.unique()) for row in classes)
    return max(1, int(gather(torch.tensor([told])).max()))
