"""Rows in bins: how right they are by confidence, and by the distance to the nearest neighbour.

Pure functions on tensors; `binned.py` accumulates them over batches and ranks. Shapes: `B` rows, `M` bins.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Neighborhoods", "ReliabilityBins", "neighborhoods", "reliability"]


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


def neighborhoods(distances: Tensor, scores: Tensor, num_bins: int = 10) -> Neighborhoods:
    """Mean scores of rows grouped by their distance to the nearest neighbour: by default in tenths of the rows.

    Args:
        distances: Shape `(B,)`; `inf` for a row without neighbours.
        scores: Of each row for base, knn and resmem, such as 1 for right and 0 for wrong; shape `(B, 3)`.
        num_bins: `M`.

    Examples:
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

    Examples:
        >>> sums = reliability(torch.tensor([0.9, 0.7]), torch.tensor([1, 0]), num_bins=2)
        >>> bins = ReliabilityBins.from_sums(sums)
        >>> bins.counts, bins.accuracies, bins.calibration_error
        (tensor([0., 2.]), tensor([   nan, 0.5000]), tensor(0.3000))
    """
    edges = torch.linspace(0, 1, num_bins + 1, dtype=confidences.dtype, device=confidences.device)
    bins = torch.bucketize(confidences, edges[1:-1], right=True)
    rows = torch.stack([torch.ones_like(confidences), confidences, right.to(confidences.dtype)], dim=1)
    return confidences.new_zeros(num_bins, 3).index_add_(0, bins, rows)
