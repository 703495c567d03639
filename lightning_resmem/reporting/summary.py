"""What a memory holds and did, as tables for people."""

from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_resmem.memory.answers import Predictions
from lightning_resmem.memory.capacity import size
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.noise import plus_minus
from lightning_resmem.tuning.result import TuningResult

_NAMES = {
    "acc": "accuracy",
    "balanced_acc": "balanced accuracy",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "R²",
    "f1": "macro F1",
    "nll": "negative log-likelihood",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "brier": "Brier score",
    "ece": "calibration error",
}


def score_rows(scores: dict[str, float]) -> list[tuple[str, list[float]]]:
    """Scores side by side, `("acc", [base, knn, resmem])`, in the order of `score_columns`: those that all have."""
    stems = [name.removesuffix("_base") for name in scores if name.endswith("_base")]
    columns = {stem: [f"{stem}_{name}" for name in score_columns(scores)] for stem in stems}
    return [(stem, [scores[name] for name in names]) for stem, names in columns.items() if set(names) <= set(scores)]


def score_columns(scores: dict[str, float]) -> tuple[str, ...]:
    """The predictions whose scores these are: base, knn and resmem, and before the last one kNN-LM if it is there."""
    base, knn, resmem = Predictions._fields
    return (base, knn, "knn_lm", resmem) if "nll_knn_lm" in scores else (base, knn, resmem)


def evaluation_summary(evaluation: Evaluation, stats: dict[str, Any]) -> list[Table | Text]:
    """What a validate or test run showed; names are users' own, so none of it is rich's markup.

    Args:
        evaluation: Of one dataloader.
        stats: `memory.stats()`.
    """
    table = _table(
        f"ResMem: {evaluation.prefix}{evaluation.suffix}, {counted(evaluation.rows, 'row')}",
        *score_columns(evaluation.scores),
    )
    for index, (stem, values) in enumerate(score_rows(evaluation.scores)):
        error = f" {plus_minus(evaluation.gain_error)}" if index == 0 else ""
        gain = f"{evaluation.gain_in(stem):+.4f}{error}"
        table.add_row(Text(_long(stem)), *(f"{value:.4f}" for value in values), gain)
    lines = []
    if evaluation.left_out:
        kind = counted(evaluation.left_out, "row")
        lines.append(f"{kind} with NaN or infinite values: answered by the base alone, not scored")
    if evaluation.ignored:
        lines.append(f"{counted(evaluation.ignored, 'row')} whose label the loss ignores: not scored")
    if "positive_flip_rate" in evaluation.scores:
        right, wrong = evaluation.scores["positive_flip_rate"], evaluation.scores["negative_flip_rate"]
        lines.append(_flips(right, wrong))
    for stem, objective in (("balanced_acc", "balanced_accuracy"), ("f1", "f1")):
        if f"{stem}_base" in evaluation.shown and evaluation.gain >= 0 > evaluation.gain_in(stem):
            lines.append(f'{_long(stem)} falls while accuracy does not: GridTuner(objective="{objective}") keeps it')
    return [table, *map(Text, lines), Text(_describe(stats))]


def memory_summary(stats: dict[str, Any], seconds: float, tuning: TuningResult | None) -> list[Table | Text]:
    """What was memorized, and what tuning chose; none of it is rich's markup.

    Args:
        stats: `memory.stats()`.
        seconds: That memorizing took, tuning included.
        tuning: If there was any.
    """
    filled = f"{_describe(stats)}, filled in {seconds:.1f} s"
    if tuning is None:
        return [Text(f"ResMem {filled}")]
    params = tuning.params
    kind = "memorized row" if tuning.leave_one_out else "validation row"
    table = _table(f"ResMem: tuned on {counted(tuning.rows, kind)}", "base", "resmem")
    gain = f"{tuning.gain:+.4f} {plus_minus(tuning.gain_error)}"
    table.add_row(Text(_long(tuning.score_name)), f"{tuning.base_score:.4f}", f"{tuning.score:.4f}", gain)
    if tuning.balanced is not None and tuning.balanced.uneven:
        base, choice, error, *_ = tuning.balanced
        gain = f"{choice - base:+.4f} {plus_minus(error)}"
        table.add_row(_long(tuning.balanced.score), f"{base:.4f}", f"{choice:.4f}", gain)
    chosen = (
        f"k={params.k}, sigma={params.sigma:.4g}, softmax_temperature={params.softmax_temperature:g}, "
        f"strength={params.strength:g}"
    )
    lost = chosen_flip_rate(tuning)
    flips = [] if lost is None else [_flips(tuning.gain + lost, lost)]
    tried = [
        f"keys of {key.embedding}{' (kept)' if key.chosen else ''}: {_long(tuning.score_name)} {key.score:.4f}, "
        f"loss {key.loss:.4f}, strength {key.strength:g}"
        for key in tuning.keys
    ]
    return [table, *map(Text, [*flips, *tried, chosen, filled])]


def chosen_flip_rate(tuning: TuningResult) -> float | None:
    """The share of right answers that the choice turned wrong on the tuning rows; None where it is not known."""
    params = tuning.params
    choice = {name: getattr(params, name) for name in ("k", "sigma", "softmax_temperature", "strength")}
    rows = (row for row in tuning.table if choice.items() <= row.items())
    return next((row["negative_flip_rate"] for row in rows if "negative_flip_rate" in row), None)


def counted(number: int, noun: str) -> str:
    """A number of things: "1 row", "2,000 rows"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _table(title: str, *predictions: str) -> Table:
    table = Table(title=Text(title, style="table.title"), title_justify="left")
    table.add_column("")
    for name in (*predictions, "gain"):
        table.add_column(name, justify="right")
    return table


def _flips(right: float, wrong: float) -> str:
    return f"turned right {right:.2%}, turned wrong {wrong:.2%}"


def _describe(stats: dict[str, Any]) -> str:
    """The memory in a line."""
    words = [counted(stats["rows"], "row"), size(stats["bytes"])]
    if "index" in stats:
        words.append(f"index {stats['index']}")
    if stats.get("recall") is not None:
        words.append(f"recall {stats['recall']:.3f}")
    if "shards" in stats:
        words.append(counted(num_shards(stats), "shard"))
    return "memory: " + ", ".join(words)


def num_shards(stats: dict[str, Any]) -> int:
    """How many shards a memory has, whatever the number of their replicas."""
    return len({shard["shard"] for shard in stats["shards"]})


def _long(stem: str) -> str:
    if stem.removeprefix("top").isdecimal():
        return f"top-{stem.removeprefix('top')} accuracy"
    return _NAMES.get(stem, stem)
