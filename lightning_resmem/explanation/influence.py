"""Which rows of a memory matter: for which queries, for better or for worse, and which are probably mislabelled."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.functional import combine, neighbor_weights
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import as_ids, as_tensor, check_shapes
from lightning_resmem.memory.contributions import fetch_neighbors, per_neighbor, row_residuals
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.params import ResMemParams, checked_k
from lightning_resmem.tasks import Multiclass, Regression, Task, check_finite

# Entries of temporary tables: queries x neighbours x outputs.
_ENTRIES = 2**24
# Rows of the memory that are looked at together.
_ROWS = 4096
# Neighbours through which harm is looked for at least: with few, most rows are not met by any validation query.
_HARM_K = 50


@dataclass(frozen=True)
class Influence:
    """What one row of the memory changes; `m` queries, the one that it changes most first.

    Attributes:
        id: Of the row.
        label: Its target: a class for `Multiclass`, otherwise shape `(C,)`.
        queries: Which queries, positions among those given, shape `(m,)`.
        distances: Between the row and these queries, shape `(m,)`.
        weights: What share of their weight it has, shape `(m,)`.
        contributions: What it adds to their predictions, `strength * w_i * r_i`, shape `(m, C)`.
    """

    id: int
    label: Tensor
    queries: Tensor
    distances: Tensor
    weights: Tensor
    contributions: Tensor


class Ranking(NamedTuple):
    """Rows of a memory by score, the highest first.

    Attributes:
        ids: Shape `(n,)`, int64; equal scores come in the order of ids.
        scores: Shape `(n,)`, float64.
    """

    ids: Tensor
    scores: Tensor


def influence(
    memory: ResidualMemory, id: int, queries: Tensor, outputs: Tensor | None = None, top: int = 10
) -> Influence:
    """The queries whose predictions one row of the memory changes most.

    `explain` shows the other side: all rows behind the prediction for a query.

    Args:
        memory: Filled.
        id: Of the row.
        queries: Embeddings, shape `(B, D)`.
        outputs: What the head returned for them, shape `(B, C)`; only needed where the params have a gate.
        top: How many queries at most.

    Returns:
        Those of the queries that have the row among their `k` neighbours; perhaps none.

    Raises:
        InputError: If the memory has no such row, shapes do not fit, or a gate needs outputs.

    Example:
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
    if params.gate is not None:
        if outputs is None:
            raise InputError("The memory's params have a gate, which depends on the base: give influence(outputs=...).")
        base = memory.task.predict(as_tensor("outputs", outputs).cpu()[found], params.softmax_temperature)
        strength = params.strengths(memory.task, base, neighbors.distances[found, 0])
    only = torch.zeros(1, dtype=torch.int64, device=memory.device)
    contributions = strength * weights[:, None] * row_residuals(row, only, params.softmax_temperature).cpu()
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

    Example:
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
        neighbors = _nearest(memory, embeddings[rows], params.k)
        weights = neighbor_weights(neighbors.distances, params.sigma).cpu()
        values, positions = fetch_neighbors(memory, neighbors.ids)
        residuals = row_residuals(values, positions, params.softmax_temperature).cpu()  # (b, k, C)
        base = task.predict(outputs[rows].cpu(), params.softmax_temperature)
        if base.shape[1] != residuals.shape[2]:
            raise InputError(f"outputs has {base.shape[1]} columns, the memory was filled with {residuals.shape[2]}.")
        strength = params.strengths(task, base, neighbors.distances[:, 0].cpu())
        added = per_neighbor(strength) * weights[..., None] * residuals
        combined = combine(base, added.sum(dim=1))[:, None]
        wanted = targets[rows].cpu()[:, None]
        gains = _error(task, combined - added, wanted) - _error(task, combined, wanted)  # (b, k)
        found = neighbors.ids.cpu() >= 0
        places = torch.searchsorted(known, neighbors.ids.cpu()[found])
        scores.index_add_(0, places, gains[found].double())
    return _ranked(known, scores)


def label_errors(
    memory: ResidualMemory,
    by: Literal["self_confidence", "disagreement", "base_loss", "harm"] = "self_confidence",
    ids: Tensor | None = None,
    embeddings: Tensor | None = None,
    outputs: Tensor | None = None,
    targets: Tensor | None = None,
    k: int = 20,
) -> Ranking:
    """Rank rows of the memory by how likely their label is wrong, the most suspicious first.

    - `"self_confidence"`: how little the base and the `k` nearest other rows believe in the label: one minus the mean
      of the label's probability by the base and its weighted share among the neighbours. Of the four it found wrong
      labels most reliably, whether or not the base had learnt them by heart.
    - `"disagreement"`: the neighbours' half of it alone.
    - `"base_loss"`: the base model's loss on the row.
    - `"harm"`: how much the row harms the predictions for validation rows (see `usefulness`), with at least 50
      neighbours and full strength.

    Args:
        memory: Filled.
        by: The ranking.
        ids: Rank these rows only, shape `(n,)`; by default all.
        embeddings: Of the validation rows, for `"harm"`.
        outputs: Of the validation rows, for `"harm"`.
        targets: Of the validation rows, for `"harm"`.
        k: How many neighbours are asked, by the first two.

    Raises:
        InputError: If `by` is not known, an id is not in the memory, or validation rows are missing or not needed.

    Example:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory()
        >>> memory.add(torch.tensor([[0.0], [0.1], [0.2]]), torch.zeros(3, 2), torch.tensor([0, 1, 0]))
        >>> label_errors(memory).ids
        tensor([1, 0, 2])
    """
    check_memory(memory)
    if by not in ("self_confidence", "disagreement", "base_loss", "harm"):
        raise InputError(f'by={by!r}: give "self_confidence", "disagreement", "base_loss" or "harm".')
    ids = memory.ids.cpu() if ids is None else as_ids(ids).cpu().unique()
    if by != "harm":
        if not (embeddings is None and outputs is None and targets is None):
            raise InputError(f'by="{by}" reads no validation rows: leave out embeddings, outputs and targets.')
        if by == "base_loss":
            return _ranked(ids, _base_loss(memory, ids))
        return _ranked(ids, _disagreement(memory, ids, checked_k(k), with_base=by == "self_confidence"))
    if embeddings is None or outputs is None or targets is None:
        raise InputError('by="harm" needs validation rows: give embeddings, outputs and targets.')
    params = dataclasses.replace(memory.params, k=max(_HARM_K, memory.params.k), strength=1.0)
    ranked = usefulness(memory, embeddings, outputs, targets, params)
    chosen = torch.isin(ranked.ids, ids)
    if int(chosen.sum()) != len(ids):
        memory.fetch(ids)  # raises the error that names the unknown ones
    order = ranked.ids[chosen].argsort()
    return _ranked(ids, -ranked.scores[chosen][order])


def other_neighbors(memory: ResidualMemory, ids: Tensor, k: int) -> Iterator[tuple[Tensor, Neighbors]]:
    """The nearest other rows of rows of the memory.

    Args:
        memory: Filled.
        ids: Shape `(n,)`.
        k: At least 1.

    Yields:
        A few thousand ids `(b,)` at a time, and the `k` neighbours of each, ascending, without the row itself.
    """
    for block in ids.to(memory.device).split(_ROWS):
        found = memory.search(memory._query_rows(block), k + 1)
        itself = found.ids == block[:, None]
        # The row itself goes last and is cut off; where others at distance 0 came before it, the last of them is.
        order = itself.byte().argsort(dim=1, stable=True)[:, :k]
        yield block.cpu(), Neighbors(found.distances.gather(1, order), found.ids.gather(1, order))


def judge(
    memory: ResidualMemory, ids: Tensor, neighbors: Neighbors, scale: float, with_base: bool = True
) -> tuple[Tensor, Tensor]:
    """What the neighbours of rows of the memory say about their labels.

    Args:
        memory: Filled.
        ids: Of the rows, shape `(n,)`.
        neighbors: From `other_neighbors`.
        scale: Width of the kernel that weighs them, a distance; the params do not matter.
        with_base: Whether the base has a say in the score.

    Returns:
        The neighbours' label average `(n, C)`, and how far it (and the base) is from the labels, shape `(n,)`.
    """
    distances = neighbors.distances * (memory.params.sigma / scale)  # `sums` divides by sigma
    average = memory.sums(Neighbors(distances, neighbors.ids))[1].cpu()
    values = memory.fetch(ids)
    score = _error(memory.task, average, values.targets.cpu())
    if with_base:
        score = (score + _error(memory.task, memory.task.predict(values.outputs), values.targets).cpu()) / 2
    return average, score


def _nearest(memory: ResidualMemory, queries: Tensor, k: int) -> Neighbors:
    return memory.search(queries, min(k, max(1, len(memory))))


def _base_loss(memory: ResidualMemory, ids: Tensor) -> Tensor:
    losses = []
    for block in ids.split(_ROWS):
        values = memory.fetch(block)
        base = memory.task.predict(values.outputs)
        losses.append(memory.task.loss(base, base, values.targets).cpu())
    return torch.cat(losses)


def _disagreement(memory: ResidualMemory, ids: Tensor, k: int, with_base: bool) -> Tensor:
    if len(memory) < 2:
        raise InputError("The memory has one row: its label can be compared with no other.")
    scale = memory.distance_scale()
    return torch.cat([judge(memory, *found, scale, with_base)[1] for found in other_neighbors(memory, ids, k)])


def _error(task: Task, prediction: Tensor, targets: Tensor) -> Tensor:
    """How far predictions `(..., C)` are from targets, which may have fewer leading dimensions of size 1: `(...)`."""
    if isinstance(task, Multiclass):
        return 1 - prediction.gather(-1, targets.expand(prediction.shape[:-1])[..., None])[..., 0]
    difference = prediction - targets
    return (difference.square() if isinstance(task, Regression) else difference.abs()).mean(dim=-1)


def _ranked(ids: Tensor, scores: Tensor) -> Ranking:
    """By score, for ids in ascending order."""
    ordered, order = scores.double().sort(descending=True, stable=True)
    return Ranking(ids[order], ordered)
