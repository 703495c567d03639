"""Exact search for few queries on a CPU, by NumPy: an operation of torch takes longer there than its numbers."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_resmem.memory.search.measuring import are_certain, measure

Array = npt.NDArray[Any]

# The smallest score of every group of this many keys decides whether the group is looked at.
GROUP = 32


def nearest(keys: Tensor, queries: Tensor, scores: Tensor, wanted: int) -> tuple[Tensor, Tensor, Tensor]:
    """The keys with the smallest scores, measured.

    Args:
        keys: Shape `(N, D)`, float32, on the CPU, as all others.
        queries: Shape `(b, D)`, float32.
        scores: Shape `(b, N)`.
        wanted: How many, at most N.

    Returns:
        Distances and positions `(b, wanted)`, as `measure` returns them, and the largest of their scores `(b,)`.

    Examples:
        >>> keys = torch.tensor([[1.0], [3.0], [2.0]])
        >>> nearest(keys, torch.zeros(1, 1), keys.T.square(), 2)
        (tensor([[1., 2.]]), tensor([[0, 2]]), tensor([4.]))
    """
    rows, each = scores.numpy(), np.arange(len(scores))[:, None]
    positions = np.stack([_smallest(row, wanted) for row in rows])
    positions.sort(axis=1)
    worst = torch.from_numpy(rows[each, positions].max(axis=1))
    apart = keys.numpy()[positions] - queries.numpy()[:, None]
    distances = torch.linalg.vector_norm(torch.from_numpy(apart), dim=2)
    if not are_certain(distances):
        return *measure(keys, queries, torch.from_numpy(positions), in_order=True), worst
    away = distances.numpy()
    order = away.argsort(axis=1, kind="stable")
    return torch.from_numpy(away[each, order]), torch.from_numpy(positions[each, order]), worst


def _smallest(scores: Array, wanted: int) -> Array:
    """Positions of the smallest scores `(N,)`, in any order.

    They are in the groups with the smallest minima. A group is every so many scores, so that minima are those of whole
    rows of numbers, which takes no longer than to read them.
    """
    groups = len(scores) // GROUP
    if groups < 2 * wanted:
        return scores.argpartition(wanted - 1)[:wanted]
    whole = groups * GROUP
    near = scores[:whole].reshape(GROUP, groups).min(axis=0).argpartition(wanted - 1)[:wanted]
    members = (near + np.arange(0, whole, groups)[:, None]).ravel()
    if whole < len(scores):
        members = np.concatenate([members, np.arange(whole, len(scores))])
    found: Array = members[scores[members].argpartition(wanted - 1)[:wanted]]
    return found
