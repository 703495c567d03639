"""Rows that several loaders, or several entries of a `Subset`, take from one dataset."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from lightning_resmem.collection.parts import as_array
from lightning_resmem.collection.samplers import Positions


class Repeats:
    """Leaves out the rows that were taken before, so that the memory has each of them once."""

    def __init__(self) -> None:
        self._taken: dict[int, Positions] = {}

    def left(self, dataset: Any, positions: Sequence[int]) -> Sequence[int]:
        """Those of `positions` of a dataset that no earlier call, and no earlier position, stands for."""
        base, rows = _origin(dataset, positions)
        _, first = np.unique(rows, return_index=True)
        new = np.zeros(len(rows), dtype=bool)
        new[first] = True
        taken = self._taken.get(id(base), rows[:0])
        new &= ~np.isin(rows, taken)
        self._taken[id(base)] = np.concatenate([taken, rows[new]])
        return positions if new.all() else as_array(positions)[new].tolist()


def _origin(dataset: Any, positions: Sequence[int]) -> tuple[Any, Positions]:
    """The dataset below all `Subset`s, and the positions there."""
    rows = as_array(positions)
    while type(dataset) is Subset:
        rows = as_array(dataset.indices)[rows]
        dataset = dataset.dataset
    return dataset, rows
