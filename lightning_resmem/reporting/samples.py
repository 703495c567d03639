"""Samples of a memory's rows for its HTML report: what they hold, and their nearest other rows."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_resmem.explanation.label_errors import judge, other_neighbors
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.local import LocalMemory

# Rows whose labels, outputs and keys are read; those whose neighbours are searched are fewer.
_READ_ROWS = 100_000
_BLOCK = 4096
# Entries of their base predictions, of all and of a block: of many classes fewer rows are read.
_READ_ENTRIES, _BLOCK_ENTRIES = 2**26, 2**24
# Neighbours that judge a label, as `label_errors` has it.
_JUDGES = 20


@dataclass(frozen=True)
class Read:
    """What a sample of rows holds: `n` rows."""

    targets: Tensor  # as the task stores them
    base: Tensor  # (n, C) base prediction
    errors: NDArray[np.float64]  # (n,) largest residual of an output
    losses: NDArray[np.float64]  # (n,)
    norms: NDArray[np.float64]  # (n,)


@dataclass(frozen=True)
class Searched:
    """The nearest other rows of a smaller sample: `n` rows with `k` neighbours each."""

    ids: Tensor  # (n,)
    neighbors: Neighbors  # (n, k)
    knn: Tensor  # (n, C) label average of those that the memory's params read
    averages: Tensor  # (n, C) label average of those that judge a label
    scores: Tensor  # (n,) how likely the label is wrong


def read_rows(memory: LocalMemory) -> Read:
    """What up to 100,000 rows of a memory hold, drawn at random."""
    task, temperature = memory.task, memory.params.softmax_temperature
    rows, block_rows = _READ_ENTRIES // memory.num_outputs, _BLOCK_ENTRIES // memory.num_outputs
    parts = []
    for block in _drawn(memory.ids, min(_READ_ROWS, rows)).split(max(1, min(_BLOCK, block_rows))):
        values = memory.fetch(block)
        outputs, targets = values.outputs.float(), values.targets
        base = task.predict(outputs, temperature)
        errors = task.residuals(outputs, targets, temperature).abs().amax(dim=1)
        parts.append((targets, base, errors, task.loss(base, base, targets), memory._query_rows(block).norm(dim=1)))
    targets, base, *numbers = (torch.cat(column) for column in zip(*parts, strict=True))
    return Read(targets, base, *(column.double().cpu().numpy() for column in numbers))


def search_rows(memory: LocalMemory, rows: int, k: int) -> Searched:
    """The `k` nearest other rows of so many rows of a memory, drawn at random, and how suspicious their labels are."""
    scale, own, parts = memory.distance_scale(), memory.params.k, []
    for block, found in other_neighbors(memory, _drawn(memory.ids, rows), max(k, _JUDGES, own)):
        shown, read, judges = (Neighbors(*(column[:, :count] for column in found)) for count in (k, own, _JUDGES))
        parts.append((block, *shown, memory.sums(read).labels.cpu(), *judge(memory, block, judges, scale)))
    block, distances, neighbors, *told = (torch.cat(column) for column in zip(*parts, strict=True))
    return Searched(block, Neighbors(distances, neighbors), *told)


def _drawn(ids: Tensor, count: int) -> Tensor:
    """So many ids at random, but the same ones each time, ascending."""
    if len(ids) <= count:
        return ids
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))[:count]].sort().values
