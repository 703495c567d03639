"""Base, knn and resmem side by side."""

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_resmem.memory.base import Predictions
from lightning_resmem.tasks import Task


class Scoreboard:
    """Scores of the three predictions over the rows of a stage, for each dataloader, summed over all ranks.

    Args:
        task: Scores a prediction: accuracy, or mean squared error in regression.
        prefix: Of the metrics' names: `"test"` gives `test/acc_base`, `test/acc_knn` and `test/acc_resmem`.
        num_dataloaders: How many dataloaders the stage has.
        device: Where the sums are kept: where the ranks can add them up.

    Example:
        >>> from lightning_resmem.tasks import Multiclass
        >>> board = Scoreboard(Multiclass(), "test")
        >>> right, wrong = torch.tensor([[0.1, 0.9]]), torch.tensor([[0.9, 0.1]])
        >>> board.update(Predictions(base=wrong, knn=right, resmem=right), torch.tensor([1]))
        >>> board.compute()
        {'test/acc_base': 0.0, 'test/acc_knn': 1.0, 'test/acc_resmem': 1.0}
    """

    def __init__(self, task: Task, prefix: str, num_dataloaders: int = 1, device: torch.device | str = "cpu") -> None:
        self._task, self._prefix, self._device = task, prefix, device
        # Made beforehand, so that a rank without rows takes part in the sum over ranks.
        self._metrics: list[dict[str, Metric]] = [
            {name: task.metric().to(device) for name in Predictions._fields} for _ in range(num_dataloaders)
        ]
        self._seen = [0] * num_dataloaders

    def update(
        self, predictions: Predictions, targets: Tensor, dataloader_idx: int = 0, num_rows: int | None = None
    ) -> None:
        """Count a batch.

        Args:
            predictions: Each of shape `(B, C)`.
            targets: Of the same rows, as the task wants them.
            dataloader_idx: Which dataloader they come from.
            num_rows: How many rows of this dataloader this rank has to count; rows after them are padding.
        """
        device = predictions.base.device
        targets = self._task.check_targets(targets.to(device), predictions.base.shape[1])
        seen = self._seen[dataloader_idx]
        self._seen[dataloader_idx] += len(targets)
        counted = len(targets) if num_rows is None else max(0, min(len(targets), num_rows - seen))
        if not counted:
            return
        for name, prediction in zip(Predictions._fields, predictions, strict=True):
            scores = self._task.score(prediction[:counted].to(device), targets[:counted])
            self._metrics[dataloader_idx][name].update(scores.to(self._device))

    def compute(self) -> dict[str, float]:
        """The scores by name; with several dataloaders the names end in `/dataloader_idx_N`, as Lightning's do."""
        scores = {}
        for index, metrics in enumerate(self._metrics):
            suffix = f"/dataloader_idx_{index}" if len(self._metrics) > 1 else ""
            for name, metric in metrics.items():
                scores[f"{self._prefix}/{self._task.score_name}_{name}{suffix}"] = float(metric.compute())
        return scores
