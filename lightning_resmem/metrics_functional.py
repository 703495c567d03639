"""The maths of the metrics as pure functions on tensors; `metrics.py` accumulates them over batches and ranks.

Shapes: `B` rows, `C` classes (or outputs), `M` bins. What a function averages, it averages in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Neighborhoods",
    "ReliabilityBins",
    "brier_scores",
    "f1_counts",
    "is_right",
    "macro_f1",
    "negative_flip_rate",
    "negative_log_likelihoods",
    "neighborhoods",
    "positive_flip_rate",
    "reliability",
    "top_k_right",
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

    @property
    def calibration_error(self) -> Tensor:
        """The expected calibration error: the mean over rows of `|accuracy - confidence|` of their bin; scalar."""
        gaps = (self.accuracies - self.confidences).abs().nan_to_num(0.0)
        return (self.counts * gaps).sum() / self.counts.sum()


class Neighborhoods(NamedTuple):
    """Scores by the distance of a row to its nearest neighbour, in groups of (nearly) equally many rows.

    Attributes:
        upper: The largest distance of each group, shape `(M,)`, ascending.
        counts: Rows in each group, shape `(M,)`. Rows of the same distance are in the same group, so that groups may
            differ in size, and be empty.
        scores: Mean score of the rows of each group, shape `(M, 3)`, for base, knn and resmem; NaN where a group is
            empty.
    """

    upper: Tensor
    counts: Tensor
    scores: Tensor
