"""A strength of its own for every prediction: more where the memory has support and the base does not know."""

import math
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from lightning_resmem.functional import combine
from lightning_resmem.metrics.functional import negative_flip_rate
from lightning_resmem.metrics.noise import Groups, decisive, plus_minus, told
from lightning_resmem.params import Gate, gate_factors, gate_features
from lightning_resmem.tasks import Task
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.sweep import Sweep

# Entries of the predictions that a gate is fitted on; more rows would not change three numbers.
_FIT_ENTRIES = 2**22
# Parts that the rows are divided into.
_FOLDS = 5
# Weight of the squared coefficients beside the sum of losses: keeps them finite where the rows leave them open.
_RIDGE = 1.0


@dataclass(frozen=True)
class GateFit:
    """A gate, and what it does for rows that it was not fitted on.

    Attributes:
        gate: Fitted on all rows.
        loss: Mean loss of rows that each fold's gate has not seen.
        constant_loss: Their mean loss with the constant strength.
        error: Standard error of `loss - constant_loss`; NaN where groups of rows are too few to tell.
        score_gain: Mean score of the same rows minus that with the constant strength.
        helps: Whether the loss falls by more than its standard error, and the score does not get worse.
    """

    gate: Gate
    loss: float
    constant_loss: float
    error: float
    score_gain: float
    helps: bool


def fit_gate(
    task: Task,
    base: Tensor,
    residual: Tensor,
    distances: Tensor,
    targets: Tensor,
    sigma: float,
    strength: float,
    groups: Tensor | None = None,
) -> GateFit:
    """Fit a gate by the loss, and compare it with the constant strength by cross-validation.

    Args:
        task: Of the memory.
        base: Base predictions, shape `(V, C)`.
        residual: Weighted residuals, shape `(V, C)`.
        distances: To the nearest neighbour, shape `(V,)`.
        targets: As the task wants them.
        sigma: The kernel width, a distance.
        strength: The constant; the gated strength lies between 0 and twice of it.
        groups: Which rows go right or wrong together, shape `(V,)`, 0, 1, ...: they are left out together.
    """
    # The trainer may be in inference mode, whose tensors have no gradients; clones made outside of it do.
    with torch.inference_mode(False), torch.enable_grad():
        every = max(1, math.ceil(base.numel() / _FIT_ENTRIES))
        base, residual = base[::every].double().clone(), strength * residual[::every].double()
        targets = targets[::every].clone()
        features = gate_features(task, base, distances[::every].clone(), sigma)

        def predict(coefficients: Tensor, rows: Tensor) -> Tensor:
            return base[rows] + gate_factors(coefficients, *(part[rows] for part in features)) * residual[rows]

        def fit(rows: Tensor) -> Tensor:
            coefficients = base.new_zeros(3, requires_grad=True)
            optimizer = torch.optim.LBFGS([coefficients], max_iter=100, line_search_fn="strong_wolfe")

            def closure() -> Tensor:
                optimizer.zero_grad()
                losses = task.loss(predict(coefficients, rows), base[rows], targets[rows])
                total = losses.mean() + _RIDGE * coefficients.square().sum() / len(rows)
                total.backward()
                return total

            optimizer.step(closure)
            return coefficients.detach()

        count = len(base)
        everything = torch.arange(count, device=base.device)
        together = None if groups is None else groups[::every].to(base.device)
        fold = (everything if together is None else together) % _FOLDS
        gained, scored, losses = (base.new_zeros(count) for _ in range(3))
        for held_out in (everything[fold == part] for part in fold.unique()):
            rest = everything[fold != fold[held_out[0]]]
            coefficients = fit(rest) if len(rest) else base.new_zeros(3)
            gated, constant = (predict(c, held_out) for c in (coefficients, torch.zeros_like(coefficients)))
            losses[held_out] = task.loss(gated, base[held_out], targets[held_out])
            gained[held_out] = task.loss(constant, base[held_out], targets[held_out]) - losses[held_out]
            difference = task.score(gated, targets[held_out]) - task.score(constant, targets[held_out])
            scored[held_out] = difference.double() if task.higher_is_better else -difference.double()
        gain, loss, score_gain = gained.mean().item(), losses.mean().item(), scored.mean().item()
        of_rows = gained.std().item() / math.sqrt(count) if count > 1 else math.inf
        of_groups = float(Groups(together).errors(gained[None])[0])
        helps = gain > decisive(of_rows, of_groups) and score_gain >= 0
        # Six digits fit any use, and hide what differs between two machines.
        gate = Gate(*(float(f"{value:.6g}") for value in fit(everything).tolist()))
        return GateFit(gate, loss, loss + gain, told(of_rows, of_groups), score_gain, helps)


def with_gate(result: TuningResult, sweep: Sweep, most_lost: float | None) -> TuningResult:
    """A tuner's result with a gate, if that helps for rows that it was not fitted on.

    Args:
        result: Without a gate.
        sweep: That the result comes from.
        most_lost: Largest share of answers that may be lost, if there is one.
    """
    task, params, rows = sweep.task, result.params, sweep.pooled(result.params)
    fit = fit_gate(task, *rows[:4], sigma=params.sigma, strength=params.strength, groups=rows.groups)
    numbers = [*astuple(fit.gate), fit.loss, fit.constant_loss, fit.error, fit.helps]
    *coefficients, loss, constant_loss, error, helps = sweep.agreed(numbers)
    gate = Gate(*coefficients)
    combined = combine(
        rows.base, rows.residual, params.strength * gate.factors(task, rows.base, rows.distances, params.sigma)
    )
    scores, before = task.score(combined, rows.targets).double(), task.score(rows.base, rows.targets).double()
    gains = scores - before
    lost = 0.0
    if sweep.counts_flips:
        lost = float(negative_flip_rate(rows.base, combined, rows.targets))
    of_rows = float(gains.std()) / math.sqrt(len(gains)) if len(gains) > 1 else math.inf
    gain_error = told(of_rows, float(Groups(rows.groups).errors(gains[None])[0]))
    score, gain_error, lost = sweep.agreed([float(scores.mean()), gain_error, lost])
    compared = f"loss {constant_loss:.4f} -> {loss:.4f} ({plus_minus(error)}) on rows that it was not fitted on"
    if not helps:
        return replace(result, notes=(*result.notes, f"the gate does not help ({compared}): none is used"))
    if most_lost is not None and lost > most_lost:
        note = f"the gate loses {lost:.4f} of the answers, more than max_negative_flip_rate={most_lost:g}: none is used"
        return replace(result, notes=(*result.notes, note))
    return replace(
        result,
        params=replace(params, gate=gate),
        score=score,
        gain_error=gain_error,
        notes=(*result.notes, f"with a gate, {compared}"),
    )
