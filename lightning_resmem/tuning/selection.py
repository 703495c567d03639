"""Which of many measured settings to choose: not the luckiest one, and none if all that it has is luck."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.metrics.noise import error_of_rows
from lightning_resmem.tuning.rows import Measured

# A gain in score alone has to exceed so many times the noise; beside a lower loss it does not have to.
_SCORE_ALONE = 2.0
# Means that differ by less are equal: their sums over other ranks are rounded otherwise.
_DIGITS = 9


class Candidates(NamedTuple):
    """Settings in the order in which they are preferred if they are equal; the first is the base.

    Attributes:
        gain: Of the objective over the base, above 0 if better; shape `(S,)`.
        gain_error: Its standard error, shape `(S,)`.
        loss: Shape `(S,)`.
        loss_gain: Over the base at the same softmax_temperature, shape `(S,)`.
        loss_error: Its standard error, shape `(S,)`.
        allowed: Those that do not lose too many answers, shape `(S,)`, bool.
    """

    gain: Tensor
    gain_error: Tensor
    loss: Tensor
    loss_gain: Tensor
    loss_error: Tensor
    allowed: Tensor


def candidates(measured: Measured, gain: Tensor, gain_error: Tensor, rows: int, most_lost: float | None) -> Candidates:
    """What there is to choose from.

    Args:
        measured: Of every setting, the base first.
        gain: Of the objective over the base, shape `(S,)`.
        gain_error: Its standard error, shape `(S,)`.
        rows: Of all ranks.
        most_lost: Largest share of answers that may be lost, if there is one.
    """
    allowed = torch.ones_like(gain, dtype=torch.bool)
    if most_lost is not None:
        allowed = _rounded(measured.lost) <= most_lost
    loss_error = error_of_rows(measured.loss_squares, measured.loss_gain, rows)
    return Candidates(gain, gain_error, measured.loss, measured.loss_gain, loss_error, allowed)


def best_gain(found: Candidates) -> int:
    """The allowed setting with the largest gain; of equal ones that with the lowest loss, then the first."""
    gain, loss = _rounded(found.gain), _rounded(found.loss)
    return _first_of_least(loss, found.allowed & (gain == gain[found.allowed].max()))


def near_best(found: Candidates, best: int, noise: float) -> Tensor:
    """Settings whose gain can be within `noise` standard errors of the best one's, and is none below 0: `(n,)`.

    The error of a difference is at most the sum of the errors.
    """
    errors = (noise * (found.gain_error + found.gain_error[best])).nan_to_num(0.0, posinf=torch.inf)  # 0 * inf
    within = found.gain[best] - found.gain <= errors + 10**-_DIGITS
    near: Tensor = within & found.allowed & (_rounded(found.gain) >= 0)
    return near.nonzero()[:, 0]


def least_loss(found: Candidates, equal: Tensor) -> int:
    """The setting with the lowest loss among those in `equal` `(n,)`."""
    pool = torch.zeros_like(found.allowed)
    pool[equal] = True
    return _first_of_least(_rounded(found.loss), pool)


def is_evident(found: Candidates, index: int, noise: float, by_loss: bool) -> bool:
    """Whether a setting helps by more than noise: its score by twice of it, or its loss while the score is no worse.

    Args:
        found: Settings to choose from.
        index: Of the setting.
        noise: How many standard errors count as noise.
        by_loss: Whether the loss alone matters.
    """
    gain, loss_gain = (float(_rounded(part)[index]) for part in (found.gain, found.loss_gain))
    lower_loss = loss_gain > max(0.0, noise * float(found.loss_error[index]))
    if by_loss:
        return lower_loss
    return gain > max(0.0, _SCORE_ALONE * noise * float(found.gain_error[index])) or (gain >= 0 and lower_loss)


def _rounded(values: Tensor) -> Tensor:
    return values.round(decimals=_DIGITS)


def _first_of_least(values: Tensor, pool: Tensor) -> int:
    return int(values.where(pool, torch.inf).argmin())
