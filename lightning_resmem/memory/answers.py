"""What a memory answers, and what follows from the neighbours that it finds."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.functional import combine, whole_residual
from lightning_resmem.memory.checks import as_tensor, check_width, missing_outputs
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task

# Rows on which the distance scale of a memory is measured when no params were given.
_SCALE_ROWS = 512
# Entries of a tensor that are shown where an answer is.
_SHOWN = 20
# Entries of a prediction that are combined at once.
_BLOCK_ENTRIES = 2**22


def briefly(fields: Mapping[str, object]) -> str:
    """What an answer holds, for its `repr`: tensors with their numbers where these are few, else by their shapes."""
    return ", ".join(
        f"{name}=Tensor{tuple(value.shape)}"
        if isinstance(value, Tensor) and value.numel() > _SHOWN
        else f"{name}={value}"
        for name, value in fields.items()
    )


class Neighbors(NamedTuple):
    """The nearest rows of each query, ascending by distance.

    Attributes:
        distances: Euclidean, shape `(B, k)`, float32; `inf` where the memory has fewer than `k` rows.
        ids: Shape `(B, k)`, int64; -1 where the memory has fewer than `k` rows.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory()
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> memory.search(torch.tensor([[0.0, 1.0]]), k=2).ids
        tensor([[1, 0]])
    """

    distances: Tensor
    ids: Tensor

    def __repr__(self) -> str:
        return f"Neighbors({briefly(self._asdict())})"


class Sums(NamedTuple):
    """Weighted sums over the neighbours of each query.

    Attributes:
        residual: Of the residuals, shape `(B, C)`, as far as they are kept.
        labels: Of the labels, shape `(B, C)`.
        tail: The weighted mass of the neighbours' base predictions that `residual` lacks, shape `(B,)`: it takes the
            shape of the query's own base prediction. None where residuals are kept in full.
    """

    residual: Tensor
    labels: Tensor
    tail: Tensor | None = None

    def whole_residual(self, base: Tensor) -> Tensor:
        """The residual sum for queries with these base predictions, shape `(B, C)`, on their device.

        Raises:
            InputError: If the base predictions have another width.
        """
        check_width(base, self.residual.shape[1])
        return whole_residual(self.residual, self.tail, base).to(base.device)


class Predictions(NamedTuple):
    """The three predictions that are always reported side by side, each of shape `(B, C)`.

    Examples:
        >>> from lightning_resmem import LocalMemory, ResMemParams
        >>> memory = LocalMemory(params=ResMemParams(k=1))
        >>> memory.add(torch.eye(2), outputs=torch.zeros(2, 2), targets=torch.tensor([0, 1]))
        >>> found = memory.predictions(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2))
        >>> found.base, found.knn, found.resmem
        (tensor([[0.5000, 0.5000]]), tensor([[0., 1.]]), tensor([[0., 1.]]))
    """

    base: Tensor
    knn: Tensor
    resmem: Tensor

    def __repr__(self) -> str:
        return f"Predictions({briefly(self._asdict())})"


def combined(task: Task, params: ResMemParams, outputs: Tensor, neighbors: Neighbors, sums: Sums) -> Predictions:
    """Base, knn and combined prediction.

    Args:
        task: What is predicted.
        params: How the memory is read.
        outputs: What the head returned for the queries, shape `(B, C)`.
        neighbors: Of the queries.
        sums: Over the neighbours.

    Raises:
        InputError: If the outputs have another width than the sums.
    """
    base = task.predict(outputs, params.softmax_temperature)
    residual = sums.whole_residual(base)
    strengths = params.strengths(task, base, neighbors.distances[:, 0].to(base.device))
    # To a query without any neighbour the base answers alone.
    known = torch.isfinite(neighbors.distances[:, :1])
    knn = sums.labels.where(known, base.to(sums.labels))
    resmem = combine(base, residual, strengths)
    if params.combined_temperature != 1 and params.strength:
        tempered = task.tempered(resmem, base, params.combined_temperature)
        resmem = tempered.where(known.to(base.device), base)
    return Predictions(base, knn, resmem)


def combined_in_blocks(
    task: Task, params: ResMemParams, outputs: Tensor, neighbors: Neighbors, sums: Callable[[Neighbors], Sums]
) -> Tensor:
    """The combined prediction `(B, C)` alone: beside it there is never more than a few blocks of rows.

    Args:
        task: What is predicted.
        params: How the memory is read.
        outputs: What the head returned for the queries, shape `(B, C)`.
        neighbors: Of the queries.
        sums: The sums over some queries' neighbours.

    Raises:
        InputError: If the outputs have another width than the sums.
    """

    def combine_rows(rows: slice) -> Tensor:
        near = Neighbors(*(part[rows] for part in neighbors))
        return combined(task, params, outputs[rows], near, sums(near)).resmem

    return in_blocks(combine_rows, *outputs.shape)


def in_blocks(compute: Callable[[slice], Tensor], rows: int, columns: int) -> Tensor:
    """What `compute` makes of some rows at a time, as one tensor `(rows, columns)`: it and a block are all there is."""
    block = rows_at_once(columns)
    if rows <= block:
        return compute(slice(0, rows))
    whole: Tensor | None = None
    for start in range(0, rows, block):
        part = compute(slice(start, start + block))
        whole = part.new_empty(rows, columns) if whole is None else whole
        whole[start : start + block] = part
    assert whole is not None
    return whole


def rows_at_once(columns: int) -> int:
    """How many rows are combined at once, of so many outputs."""
    return max(1, _BLOCK_ENTRIES // max(1, columns))


def residual_sum(task: Task, params: ResMemParams, outputs: Tensor | None, sums: Sums) -> Tensor:
    """The residual sum `(B, C)` for queries whose outputs `(B, C)` are only needed where base predictions are cut.

    Raises:
        InputError: If they are needed and missing, or have another width.
    """
    if sums.tail is None:
        return sums.residual
    if outputs is None:
        raise missing_outputs()
    return sums.whole_residual(task.predict(as_tensor("outputs", outputs), params.softmax_temperature))


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
