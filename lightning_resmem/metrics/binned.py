"""Rows in bins as torchmetrics metrics: reliability, and scores by the distance to the nearest neighbour.

The maths is in `bins.py`. `Reliability` is sums; `NeighborhoodAccuracy` keeps 16 bytes a row.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_resmem.errors import InputError
from lightning_resmem.metrics import bins
from lightning_resmem.metrics.bins import Neighborhoods, ReliabilityBins
from lightning_resmem.metrics.sums import Sums


class Reliability(Sums):
    """Confidence against accuracy, in bins; `calibration_error` of the result is the ECE.

    torchmetrics' calibration errors keep all rows and do not show the bins.

    Args:
        num_bins: Equally wide bins of confidence from 0 to 1.

    Examples:
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
        self.add(bins.reliability(confidences, right, len(self.sums)))

    def compute(self) -> ReliabilityBins:
        """The bins."""
        return ReliabilityBins.from_sums(self.sums)


class NeighborhoodAccuracy(Metric):
    """Scores of base, knn and resmem by tenths of the distance to the nearest neighbour.

    Shows where the memory helps, and from which distance on it has nothing to say. The tenths are exact, and the same
    on any number of ranks, since the rows are kept until the end: a distance and three scores, 16 bytes a row.

    Args:
        num_bins: In how many groups of equally many rows the distances are cut.

    Examples:
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
        return bins.neighborhoods(distances, scores.reshape(-1, 3).double(), self.num_bins)
