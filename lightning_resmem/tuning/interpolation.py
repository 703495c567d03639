"""Whether the base fits the rows of its memory so well that there is nothing left to memorize."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.answers import evenly_spaced
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Gather

# Residuals below this share of what labels differ from their average are as good as none.
_VANISHING = 0.03
# On rows that the base has not seen its residuals are at least so many times larger, or it is simply good.
_TIMES_LARGER = 3.0
_ROWS, _ENTRIES = 2048, 2**24


class Residuals(NamedTuple):
    """Mean absolute residuals, as a share of what the labels differ from their average: 1 for a base without a clue.

    Attributes:
        stored: Of the rows in the memory.
        unseen: Of rows that are not in it; None if there are none.
    """

    stored: float
    unseen: float | None

    @property
    def vanish(self) -> bool:
        """Whether the stored ones are as good as none, while those of unseen rows are not."""
        return self.stored < _VANISHING and (self.unseen is None or self.unseen > _TIMES_LARGER * self.stored)


def measure_residuals(memory: ResidualMemory, rows: Rows, gather: Gather) -> Residuals:
    """Residuals of up to 2,048 evenly spaced rows of the memory, and of the rows to tune on.

    Args:
        memory: Filled.
        rows: Of this rank; if they have ids they are not unseen.
        gather: Concatenates a tensor `(n, ...)` over all ranks.
    """
    ids = memory.ids
    count = min(len(ids), _ROWS, max(1, _ENTRIES // rows.outputs.shape[1]))
    values = memory.fetch(evenly_spaced(ids, count))
    residuals = memory.task.residuals(values.outputs, values.targets)
    labels = residuals + memory.task.predict(values.outputs)
    average = labels.mean(dim=0)
    # In double: labels that are all the same differ from their average by rounding alone.
    spread = float((labels.double() - average.double()).abs().mean())
    if spread < 1e-6:
        return Residuals(1.0, None)  # nothing is known
    stored = float(residuals.abs().mean()) / spread
    if rows.ids is not None:
        return Residuals(stored, None)
    sums = _absolute_sums(memory, rows)
    unseen, count_unseen = gather(sums[None]).sum(dim=0).tolist()
    return Residuals(stored, unseen / count_unseen / spread)


def _absolute_sums(memory: ResidualMemory, rows: Rows) -> Tensor:
    residuals = memory.task.residuals(rows.outputs, rows.targets)
    return torch.tensor([float(residuals.abs().sum(dtype=torch.float64)), residuals.numel()], dtype=torch.float64)
