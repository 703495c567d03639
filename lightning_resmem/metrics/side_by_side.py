"""Base, knn and resmem side by side: everything that is reported of them, as one torchmetrics metric.

States are sums in float64 (`sums.py`, `binned.py`); only `NeighborhoodAccuracy` keeps 16 bytes a row.
"""

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_resmem.memory.answers import Predictions
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.binned import NeighborhoodAccuracy, Reliability
from lightning_resmem.metrics.reported import (
    BALANCED,
    COMMON,
    F1,
    LESS_IS_BETTER,
    UserMetrics,
    as_collection,
    for_users,
    own_metrics,
)
from lightning_resmem.metrics.sums import ClassCounts, MeanScores, NegativeFlipRate, PositiveFlipRate
from lightning_resmem.tasks import Multiclass, Multilabel, Regression, Task


class ResMemMetrics(WrapperMetric):
    """Everything that is known about base, knn and resmem, as one metric.

    `compute` returns a dict; every name but those of the flips and the gain ends in `_base`, `_knn` or `_resmem`:

    | task | names |
    |---|---|
    | `Multiclass` | `acc`, `balanced_acc` (macro recall), `nll`, `ece`, `brier`, `f1` (macro), `top5` (of 6 and more) |
    | `Multilabel` | `acc` (share of right labels), `nll`, `ece`, `brier`, `f1` (macro), `exact` (all labels right) |
    | `Regression` | `mse`, `mae`, `r2` |
    | classification | `positive_flip_rate`, `negative_flip_rate` |
    | all | `gain` (of resmem over the base in `acc` or `mse`: above 0 is better), `gain_error` (its standard error) |

    `nll`, `ece`, `brier` and your own metrics are those of a proper distribution, the one that the model's own loss
    sees (`functional.log_predictions`), since the combined prediction has entries outside [0, 1].

    Args:
        task: What the predictions are; that of the memory.
        num_outputs: `C`.
        metrics: Your own torchmetrics metrics, by name or named by their class; copies of them are reported for base,
            knn and resmem. They get probabilities `(B, C)` and int64 targets `(B,)`; in multilabel tasks both `(B, C)`;
            in regression both `(B, C)` as they are. If `C` is 1, all of them are `(B,)`.
        with_knn_lm: Whether kNN-LM is reported beside them, for `Multiclass`: those names end in `_knn_lm`.

    Attributes:
        scores: A `MeanScores`.
        neighborhoods: A `NeighborhoodAccuracy`.
        base: What is reported of the base: a `PredictionMetrics`. So are `knn`, `resmem` and, if there, `knn_lm`.

    Raises:
        InputError: If `metrics` holds something else, or a name that is taken.

    Examples:
        >>> from lightning_resmem import Multiclass
        >>> metrics = ResMemMetrics(Multiclass(), num_outputs=2)
        >>> right, wrong = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.9, 0.1]])
        >>> metrics.update(Predictions(base=wrong, knn=right, resmem=right), torch.tensor([1]), torch.tensor([0.5]))
        >>> scores = metrics.compute()
        >>> scores["acc_base"].item(), scores["acc_resmem"].item(), scores["positive_flip_rate"].item()
        (0.0, 1.0, 1.0)
    """

    def __init__(
        self, task: Task, num_outputs: int, metrics: UserMetrics | None = None, with_knn_lm: bool = False
    ) -> None:
        super().__init__()
        self.task, self.scores, self.neighborhoods = task, MeanScores(task.higher_is_better), NeighborhoodAccuracy()
        users = None if metrics is None else as_collection(metrics, task, num_outputs)
        self.base, self.knn, self.resmem = (PredictionMetrics(task, num_outputs, users) for _ in Predictions._fields)
        self.knn_lm = PredictionMetrics(task, num_outputs, users) if with_knn_lm else None
        self.positive_flips, self.negative_flips = PositiveFlipRate(), NegativeFlipRate()

    @property
    def predictions(self) -> dict[str, "PredictionMetrics"]:
        """What is reported of base, knn and resmem, and of kNN-LM if it is."""
        reported = {"base": self.base, "knn": self.knn, "resmem": self.resmem}
        return reported if self.knn_lm is None else {**reported, "knn_lm": self.knn_lm}

    def update(
        self,
        predictions: Predictions,
        targets: Tensor,
        distances: Tensor,
        outputs: Tensor | None = None,
        knn_lm: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        """Add rows.

        Args:
            predictions: Each of shape `(B, C)`, from `memory.predictions`.
            targets: Of the same rows, as the task wants them.
            distances: Of each row to its nearest neighbour, shape `(B,)`; `inf` without one.
            outputs: What the head returned, shape `(B, C)`: the base is then reported as it is without a memory, while
                `predictions.base` may be at another `softmax_temperature`.
            knn_lm: The prediction of kNN-LM, shape `(B, C)`, if it is reported.
            groups: Which rows go right or wrong together, shape `(B,)`, for the error of the gain: int64 numbers, such
                as those of the sequences whose positions they are, or floating-point times, which make ten stretches.
        """
        task, base = self.task, predictions.base
        targets = task.check_targets(targets, base.shape[1])
        proper = (
            base if outputs is None else task.predict(outputs),
            task.probabilities(predictions.knn, base),
            task.probabilities(predictions.resmem, base),
        )
        if isinstance(task, Regression):
            labels = list(predictions)
        else:
            labels = [functional.labels(prediction, targets) for prediction in predictions]
            self.positive_flips.update(labels[0], labels[2], targets)
            self.negative_flips.update(labels[0], labels[2], targets)
        scores = torch.stack([task.score(prediction, targets) for prediction in predictions], dim=1)
        self.scores.update(scores, groups)
        self.neighborhoods.update(distances, scores)
        for of, probabilities, given in zip((self.base, self.knn, self.resmem), proper, labels, strict=True):
            of.update(probabilities, given, targets)
        if self.knn_lm is not None and knn_lm is not None:
            self.knn_lm.update(knn_lm, functional.labels(knn_lm, targets), targets)

    def compute(self) -> dict[str, Tensor]:
        """The scores by name, over all ranks: every rank has to ask."""
        means = self.scores.compute()
        if self.knn_lm is not None:
            right, _, rows = self.knn_lm.counts.compute().sum(dim=1)
            means["knn_lm"] = right / rows
        parts = {name: {self.task.score_name: means[name], **of.compute()} for name, of in self.predictions.items()}
        scores = {f"{score}_{name}": part[score] for score in parts["base"] for name, part in parts.items()}
        if not isinstance(self.task, Regression):
            scores["positive_flip_rate"] = self.positive_flips.compute()
            scores["negative_flip_rate"] = self.negative_flips.compute()
        return scores | {name: means[name] for name in ("gain", "gain_error")}

    def is_shown(self, name: str) -> bool:
        """Whether runs log a score by themselves: what tells at a glance if the memory helped, and your own metrics.

        Balanced accuracies are where classes are far from uniform, F1 where some of several labels are rare; after
        `compute`, on all ranks.
        """
        prediction = next((prediction for prediction in self.predictions if name.endswith(f"_{prediction}")), "")
        score = name.removesuffix(f"_{prediction}")
        if score == BALANCED and score in self.base.names:
            return functional.far_from_uniform(self.base.counts.compute()[2])
        if score == F1 and score in self.base.names and isinstance(self.task, Multilabel):
            rows = int(self.scores.compute()["rows"])
            return functional.has_rare_labels(self.base.counts.compute()[2], rows)
        if score in self.base.names:
            shown = {"knn": (), "knn_lm": ("nll",)}.get(prediction, ("nll", "ece", "r2"))
            return score in shown
        return name not in ("gain", "gain_error")

    @property
    def less_is_better(self) -> frozenset[str]:
        """The names of scores, without `_base` and so on, of which less is better; your own have to say so."""
        ours = {self.task.score_name, *self.base.names}.intersection(LESS_IS_BETTER)
        return self.base.users_less_is_better.union(ours)

    def reset(self) -> None:
        """Forget all rows."""
        for metric in (self.scores, self.neighborhoods, self.positive_flips, self.negative_flips):
            metric.reset()
        for prediction in self.predictions.values():
            prediction.reset()


class PredictionMetrics(nn.Module):
    """What is reported of one prediction beside its score: part of `ResMemMetrics`.

    Attributes:
        counts: A `ClassCounts`; not updated in regression.
        reliability: A `Reliability`; not updated in regression.
        names: Of what is reported, without the user's own.
    """

    def __init__(self, task: Task, num_outputs: int, users: MetricCollection | None) -> None:
        super().__init__()
        self._task = task
        self._own = MetricCollection(own_metrics(task, num_outputs), compute_groups=False)
        self._users = None if users is None else users.clone()
        if self._users is not None:
            self._users.reset()
        self.counts, self.reliability = ClassCounts(num_outputs), Reliability()
        balanced = {BALANCED} if isinstance(task, Multiclass) else set()
        self.names = frozenset({*COMMON, *self._own, *balanced} - set(self._users or ()))

    def update(self, probabilities: Tensor, labels: Tensor, targets: Tensor) -> None:
        """Add rows of probabilities `(B, C)` (predictions, in regression), their labels, and checked targets."""
        self._own.update(probabilities, targets)
        if not isinstance(self._task, Regression):
            self.counts.update(labels, targets)
            if targets.ndim == 1:
                self.reliability.update(probabilities.gather(1, labels[:, None])[:, 0], labels == targets)
            else:
                self.reliability.update(probabilities.flatten(), targets.flatten())
        if self._users is None:
            return
        given = for_users(self._task, probabilities, targets)
        try:
            self._users.update(*given)
        except Exception as error:
            shapes = " and ".join(f"a {tensor.dtype} tensor of shape {tuple(tensor.shape)}" for tensor in given)
            error.add_note(f"One of {self._named_users()} did not accept {shapes}.")
            raise

    def compute(self) -> dict[str, Tensor]:
        """By name, the user's own last."""
        scores: dict[str, Tensor] = self._own.compute()
        if not isinstance(self._task, Regression):
            counts = self.counts.compute()
            if BALANCED in self.names:
                scores = {BALANCED: functional.balanced_accuracy(counts), **scores}
            scores[F1] = functional.macro_f1(counts)
            scores["ece"] = self.reliability.compute().calibration_error
        if self._users is None:
            return scores
        try:
            return scores | self._users.compute()
        except Exception as error:
            error.add_note(
                f"One of {self._named_users()} has no result for what it was given: is it made for this task and so "
                "many outputs? The memory is as it was."
            )
            raise

    @property
    def users_less_is_better(self) -> frozenset[str]:
        """The names of those of the user's own that are `higher_is_better = False`."""
        users = {} if self._users is None else dict(self._users.items())
        return frozenset(name for name, metric in users.items() if metric.higher_is_better is False)

    def _named_users(self) -> str:
        return f"the metrics given to ResMem ({', '.join(map(str, self._users or ()))})"

    def reset(self) -> None:
        """Forget all rows."""
        for metric in (self._own, self.counts, self.reliability):
            metric.reset()
        if self._users is not None:
            self._users.reset()
