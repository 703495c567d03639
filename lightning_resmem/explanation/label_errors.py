"""Which rows of a memory are probably mislabelled."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explanation.influence import Ranking, error_of, ranked, usefulness
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.checks import as_ids
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.params import checked_k

# Rows of the memory that are looked at together, and entries of their outputs.
_ROWS, _ENTRIES = 4096, 2**24
# Neighbours through which harm is looked for at least: with few, most rows are not met by any validation query.
_HARM_K = 50


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

    Examples:
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
            return ranked(ids, _base_loss(memory, ids))
        return ranked(ids, _disagreement(memory, ids, checked_k(k), with_base=by == "self_confidence"))
    if embeddings is None or outputs is None or targets is None:
        raise InputError('by="harm" needs validation rows: give embeddings, outputs and targets.')
    params = dataclasses.replace(memory.params, k=max(_HARM_K, memory.params.k), strength=1.0)
    helpful = usefulness(memory, embeddings, outputs, targets, params)
    chosen = torch.isin(helpful.ids, ids)
    if int(chosen.sum()) != len(ids):
        memory.fetch(ids)  # raises the error that names the unknown ones
    order = helpful.ids[chosen].argsort()
    return ranked(ids, -helpful.scores[chosen][order])


def other_neighbors(memory: ResidualMemory, ids: Tensor, k: int) -> Iterator[tuple[Tensor, Neighbors]]:
    """The nearest other rows of rows of the memory.

    Args:
        memory: Filled.
        ids: Shape `(n,)`.
        k: At least 1.

    Yields:
        A few thousand ids `(b,)` at a time, and the `k` neighbours of each, ascending, without the row itself.
    """
    for block in ids.to(memory.device).split(_block(memory)):
        found = memory.at_rows(block).search(memory._query_rows(block), k + 1)
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
    average = memory.sums(Neighbors(distances, neighbors.ids)).labels.cpu()
    values = memory.fetch(ids)
    score = error_of(memory.task, average, values.targets.cpu())
    if with_base:
        score = (score + error_of(memory.task, memory.task.predict(values.outputs), values.targets).cpu()) / 2
    return average, score


def _block(memory: ResidualMemory) -> int:
    return max(1, min(_ROWS, _ENTRIES // memory.num_outputs))


def _base_loss(memory: ResidualMemory, ids: Tensor) -> Tensor:
    losses = []
    for block in ids.split(_block(memory)):
        values = memory.fetch(block)
        base = memory.task.predict(values.outputs)
        losses.append(memory.task.loss(base, base, values.targets).cpu())
    return torch.cat(losses)


def _disagreement(memory: ResidualMemory, ids: Tensor, k: int, with_base: bool) -> Tensor:
    if len(memory) < 2:
        raise InputError("The memory has one row: its label can be compared with no other.")
    scale = memory.distance_scale()
    return torch.cat([judge(memory, *found, scale, with_base)[1] for found in other_neighbors(memory, ids, k)])
