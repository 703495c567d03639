"""True distances of the candidates that a search has found."""

import math

import torch
from torch import Tensor

from lightning_resmem.functional import ascending

# Numbers of candidates that are measured at once: what stays in a core's cache, and what keeps a GPU busy.
_CPU_MEASURED, _GPU_MEASURED = 2**20, 2**24
# Keys that are looked at together.
_CHUNK = 65536
# Distances below this may have lost digits, or all of them, when their squares were added up.
_LEAST = 1e-13
_MOST = torch.finfo(torch.float32).max
# Distances from here on may be more than float32 holds: also those of a query that is not finite.
FARTHEST = 2.0**127


def on_cpu(rows: Tensor) -> bool:
    """Whether to take the way of a CPU."""
    return rows.device.type == "cpu"


def measure(keys: Tensor, queries: Tensor, positions: Tensor, in_order: bool = False) -> tuple[Tensor, Tensor]:
    """True distances of candidates, by direct differences, of whatever magnitude.

    Args:
        keys: Shape `(N, D)`.
        queries: Shape `(b, D)`, float32.
        positions: Shape `(b, n)`, int64; -1 is missing.
        in_order: Whether those of a query are ascending already, missing ones last.

    Returns:
        Distances and positions, both `(b, n)`, sorted by distance and then by position, missing ones last. A distance
        that float32 cannot hold is its largest number: infinity would mean that the place is missing.
    """
    if not in_order:
        positions = positions.sort(dim=1).values
    candidates, width = positions.shape[1], keys.shape[1]
    is_on_cpu = on_cpu(keys)
    rows = max(1, (_CPU_MEASURED if is_on_cpu else _GPU_MEASURED) // max(1, candidates * width))
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
        measured = distances[first : first + rows]
        if is_on_cpu:
            torch.linalg.vector_norm(wide, dim=2, out=measured)
        else:  # of all, as to find the few that need it takes longer there: it is waited for
            measured.copy_(_lengths(wide))
    if is_on_cpu:
        _measure_doubtful(keys, queries, positions, distances)
    distances, order = ascending(distances.masked_fill_(positions < 0, torch.inf))
    return distances, positions.gather(1, order)


def _measure_doubtful(keys: Tensor, queries: Tensor, positions: Tensor, distances: Tensor) -> None:
    """Measure again, where squares may have overflowed or vanished; as for `measure`, writes into `distances`."""
    if are_certain(distances):
        return
    doubtful = _are_doubtful(distances) & (positions >= 0)
    for part in doubtful.nonzero().split(max(1, _CPU_MEASURED // keys.shape[1])):
        row, place = part.unbind(dim=1)
        apart = keys.index_select(0, positions[row, place]).float() - queries.index_select(0, row)
        distances[row, place] = _lengths(apart).float()


def are_certain(distances: Tensor) -> bool:
    """Whether no distance may have lost digits when squares were added up, or be more than float32 holds."""
    if not distances.numel():
        return True
    least, most = distances.aminmax()
    return least.item() >= _LEAST and most.item() < math.inf


def _are_doubtful(distances: Tensor) -> Tensor:
    return ~((distances >= _LEAST) & (distances < torch.inf))


def _lengths(rows: Tensor) -> Tensor:
    """Of rows `(..., D)` in float32, whose squares may overflow or vanish in it: shape `(...)`, at most its largest."""
    lengths: Tensor
    if rows.device.type in ("cpu", "cuda"):
        lengths = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64)
        return lengths.clamp_max_(_MOST)
    rows = rows.clamp(-_MOST, _MOST)  # there may be no float64
    largest = rows.abs().amax(dim=-1, keepdim=True)
    lengths = torch.linalg.vector_norm(rows / largest.where(largest > 0, 1), dim=-1)
    return lengths.mul_(largest.squeeze(-1)).clamp_max_(_MOST)


def largest_number(keys: Tensor) -> float:
    """The largest absolute value in keys `(N, D)`."""
    ends = [torch.stack(torch.aminmax(chunk)) for chunk in keys.split(_CHUNK)]
    return float(torch.stack(ends).abs().max())
