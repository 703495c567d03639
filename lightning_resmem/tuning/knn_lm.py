"""The best that kNN-LM does on the rows that ResMem is tuned on."""

from dataclasses import replace

from lightning_resmem.tuning.grid import Axes, GridSearch
from lightning_resmem.tuning.result import TuningResult

# From nothing but the base to almost nothing but the neighbours.
SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7)


def with_knn_lm(result: TuningResult, grid: GridSearch, axes: Axes, refinements: int) -> TuningResult:
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
