"""The scores of rows as pure functions on tensors; `sums.py` adds them up over batches and ranks.

Shapes: `B` rows, `C` classes (or outputs). Predictions are labels `(B,)` or probabilities `(B, C)`, of which
the largest is the label; in multilabel tasks both predictions and targets are `(B, C)`, and 0.5 is the threshold.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_resmem.functional import argmax

__all__ = [
    "absolute_errors",
    "all_right",
    "balanced_accuracy",
    "brier_scores",
    "f1_counts",
    "far_from_uniform",
    "has_rare_labels",
    "is_right",
    "labels",
    "macro_f1",
    "negative_flip_rate",
    "negative_log_likelihoods",
    "positive_flip_rate",
    "r2",
    "top_k_right",
    "turned_right",
]

# Class sizes with a standard deviation above this share of their mean are far from uniform: two classes at 2 to 1.
_UNEVEN = 1 / 3


def is_right(predictions: Tensor, targets: Tensor) -> Tensor:
    """Which labels are those of the targets.

    Args:
        predictions: Labels `(B,)`, or probabilities `(B, C)`.
        targets: Labels `(B,)`, or in multilabel tasks 0 and 1, shape `(B, C)`.

    Returns:
        bool, in the shape of the targets.

    Examples:
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

    Examples:
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

    Examples:
        >>> all_right(torch.tensor([[0.2, 0.8]]), torch.tensor([[1, 1]]))
        tensor([False])
    """
    return is_right(predictions, targets).all(dim=1)


def turned_right(base: Tensor, resmem: Tensor, targets: Tensor) -> Tensor:
    """Which labels the base had wrong and resmem has right; arguments as for `positive_flip_rate`.

    Returns:
        bool, in the shape of the targets.

    Examples:
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

    Examples:
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

    Examples:
        >>> negative_flip_rate(torch.tensor([0, 0, 1]), torch.tensor([1, 0, 0]), torch.tensor([1, 0, 1]))
        tensor(0.3333)
    """
    return positive_flip_rate(resmem, base, targets)


def negative_log_likelihoods(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Of each row: `-log p[target]` in nats; in multilabel tasks the mean cross entropy of its labels.

    Args:
        probabilities: Shape `(B, C)`; those that their dtype cannot tell from 0 (or 1, in multilabel tasks) count as
            the nearest that it can.
        targets: Shape `(B,)`, or `(B, C)` in multilabel tasks.

    Returns:
        Shape `(B,)`.

    Examples:
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

    Examples:
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

    Examples:
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

    Examples:
        >>> f1_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), num_classes=2)
        tensor([[1, 1], [1, 2], [2, 1]])
    """
    predicted = labels(predictions, targets)
    if targets.ndim == 2:
        labelled = targets >= 0.5
        return torch.stack([(predicted & labelled).sum(dim=0), predicted.sum(dim=0), labelled.sum(dim=0)])
    # Not bincount, and not the right ones alone: a GPU would be waited for to tell how many there are.
    rows = torch.stack([targets, predicted, targets])
    counted = torch.ones_like(rows)
    counted[0] = predicted == targets
    return rows.new_zeros(3, num_classes).scatter_add_(1, rows, counted)


def macro_f1(counts: Tensor) -> Tensor:
    """The mean over classes of `2 * true positives / (predicted + labelled)`.

    Args:
        counts: From `f1_counts`, shape `(3, C)`.

    Returns:
        Scalar, float64; classes that were neither predicted nor labelled are left out.

    Examples:
        >>> macro_f1(torch.tensor([[1, 1], [1, 2], [2, 1]]))
        tensor(0.6667, dtype=torch.float64)
    """
    both = counts.double()
    scores = 2 * both[0] / (both[1] + both[2])
    return scores.nanmean()


def balanced_accuracy(counts: Tensor) -> Tensor:
    """The mean over classes of the share of their rows that is right (macro recall): every class counts the same.

    Args:
        counts: From `f1_counts`, shape `(3, C)`.

    Returns:
        Scalar, float64; classes without rows are left out, as scikit-learn's `balanced_accuracy_score` does.

    Examples:
        >>> targets = torch.tensor([0, 0, 0, 1])
        >>> balanced_accuracy(f1_counts(torch.tensor([0, 0, 0, 0]), targets, num_classes=2))
        tensor(0.5000, dtype=torch.float64)
    """
    both = counts.double()
    return (both[0] / both[2]).nanmean()


def far_from_uniform(counts: Tensor) -> bool:
    """Whether classes differ so much in their rows that accuracy and balanced accuracy are two things.

    They do if the standard deviation of their sizes is more than a third of the mean, chance aside: what rows drawn
    from equal classes would show is subtracted, and has to be exceeded by four standard deviations.

    Args:
        counts: Rows of each class, shape `(C,)`; classes without any are left out.

    Examples:
        >>> far_from_uniform(torch.tensor([90, 10])), far_from_uniform(torch.tensor([55, 45]))
        (True, False)
    """
    sizes = counts[counts > 0].double()
    others = len(sizes) - 1
    if others < 1:
        return False
    mean = sizes.mean()
    chance = others + 4 * math.sqrt(2 * others)  # chi-squared of equal classes, and four standard deviations
    chi_squared = float((sizes - mean).square().sum() / mean)
    return chi_squared > chance and (chi_squared - others) / float(sizes.sum()) > _UNEVEN**2


def has_rare_labels(counts: Tensor, rows: int) -> bool:
    """Whether one of several labels is so rare, or so frequent, that accuracy and F1 are two things.

    Args:
        counts: Rows that have each label, shape `(C,)`.
        rows: How many there are.

    Examples:
        >>> has_rare_labels(torch.tensor([50, 10]), rows=100), has_rare_labels(torch.tensor([50, 45]), rows=100)
        (True, False)
    """
    counts = counts.cpu()
    return any(far_from_uniform(pair) for pair in torch.stack([counts, rows - counts], dim=1))


def absolute_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """Of each row, the mean absolute error over its outputs.

    Args:
        predictions: Shape `(B, C)`.
        targets: Shape `(B, C)`.

    Returns:
        Shape `(B,)`.

    Examples:
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

    Examples:
        >>> target, prediction = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 2.0])
        >>> sums = torch.stack([target, target.square(), (target - prediction).square()]).sum(dim=1, keepdim=True)
        >>> r2(sums, torch.tensor(3))
        tensor(0.5000)
    """
    deviations = sums[1] - sums[0].square() / rows
    return (1 - sums[2] / deviations).where(deviations > 0, torch.nan).nanmean()
