"""How sure the combined prediction may be: one temperature after combining, by the loss on tuning rows."""

import math
from dataclasses import replace

import torch

from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.sweep import Sweep

# Entries of the predictions that it is chosen on; more rows would not change one number.
_ENTRIES = 2**24
# Candidates are powers of 2: these, and then half a step to either side of the best, so many times.
_POWERS = (-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
_HALVINGS = 4


def with_temperature(result: TuningResult, sweep: Sweep, noise: float) -> TuningResult:
    """A tuner's result with a `combined_temperature`, if that lowers the loss by more than its standard error.

    Args:
        result: Without one.
        sweep: That the result comes from, of rows that the base was not trained on.
        noise: How many standard errors count as noise.
    """
    task = sweep.task
    if not (task.uses_softmax_temperature and result.params.strength):
        return result
    combined, base, targets = sweep.both(result.params)
    every = max(1, math.ceil(base.numel() / _ENTRIES))
    combined, base, targets = combined[::every], base[::every], targets[::every]
    before = task.loss(combined, base, targets).double()
    rows, loss = sweep.total(torch.stack([torch.ones_like(before).sum(), before.sum()])).tolist()

    def gain(power: float) -> tuple[float, float]:
        """By how much the loss falls, and the standard error of that."""
        gains = before - task.loss(task.tempered(combined, base, 2.0**power), base, targets).double()
        mean, squares = (sweep.total(torch.stack([gains.sum(), gains.square().sum()])) / rows).tolist()
        return mean, math.sqrt(max(0.0, squares - mean**2) / (rows - 1)) if rows > 1 else math.inf

    gains = {power: gain(power) for power in _POWERS}
    step = _POWERS[1] - _POWERS[0]
    for _ in range(_HALVINGS):
        best, step = max(gains, key=lambda power: gains[power][0]), step / 2
        gains |= {power: gain(power) for power in (best - step, best + step)}
    best = max(gains, key=lambda power: gains[power][0])
    gained, error = gains[best]
    if best == 0 or not gained > noise * error:
        return result
    temperature = float(f"{2.0**best:.6g}")
    note = (
        f"combined_temperature={temperature:.4g} after combining: loss {loss / rows:.4f} -> {loss / rows - gained:.4f}"
    )
    return replace(
        result,
        params=replace(result.params, combined_temperature=temperature),
        notes=(*result.notes, f"{note} (± {error:.4f})"),
    )
