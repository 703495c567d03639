"""The settings of a grid, those between them, and the one to choose."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.metrics import noise
from lightning_resmem.params import ResMemParams
from lightning_resmem.tuning import selection
from lightning_resmem.tuning.objectives import MetricObjective
from lightning_resmem.tuning.rows import Measured
from lightning_resmem.tuning.sweep import Sweep


class Axes(NamedTuple):
    """Candidates for each number."""

    k: tuple[int, ...]
    sigma: tuple[float, ...]
    softmax_temperature: tuple[float, ...]
    strength: tuple[float, ...]

    def settings(self) -> list[ResMemParams]:
        """Every combination whose strength is above 0."""
        combinations = itertools.product(self.softmax_temperature, self.sigma, self.k, self.strength)
        return [ResMemParams(k, sigma, t, strength) for t, sigma, k, strength in combinations if strength]

    def around(self, center: ResMemParams, most_k: int) -> "Axes":
        """Half a step below a setting, the setting, and half a step above; beyond the last candidate as well."""
        k = {round(value) for value in _half_steps(self.k, center.k)}
        return Axes(
            tuple(sorted(min(max(value, 1), most_k) for value in k)),
            _half_steps(self.sigma, center.sigma),
            _half_steps(self.softmax_temperature, center.softmax_temperature),
            _half_steps(self.strength, center.strength),
        )


class Choice(NamedTuple):
    """A setting, by its place in the table, and why it is not another one."""

    place: int
    note: str | None


class GridSearch:
    """Measures settings, and chooses among those it has measured; the first is the base.

    Args:
        sweep: Of the tuning rows.
        metric: What is to be high or low; None for the task's own score, or its loss.
        by_loss: Whether the loss is the objective.
        noise: How many standard errors count as noise.
        most_lost: Largest share of answers that may be lost, if there is one.
    """

    def __init__(
        self, sweep: Sweep, metric: MetricObjective | None, by_loss: bool, noise: float, most_lost: float | None
    ) -> None:
        self._sweep, self._metric = sweep, metric
        self._by_loss, self._noise, self._most_lost = by_loss, noise, most_lost
        self.settings: list[ResMemParams] = []
        self._measured: list[Measured] = []
        self._values: list[Tensor] = []
        self.add([ResMemParams(k=sweep.ks[-1], sigma=sweep.scale, strength=0.0)])
        self.rows = sweep.num_rows

    def add(self, settings: Sequence[ResMemParams]) -> None:
        """Measure settings that were not measured before."""
        known = set(self.settings)
        new = [setting for setting in dict.fromkeys(settings) if setting not in known]
        self.settings += new
        self._measured.append(self._sweep.measure(new))
        if self._metric is not None:
            self._values.append(self._sweep.values(new, self._metric))
            if len(self.settings) == 1 and self._values[0].isnan():
                raise InputError(f"objective={self._metric.name} is NaN for the base on these rows: give more of them.")

    def explore(self, axes: Axes, refinements: int) -> int:
        """Measure a grid, and finer ones around its best setting; returns how many settings these have."""
        self.add(axes.settings())
        before = len(self.settings)
        for _ in range(refinements):
            favourite = self.favourite()
            if favourite:
                axes = axes.around(self.settings[favourite], self._sweep.ks[-1])
                self.add(axes.settings())
        return len(self.settings) - before

    @property
    def measured(self) -> Measured:
        """Of all settings."""
        return Measured(*(torch.cat(parts) for parts in zip(*self._measured, strict=True)))

    @property
    def objective(self) -> Tensor:
        """What is to be high or low, of all settings."""
        if self._metric is not None:
            return torch.cat(self._values)
        return self.measured.loss if self._by_loss else self.measured.score

    def favourite(self) -> int:
        """The setting to refine the grid around: the choice, were there no noise."""
        return self._choose(self._most_lost)[0]

    def choice(self) -> Choice:
        """The setting to use, 0 if no other one helps."""
        index, evident = self._choose(self._most_lost)
        if index and evident:
            return Choice(index, None)
        if self._most_lost is not None:
            free, evident = self._choose(None)
            if free and evident:
                lost = float(self.measured.lost[free])
                return Choice(
                    0,
                    f"no setting helps within max_negative_flip_rate={self._most_lost:g} (without that bound the best "
                    f"one loses {lost:.4f} of the answers)",
                )
        gain = float(self._gain()[index])
        if index and gain > 0 and not self._by_loss:
            return Choice(0, f"the best setting's gain of {gain:.4f} is within the noise")
        return Choice(0, None)

    def gain_error(self, index: int) -> float:
        """Standard error of the gain in score; NaN where groups of rows are too few to tell."""
        if index == 0:
            return 0.0
        measured = self.measured
        gain = measured.score - measured.score[0]
        of_rows = float(noise.error_of_rows(measured.squares, gain, self.rows)[index])
        return noise.told(of_rows, self._errors_of_groups(index)[0])

    def table(self) -> list[dict[str, float]]:
        """A row per setting."""
        measured = self.measured
        columns = (measured.score, measured.loss, measured.lost, self.objective)
        rows = zip(self.settings, *(column.tolist() for column in columns), strict=True)
        table: list[dict[str, float]] = [
            {
                "k": setting.k,
                "sigma": setting.sigma,
                "softmax_temperature": setting.softmax_temperature,
                "strength": setting.strength,
                "score": score,
                "loss": loss,
                "negative_flip_rate": lost,
                "objective": value,
            }
            for setting, score, loss, lost, value in rows
        ]
        if not self._sweep.counts_flips:
            for row in table:
                del row["negative_flip_rate"]
        return table

    def _gain(self) -> Tensor:
        """Of the objective over the base, above 0 if better."""
        objective = self.objective
        if self._metric is not None:
            sign = self._metric.sign
        else:
            sign = 1.0 if self._sweep.task.higher_is_better and not self._by_loss else -1.0
        return (sign * (objective - objective[0])).nan_to_num(-math.inf)

    def _choose(self, most_lost: float | None) -> tuple[int, bool]:
        """The best setting as far as noise lets one tell, and whether it helps."""
        measured, gain = self.measured, self._gain()
        error = noise.error_of_rows(measured.squares, measured.score - measured.score[0], self.rows)
        found = selection.candidates(measured, gain, error, self.rows, most_lost)
        if self._by_loss:
            index = selection.least_loss(found, found.allowed.nonzero()[:, 0])
            return index, self._is_evident(found, index)
        if self._metric is None:
            of_groups = self._sweep.score_errors(torch.arange(len(self.settings)), 0)
            found = found._replace(gain_error=torch.fmax(error, of_groups))
        best = selection.best_gain(found)
        if self._metric is not None:
            of_best = self._sweep.value_error(self.settings[best], self._metric) if best else 0.0
            found = found._replace(gain_error=torch.full_like(gain, of_best))
        equal = selection.near_best(found, best, self._noise)
        if self._metric is None and self._noise and len(equal) > 1:
            equal = equal[self._within_noise(equal, best, gain)]
        index = selection.least_loss(found, equal)
        return index, self._is_evident(found, index)

    def _is_evident(self, found: selection.Candidates, index: int) -> bool:
        """Whether a setting helps by more than the noise of rows, and of their groups."""
        loss_error = found.loss_error.clone()
        loss_error[index] = noise.decisive(float(loss_error[index]), self._errors_of_groups(index)[1])
        return selection.is_evident(found._replace(loss_error=loss_error), index, self._noise, self._by_loss)

    def _errors_of_groups(self, index: int) -> list[float]:
        """Standard errors of the gains in score and loss as `Groups.errors` has them."""
        sweep = self._sweep
        if not index or not sweep.groups.count:
            return [0.0, 0.0]
        errors: list[float] = sweep.groups.errors(sweep.gains(self.settings[index])).tolist()
        return errors

    def _within_noise(self, indices: Tensor, best: int, gain: Tensor) -> Tensor:
        """Which settings are within the noise of the best one, by the differences of the rows; `(n,)`, bool."""
        squares = self._sweep.squared_differences(indices, best)
        below = gain[best] - gain[indices]
        error = torch.fmax(noise.error_of_rows(squares, below, self.rows), self._sweep.score_errors(indices, best))
        return below <= self._noise * error + 1e-9


def _half_steps(candidates: Sequence[float], center: float) -> tuple[float, ...]:
    """The centre between the geometric means with its neighbours; steps go on beyond the ends."""
    ordered = sorted({*candidates, center})
    if len(ordered) == 1:
        return (center,)
    place = ordered.index(center)
    above = ordered[place + 1] if place + 1 < len(ordered) else center * center / ordered[place - 1]
    below = ordered[place - 1] if place else center * center / above
    # Six digits fit any use, and hide what differs between two machines.
    return tuple(
        float(f"{math.sqrt(other * center):.6g}") if other != center else center for other in (below, center, above)
    )
