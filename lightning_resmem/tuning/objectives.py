"""What a tuner maximises: a name, or any torchmetrics metric."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassF1Score, MultilabelF1Score

from lightning_resmem.errors import InputError
from lightning_resmem.metrics.reported import for_users
from lightning_resmem.metrics.sums import BalancedAccuracy
from lightning_resmem.tasks import Multiclass, Multilabel, Regression, Task

# Outputs beyond which a rehearsal makes up no rows of every class.
_MOST_REHEARSED = 1000

NAMES = ("accuracy", "balanced_accuracy", "nll", "f1", "mse")


class MetricObjective:
    """A torchmetrics metric over the tuning rows, the same on every rank.

    Args:
        metric: It is cloned, and knows whether higher is better.
        task: Of the memory.

    Raises:
        InputError: If the metric does not say whether higher is better.
    """

    def __init__(self, metric: Metric, task: Task) -> None:
        self._metric, self._task = metric.clone(), task
        for part in self._metric.modules():
            if isinstance(part, Metric):
                part.sync_on_compute = False  # every rank has all rows already
        self.name = type(metric).__name__
        self.sign = 1.0 if metric.higher_is_better else -1.0

    def value(self, prediction: Tensor, targets: Tensor) -> float:
        """The metric of predictions `(V, C)`."""
        with self._refusing(prediction, targets):
            self._update(prediction, targets)
            value = self._metric.compute()
        return self._number(value)

    def rehearse(self, prediction: Tensor, targets: Tensor) -> None:
        """Raise what `value` would raise for rows like these, as far as a few of them tell."""
        with self._refusing(prediction, targets):
            self._update(prediction, targets)
        try:
            value = self._metric.compute()
        except Exception:  # perhaps only because rows are few
            if prediction.shape[1] <= _MOST_REHEARSED:
                self.value(*_rows_of_every_class(self._task, prediction, targets))
        else:
            self._number(value)

    def _update(self, prediction: Tensor, targets: Tensor) -> None:
        self._metric.reset()
        self._metric.to(prediction.device)
        self._metric.update(*for_users(self._task, prediction, targets))

    @contextmanager
    def _refusing(self, prediction: Tensor, targets: Tensor) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the metric says of predictions that it was not made for
            raise InputError(
                f"objective={self._metric} does not take predictions of shape {tuple(prediction.shape)} and targets of "
                f"shape {tuple(targets.shape)} ({type(error).__name__}: {error}). Give one made for this task and "
                f"{prediction.shape[1]} outputs."
            ) from error

    def _number(self, value: object) -> float:
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"values of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"objective={self._metric} gives {found}, a tuner needs one number: give a metric with an average, "
                'such as average="macro".'
            )
        return float(value)


def _rows_of_every_class(task: Task, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets of a few rows, repeated, with made-up targets where there are classes."""
    num_outputs = prediction.shape[1]
    rows = torch.arange(max(64, 2 * num_outputs))
    repeated = rows % len(prediction)
    if isinstance(task, Regression):
        return prediction[repeated], targets[repeated]
    if isinstance(task, Multilabel):
        return prediction[repeated], ((rows[:, None] + torch.arange(num_outputs)) % 2).to(targets.dtype)
    return prediction[repeated], rows % num_outputs


def check_objective(objective: object) -> None:
    """Raise an error unless an objective is known, whatever the task."""
    if isinstance(objective, MetricCollection) or not isinstance(objective, Metric | str):
        raise InputError(f"objective={objective!r}: give one of {_listed(NAMES)}, or a torchmetrics Metric.")
    if isinstance(objective, str):
        if objective not in NAMES:
            raise InputError(f"objective={objective!r} is not known: give {_listed(NAMES)}, or a torchmetrics Metric.")
    elif objective.higher_is_better is None:
        raise InputError(
            f"objective={objective} does not say whether higher is better: set higher_is_better = True or False in its "
            "class."
        )


def check_task(objective: Metric | str, task: Task) -> None:
    """Raise an error unless an objective is one for the task."""
    fitting = ["accuracy", "mse", "nll"] if isinstance(task, Regression) else ["accuracy", "nll", "f1"]
    if isinstance(task, Multiclass):
        fitting.insert(1, "balanced_accuracy")
    if isinstance(objective, str) and objective not in fitting:
        raise InputError(f"objective={objective!r} is not for task={type(task).__name__}(): give {_listed(fitting)}.")


def make_objective(objective: Metric | str, task: Task, num_outputs: int) -> MetricObjective | None:
    """The metric that an objective stands for, or None if it is the task's own score or loss."""
    if isinstance(objective, Metric):
        return MetricObjective(objective, task)
    if objective == "balanced_accuracy":
        # torchmetrics' macro recall counts a class that is predicted but has no rows as one of recall 0.
        return MetricObjective(BalancedAccuracy(num_outputs), task)
    if objective != "f1":
        return None
    if isinstance(task, Multiclass):
        return MetricObjective(MulticlassF1Score(num_outputs, average="macro", validate_args=False), task)
    assert isinstance(task, Multilabel)
    return MetricObjective(MultilabelF1Score(num_outputs, average="macro", validate_args=False), task)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names[:-1]) + f' or "{names[-1]}"'
