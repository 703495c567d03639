"""The maths of the metrics as pure functions on tensors; `metrics.py` accumulates them over batches and ranks.

Shapes: `B` rows, `C` classes (or outputs), `M` bins. Predictions are labels `(B,)` or probabilities `(B, C)`, of which
the largest is the label; in multilabel tasks both predictions and targets are `(B, C)`, and 0.5 is the threshold.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_resmem.functional import argmax

__all__ = [
    "Neighborhoods",
    "ReliabilityBins",
    "absolute_errors",
    "all_right",
    "brier_scores",
    "f1_counts",
    "is_right",
    "labels",
    "macro_f1",
    "negative_flip_rate",
    "negative_log_likelihoods",
    "neighborhoods",
    "positive_flip_rate",
    "r2",
    "reliability",
    "top_k_right",
    "turned_right",
]


class ReliabilityBins(NamedTuple):
    """Confidence against accuracy, in equally wide bins of confidence from 0 to 1.

    Attributes:
        counts: Rows in each bin, shape `(M,)`.
        confidences: Their mean confidence, shape `(M,)`; NaN where a bin is empty.
        accuracies: The share of them that is right, shape `(M,)`; NaN where a bin is empty.
    """

    counts: Tensor
    confidences: Tensor
    accuracies: Tensor

    @classmethod
    def from_sums(cls, sums: Tensor) -> "ReliabilityBins":
        """From sums over the rows of each bin of (1, confidence, right), shape `(M, 3)`."""
        return cls(sums[:, 0], sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0])

    @property
    def calibration_error(self) -> Tensor:
        """Expected calibration error: the mean over rows of `|accuracy - confidence|` of their bin; NaN without rows.

        Guo et al. 2017, "On Calibration of Modern Neural Networks", https://arxiv.org/abs/1706.04599.
        """
        gaps = (self.accuracies - self.confidences).abs().nan_to_num(0.0)
        return (self.counts * gaps).sum() / self.counts.sum()


class Neighborhoods(NamedTuple):
    """Scores by the distance of a row to its nearest neighbour, in groups of (nearly) equally many rows.

    Attributes:
        upper: The largest distance of each group, shape `(M,)`, ascending; `inf` if rows without any neighbour are in
            it, NaN if there are no rows at all.
        counts: Rows in each group, shape `(M,)`. Rows of the same distance are in the same group, so that groups may
            differ in size, and be empty.
        scores: Mean score of the rows of each group, shape `(M, 3)`, for base, knn and resmem; NaN where a group is
            empty.
    """

    upper: Tensor
    counts: Tensor
    scores: Tensor


def is_right(predictions: Tensor, targets: Tensor) -> Tensor:
    """Which labels are those of the targets.

    Args:
        predictions: Labels `(B,)`, or probabilities `(B, C)`.
        targets: Labels `(B,)`, or in multilabel tasks 0 and 1, shape `(B, C)`.

    Returns:
        bool, in the shape of the targets.

    Example:
        >>> is_right(torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1]))
        tensor([ True, False])
    """
    hard = targets if targets.ndim == 1 else targets >= 0.5
    return labels(predictions, targets) == hard


def labels(predictions: Tensor, targets: Tensor) -> Tensor:
    """Predicted labels.

    Args:
        predictions: Probabilities `(B, C)`; labels are returned as they are.
        targets: Labels `(B,)`, or in multilabel tasks 0 and 1, shape `(B, C)`.

    Returns:
        In the shape of the targets; bool in multilabel tasks.

    Example:
        >>> labels(torch.tensor([[0.2, 0.8], [0.6, 0.4]]), torch.tensor([1, 1]))
        tensor([1, 0])
    """
    if targets.ndim == 2:
        return predictions if predictions.dtype == torch.bool else predictions >= 0.5
    return argmax(predictions) if predictions.ndim == 2 else predictions


def all_right(predictions: Tensor, targets: Tensor) -> Tensor:
    """Of each row, whether all its labels are right.

    Args:
        predictions: Probabilities, shape `(B, C)`.
        targets: 0 and 1, shape `(B, C)`.

    Returns:
        bool, shape `(B,)`.

    Example:
        >>> all_right(torch.tensor([[0.2, 0.8]]), torch.tensor([[1, 1]]))
        tensor([False])
    """
    return is_right(predictions, targets).all(dim=1)


def turned_right(base: Tensor, resmem: Tensor, targets: Tensor) -> Tensor:
    """Which labels the base had wrong and resmem has right; arguments as for `positive_flip_rate`.

    Returns:
        bool, in the shape of the targets.

    Example:
        >>> turned_right(torch.tensor([0, 0]), torch.tensor([1, 0]), torch.tensor([1, 0]))
        tensor([ True, False])
    """
    return is_right(resmem, targets) & ~is_right(base, targets)


def positive_flip_rate(base: Tensor, resmem: Tensor, targets: Tensor) -> Tensor:
    """The share of rows (in multilabel tasks: of labels) that the base had wrong and resmem has right.

    Args:
        base: Predictions before: labels `(B,)` or probabilities `(B, C)`.
        resmem: Predictions after, likewise.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.

    Returns:
        Scalar. It minus the `negative_flip_rate` is the gain in accuracy.

    Example:
        >>> positive_flip_rate(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]), torch.tensor([1, 0, 1]))
        tensor(0.3333)
    """
    return turned_right(base, resmem, targets).float().mean()


def negative_flip_rate(base: Tensor, resmem: Tensor, targets: Tensor) -> Tensor:
    """The share of rows (in multilabel tasks: of labels) that the base had right and resmem has wrong.

    What users of a model notice first after an update: Yan et al. 2021, "Positive-Congruent Training: Towards
    Regression-Free Model Updates", https://arxiv.org/abs/2011.09161; Xie et al. 2021, "Regression Bugs Are In Your
    Model! Measuring, Reducing and Analyzing Regressions In NLP Model Updates", ACL 2021.

    Args:
        base: Predictions before: labels `(B,)` or probabilities `(B, C)`.
        resmem: Predictions after, likewise.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.

    Returns:
        Scalar.

    Example:
        >>> negative_flip_rate(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]), torch.tensor([1, 0, 1]))
        tensor(0.3333)
    """
    return positive_flip_rate(resmem, base, targets)


def neighborhoods(distances: Tensor, scores: Tensor, num_bins: int = 10) -> Neighborhoods:
    """Mean scores of rows grouped by their distance to the nearest neighbour: by default in tenths of the rows.

    Args:
        distances: Shape `(B,)`; `inf` for a row without neighbours.
        scores: Of each row for base, knn and resmem, such as 1 for right and 0 for wrong; shape `(B, 3)`.
        num_bins: `M`.

    Example:
        >>> near, far = [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]
        >>> found = neighborhoods(torch.tensor([0.1, 5.0, 0.2, 4.0]), torch.tensor([near, far, near, far]), num_bins=2)
        >>> found.upper, found.scores
        (tensor([0.2000, 5.0000]), tensor([[1., 1., 1.], [1., 0., 0.]]))
    """
    counts = scores.new_zeros(num_bins)
    sums = scores.new_zeros(num_bins, scores.shape[1])
    if not len(distances):
        return Neighborhoods(counts + torch.nan, counts, sums + torch.nan)
    # Distances of rows, never values between two: exact, whatever the number of rows, and inf stays inf.
    last = (torch.arange(1, num_bins + 1, device=distances.device) * len(distances) - 1) // num_bins
    upper = distances.sort().values[last]
    groups = torch.searchsorted(upper, distances)
    counts.index_add_(0, groups, torch.ones_like(scores[:, 0]))
    sums.index_add_(0, groups, scores)
    return Neighborhoods(upper, counts, sums / counts[:, None])


def reliability(confidences: Tensor, right: Tensor, num_bins: int = 15) -> Tensor:
    """What the bins of a reliability diagram hold; `ReliabilityBins.from_sums` makes means of it.

    Args:
        confidences: From 0 to 1, shape `(B,)`: the probability of each row's label, or in multilabel tasks that of
            every label.
        right: Whether it is right, 0 or 1, shape `(B,)`; in multilabel tasks the targets.
        num_bins: `M`, equally wide bins; a confidence on an edge belongs to the bin above.

    Returns:
        Sums over the rows of each bin of (1, confidence, right), shape `(M, 3)`.

    Example:
        >>> sums = reliability(torch.tensor([0.9, 0.7]), torch.tensor([1, 0]), num_bins=2)
        >>> bins = ReliabilityBins.from_sums(sums)
        >>> bins.counts, bins.accuracies, bins.calibration_error
        (tensor([0., 2.]), tensor([   nan, 0.5000]), tensor(0.3000))
    """
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidences.dtype, device=confidences.device)
    bins = torch.bucketize(confidences, edges[1:-1], right=True)
    rows = torch.stack([torch.ones_like(confidences), confidences, right.to(confidences.dtype)], dim=1)
    return confidences.new_zeros(num_bins, 3).index_add_(0, bins, rows)


def negative_log_likelihoods(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Of each row: `-log p[target]` in nats; in multilabel tasks the mean cross entropy of its labels.

    Args:
        probabilities: Shape `(B, C)`; those that their dtype cannot tell from 0 (or 1, in multilabel tasks) count as
            the nearest that it can.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.

    Returns:
        Shape `(B,)`.

    Example:
        >>> negative_log_likelihoods(torch.tensor([[0.5, 0.5]]), torch.tensor([0]))
        tensor([0.6931])
    """
    limits = torch.finfo(probabilities.dtype)
    if targets.ndim == 1:
        return -probabilities.gather(1, targets[:, None])[:, 0].clamp_min(limits.tiny).log()
    inside = probabilities.clamp(limits.eps, 1 - limits.eps)
    return F.binary_cross_entropy(inside, targets.to(inside.dtype), reduction="none").mean(dim=1)


def brier_scores(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Of each row: `sum_c (p_c - onehot_c)^2`, from 0 to 2; in multilabel tasks the mean of its labels' squared errors.

    Args:
        probabilities: Shape `(B, C)`.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.

    Returns:
        Shape `(B,)`.

    Example:
        >>> brier_scores(torch.tensor([[0.8, 0.2]]), torch.tensor([0]))
        tensor([0.0800])
    """
    if targets.ndim == 1:
        right = probabilities.gather(1, targets[:, None])[:, 0]
        return (probabilities.square().sum(dim=1) - 2 * right + 1).clamp_min(0)
    return (probabilities - targets).square().mean(dim=1)


def top_k_right(probabilities: Tensor, targets: Tensor, k: int) -> Tensor:
    """Which targets are among the `k` most probable classes; of equally probable ones, the target is the last.

    Args:
        probabilities: Shape `(B, C)`.
        targets: Shape `(B,)`.
        k: At most `C`.

    Returns:
        bool, shape `(B,)`.

    Example:
        >>> top_k_right(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([1]), k=2)
        tensor([True])
    """
    # A thirtieth of the time of topk, and a tenth of that of a sum of bools.
    as_likely = torch.ge(probabilities, probabilities.gather(1, targets[:, None]), out=torch.empty_like(probabilities))
    return as_likely.sum(dim=1) <= k


def f1_counts(predictions: Tensor, targets: Tensor, num_classes: int) -> Tensor:
    """Rows of each class that are true positives, predicted, and labelled so.

    Args:
        predictions: Labels `(B,)` or probabilities `(B, C)`.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.
        num_classes: `C`.

    Returns:
        Shape `(3, C)`, int64. Unlike torchmetrics', it takes no `(C, C)` matrix on the way.

    Example:
        >>> f1_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), num_classes=2)
        tensor([[1, 1], [1, 2], [2, 1]])
    """
    predicted = labels(predictions, targets)
    if targets.ndim == 2:
        labelled = targets >= 0.5
        return torch.stack([(predicted & labelled).sum(dim=0), predicted.sum(dim=0), labelled.sum(dim=0)])
    parts = predicted[predicted == targets], predicted, targets
    return torch.stack([torch.bincount(part, minlength=num_classes) for part in parts])


def macro_f1(counts: Tensor) -> Tensor:
    """The mean over classes of `2 * true positives / (predicted + labelled)`.

    Args:
        counts: From `f1_counts`, shape `(3, C)`.

    Returns:
        Scalar, float64; classes that were neither predicted nor labelled are left out.

    Example:
        >>> macro_f1(torch.tensor([[1, 1], [1, 2], [2, 1]]))
        tensor(0.6667, dtype=torch.float64)
    """
    both = counts.double()
    scores = 2 * both[0] / (both[1] + both[2])
    return scores.nanmean()


def absolute_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Of each row, the mean absolute error over its outputs.

    Args:
        predictions: Shape `(B, C)`.
        targets: Shape `(B, C)`.

    Returns:
        Shape `(B,)`.

    Example:
        >>> absolute_errors(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]]))
        tensor([0.2500])
    """
    return (predictions - targets).abs().mean(dim=1)


def r2(sums: Tensor, rows: Tensor) -> Tensor:
    """The coefficient of determination, the mean over outputs.

    Args:
        sums: Over the rows, of target, squared target and squared error; shape `(3, C)`.
        rows: Number of rows, scalar.

    Returns:
        Scalar; outputs whose targets are all equal are left out, and NaN if none is left.

    Example:
        >>> target, prediction = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0])
        >>> sums = torch.stack([target, target.square(), (target - prediction).square()]).sum(dim=1, keepdim=True)
        >>> r2(sums, torch.tensor(3))
        tensor(0.5000)
    """
    deviations = sums[1] - sums[0].square() / rows
    return (1 - sums[2] / deviations).where(deviations > 0, torch.nan).nanmean()
