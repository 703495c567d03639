"""Balanced accuracy of a choice, and whether classes are so far from uniform that it has to be looked at."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.functional import far_from_uniform, is_right
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass
from lightning_resmem.tuning.sweep import Gather, Rows, Sweep

# Rows of the memory whose classes are counted, and outputs that are read with them at most.
_ROWS, _ENTRIES = 4096, 2**24


class BalancedScore(NamedTuple):
    """Balanced accuracy (macro recall: every class counts the same) on the tuning rows.

    Attributes:
        base: Of the base alone.
        choice: Of the choice.
        error: Standard error of `choice - base`, from the differences of the rows of each class.
        uneven: Whether the classes of the tuning rows or of the memory's are far from uniform, or the sampler of the
            training rows draws them with weights that are.
    """

    base: float
    choice: float
    error: float
    uneven: bool

    @property
    def falls(self) -> bool:
        """Whether the choice is worse than the base by more than a standard error."""
        return self.base - self.choice > self.error


def measure_balance(
    memory: ResidualMemory, rows: Rows, sweep: Sweep, params: ResMemParams, gather: Gather
) -> BalancedScore | None:
    """Balanced accuracy of base and choice over the rows of all ranks; None in tasks without one label a row.

    Args:
        memory: Filled.
        rows: Of this rank.
        sweep: Of these rows.
        params: The choice, with its gate.
        gather: Concatenates a tensor `(n, ...)` over all ranks.
    """
    if not isinstance(memory.task, Multiclass):
        return None
    targets, classes = rows.targets, rows.outputs.shape[1]
    before = is_right(memory.task.predict(rows.outputs), targets)
    after = before if params.strength == 0 else is_right(sweep.predict(params), targets).to(before.device)
    parts = targets, targets[before], targets[after], targets[before != after]
    counts = torch.stack([torch.bincount(part, minlength=classes) for part in parts]).cpu()
    counts = gather(counts[None]).sum(dim=0)  # (4, C)
    labelled, base, choice, changed = counts[:, counts[0] > 0].double()
    differences = (choice - base) / labelled
    variances = (changed / labelled - differences.square()) / (labelled - 1).clamp_min(1)
    return BalancedScore(
        float((base / labelled).mean()),
        float((choice / labelled).mean()),
        math.sqrt(max(0.0, float(variances.sum()))) / len(labelled),
        far_from_uniform(counts[0]) or far_from_uniform(_memorized_classes(memory, classes)),
    )


def _memorized_classes(memory: ResidualMemory, classes: int) -> Tensor:
    """How many of some of the memory's rows, the same ones on every rank, have each class; `(C,)`."""
    ids, count = memory.ids.cpu(), max(1, min(_ROWS, _ENTRIES // classes))
    if len(ids) > count:
        # Drawn, not evenly spaced: rows may be in an order that repeats.
        ids = ids[torch.randint(len(ids), (count,), generator=torch.Generator().manual_seed(0)).unique()]
    return torch.bincount(memory.fetch(ids).targets.cpu(), minlength=classes)
