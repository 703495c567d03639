"""Which rows of a memory matter: for which queries, and whether for better or for worse."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.functional import combine, neighbor_weights
from lightning_resmem.memory.answers import Neighbors, briefly
from lightning_resmem.memory.checks import as_ids, as_tensor, check_shapes
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.single_rows import fetch_neighbors, per_neighbor, row_residuals
from lightning_resmem.params import ResMemParams, checked_k
from lightning_resmem.tasks import Multiclass, Regression, Task, check_finite

# Entries of temporary tables: queries x neighbours x outputs.
_ENTRIES = 2**24


@dataclass(frozen=True)
class Influence:
    """What one row of the memory changes; `m` queries, the one that it changes most first.

    Attributes:
        id: Of the row.
        label: Its target: a class for `Multiclass`, otherwise shape `(C,)`.
        queries: Which queries, positions among those given, shape `(m,)`.
        distances: Between the row and these queries, shape `(m,)`.
        weights: What share of their weight it has, shape `(m,)`.
        contributions: What it adds to their `F(x)`, `strength * w_i * r_i`, shape `(m, C)`.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(params=ResMemParams(k=1))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> found = influence(memory, 1, torch.eye(2))
        >>> int(found.label), found.queries, found.weights
        (1, tensor([1]), tensor([1.]))
    """

    id: int
    label: Tensor
    queries: Tensor
    distances: Tensor
    weights: Tensor
    contributions: Tensor

    def __repr__(self) -> str:
        return f"Influence({briefly(vars(self))})"


class Ranking(NamedTuple):
    """Rows of a memory by score, the highest first.

    Attributes:
        ids: Shape `(n,)`, int64; equal scores come in the order of ids.
        scores: Shape `(n,)`, float64.

    Examples:
        >>> ranking = Ranking(ids=torch.tensor([4, 9]), scores=torch.tensor([0.5, -0.2]).double())
        >>> ranking.ids[ranking.scores < 0]  # the harmful ones
        tensor([9])
    """

    ids: Tensor
    scores: Tensor

    def __repr__(self) -> str:
        return f"Ranking({briefly(self._asdict())})"


def influence(
    memory: ResidualMemory, id: int, queries: Tensor, outputs: Tensor | None = None, top: int = 10
) -> Influence:
    """The queries whose predictions one row of the memory changes most.

    `explain` shows the other side: all rows behind the prediction for a query.

    Args:
        memory: Filled.
        id: Of the row.
        queries: Embeddings, shape `(B, D)`.
        outputs: What the head returned for them, shape `(B, C)`; only needed where the params have a gate, or where
            values are sparse.
        top: How many queries at most.

    Returns:
        Those of the queries that have the row among their `k` neighbours; perhaps none.

    Raises:
        InputError: If the memory has no such row, shapes do not fit, or a gate or sparse values need outputs.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(params=ResMemParams(k=1))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> found = influence(memory, 1, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> found.queries, found.contributions
        (tensor([1]), tensor([[-0.5000,  0.5000]]))
    """
    check_memory(memory)
    top, params = checked_k(top, "top"), memory.params
    row = memory.fetch(as_ids([id]))
    neighbors = Neighbors(*(part.cpu() for part in _nearest(memory, as_tensor("queries", queries), params.k)))
    found, places = (neighbors.ids == id).nonzero(as_tuple=True)
    weights = neighbor_weights(neighbors.distances, params.sigma)[found, places]
    strength: float | Tensor = params.strength
    base: Tensor | None = None
    if outputs is not None:
        base = memory.task.predict(as_tensor("outputs", outputs).cpu()[found], params.softmax_temperature)
    if params.gate is not None:
        if base is None:
            raise InputError("The memory's params have a gate, which depends on the base: give influence(outputs=...).")
        strength = params.strengths(memory.task, base, neighbors.distances[found, 0])
    only = torch.zeros(len(found), 1, dtype=torch.int64, device=memory.device)
    residuals = row_residuals(row, only, params.softmax_temperature, base)[:, 0].cpu()
    contributions = strength * weights[:, None] * residuals
    order = contributions.abs().amax(dim=1).argsort(descending=True, stable=True)[:top]
    return Influence(
        id=int(id),
        label=row.targets[0].cpu(),
        queries=found[order],
        distances=neighbors.distances[found, places][order],
        weights=weights[order],
        contributions=contributions[order],
    )


def usefulness(
    memory: ResidualMemory, embeddings: Tensor, outputs: Tensor, targets: Tensor, params: ResMemParams | None = None
) -> Ranking:
    """Rank the rows of the memory by how much they help on validation rows: most useful first, most harmful last.

    A row's score is the sum, over the validation rows, of how much larger the error would be without what it adds
    (`strength * w_i * r_i`), the others' weights as they are. The error is one minus the probability of the right class
    (`Multiclass`), the mean absolute error of the probabilities (`Multilabel`) or the mean squared error
    (`Regression`). Rows that are no query's neighbour have the score 0.

    Args:
        memory: Filled.
        embeddings: Of the validation rows, shape `(V, D)`.
        outputs: What the head returned for them, shape `(V, C)`.
        targets: As the task wants them.
        params: How the memory is read; by default its own params.

    Raises:
        InputError: If shapes or dtypes do not fit.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(params=ResMemParams(k=1))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 0]))
        >>> usefulness(memory, torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        Ranking(ids=tensor([0, 1]), scores=tensor([ 0.5000, -0.5000], dtype=torch.float64))
    """
    check_memory(memory)
    params, task = params or memory.params, memory.task
    embeddings, outputs = as_tensor("embeddings", embeddings), as_tensor("outputs", outputs)
    targets = as_tensor("targets", targets)
    check_shapes(embeddings, outputs, targets, None)
    check_finite("outputs", outputs)
    targets = task.check_targets(targets, outputs.shape[1])
    known = memory.ids.cpu()
    scores = torch.zeros(len(known), dtype=torch.float64)
    block = max(1, _ENTRIES // (min(params.k, len(memory)) * outputs.shape[1]))
    for rows in torch.arange(len(targets)).split(block):
        neighbors = _nearest(memory.for_queries(rows), embeddings[rows], params.k)
        weights = neighbor_weights(neighbors.distances, params.sigma).cpu()
        values, positions = fetch_neighbors(memory, neighbors.ids)
        base = task.predict(outputs[rows].cpu(), params.softmax_temperature)
        residuals = row_residuals(values, positions, params.softmax_temperature, base).cpu()  # (b, k, C)
        strength = params.strengths(task, base, neighbors.distances[:, 0].cpu())
        added = per_neighbor(strength) * weights[..., None] * residuals
        combined = combine(base, added.sum(dim=1))[:, None]
        wanted = targets[rows].cpu()[:, None]
        gains = error_of(task, combined - added, wanted) - error_of(task, combined, wanted)  # (b, k)
        found = neighbors.ids.cpu() >= 0
        places = torch.searchsorted(known, neighbors.ids.cpu()[found])
        scores.index_add_(0, places, gains[found].double())
    return ranked(known, scores)


def _nearest(memory: ResidualMemory, queries: Tensor, k: int) -> Neighbors:
    return memory.search(queries, min(k, max(1, len(memory))))


def error_of(task: Task, prediction: Tensor, targets: Tensor) -> Tensor:
    """How far predictions `(..., C)` are from targets, which may have fewer leading dimensions of size 1: `(...)`."""
    if isinstance(task, Multiclass):
        return 1 - prediction.gather(-1, targets.expand(prediction.shape[:-1])[..., None])[..., 0]
    difference = prediction - targets
    return (difference.square() if isinstance(task, Regression) else difference.abs()).mean(dim=-1)


def ranked(ids: Tensor, scores: Tensor) -> Ranking:
    """By score, for ids in ascending order."""
    ordered, order = scores.double().sort(descending=True, stable=True)
    return Ranking(ids[order], ordered)
