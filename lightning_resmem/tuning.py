"""Choose k, sigma, softmax_temperature and strength on validation rows: one search, then arithmetic."""

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.functional import combine, neighbor_weights
from lightning_resmem.memory.base import ResidualMemory
from lightning_resmem.memory.checks import as_tensor, check_shapes
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Task, check_finite

Gather = Callable[[Tensor], Tensor]

# Validation rows below which a choice says little.
_FEW_ROWS = 50


@dataclass(frozen=True)
class TuningResult:
    """What a tuner chose, and what it gained on the rows it was given.

    Attributes:
        params: The choice; `strength` 0 if the memory did not help.
        table: One row per setting: `k`, `sigma`, `softmax_temperature`, `strength`, the mean `score` (accuracy, or mean
            squared error in regression) and the mean `loss`.
        base_score: Score of the base model alone.
        score: Score of the choice.
        score_name: `"acc"` or `"mse"`.
        rows: Number of validation rows, over all ranks.
        gain_error: Standard error of `score - base_score`, from the differences of the rows; 0 if the choice is the
            base alone, inf for a single row. It leaves out that the best of many settings looks better than it is.
    """

    params: ResMemParams
    table: list[dict[str, float]] = field(repr=False)
    base_score: float
    score: float
    score_name: str
    rows: int
    gain_error: float

    def summary(self) -> str:
        """The choice and the gain, as one sentence."""
        compared = f"{self.score_name} {self.base_score:.4f} -> {self.score:.4f}"
        where = f"on {self.rows} validation row{'' if self.rows == 1 else 's'}"
        if self.params.strength == 0:
            compared = f"{compared} {where}"
            return f"the memory does not help ({len(self.table)} settings, {compared}): strength 0, the base alone"
        params = self.params
        return (
            f"chose k={params.k}, sigma={params.sigma:.4g}, softmax_temperature={params.softmax_temperature:g}, "
            f"strength={params.strength:g} of {len(self.table)} settings: {compared} "
            f"({self.score - self.base_score:+.4f} ± {self.gain_error:.4f}) {where}"
        )


class Tuner(ABC):
    """Chooses the params of a memory."""

    @abstractmethod
    def tune(
        self,
        memory: ResidualMemory,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        gather: Gather = lambda rows: rows,
    ) -> TuningResult:
        """Choose params on validation rows; the memory is not changed.

        NumPy arrays and nested lists work where tensors do.

        Args:
            memory: Filled with training rows.
            embeddings: Of this rank's validation rows, shape `(V, D)`.
            outputs: What the head returned for them, shape `(V, C)`.
            targets: Their targets, as the memory's task wants them.
            gather: Concatenates a tensor `(n, ...)` over all ranks, so that every rank makes the same choice.
        """


class GridTuner(Tuner):
    """Tries every combination; ties in accuracy are broken by the loss. `strength` 0 is always a candidate.

    Args:
        k: Numbers of neighbours; those beyond the memory's rows are cut to them.
        sigma: Kernel widths, in multiples of the measured median distance between a validation row and its 10 nearest
            training rows.
        softmax_temperature: Divisors of the logits (without effect, and not tried, in regression).
        strength: Factors of the weighted residual.
        objective: `"accuracy"` (the mean squared error in regression), or `"nll"`, the negative log-likelihood.

    Raises:
        InputError: If a candidate is out of range or there is none.

    Example:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory()
        >>> memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> result = GridTuner(k=[1]).tune(memory, torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> result.base_score, result.score
        (0.5, 1.0)
    """

    def __init__(
        self,
        k: Sequence[int] = (5, 10, 20, 50, 100, 200),
        sigma: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        softmax_temperature: Sequence[float] = (0.7, 1.0, 1.4, 2.0),
        strength: Sequence[float] = (0.25, 0.5, 0.75, 1.0),
        objective: Literal["accuracy", "nll"] = "accuracy",
    ) -> None:
        if objective not in ("accuracy", "nll"):
            raise InputError(f'objective={objective!r} is not known: give "accuracy" or "nll".')
        grid = {"k": k, "sigma": sigma, "softmax_temperature": softmax_temperature, "strength": strength}
        for name, candidates in grid.items():
            if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
                raise InputError(f"{name}={candidates!r}: give a list of candidates, at least one.")
            for candidate in candidates:
                replace(ResMemParams(), **{name: candidate})  # type: ignore[arg-type]
        self.k, self.sigma = tuple(k), tuple(sigma)
        self.softmax_temperature, self.strength = tuple(softmax_temperature), tuple(strength)
        self.objective = objective

    def tune(
        self,
        memory: ResidualMemory,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        gather: Gather = lambda rows: rows,
    ) -> TuningResult:
        embeddings, outputs = as_tensor("embeddings", embeddings), as_tensor("outputs", outputs)
        targets = as_tensor("targets", targets)
        check_shapes(embeddings, outputs, targets, None)
        check_finite("outputs", outputs)
        targets = memory.task.check_targets(targets, outputs.shape[1])
        rows = int(gather(torch.tensor([len(targets)])).sum())
        if not rows:
            raise InputError("embeddings has no rows: tuning needs at least one validation row.")
        grid = _Evaluation(memory, embeddings, outputs, targets, self.k, gather)
        base = ResMemParams(k=grid.ks[-1], sigma=grid.scale, strength=0.0)
        settings = [base, *self._settings(memory.task, grid)]
        means = gather(grid.sums(settings)[None]).sum(dim=0) / rows  # (settings, 2)
        best = self._best(means, memory.task.higher_is_better)
        table: list[dict[str, Any]] = [
            {
                "k": setting.k,
                "sigma": setting.sigma,
                "softmax_temperature": setting.softmax_temperature,
                "strength": setting.strength,
                "score": score,
                "loss": loss,
            }
            for setting, (score, loss) in zip(settings, means.tolist(), strict=True)
        ]
        gain = table[best]["score"] - table[0]["score"]
        squares = float(gather(grid.squared_deviations(base, settings[best], gain)).sum())
        result = TuningResult(
            params=settings[best],
            table=table,
            base_score=table[0]["score"],
            score=table[best]["score"],
            score_name=memory.task.score_name,
            rows=rows,
            gain_error=0.0 if best == 0 else math.sqrt(squares / (rows - 1) / rows) if rows > 1 else math.inf,
        )
        few = (
            f" A choice on fewer than {_FEW_ROWS} rows is mostly chance: give more validation rows, or set the params "
            "yourself."
        )
        if best == 0 or rows < _FEW_ROWS:
            warning = f"ResMem tuning: {result.summary()}.{few if rows < _FEW_ROWS else ''}"
            warnings.warn(warning, ResMemWarning, stacklevel=2)
        return result

    def _settings(self, task: Task, grid: "_Evaluation") -> list[ResMemParams]:
        temperatures = self.softmax_temperature if task.uses_softmax_temperature else (1.0,)
        return [
            ResMemParams(k, sigma * grid.scale, temperature, strength)
            for temperature, k, sigma, strength in itertools.product(temperatures, grid.ks, self.sigma, self.strength)
            if strength
        ]

    def _best(self, means: Tensor, higher_is_better: bool) -> int:
        """The first of the best settings; means that differ by rounding are equal, on any number of ranks."""
        scores, losses = means[:, 0].tolist(), means[:, 1].tolist()
        sign = -1.0 if higher_is_better else 1.0
        keys = [(round(sign * score, 9), round(loss, 9)) for score, loss in zip(scores, losses, strict=True)]
        if self.objective == "nll":
            keys = [(loss, score) for score, loss in keys]
        return min(range(len(keys)), key=keys.__getitem__)


class _Evaluation:
    """One search with the largest k; then any setting is arithmetic on what it found."""

    def __init__(
        self,
        memory: ResidualMemory,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        ks: Sequence[int],
        gather: Gather,
    ) -> None:
        self.ks = sorted({min(k, len(memory)) for k in ks})
        self._task, self._outputs, self._targets = memory.task, outputs, targets
        neighbors = memory.search(embeddings, self.ks[-1])
        self._distances = neighbors.distances
        ids, positions = neighbors.ids.unique(return_inverse=True)
        known = ids[ids >= 0]  # an approximate index may leave places empty
        positions = positions.reshape(neighbors.ids.shape) - (len(ids) - len(known))
        self._positions = positions.to(memory.device)
        self._values = memory.fetch(known)
        if outputs.shape[1] != self._values.num_outputs:
            raise InputError(
                f"outputs has {outputs.shape[1]} columns, the memory was filled with {self._values.num_outputs}."
            )
        near = neighbors.distances[:, :10]
        near = near.where(near.isfinite(), torch.nan).nanmean(dim=1)
        self.scale = float(gather(near).nanmedian()) or 1.0

    def sums(self, settings: Sequence[ResMemParams]) -> Tensor:
        """Sums of score and loss over the rows for each setting, shape `(len(settings), 2)`, float64."""
        sums = torch.zeros(len(settings), 2, dtype=torch.float64)
        if not len(self._targets):
            return sums
        for index, (combined, base) in enumerate(self._predictions(settings)):
            sums[index, 0] = self._task.score(combined, self._targets).sum(dtype=torch.float64)
            sums[index, 1] = self._task.loss(combined, base, self._targets).sum(dtype=torch.float64)
        return sums

    def squared_deviations(self, base: ResMemParams, choice: ResMemParams, gain: float) -> Tensor:
        """Sum over the rows of `(score of the choice - score of the base - gain) ** 2`, shape `(1,)`, float64."""
        if not len(self._targets):
            return torch.zeros(1, dtype=torch.float64)
        before, after = (
            self._task.score(combined, self._targets).double() for combined, _ in self._predictions([base, choice])
        )
        return (after - before - gain).square().sum()[None].cpu()

    def _predictions(self, settings: Sequence[ResMemParams]) -> Iterator[tuple[Tensor, Tensor]]:
        """The combined and the base prediction, both `(V, C)`, of each setting."""
        base = residual = None
        previous: ResMemParams | None = None
        for setting in settings:
            # Settings come ordered, so what they share with the one before is not computed again.
            if previous is None or setting.softmax_temperature != previous.softmax_temperature:
                base, previous = self._task.predict(self._outputs, setting.softmax_temperature), None
            if previous is None or (setting.k, setting.sigma) != (previous.k, previous.sigma):
                weights = neighbor_weights(self._distances[:, : setting.k], setting.sigma)
                residual = self._values.residual_sum(
                    self._positions[:, : setting.k], weights.to(self._positions.device), setting.softmax_temperature
                )
            assert base is not None
            assert residual is not None
            yield combine(base, residual.to(base.device), setting.strength), base
            previous = setting
