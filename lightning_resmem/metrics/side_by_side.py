"""Base, knn and resmem side by side, as torchmetrics metrics that are summed over batches and ranks.

The maths is in `metrics_functional.py`. States are float64 sums; only `NeighborhoodAccuracy` keeps 16 bytes a row.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from lightning_resmem.errors import InputError
from lightning_resmem.memory.answers import Predictions
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.functional import Neighborhoods, ReliabilityBins
from lightning_resmem.tasks import Multilabel, Regression, Task

UserMetrics = Metric | Sequence[Metric] | Mapping[str, Metric] | MetricCollection

_TOP_K = 5
# Names of scores that `PredictionMetrics` adds to those of `_own`.
_COMMON = ("f1", "ece")


class _Sums(Metric):
    """Sums over rows, added up over ranks."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        # In float32, counts would stop at 2^24 rows.
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, sums: Tensor) -> None:
        self.sums += sums.to(self.sums)


class PositiveFlipRate(_Sums):
    """The share of rows (in multilabel tasks: of labels) that the base had wrong and resmem has right.

    Example:
        >>> metric = PositiveFlipRate()
        >>> metric.update(base=torch.tensor([0, 0]), resmem=torch.tensor([1, 0]), targets=torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__(2)

    def update(self, base: Tensor, resmem: Tensor, targets: Tensor) -> None:
        """Add rows.

        Args:
            base: Predictions before: labels `(B,)` or probabilities `(B, C)`.
            resmem: Predictions after, likewise.
            targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.
        """
        flipped = functional.turned_right(base, resmem, targets)
        self.add(torch.stack([flipped.sum(), flipped.new_tensor(flipped.numel(), dtype=torch.int64)]))

    def compute(self) -> Tensor:
        """The rate, scalar; NaN without rows."""
        return self.sums[0] / self.sums[1]


class NegativeFlipRate(PositiveFlipRate):
    """The share of rows (in multilabel tasks: of labels) that the base had right and resmem has wrong.

    What users of a model notice first after an update: Yan et al. 2021, "Positive-Congruent Training: Towards
    Regression-Free Model Updates", https://arxiv.org/abs/2011.09161; Xie et al. 2021, "Regression Bugs Are In Your
    Model! Measuring, Reducing and Analyzing Regressions In NLP Model Updates", ACL 2021.

    Example:
        >>> metric = NegativeFlipRate()
        >>> metric.update(base=torch.tensor([0, 0]), resmem=torch.tensor([1, 0]), targets=torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, base: Tensor, resmem: Tensor, targets: Tensor) -> None:
        super().update(resmem, base, targets)


class NeighborhoodAccuracy(Metric):
    """Scores of base, knn and resmem by tenths of the distance to the nearest neighbour.

    Shows where the memory helps, and from which distance on it has nothing to say. The tenths are exact, and the same
    on any number of ranks, since the rows are kept until the end: a distance and three scores, 16 bytes a row.

    Args:
        num_bins: In how many groups of equally many rows the distances are cut.

    Example:
        >>> metric = NeighborhoodAccuracy(num_bins=2)
        >>> right, wrong = [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]
        >>> metric.update(torch.tensor([0.1, 5.0]), torch.tensor([right, wrong]))
        >>> metric.compute().scores[:, 2]
        tensor([1., 0.], dtype=torch.float64)
    """

    full_state_update = False
    distances: list[Tensor] | Tensor
    scores: list[Tensor] | Tensor

    def __init__(self, num_bins: int = 10) -> None:
        super().__init__()
        if not isinstance(num_bins, int) or num_bins < 1:
            raise InputError(f"num_bins={num_bins!r}: give a whole number, at least 1.")
        self.num_bins = num_bins
        self.add_state("distances", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, distances: Tensor, scores: Tensor) -> None:
        """Add rows.

        Args:
            distances: To the nearest neighbour, shape `(B,)`; `inf` without one.
            scores: Of base, knn and resmem, such as 1 for right and 0 for wrong; shape `(B, 3)`.
        """
        assert isinstance(self.distances, list)
        assert isinstance(self.scores, list)
        self.distances.append(distances.float().to(self.device))
        # Flat: the state of a rank without rows is an empty vector, and ranks have to agree in dimensions.
        self.scores.append(scores.float().flatten().to(self.device))

    def compute(self) -> Neighborhoods:
        """Distances, counts and scores of the groups."""
        distances, scores = (
            torch.cat([torch.zeros(0, device=self.device), *([rows] if isinstance(rows, Tensor) else rows)])
            for rows in (self.distances, self.scores)
        )
        return functional.neighborhoods(distances, scores.reshape(-1, 3).double(), self.num_bins)


class MeanScores(_Sums):
    """Mean scores of base, knn and resmem, and the gain of resmem over the base with its standard error.

    Example:
        >>> metric = MeanScores()
        >>> metric.update(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'base': 0.5, 'knn': 0.5, 'resmem': 1.0, 'gain': 0.5, 'gain_error': 0.5, 'rows': 2.0}
    """

    def __init__(self) -> None:
        super().__init__(5)

    def update(self, scores: Tensor) -> None:
        """Add rows.

        Args:
            scores: Of base, knn and resmem, shape `(B, 3)`.
        """
        scores = scores.to(self.sums)
        squares = (scores[:, 2] - scores[:, 0]).square().sum()
        self.add(torch.cat([scores.sum(dim=0), squares[None], squares.new_tensor([len(scores)])]))

    def compute(self) -> dict[str, Tensor]:
        """By name; the standard error is inf for a single row, and all are NaN without rows."""
        rows = self.sums[4]
        base, knn, resmem, squares = self.sums[:4] / rows
        gain = resmem - base
        error = ((squares - gain.square()).clamp_min(0) / (rows - 1)).sqrt() if rows > 1 else rows / 0
        return {"base": base, "knn": knn, "resmem": resmem, "gain": gain, "gain_error": error, "rows": rows}


class RowMean(_Sums):
    """The mean over rows of a function of predictions and targets.

    Args:
        function: `function(predictions (B, C), targets)` returns a number for each row, shape `(B,)`.

    Example:
        >>> metric = RowMean(functional.brier_scores)
        >>> metric.update(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(2)
        self.function = function

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add rows: predictions `(B, C)`, and targets as the function wants them."""
        values = self.function(predictions, targets)
        self.add(torch.stack([values.double().sum(), values.new_tensor(len(values), dtype=torch.float64)]))

    def compute(self) -> Tensor:
        """The mean, scalar; NaN without rows."""
        return self.sums[0] / self.sums[1]


class Reliability(_Sums):
    """Confidence against accuracy, in bins; `calibration_error` of the result is the ECE.

    torchmetrics' calibration errors keep all rows and do not show the bins.

    Args:
        num_bins: Equally wide bins of confidence from 0 to 1.

    Example:
        >>> metric = Reliability()
        >>> metric.update(torch.tensor([0.9, 0.9]), torch.tensor([True, False]))
        >>> metric.compute().calibration_error
        tensor(0.4000, dtype=torch.float64)
    """

    def __init__(self, num_bins: int = 15) -> None:
        if not isinstance(num_bins, int) or num_bins < 1:
            raise InputError(f"num_bins={num_bins!r}: give a whole number, at least 1.")
        super().__init__(num_bins, 3)

    def update(self, confidences: Tensor, right: Tensor) -> None:
        """Add rows: the probabilities of their labels and whether they are right, both `(B,)`."""
        self.add(functional.reliability(confidences, right, len(self.sums)))

    def compute(self) -> ReliabilityBins:
        """The bins."""
        return ReliabilityBins.from_sums(self.sums)


class MacroF1(_Sums):
    """The mean over classes of F1; classes that were neither predicted nor labelled are left out.

    Args:
        num_classes: `C`.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(3, num_classes)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add rows: predictions `(B, C)` and targets `(B,)`, or `(B, C)` in multilabel tasks."""
        self.add(functional.f1_counts(predictions, targets, self.sums.shape[1]))

    def compute(self) -> Tensor:
        """Scalar."""
        return functional.macro_f1(self.sums)


class R2(_Sums):
    """The coefficient of determination, the mean over outputs; see `metrics_functional.r2`.

    Args:
        num_outputs: `C`.
    """

    def __init__(self, num_outputs: int) -> None:
        super().__init__(4, num_outputs)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add rows: predictions and targets `(B, C)`."""
        targets = targets.double()
        errors = (predictions - targets).square()
        self.add(torch.stack([targets, targets.square(), errors, torch.ones_like(targets)]).sum(dim=1))

    def compute(self) -> Tensor:
        """Scalar."""
        return functional.r2(self.sums[:3], self.sums[3, 0])


class ResMemMetrics(WrapperMetric):
    """Everything that is known about base, knn and resmem, as one metric.

    `compute` returns a dict; every name but those of the flips and the gain ends in `_base`, `_knn` or `_resmem`:

    | task | names |
    |---|---|
    | `Multiclass` | `acc`, `nll`, `ece`, `brier`, `f1` (macro), `top5` (if there are more than 5 classes) |
    | `Multilabel` | `acc` (share of right labels), `nll`, `ece`, `brier`, `f1` (macro), `exact` (all labels right) |
    | `Regression` | `mse`, `mae`, `r2` |
    | classification | `positive_flip_rate`, `negative_flip_rate` |
    | all | `gain` (mean score of resmem minus base), `gain_error` (its standard error) |

    `nll`, `ece`, `brier` and your own metrics are those of a proper distribution, the one that the model's own loss
    sees (`functional.log_predictions`), since the combined prediction has entries outside [0, 1].

    Args:
        task: What the predictions are; that of the memory.
        num_outputs: `C`.
        metrics: Your own torchmetrics metrics, by name or named by their class; copies of them are reported for base,
            knn and resmem. They get probabilities `(B, C)` and int64 targets `(B,)`; in multilabel tasks both `(B, C)`;
            in regression both `(B, C)` as they are. If `C` is 1, all of them are `(B,)`.

    Attributes:
        scores: A `MeanScores`.
        neighborhoods: A `NeighborhoodAccuracy`.
        base: What is reported of the base: a `PredictionMetrics`. So are `knn` and `resmem`.

    Raises:
        InputError: If `metrics` holds something else, or a name that is taken.

    Example:
        >>> from lightning_resmem import Multiclass
        >>> metrics = ResMemMetrics(Multiclass(), num_outputs=2)
        >>> right, wrong = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.9, 0.1]])
        >>> metrics.update(Predictions(base=wrong, knn=right, resmem=right), torch.tensor([1]), torch.tensor([0.5]))
        >>> scores = metrics.compute()
        >>> scores["acc_base"].item(), scores["acc_resmem"].item(), scores["positive_flip_rate"].item()
        (0.0, 1.0, 1.0)
    """

    def __init__(self, task: Task, num_outputs: int, metrics: UserMetrics | None = None) -> None:
        super().__init__()
        self.task, self.scores, self.neighborhoods = task, MeanScores(), NeighborhoodAccuracy()
        users = None if metrics is None else as_collection(metrics, task, num_outputs)
        self.base, self.knn, self.resmem = (PredictionMetrics(task, num_outputs, users) for _ in Predictions._fields)
        self.positive_flips, self.negative_flips = PositiveFlipRate(), NegativeFlipRate()

    @property
    def predictions(self) -> dict[str, "PredictionMetrics"]:
        """What is reported of base, knn and resmem."""
        return {"base": self.base, "knn": self.knn, "resmem": self.resmem}

    def update(
        self, predictions: Predictions, targets: Tensor, distances: Tensor, outputs: Tensor | None = None
    ) -> None:
        """Add rows.

        Args:
            predictions: Each of shape `(B, C)`, from `memory.predictions`.
            targets: Of the same rows, as the task wants them.
            distances: Of each row to its nearest neighbour, shape `(B,)`; `inf` without one.
            outputs: What the head returned, shape `(B, C)`: the base is then reported as it is without a memory, while
                `predictions.base` may be at another `softmax_temperature`.
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
        self.scores.update(scores)
        self.neighborhoods.update(distances, scores)
        for of, probabilities, given in zip(self.predictions.values(), proper, labels, strict=True):
            of.update(probabilities, given, targets)

    def compute(self) -> dict[str, Tensor]:
        """The scores by name, over all ranks: every rank has to ask."""
        means = self.scores.compute()
        parts = {name: {self.task.score_name: means[name], **of.compute()} for name, of in self.predictions.items()}
        scores = {f"{score}_{name}": part[score] for score in parts["base"] for name, part in parts.items()}
        if not isinstance(self.task, Regression):
            scores["positive_flip_rate"] = self.positive_flips.compute()
            scores["negative_flip_rate"] = self.negative_flips.compute()
        return scores | {name: means[name] for name in ("gain", "gain_error")}

    def is_shown(self, name: str) -> bool:
        """Whether runs log a score by themselves: what tells at a glance if the memory helped, and your own metrics."""
        score, _, prediction = name.rpartition("_")
        if score in self.base.names:
            return score in ("nll", "ece", "r2") and prediction != "knn"
        return score != "gain" and name != "gain"

    def reset(self) -> None:
        """Forget all rows."""
        for metric in (self.scores, self.neighborhoods, self.positive_flips, self.negative_flips):
            metric.reset()
        for prediction in self.predictions.values():
            prediction.reset()


class PredictionMetrics(nn.Module):
    """What is reported of one prediction beside its score: part of `ResMemMetrics`.

    Attributes:
        f1: A `MacroF1`; not updated in regression.
        reliability: A `Reliability`; not updated in regression.
        names: Of what is reported, without the user's own.
    """

    def __init__(self, task: Task, num_outputs: int, users: MetricCollection | None) -> None:
        super().__init__()
        self._task = task
        self._own = MetricCollection(_own(task, num_outputs), compute_groups=False)
        self._users = None if users is None else users.clone()
        if self._users is not None:
            self._users.reset()
        self.f1, self.reliability = MacroF1(num_outputs), Reliability()
        self.names = frozenset([*_COMMON, *self._own])

    def update(self, probabilities: Tensor, labels: Tensor, targets: Tensor) -> None:
        """Add rows of probabilities `(B, C)` (predictions, in regression), their labels, and checked targets."""
        self._own.update(probabilities, targets)
        if not isinstance(self._task, Regression):
            self.f1.update(labels, targets)
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
            scores["f1"] = self.f1.compute()
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

    def _named_users(self) -> str:
        return f"the metrics given to ResMem ({', '.join(map(str, self._users or ()))})"

    def reset(self) -> None:
        """Forget all rows."""
        for metric in (self._own, self.f1, self.reliability):
            metric.reset()
        if self._users is not None:
            self._users.reset()


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
    own = {task.score_name, "gain", *_COMMON, *_own(task, num_outputs)}
    for name in metrics:
        if name in own:
            raise InputError(f"metrics has the name {name!r}, which is reported anyway: give it another one.")
    return metrics


def _own(task: Task, num_outputs: int) -> dict[str, Metric | MetricCollection]:
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


def for_users(task: Task, probabilities: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets as torchmetrics expects them."""
    if isinstance(task, Multilabel):
        targets = (targets >= 0.5).long()
    if probabilities.shape[1] == 1:
        return probabilities[:, 0], targets.reshape(-1)
    return probabilities.contiguous(), targets.contiguous()  # some of them view both as one row
