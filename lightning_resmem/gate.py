"""A strength of its own for every prediction: more where the memory has support and the base does not know."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.tasks import Multiclass, Multilabel, Task

# Base probabilities stay this far from 0 and 1, so that their logits are finite.
_MARGIN = 1e-6
# Entries of the predictions that a gate is fitted on; more rows would not change three numbers.
_FIT_ENTRIES = 2**22
# Weight of the squared coefficients beside the sum of losses: keeps them finite where the rows leave them open.
_RIDGE = 1.0


@dataclass(frozen=True)
class Gate:
    """Scales the strength of each prediction by `2 * sigmoid(bias + distance * far + confidence * sure)`.

    `far` is `log(1 + d / sigma)` for the distance `d` to the nearest neighbour, `sure` the logit of the base's largest
    probability (in multilabel tasks of each label's; 0 in regression). Without effect, as `Gate()` is, the factor is
    1; it lies between 0 and 2.

    Args:
        bias: The same for all rows.
        distance: Below 0, the memory counts less where its nearest row is far away.
        confidence: Below 0, the memory counts less where the base is sure.

    Raises:
        InputError: If a value is not a finite number.

    Example:
        >>> gate = Gate(distance=-1.0)
        >>> probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> gate.factors(Multiclass(), probabilities, distances=torch.tensor([0.0, 3.0]), sigma=1.0)
        tensor([[1.0000],
                [0.4000]])
    """

    bias: float = 0.0
    distance: float = 0.0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bias", "distance", "confidence"):
            value = getattr(self, name)
            try:
                if isinstance(value, str | bytes | bool):
                    raise TypeError
                number = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                raise InputError(f"{name}={value!r} is not a number: give one, 0 has no effect.") from None
            if not math.isfinite(number):
                raise InputError(f"{name}={value!r} is not finite: give a number, 0 has no effect.")
            object.__setattr__(self, name, number)

    def factors(self, task: Task, base: Tensor, distances: Tensor, sigma: float) -> Tensor:
        """What to multiply `strength` by.

        Args:
            task: Of the memory.
            base: Base predictions, shape `(B, C)`.
            distances: To the nearest neighbour, shape `(B,)`; `inf` where there is none.
            sigma: The kernel width, a distance.

        Returns:
            Shape `(B, 1)`, or `(B, C)` in multilabel tasks; between 0 and 2.
        """
        coefficients = base.new_tensor([self.bias, self.distance, self.confidence])
        return _factors(coefficients, *_features(task, base, distances, sigma))


@dataclass(frozen=True)
class GateFit:
    """A gate, and what it does for rows that it was not fitted on.

    Attributes:
        gate: Fitted on all rows.
        loss: Mean loss of rows that each fold's gate has not seen.
        constant_loss: Their mean loss with the constant strength.
        error: Standard error of `loss - constant_loss`.
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
    folds: int = 5,
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
        folds: Parts that the rows are divided into.
    """
    # The trainer may be in inference mode, whose tensors have no gradients; clones made outside of it do.
    with torch.inference_mode(False), torch.enable_grad():
        every = max(1, math.ceil(base.numel() / _FIT_ENTRIES))
        base, residual = base[::every].double().clone(), strength * residual[::every].double()
        targets = targets[::every].clone()
        features = _features(task, base, distances[::every].clone(), sigma)

        def predict(coefficients: Tensor, rows: Tensor) -> Tensor:
            return base[rows] + _factors(coefficients, *(part[rows] for part in features)) * residual[rows]

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
        fold = torch.arange(count, device=base.device) % folds
        everything = torch.arange(count, device=base.device)
        gained, scored, losses = (base.new_zeros(count) for _ in range(3))
        for held_out in (everything[fold == part] for part in range(min(folds, count))):
            rest = everything[fold != fold[held_out[0]]]
            coefficients = fit(rest) if len(rest) else base.new_zeros(3)
            gated, constant = (predict(c, held_out) for c in (coefficients, torch.zeros_like(coefficients)))
            losses[held_out] = task.loss(gated, base[held_out], targets[held_out])
            gained[held_out] = task.loss(constant, base[held_out], targets[held_out]) - losses[held_out]
            difference = task.score(gated, targets[held_out]) - task.score(constant, targets[held_out])
            scored[held_out] = difference.double() if task.higher_is_better else -difference.double()
        gain, loss, score_gain = gained.mean().item(), losses.mean().item(), scored.mean().item()
        error = gained.std().item() / math.sqrt(count) if count > 1 else math.inf
        # Six digits fit any use, and hide what differs between two machines.
        gate = Gate(*(float(f"{value:.6g}") for value in fit(everything).tolist()))
        return GateFit(gate, loss, loss + gain, error, score_gain, gain > error and score_gain >= 0)


def _features(task: Task, base: Tensor, distances: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """`far` `(B, 1)` and `sure` `(B, 1)` or `(B, C)`."""
    # A row without neighbours has no residual either: any finite number will do.
    distances = distances.to(base).where(distances.to(base).isfinite(), 0)
    far = torch.log1p(distances / sigma)[:, None]
    if isinstance(task, Multiclass):
        return far, torch.logit(base.amax(dim=1, keepdim=True), eps=_MARGIN)
    if isinstance(task, Multilabel):
        return far, torch.logit(torch.maximum(base, 1 - base), eps=_MARGIN)
    return far, torch.zeros_like(far)


def _factors(coefficients: Tensor, far: Tensor, sure: Tensor) -> Tensor:
    bias, distance, confidence = coefficients
    return 2 * torch.sigmoid(bias + distance * far + confidence * sure)
