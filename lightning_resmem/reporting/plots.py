"""What a memory did, as matplotlib figures: no pyplot, no global state, no window."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import CenteredNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import NullLocator, PercentFormatter

from lightning_resmem.errors import check_type
from lightning_resmem.memory.answers import Predictions
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.noise import plus_minus
from lightning_resmem.reporting.summary import counted
from lightning_resmem.tasks import Regression
from lightning_resmem.tuning.result import TuningResult

# Distinguishable without colour vision (Okabe and Ito).
_COLORS = {"base": "#7f7f7f", "knn": "#e69f00", "resmem": "#0072b2"}
_RIGHT, _WRONG = "#009e73", "#d55e00"
_SCORES = {"acc": "accuracy", "mse": "mean squared error"}
_EVALUATION = "an Evaluation, such as ResMemCallback.evaluation after trainer.test"
# Cells of a heat map beyond which their numbers would not be readable.
_READABLE_CELLS = 100


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """A figure as an image, shape `(H, W, 3)`, uint8."""
    check_type("figure", figure, Figure, "a figure; plots return None where there is nothing to show")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def tuning_map(tuning: TuningResult) -> Figure | None:
    """The best score for each `k` and `sigma`, whatever the other params; None if no setting had a memory.

    Values of `k` and `sigma` that were tried in all combinations make the cells; other settings are dots.

    Examples:
        >>> import torch
        >>> from lightning_resmem import GridTuner, LocalMemory
        >>> rows = torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1])
        >>> memory = LocalMemory()
        >>> memory.add(*rows)
        >>> figure = tuning_map(GridTuner(k=[1]).tune(memory, *rows))
        >>> pixels(figure).shape[2]
        3
    """
    check_type("tuning", tuning, TuningResult, "a TuningResult, such as ResMemCallback.tuning after a fit that tuned")
    best = _best_scores(tuning)
    if not best:
        return None
    # Settings around the best one of the grid share some of its values, which would then occur most often.
    grid = _best_scores(tuning, len(tuning.table) - tuning.refined) or best
    ks, sigmas = _grid(k for k, _ in grid), _grid(sigma for _, sigma in grid)
    scores = np.array([[best.get((k, sigma), math.nan) for sigma in sigmas] for k in ks])
    halfrange = max(abs(score - tuning.base_score) for score in best.values()) or 1.0
    style: dict[str, Any] = {
        "norm": CenteredNorm(tuning.base_score, halfrange),
        "cmap": "RdBu" if _is_gain(tuning, 1.0) else "RdBu_r",
    }
    name = _SCORES.get(tuning.score_name, tuning.score_name)
    kind = "memorized row" if tuning.leave_one_out else "validation row"
    figure, axes = _figure(f"Tuning on {counted(tuning.rows, kind)}", size=(6.6, 4.2))
    axes.set(xscale="log", yscale="log", xlabel="sigma (distance)", ylabel="k (neighbours)")
    cells = axes.pcolormesh(_edges(sigmas), _edges(ks), scores, edgecolors="white", linewidth=1, **style)
    chosen = tuning.params if tuning.params.strength else None
    if scores.size <= _READABLE_CELLS:
        for (row, column), score in np.ndenumerate(scores):
            below_star = chosen is not None and (chosen.k, chosen.sigma) == (ks[row], sigmas[column])
            axes.annotate(
                _short(score),
                (sigmas[column], ks[row]),
                xytext=(0, -11 if below_star else 0),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(score - tuning.base_score) > 0.65 * halfrange else "black",
            )
    between = [(sigma, k, score) for (k, sigma), score in best.items() if k not in ks or sigma not in sigmas]
    if between:
        x, y, values = zip(*between, strict=True)
        axes.scatter(x, y, c=values, s=20, edgecolors="black", linewidths=0.5, **style)
    if chosen is not None:
        star: dict[str, Any] = {"marker": "*", "s": 120, "color": "#ffd400", "edgecolors": "black", "linewidths": 0.8}
        axes.scatter(chosen.sigma, chosen.k, label="chosen", zorder=3, **star)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderpad=0, handletextpad=0.2)
    axes.set_xticks(sigmas, [f"{sigma:.3g}" for sigma in sigmas])
    axes.set_yticks(ks, [f"{k:g}" for k in ks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    bar = figure.colorbar(cells, ax=axes, label=f"{name} (white: the base, {_short(tuning.base_score)})")
    low, *_, high = sorted([tuning.base_score, *best.values()])
    if low < high:
        bar.ax.set_ylim(low, high)
    bar.outline.set_visible(False)
    return figure


def by_distance(evaluation: Evaluation) -> Figure | None:
    """Score by distance to the nearest neighbour, in tenths of the rows; None where there are no rows.

    Examples:
        >>> import torch
        >>> from lightning_resmem.metrics.bins import neighborhoods
        >>> groups = neighborhoods(torch.rand(40), torch.rand(40, 3))
        >>> found = Evaluation("test", "", 40, {"acc_base": 0.6}, (), 0.1, 0.02, (), {}, groups)
        >>> [line.get_label() for line in by_distance(found).axes[0].lines]
        ['base', 'knn', 'resmem']
    """
    check_type("evaluation", evaluation, Evaluation, _EVALUATION)
    upper, counts, scores = (column.cpu().numpy() for column in evaluation.neighborhoods)
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    figure, axes = _figure(f"{evaluation.prefix}: where the memory helps")
    places = np.arange(len(filled))
    for column, name in enumerate(Predictions._fields):
        axes.plot(places, scores[filled, column], marker="o", markersize=4, color=_COLORS[name], label=name)
    axes.set_xticks(places, [f"{distance:.3g}" for distance in upper[filled]], fontsize=8)
    each = counted(round(counts[filled].mean()), "row")
    axes.set_xlabel(f"distance to the nearest neighbour, up to (about {each} each)")
    name = "acc" if "acc_base" in evaluation.scores else "mse"
    axes.set_ylabel(_SCORES[name])
    if name == "acc":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(frameon=False)
    return figure


def reliability(evaluation: Evaluation) -> Figure | None:
    """Confidence against accuracy of base and resmem, and how many rows have it; None in regression.

    Examples:
        >>> import torch
        >>> from lightning_resmem.metrics.bins import ReliabilityBins, neighborhoods
        >>> bins = ReliabilityBins.from_sums(torch.tensor([[4.0, 1.2, 2.0], [36.0, 30.0, 29.0]]))
        >>> groups = neighborhoods(torch.rand(40), torch.rand(40, 3))
        >>> found = Evaluation("test", "", 40, {"acc_base": 0.6}, (), 0.1, 0.02, (), {"base": bins}, groups)
        >>> [axes.get_ylabel() for axes in reliability(found).axes]
        ['accuracy', 'rows']
    """
    check_type("evaluation", evaluation, Evaluation, _EVALUATION)
    bins = {name: found for name, found in evaluation.reliability.items() if name in ("base", "resmem")}
    if not bins or not evaluation.rows:
        return None
    figure = Figure(figsize=(4.8, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.75", linestyle="--", linewidth=1)
    for place, (name, found) in enumerate(bins.items()):
        counts, confidences, accuracies = (column.cpu().numpy() for column in found)
        filled = counts > 0
        label = f"{name} (calibration error {float(found.calibration_error):.3f})"
        top.plot(confidences[filled], accuracies[filled], marker="o", markersize=4, color=_COLORS[name], label=label)
        width = 1 / len(counts)
        left = (np.arange(len(counts)) + place / len(bins)) * width
        bottom.bar(left, counts / counts.sum(), width / len(bins), align="edge", color=_COLORS[name])
    _style(top, f"{evaluation.prefix}: confidence and accuracy")
    _style(bottom)
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    bottom.set(xlabel="confidence", ylabel="rows")
    for axis in (top.yaxis, bottom.xaxis, bottom.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    top.legend(frameon=False, loc="upper left")
    return figure


def flips(evaluation: Evaluation) -> Figure | None:
    """How many rows (in multilabel tasks: labels) were and are right; None in regression.

    Examples:
        >>> import torch
        >>> from lightning_resmem.metrics.bins import neighborhoods
        >>> groups = neighborhoods(torch.rand(40), torch.rand(40, 3))
        >>> scores = {"acc_base": 0.6, "positive_flip_rate": 0.15, "negative_flip_rate": 0.05}
        >>> found = Evaluation("test", "", 40, scores, (), 0.1, 0.02, (), {}, groups)
        >>> flips(found).axes[0].get_xlabel()
        'gain +10.00% ± 2.00% of 40 rows'
    """
    check_type("evaluation", evaluation, Evaluation, _EVALUATION)
    scores = evaluation.scores
    if "positive_flip_rate" not in scores or not evaluation.rows:
        return None
    gained, lost = scores["positive_flip_rate"], scores["negative_flip_rate"]
    shares = [[scores["acc_base"] - lost, lost], [gained, 1 - scores["acc_base"] - gained]]
    figure, axes = _figure(f"{evaluation.prefix}: what the memory changed", size=(4.4, 3.4))
    meanings = [["stays right", "turned wrong"], ["turned right", "stays wrong"]]
    for row, column in np.ndindex(2, 2):
        color = "#eeeeee" if row == column else _RIGHT if row else _WRONG
        axes.add_patch(Rectangle((column, row), 1, 1, color=color, ec="white", lw=3))
        text: dict[str, Any] = {"ha": "center", "va": "center", "color": "black" if row == column else "white"}
        axes.text(column + 0.5, row + 0.42, f"{max(0.0, shares[row][column]):.2%}", fontsize=16, **text)
        axes.text(column + 0.5, row + 0.65, meanings[row][column], fontsize=9, **text)
    axes.set(xlim=(0, 2), ylim=(2, 0))
    axes.set_xticks([0.5, 1.5], ["resmem right", "resmem wrong"])
    axes.set_yticks([0.5, 1.5], ["base right", "base wrong"], rotation=90, va="center")
    error = plus_minus(evaluation.gain_error, ".2%")
    axes.set_xlabel(f"gain {evaluation.gain:+.2%} {error} of {counted(evaluation.rows, 'row')}")
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def _figure(title: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _style(axes, title)
    return figure, axes


def _style(axes: Axes, title: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)  # callbacks are named by users
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92", linewidth=0.8)
    axes.set_axisbelow(True)


def _is_gain(tuning: TuningResult, difference: float) -> bool:
    """Whether a difference in score, after minus before, is an improvement."""
    return (difference > 0) != (tuning.score_name == Regression.score_name)


def _best_scores(tuning: TuningResult, settings: int | None = None) -> dict[tuple[float, float], float]:
    """The best score of the first so many settings (all by default), those with a memory, by `(k, sigma)`."""
    best: dict[tuple[float, float], float] = {}
    for row in tuning.table[:settings]:
        cell = row["k"], row["sigma"]
        if row["strength"] and (cell not in best or _is_gain(tuning, row["score"] - best[cell])):
            best[cell] = row["score"]
    return best


def _grid(values: Iterable[float]) -> list[float]:
    """Those values that occur most often, ascending: with them, all combinations were tried."""
    counts = Counter(values)
    most = max(counts.values())
    return sorted(value for value, count in counts.items() if count == most)


def _edges(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Edges of cells around positive values, halfway between them on a logarithmic scale."""
    logs = np.log(np.asarray(values, dtype=float))
    if len(logs) == 1:
        edges = logs[0] + np.array([-0.5, 0.5])
    else:
        middles = (logs[1:] + logs[:-1]) / 2
        edges = np.concatenate([[2 * logs[0] - middles[0]], middles, [2 * logs[-1] - middles[-1]]])
    return np.asarray(np.exp(edges))


def _short(score: float) -> str:
    return "" if math.isnan(score) else f"{score:.4f}" if abs(score) < 10 else f"{score:.4g}"
