"""Choose k, sigma, softmax_temperature and strength on validation rows: one search, then arithmetic."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.token_ids import of_sequences
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Multiclass, Regression, Task
from lightning_resmem.tuning.balance import measure_balance
from lightning_resmem.tuning.calibration import with_temperature
from lightning_resmem.tuning.gate import with_gate
from lightning_resmem.tuning.grid import Axes, GridSearch
from lightning_resmem.tuning.interpolation import Residuals, measure_residuals
from lightning_resmem.tuning.objectives import check_objective, check_task, make_objective
from lightning_resmem.tuning.own_rows import drawn_rows
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.rows import checked_rows
from lightning_resmem.tuning.sweep import Gather, Sweep

# Validation rows that may be found in the memory: so many, and this share of them; data sets hold a few rows twice.
_FEW_KNOWN_ROWS, _FEW_KNOWN_SHARE = 5, 0.01
# Tuning rows below which a choice says little.
_FEW_ROWS = 50

# From nothing but the base to almost nothing but the neighbours.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


class Tuner(ABC):
    """Chooses the params of a memory.

    Examples:
        >>> sorted(Tuner.__abstractmethods__)  # what a tuner of yours has to have
        ['tune']
    """

    @abstractmethod
    def tune(
        self,
        memory: ResidualMemory,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        gather: Gather = lambda rows: rows,
        ids: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> TuningResult:
        """Choose params on validation rows; the memory is not changed.

        NumPy arrays and nested lists work where tensors do.

        Args:
            memory: Filled with training rows.
            embeddings: Of this rank's validation rows, shape `(V, D)`.
            outputs: What the head returned for them, shape `(V, C)`.
            targets: Their targets, as the memory's task wants them.
            gather: Concatenates a tensor `(n, ...)` over all ranks, so that every rank makes the same choice.
            ids: Shape `(V,)`, if the rows are rows of the memory: then no row is its own neighbour.
            groups: Which rows go right or wrong together, as the positions of a sequence do: the number of its group
                for each row, shape `(V,)`, int64. By default rows are independent; asked at times, those of ten
                stretches of time are together.
        """

    def tune_leave_one_out(
        self,
        memory: ResidualMemory,
        rows: int = 5000,
        seed: int = 0,
        gather: Gather = lambda rows: rows,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> TuningResult:
        """Choose params without validation rows: on rows of the memory, none of which is its own neighbour.

        The base was trained on these rows, so it looks better on them than it is, and the memory less useful. A base
        that fits them perfectly leaves nothing to choose by.

        Args:
            memory: Filled with at least two training rows, the same on all ranks.
            rows: How many are drawn; all, if there are not more.
            seed: Of the draw.
            gather: As for `tune`.
            rank: Which part of the rows is this rank's.
            num_ranks: How many parts there are.

        Raises:
            InputError: If the memory has fewer than two rows, or only those that the base has most wrong.
        """
        check_memory(memory)
        ids = drawn_rows(memory, rows, seed)[rank::num_ranks]
        values = memory.fetch(ids)
        rows_of = memory._query_rows(ids), values.outputs, values.targets
        return self.tune(memory.at_rows(ids), *rows_of, gather, ids, memory.sequences_of(ids))

    def check(self, task: Task) -> None:  # noqa: B027 -- for those that cannot tune every task
        """Raise an error, before any training, if this tuner cannot tune the memory of a task."""

    def rehearse(self, task: Task, outputs: Tensor, targets: Tensor) -> None:  # noqa: B027
        """Raise an error, before any training, if this tuner cannot tune on rows like these.

        Args:
            task: Of the memory.
            outputs: What the head returned for one or two rows, shape `(n, C)`, on the CPU.
            targets: Their targets, as the task stores them.
        """


class GridTuner(Tuner):
    """Tries every combination, and more of them around the best one, on one search; `strength` 0 is always a candidate.

    The highest score of a thousand settings is luck in part. So of all settings whose score is within one standard
    error of the best one's the loss decides, and the memory is kept only if it helps by more than noise: by two
    standard errors of the score, or by one of the loss (with the base at the same `softmax_temperature`) while the
    score is no worse than the base's.

    Args:
        k: Numbers of neighbours; those beyond the memory's rows are cut to them.
        sigma: Kernel widths, in multiples of the measured median distance between a validation row and its 10 nearest
            training rows.
        softmax_temperature: Divisors of the logits (without effect, and not tried, in regression).
        strength: Factors of the weighted residual.
        objective: `"auto"` is accuracy, and of rows that are positions of sequences `"nll"`: there, what is best in
            accuracy may ruin the perplexity. `"accuracy"` (the mean squared error in regression, also called `"mse"`),
            `"balanced_accuracy"`, in which every class counts the same however few its rows (for `Multiclass`),
            `"nll"`, the negative log-likelihood (the squared error in regression), `"f1"`, its mean over classes, or
            any torchmetrics `Metric` of probabilities and targets.
        max_negative_flip_rate: Largest share of the rows (in multilabel tasks: of labels) that the base has right and
            the combined prediction may have wrong. None for no bound.
        refinements: How often the grid is refined around its best setting. A list with one candidate is left alone.
        noise: How many standard errors count as noise. 0 takes the best score as it is.
        gate: Whether to fit a `Gate`, and to keep it if it lowers the loss of rows that it was not fitted on.
        calibrate: Whether to choose a `combined_temperature` by the loss, and to keep it if that falls by more than
            noise. Left out on rows of the memory, which the base is too sure of, and for a metric of your own.

    Raises:
        InputError: If an argument is out of range.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory()
        >>> memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> result = GridTuner(k=[1]).tune(memory, torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> result.base_score, result.score
        (0.5, 1.0)
    """

    def __init__(
        self,
        k: Sequence[int] = (3, 5, 10, 20, 50, 100, 200),
        sigma: Sequence[float] = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
        softmax_temperature: Sequence[float] = (0.7, 1.0, 1.4, 2.0, 2.8),
        strength: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.5),
        objective: str | Metric = "auto",
        max_negative_flip_rate: float | None = None,
        refinements: int = 1,
        noise: float = 1.0,
        gate: bool = False,
        calibrate: bool = True,
    ) -> None:
        grid = {"k": k, "sigma": sigma, "softmax_temperature": softmax_temperature, "strength": strength}
        for name, candidates in grid.items():
            if isinstance(candidates, str) or not isinstance(candidates, Sequence) or not candidates:
                raise InputError(f"{name}={candidates!r}: give a list of candidates, at least one.")
            for candidate in candidates:
                replace(ResMemParams(), **{name: candidate})  # type: ignore[arg-type]
        if not _is_auto(objective):
            check_objective(objective)
        if max_negative_flip_rate is not None and not _is_number(max_negative_flip_rate, 0, 1):
            raise InputError(f"max_negative_flip_rate={max_negative_flip_rate!r}: give a share of 0 to 1, or None.")
        if isinstance(refinements, bool) or not isinstance(refinements, int) or refinements < 0:
            raise InputError(f"refinements={refinements!r}: give a whole number of at least 0.")
        if not _is_number(noise, 0, math.inf):
            raise InputError(f"noise={noise!r}: give a number of standard errors of at least 0.")
        for name, flag in (("gate", gate), ("calibrate", calibrate)):
            if not isinstance(flag, bool):
                raise InputError(f"{name}={flag!r}: give True or False.")
        self.k, self.sigma = tuple(k), tuple(sigma)
        self.softmax_temperature, self.strength = tuple(softmax_temperature), tuple(strength)
        self.objective, self.max_negative_flip_rate = objective, max_negative_flip_rate
        self.refinements, self.noise, self.gate, self.calibrate = refinements, noise, gate, calibrate

    def check(self, task: Task) -> None:
        if not _is_auto(self.objective):
            check_task(self.objective, task)
        if self.max_negative_flip_rate is not None and isinstance(task, Regression):
            raise InputError(
                f"max_negative_flip_rate={self.max_negative_flip_rate} is not for task=Regression(), where no answer "
                "is simply right: leave it out."
            )

    def rehearse(self, task: Task, outputs: Tensor, targets: Tensor) -> None:
        metric = None if _is_auto(self.objective) else make_objective(self.objective, task, outputs.shape[1])
        if metric is not None:
            base = task.predict(outputs)
            metric.rehearse(task.probabilities(base, base), targets)

    @torch.no_grad()
    def tune(
        self,
        memory: ResidualMemory,
        embeddings: Tensor,
        outputs: Tensor,
        targets: Tensor,
        gather: Gather = lambda rows: rows,
        ids: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> TuningResult:
        check_memory(memory)
        self.check(memory.task)
        rows = checked_rows(memory, embeddings, outputs, targets, ids, groups)
        if not int(gather(torch.tensor([len(rows.targets)])).sum()):
            raise InputError("embeddings has no rows: tuning needs at least one validation row.")
        sweep = Sweep(memory, rows, self.k, gather)
        temperatures = self.softmax_temperature if memory.task.uses_softmax_temperature else (1.0,)
        sigmas, strengths = tuple(sigma * sweep.scale for sigma in self.sigma), tuple(s for s in self.strength if s)
        axes = Axes(tuple(sweep.ks), sigmas, temperatures, strengths)
        named = "nll" if of_sequences(memory.provenance) else "accuracy"
        aim = named if _is_auto(self.objective) else self.objective
        metric = make_objective(aim, memory.task, rows.outputs.shape[1])
        by_loss = isinstance(aim, str) and aim == "nll"  # metrics overload ==
        grid = GridSearch(sweep, metric, by_loss, self.noise, self.max_negative_flip_rate)
        refined = grid.explore(axes, self.refinements)
        choice = grid.choice()
        objective, score = grid.objective.tolist(), grid.measured.score.tolist()
        result = TuningResult(
            params=grid.settings[choice.place],
            table=grid.table(),
            base_score=score[0],
            score=score[choice.place],
            score_name=memory.task.score_name,
            rows=sweep.num_rows,
            gain_error=grid.gain_error(choice.place),
            objective=aim if isinstance(aim, str) else type(aim).__name__,
            base_objective=objective[0],
            best_objective=objective[choice.place],
            refined=refined,
            leave_one_out=ids is not None,
            notes=sweep.notes if choice.note is None else (*sweep.notes, choice.note),
        )
        if of_sequences(memory.provenance) and isinstance(memory.task, Multiclass):
            peer = GridSearch(sweep.of_knn_lm(), metric, by_loss, self.noise, self.max_negative_flip_rate)
            result = _with_knn_lm(result, peer, axes, self.refinements)
        if self.gate and choice.place:
            result = with_gate(result, sweep, self.max_negative_flip_rate)
        if self.calibrate and ids is None and isinstance(aim, str):
            result = with_temperature(result, sweep, self.noise)
        result = replace(result, balanced=measure_balance(memory, sweep.rows, sweep, result.params, gather))
        if result.balanced is not None and _unbalances(result):
            note = (
                f"{result.balanced.words}, in which every class counts the same, falls while accuracy does not: "
                f'GridTuner(objective="{result.balanced.objective}") keeps it'
            )
            result = replace(result, notes=(*result.notes, note))
        known = 0 if result.leave_one_out else sweep.known_rows(of_sequences(memory.provenance))
        _warn(result, measure_residuals(memory, sweep.rows, gather), known, of_sequences(memory.provenance))
        return result


def _with_knn_lm(result: TuningResult, grid: GridSearch, axes: Axes, refinements: int) -> TuningResult:
    """A tuner's result with the peer beside it: same objective, rows and neighbours, and the best one, be it luck.

    Args:
        result: Of ResMem.
        grid: Over the sweep's `of_knn_lm`.
        axes: Of ResMem; `k` is what was chosen, as one search is to answer both.
        refinements: As for ResMem.
    """
    grid.explore(axes._replace(k=(result.params.k,), strength=SHARES), refinements)
    place = grid.favourite()
    score, objective = float(grid.measured.score[place]), float(grid.objective[place])
    named = "" if result.objective == "accuracy" else f", {result.objective} {objective:.4f}"
    params = grid.settings[place]
    note = f"kNN-LM with a share of {params.strength:.4g} has {result.score_name} {score:.4f}{named} on these rows"
    return replace(result, knn_lm=params, notes=(*result.notes, note))


def _warn(result: TuningResult, residuals: Residuals, known: int, are_tokens: bool) -> None:
    advice = []
    if known > max(_FEW_KNOWN_ROWS, _FEW_KNOWN_SHARE * result.rows):
        kind, new = "rows are rows of the memory", "rows that are not memorized"
        if are_tokens:
            kind = "tokens are in sequences that the memory holds, or whose windows overlap with its own"
            new = "text that is not memorized"
        advice.append(
            f"{known} of the {result.rows} validation {kind} (the distance to the nearest row is 0, and the label is "
            "the same), which answers them from themselves: the gain is not that of new ones, and may be a loss there. "
            f"Tune on {new}."
        )
    if residuals.vanish:
        unseen = "" if residuals.unseen is None else f", {residuals.unseen:.1%} on rows that it has not seen"
        advice.append(
            f"The base fits the rows of its memory almost perfectly (residuals of {residuals.stored:.1%}{unseen}, 100% "
            "being those of the labels' average), so there is little left to memorize"
            + (", and these rows say nothing about the memory's use for new ones" if result.leave_one_out else "")
            + ". Memorize rows that the base was not trained on instead: give them as memory_dataloader."
        )
    if result.rows < _FEW_ROWS:
        advice.append(
            f"A choice on fewer than {_FEW_ROWS} rows is mostly chance: give more validation rows, or set the params "
            "yourself."
        )
    if result.params.strength == 0 or _unbalances(result) or advice:
        warnings.warn(" ".join([f"ResMem tuning: {result.summary()}.", *advice]), ResMemWarning, stacklevel=4)


def _unbalances(result: TuningResult) -> bool:
    """Whether rare classes pay for the gain of frequent ones, and another objective would not let them."""
    if result.balanced is None or result.objective == result.balanced.objective:
        return False
    return result.balanced.falls and result.gain >= 0


def _is_auto(objective: str | Metric) -> bool:
    return isinstance(objective, str) and objective == "auto"  # metrics overload ==


def _is_number(value: object, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def choose_tuner(tuner: Tuner | Literal["auto"] | None, memory: ResidualMemory) -> Tuner | None:
    """The tuner that an argument stands for."""
    if tuner == "auto":
        return GridTuner() if memory.tunable else None
    if tuner is not None and not isinstance(tuner, Tuner):
        raise InputError(f'tuner={tuner!r} is not a Tuner: give GridTuner(), "auto", or None to keep the params.')
    if tuner is not None:
        tuner.check(memory.task)
    return tuner
