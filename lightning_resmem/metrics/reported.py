"""Which metrics are reported of a prediction: those of the task, and the user's own beside them."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_resmem.errors import InputError
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.sums import R2, RowMean
from lightning_resmem.tasks import Multilabel, Regression, Task

UserMetrics = Metric | Sequence[Metric] | Mapping[str, Metric] | MetricCollection

# Names of scores that `PredictionMetrics` adds to those of `own_metrics`.
F1 = "f1"
COMMON = (F1, "ece")
_TOP_K = 5
# Of the scores that are ours, by name: those of which less is better.
LESS_IS_BETTER = ("mse", "mae", "nll", "brier", "ece")
# Reported for `Multiclass`, but a name that users' own metrics may have.
BALANCED = "balanced_acc"


def own_metrics(task: Task, num_outputs: int) -> dict[str, Metric | MetricCollection]:
    """New metrics of probabilities and targets, by name; with many outputs there is one more.

    Args:
        task: What the predictions are.
        num_outputs: `C`.
    """
    if isinstance(task, Regression):
        return {"mae": RowMean(functional.absolute_errors), "r2": R2(num_outputs)}
    own: dict[str, Metric | MetricCollection] = {
        "nll": RowMean(functional.negative_log_likelihoods),
        "brier": RowMean(functional.brier_scores),
    }
    if isinstance(task, Multilabel):
        own["exact"] = RowMean(functional.all_right)
    elif num_outputs > _TOP_K:
        own[f"top{_TOP_K}"] = RowMean(partial(functional.top_k_right, k=_TOP_K))
    return own


def as_collection(metrics: UserMetrics, task: Task, num_outputs: int = 1) -> MetricCollection:
    """Users' metrics by name.

    Args:
        metrics: One, several, or several by name.
        task: Of the memory, which has names of its own.
        num_outputs: `C`, if it is known: with many outputs there is one name more.

    Raises:
        InputError: If there is something else among them, two of one name, or a name that is taken.
    """
    if not isinstance(metrics, MetricCollection):
        try:
            metrics = MetricCollection(dict(metrics) if isinstance(metrics, Mapping) else metrics)
        except (TypeError, ValueError, KeyError) as error:  # KeyError: an empty name
            raise InputError(
                f"metrics={metrics!r}: give torchmetrics metrics, one, a list of them, a dict by name, or a "
                f"MetricCollection. {error.args[0]}"
            ) from error
    own = {task.score_name, "gain", *COMMON, *own_metrics(task, num_outputs)}
    for name in metrics:
        if name in own:
            raise InputError(f"metrics has the name {name!r}, which is reported anyway: give it another one.")
    return metrics


def for_users(task: Task, probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets as torchmetrics expects them."""
    if isinstance(task, Multilabel):
        targets = (targets >= 0.5).long()
    if probabilities.shape[1] == 1:
        return probabilities[:, 0], targets.reshape(-1)
    return probabilities.contiguous(), targets.contiguous()  # some of them view both as one row
