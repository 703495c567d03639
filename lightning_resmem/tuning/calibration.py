"""How sure the combined prediction may be: one temperature after combining, by the loss on tuning rows."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.metrics.noise import decisive, error_of_rows, plus_minus, told
from lightning_resmem.params import ResMemParams
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.sweep import Sweep

# Entries of the predictions that it is chosen on; more rows would not change one number.
_ENTRIES = 2**24
# Candidates are powers of 2: these, and then half a step to either side of the best, so many times.
_POWERS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_HALVINGS = 4


class Found(NamedTuple):
    """A temperature, the mean loss before and after it, and the standard error of the difference."""

    temperature: float
    before: float
    after: float
    error: float


def with_temperature(result: TuningResult, sweep: Sweep, noise: float) -> TuningResult:
    """A tuner's result with a `combined_temperature`, if that lowers the loss by more than its standard error.

    The params of kNN-LM have one of their own, by the same rule.

    Args:
        result: Without one.
        sweep: That the result comes from, of rows that the base was not trained on.
        noise: How many standard errors count as noise.
    """
    if not sweep.task.uses_softmax_temperature:
        return result
    if result.knn_lm is not None and (found := _find(result.knn_lm, sweep.of_knn_lm(), noise)) is not None:
        result = replace(result, knn_lm=replace(result.knn_lm, combined_temperature=found.temperature))
    found = _find(result.params, sweep, noise)
    if found is None:
        return result
    note = (
        f"combined_temperature={found.temperature:.4g} after combining: loss {found.before:.4f} -> {found.after:.4f} "
        f"({plus_minus(found.error)})"
    )
    params = replace(result.params, combined_temperature=found.temperature)
    return replace(result, params=params, notes=(*result.notes, note))


def _find(params: ResMemParams, sweep: Sweep, noise: float) -> Found | None:
    """The temperature with the least loss, if that falls by more than its noise."""
    if not params.strength:
        return None
    task = sweep.task
    known = sweep.distances[:, 0].isfinite()  # to the others the base answers alone
    combined, base, targets = (part[known.to(part.device)] for part in sweep.both(params))
    every = max(1, math.ceil(base.numel() / _ENTRIES))
    combined, base, targets = combined[::every], base[::every], targets[::every]
    before = task.loss(combined, base, targets).double()
    rows, loss = sweep.total(torch.stack([torch.ones_like(before).sum(), before.sum()])).tolist()

    def gains_of(power: float) -> Tensor:
        return before - task.loss(task.tempered(combined, base, 2.0**power), base, targets).double()

    def gain(power: float) -> tuple[float, float]:
        """By how much the loss falls, and the mean square of that."""
        gains = gains_of(power)
        mean, square = (sweep.total(torch.stack([gains.sum(), gains.square().sum()])) / rows).tolist()
        return mean, square

    gains = {power: gain(power) for power in _POWERS}
    step = _POWERS[1] - _POWERS[0]
    for _ in range(_HALVINGS):
        best, step = max(gains, key=lambda power: gains[power][0]), step / 2
        gains |= {power: gain(power) for power in (best - step, best + step)}
    best = max(gains, key=lambda power: gains[power][0])
    gained, square = gains[best]
    of_rows = float(
        error_of_rows(torch.tensor(square, dtype=torch.float64), torch.tensor(gained, dtype=torch.float64), int(rows))
    )
    of_groups = float(sweep.groups.errors(gains_of(best)[None], known.nonzero()[::every, 0])[0])
    if best == 0 or not gained > noise * decisive(of_rows, of_groups):
        return None
    return Found(float(f"{2.0**best:.6g}"), loss / rows, loss / rows - gained, told(of_rows, of_groups))
