"""What a tuner chose, and what it gained."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from lightning_resmem.metrics.noise import plus_minus
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import Regression
from lightning_resmem.tuning.balance import BalancedScore


class TriedKey(NamedTuple):
    """What a memory gave on the tuning rows with the keys of one place.

    Attributes:
        embedding: The name of the place; `"head"` for the input of the head.
        score: Of its best params.
        loss: Of its best params.
        strength: 0 where such keys did not help.
        chosen: Whether the memory has these keys.
    """

    embedding: str
    score: float
    loss: float
    strength: float
    chosen: bool


@dataclass(frozen=True)
class TuningResult:
    """What a tuner chose, and what it gained on the rows it was given.

    Attributes:
        params: The choice; `strength` 0 if the memory did not help.
        table: One row per setting, the base first: `k`, `sigma`, `softmax_temperature`, `strength`, the mean `score`
            (accuracy, or mean squared error in regression), the mean `loss`, the `negative_flip_rate` (the share of
            answers that the base had right and the setting has wrong; not in regression) and the value of what was
            optimised as `objective`.
        base_score: Score of the base model alone.
        score: Score of the choice.
        score_name: `"acc"` or `"mse"`.
        rows: Number of tuning rows, over all ranks.
        gain_error: Standard error of `gain`: of the rows' differences, or, if that is larger, of those of sequences
            whose positions the rows are, or of ten stretches of time where rows have times; NaN for one or two of
            these, which do not tell. 0 if the choice is the base alone, inf for a single row. It leaves out that the
            best of many settings looks better than it is.
        objective: What was optimised: `"accuracy"`, `"nll"`, ... or the name of the metric.
        base_objective: Its value for the base alone.
        best_objective: Its value for the choice.
        refined: How many of the settings lie between those of the grid, around its best one.
        leave_one_out: Whether the rows were those of the memory itself.
        balanced: Balanced accuracy of base and choice for `Multiclass`, macro F1 for `Multilabel`, else None. Where
            classes are far from uniform, or labels rare, the summary has it.
        knn_lm: Of positions of sequences, how the same neighbours are best read as kNN-LM: `strength` is the share of
            their labels.
        keys: With `embedding="auto"` what each of the places gave; else empty.
        notes: What else there is to say, as sentences without a full stop.

    Examples:
        >>> import torch
        >>> from lightning_resmem import GridTuner, LocalMemory
        >>> rows = torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1])
        >>> memory = LocalMemory()
        >>> memory.add(*rows)
        >>> found = GridTuner(k=[1]).tune(memory, *rows)
        >>> found.params.k, found.base_score, found.score, found.gain
        (1, 0.5, 1.0, 0.5)
    """

    params: ResMemParams
    table: list[dict[str, float]] = field(repr=False)
    base_score: float
    score: float
    score_name: str
    rows: int
    gain_error: float
    objective: str = "accuracy"
    base_objective: float = math.nan
    best_objective: float = math.nan
    refined: int = 0
    leave_one_out: bool = False
    notes: tuple[str, ...] = ()
    balanced: BalancedScore | None = None
    knn_lm: ResMemParams | None = None
    keys: tuple[TriedKey, ...] = ()

    @property
    def gain(self) -> float:
        """How much better the choice's score is than the base's: above 0 is better, also where less of it is."""
        less_is_better = self.score_name == Regression.score_name
        return self.base_score - self.score if less_is_better else self.score - self.base_score

    def summary(self) -> str:
        """The choice and the gain, as one line."""
        compared = f"{self.score_name} {self.base_score:.4f} -> {self.score:.4f}"
        balanced = ""
        if self.balanced is not None and self.balanced.uneven:
            balanced = f", {self.balanced.words} {self.balanced.base:.4f} -> {self.balanced.choice:.4f}"
        kind = "row of the memory, left out of it" if self.leave_one_out else "validation row"
        if self.rows != 1:
            kind = "rows of the memory, each left out of it" if self.leave_one_out else "validation rows"
        where = f"on {self.rows} {kind}"
        notes = "".join(f"; {note}" for note in self.notes)
        if self.params.strength == 0:
            compared = f"{compared}{balanced} {where}"
            return (
                f"the memory does not help ({len(self.table)} settings, {compared}): strength 0, the base alone{notes}"
            )
        params = self.params
        refined = f", {self.refined} of them around the best of the grid" if self.refined else ""
        named = self.objective in ("accuracy", "mse")
        named = named or (balanced != "" and self.balanced is not None and self.objective == self.balanced.objective)
        other = "" if named else f", {self.objective} {self.base_objective:.4f} -> {self.best_objective:.4f}"
        return (
            f"chose k={params.k}, sigma={params.sigma:.4g}, softmax_temperature={params.softmax_temperature:.4g}, "
            f"strength={params.strength:.4g} of {len(self.table)} settings{refined}: {compared} "
            f"({self.gain:+.4f} {plus_minus(self.gain_error)}){other}{balanced} {where}{notes}"
        )
