"""What a memory answers, and what follows from the neighbours that it finds."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.functional import combine
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task

# Rows on which the distance scale of a memory is measured when no params were given.
_SCALE_ROWS = 512


class Neighbors(NamedTuple):
    """The nearest rows of each query, ascending by distance.

    Attributes:
        distances: Euclidean, shape `(B, k)`, float32; `inf` where the memory has fewer than `k` rows.
        ids: Shape `(B, k)`, int64; -1 where the memory has fewer than `k` rows.
    """

    distances: Tensor
    ids: Tensor


class Predictions(NamedTuple):
    """The three predictions that are always reported side by side, each of shape `(B, C)`."""

    base: Tensor
    knn: Tensor
    resmem: Tensor


def combined(
    task: Task, params: ResMemParams, outputs: Tensor, neighbors: Neighbors, sums: tuple[Tensor, Tensor]
) -> Predictions:
    """Base, knn and combined prediction.

    Args:
        task: What is predicted.
        params: How the memory is read.
        outputs: What the head returned for the queries, shape `(B, C)`.
        neighbors: Of the queries.
        sums: Over the neighbours: the residual sum and the label average, both `(B, C)`.

    Raises:
        InputError: If the outputs have another width than the sums.
    """
    base, (residual, labels) = task.predict(outputs, params.softmax_temperature), sums
    if base.shape != residual.shape:
        raise InputError(f"outputs has {base.shape[1]} columns, the memory was filled with {residual.shape[1]}.")
    strengths = params.strengths(task, base, neighbors.distances[:, 0].to(base.device))
    return Predictions(base, labels, combine(base, residual.to(base.device), strengths))


def evenly_spaced(ids: Tensor, count: int = _SCALE_ROWS) -> Tensor:
    """Up to `count` of all ids `(N,)`, from the first to the last."""
    count = min(len(ids), count)
    # Whole numbers: float32 counts only to 2**24.
    places = torch.arange(count, dtype=torch.int64, device=ids.device) * (len(ids) - 1) // max(1, count - 1)
    return ids[places]


def typical_distance(ids: Tensor, neighbors: Neighbors) -> float:
    """The median over rows of the mean distance to their nearest other rows; 1.0 where there is none, or it is 0.

    Args:
        ids: Of the rows, shape `(n,)`.
        neighbors: Of the rows, themselves among them.
    """
    others = torch.isfinite(neighbors.distances) & (neighbors.ids != ids[:, None].to(neighbors.ids.device))
    count = others.sum(dim=1)
    # Divided first: the sum could be more than float32 can hold.
    means = (neighbors.distances.where(others, 0) / count.clamp_min(1)[:, None]).sum(dim=1)[count > 0]
    scale = means.median().item() if len(means) else 0.0
    return scale or 1.0
