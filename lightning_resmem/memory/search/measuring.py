"""True distances of the candidates that a search has found."""

import torch
from torch import Tensor

from lightning_resmem.functional import ascending

# Numbers of candidates that are measured at once: what stays in a core's cache, and what keeps a GPU busy.
_CPU_MEASURED, _GPU_MEASURED = 2**20, 2**26


def measure(keys: Tensor, queries: Tensor, positions: Tensor, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """True distances of candidates, by direct differences.

    Args:
        keys: Shape `(N, D)`.
        queries: Shape `(b, D)`, float32.
        positions: Shape `(b, n)`, int64; -1 is missing.
        in_order: Whether those of a query are ascending already, missing ones last.

    Returns:
        Distances and positions, both `(b, n)`, sorted by distance and then by position, missing ones last.
    """
    if not in_order:
        positions = positions.sort(dim=1).values
    candidates, width = positions.shape[1], keys.shape[1]
    rows = max(1, (_CPU_MEASURED if keys.device.type == "cpu" else _GPU_MEASURED) // max(1, candidates * width))
    rows = min(rows, len(queries))
    # Into the same memory again and again: fresh memory takes several times as long as the rest.
    gathered = keys.new_empty(rows * candidates, width)
    differences = gathered if keys.dtype == torch.float32 else gathered.float()
    distances = queries.new_empty(len(queries), candidates)
    for first in range(0, len(queries), rows):
        block = positions[first : first + rows]
        part, wide = gathered[: block.numel()], differences[: block.numel()]
        torch.index_select(keys, 0, block.clamp_min(0).flatten(), out=part)  # ten times faster than keys[positions]
        if keys.dtype != torch.float32:
            wide.copy_(part)
        wide = wide.view(*block.shape, width).sub_(queries[first : first + rows, None])
        torch.linalg.vector_norm(wide, dim=2, out=distances[first : first + rows])
    distances, order = ascending(distances.masked_fill_(positions < 0, torch.inf))
    return distances, positions.gather(1, order)
