"""Rates and means of rows as torchmetrics metrics: sums over rows in float64, added up over ranks.

The maths is in `functional.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_resmem.metrics import functional, noise


class Sums(Metric):
    """Sums over rows, added up over ranks."""

    full_state_update = False
    sums: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        # In float32, counts would stop at 2^24 rows.
        self.add_state("sums", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def add(self, sums: Tensor) -> None:
        self.sums += sums.to(self.sums)


class PositiveFlipRate(Sums):
    """The share of rows (in multilabel tasks: of labels) that the base had wrong and resmem has right.

    Examples:
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
        count = flipped.sum()
        self.add(torch.stack([count, torch.full_like(count, flipped.numel())]))

    def compute(self) -> Tensor:
        """The rate, scalar; NaN without rows."""
        return self.sums[0] / self.sums[1]


class NegativeFlipRate(PositiveFlipRate):
    """The share of rows (in multilabel tasks: of labels) that the base had right and resmem has wrong.

    What users of a model notice first after an update: Yan et al. 2021, "Positive-Congruent Training: Towards
    Regression-Free Model Updates", https://arxiv.org/abs/2011.09161; Xie et al. 2021, "Regression Bugs Are In Your
    Model! Measuring, Reducing and Analyzing Regressions In NLP Model Updates", ACL 2021.

    Examples:
        >>> metric = NegativeFlipRate()
        >>> metric.update(base=torch.tensor([0, 0]), resmem=torch.tensor([1, 0]), targets=torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, base: Tensor, resmem: Tensor, targets: Tensor) -> None:
        super().update(resmem, base, targets)


class MeanScores(Sums):
    """Mean scores of base, knn and resmem, and the gain of resmem over the base with its standard error.

    Of rows in groups, a few numbers are kept for each group until the end.

    Args:
        more_is_better: Whether a gain is a higher score, or a lower one, such as an error; it is above 0 either way.

    Examples:
        >>> metric = MeanScores()
        >>> metric.update(torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))
        >>> {name: round(value.item(), 4) for name, value in metric.compute().items()}
        {'base': 0.5, 'knn': 0.5, 'resmem': 1.0, 'gain': 0.5, 'gain_error': 0.5, 'rows': 2.0}
    """

    groups: list[Tensor] | Tensor

    def __init__(self, more_is_better: bool = True) -> None:
        super().__init__(5)
        self.more_is_better = more_is_better
        # Whether they are times, and of each its number or time, the sum of the rows' gains, and how many rows.
        self.add_state("groups", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, groups: Tensor | None = None) -> None:
        """Add rows.

        Args:
            scores: Of base, knn and resmem, shape `(B, 3)`.
            groups: Which of them go right or wrong together, shape `(B,)`: int64 numbers of groups, such as those of
                sequences, or floating-point times. Without them rows are independent.
        """
        scores = scores.to(self.sums)
        gains = scores[:, 2] - scores[:, 0]
        squares = gains.square().sum()
        self.add(torch.cat([scores.sum(dim=0), squares[None], squares.new_full((1,), len(scores))]))
        if groups is None:
            return
        assert isinstance(self.groups, list)
        keys, place = groups.to(self.device).unique(return_inverse=True)
        sums = gains.new_full((4, len(keys)), float(groups.is_floating_point()))
        sums[1] = keys.double() if keys.is_floating_point() else keys.long().view(torch.float64)  # all its bits
        sums[2:] = sums.new_zeros(2, len(keys)).index_add_(1, place, torch.stack([gains, torch.ones_like(gains)]))
        # Flat, and as float32, since that is what the state of a rank without rows is.
        self.groups.append(sums.T.flatten().view(torch.float32))

    def compute(self) -> dict[str, Tensor]:
        """By name; the error is inf for a single row, NaN for one or two groups, and all are NaN without rows."""
        rows = self.sums[4]
        base, knn, resmem, squares = self.sums[:4] / rows
        gain = resmem - base if self.more_is_better else base - resmem
        error = noise.error_of_rows(squares, gain, int(rows)) if rows else rows / 0
        groups = torch.cat([*self.groups]) if isinstance(self.groups, list) and self.groups else self.groups
        if isinstance(groups, Tensor) and len(groups):
            is_time, keys, *sums = groups.view(torch.float64).reshape(-1, 4).T
            place, count = noise.places(keys if is_time.any() else keys.contiguous().view(torch.int64))
            sums, counts = torch.zeros(2, count).to(sums[0]).index_add_(1, place.to(keys.device), torch.stack(sums))
            error = torch.maximum(error, noise.error_of_groups(sums[None], counts)[0])  # NaN stays
        return {"base": base, "knn": knn, "resmem": resmem, "gain": gain, "gain_error": error, "rows": rows}


class RowMean(Sums):
    """The mean over rows of a function of predictions and targets.

    Args:
        function: `function(predictions (B, C), targets)` returns a number for each row, shape `(B,)`.

    Examples:
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
        total = values.double().sum()
        self.add(torch.stack([total, torch.full_like(total, len(values))]))

    def compute(self) -> Tensor:
        """The mean, scalar; NaN without rows."""
        return self.sums[0] / self.sums[1]


class ClassCounts(Sums):
    """Rows of each class that are true positives, predicted, and labelled so; see `functional.f1_counts`.

    Args:
        num_classes: `C`.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(3, num_classes)

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Add rows: predictions `(B, C)` and targets `(B,)`, or `(B, C)` in multilabel tasks."""
        self.add(functional.f1_counts(predictions, targets, self.sums.shape[1]))

    def compute(self) -> Tensor:
        """Shape `(3, C)`."""
        return self.sums.clone()


class BalancedAccuracy(ClassCounts):
    """The mean over classes of the share of their rows that is right; classes without rows are left out.

    Args:
        num_classes: `C`.

    Examples:
        >>> metric = BalancedAccuracy(num_classes=2)
        >>> metric.update(torch.tensor([0, 0, 0, 0]), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Scalar."""
        return functional.balanced_accuracy(self.sums)


class R2(Sums):
    """The coefficient of determination, the mean over outputs; see `functional.r2`.

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
