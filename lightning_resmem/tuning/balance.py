"""Balanced accuracy of a choice, of several labels a row macro F1, and whether rare classes call for a look at it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.functional import f1_counts, far_from_uniform, has_rare_labels, is_right, labels
from lightning_resmem.metrics.noise import decisive, told
from lightning_resmem.metrics.reported import BALANCED, F1
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Multilabel
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Gather, Sweep

# Rows of the memory whose classes are counted, and outputs that are read with them at most.
_ROWS, _ENTRIES = 4096, 2**24


class BalancedScore(NamedTuple):
    """Balanced accuracy (macro recall: every class counts the same) on the tuning rows; of several labels, macro F1.

    Attributes:
        base: Of the base alone.
        choice: Of the choice.
        error: Standard error of `choice - base`, from the differences of the rows of each class, or of groups of rows
            that go right or wrong together, if that is larger; NaN where these are too few to tell.
        uneven: Whether the classes of the tuning rows or of the memory's are far from uniform (of several labels: some
            are rare), or the sampler of the training rows draws them with weights that are.
        falls: Whether the choice is worse than the base by more than that error; where it is NaN, by more than that of
            the rows.
        score: `"balanced_acc"`, or `"f1"`.
    """

    base: float
    choice: float
    error: float
    uneven: bool
    falls: bool
    score: str = BALANCED

    @property
    def words(self) -> str:
        """What it is."""
        return "macro F1" if self.score == F1 else "balanced accuracy"

    @property
    def objective(self) -> str:
        """That of a tuner which keeps it."""
        return "f1" if self.score == F1 else "balanced_accuracy"


def measure_balance(
    memory: ResidualMemory, rows: Rows, sweep: Sweep, params: ResMemParams, gather: Gather
) -> BalancedScore | None:
    """Balanced accuracy, or macro F1, of base and choice over the rows of all ranks; None in regression.

    Args:
        memory: Filled.
        rows: Of this rank.
        sweep: Of these rows.
        params: The choice, with its gate.
        gather: Concatenates a tensor `(n, ...)` over all ranks.
    """
    if isinstance(memory.task, Multilabel):
        return _measure_f1(memory, rows, sweep, params, gather)
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
    weights = counts.new_zeros(classes, dtype=torch.float64)  # of a row in the score, by its class
    weights[counts[0] > 0] = 1 / labelled / len(labelled)
    averages = counts.new_zeros(classes, dtype=torch.float64)
    averages[counts[0] > 0] = differences
    added = weights[targets.cpu()] * ((after.double() - before.double()).cpu() - averages[targets.cpu()])
    before_after = float((base / labelled).mean()), float((choice / labelled).mean())
    errors = math.sqrt(max(0.0, float(variances.sum()))) / len(labelled), _error_of_sum(added, sweep)
    uneven = far_from_uniform(counts[0]) or far_from_uniform(_memorized_classes(memory, classes))
    return _score(before_after, errors, uneven, BALANCED)


def _measure_f1(
    memory: ResidualMemory, rows: Rows, sweep: Sweep, params: ResMemParams, gather: Gather
) -> BalancedScore:
    targets = rows.targets
    before = labels(memory.task.predict(rows.outputs), targets)
    after = before if params.strength == 0 else labels(sweep.predict(params), targets).to(before.device)
    both = torch.stack([f1_counts(said, targets, targets.shape[1]) for said in (before, after)])
    counts = gather(both.cpu()[None]).sum(dim=0).to(before.device)  # (2, 3, C)
    sizes = (counts[:, 1] + counts[:, 2]).double()
    scores = 2 * counts[:, 0] / sizes  # (2, C); NaN for labels that nobody has or predicts
    # What each row adds to the scores, of which the error is made: to first order.
    truth, said = (targets >= 0.5).double(), torch.stack([before, after]).double()
    added = ((2 * said * truth - scores[:, None] * (said + truth)) / sizes[:, None]).nanmean(dim=2)  # (2, V)
    variance = gather((added[1] - added[0]).nan_to_num().square().sum().cpu()[None]).sum()
    count = int(gather(torch.tensor([len(targets)])).sum())
    base, choice = scores.nanmean(dim=1).tolist()
    errors = math.sqrt(float(variance)), _error_of_sum((added[1] - added[0]).nan_to_num(), sweep)
    return _score((base, choice), errors, has_rare_labels(counts[0, 2], count), F1)


def _score(before_after: tuple[float, float], errors: tuple[float, float], uneven: bool, score: str) -> BalancedScore:
    """Of base and choice, whose difference has these errors: of rows, and of groups."""
    base, choice = before_after
    return BalancedScore(base, choice, told(*errors), uneven, base - choice > decisive(*errors), score)


def _error_of_sum(added: Tensor, sweep: Sweep) -> float:
    """Standard error of the sum of what rows add to a score `(V,)`, if groups of them go right or wrong together."""
    return float(sweep.groups.errors(added[None])[0]) * sweep.num_rows


def _memorized_classes(memory: ResidualMemory, classes: int) -> Tensor:
    """How many of some of the memory's rows, the same ones on every rank, have each class; `(C,)`."""
    ids, count = memory.ids.cpu(), max(1, min(_ROWS, _ENTRIES // classes))
    if len(ids) > count:
        # Drawn, not evenly spaced: rows may be in an order that repeats.
        ids = ids[torch.randint(len(ids), (count,), generator=torch.Generator().manual_seed(0)).unique()]
    return torch.bincount(memory.fetch(ids).targets.cpu(), minlength=classes)
