"""What the memory keeps of a row besides its key: the head's output and the target, from which residuals follow."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from lightning_resmem import functional
from lightning_resmem.memory.rows import GrowingTensor
from lightning_resmem.tasks import Task

# Rows whose residuals are derived at once.
_DERIVE_ROWS = 65536


class Values(ABC):
    """The values of `N` rows, in the order of their keys.

    Outputs are kept rather than residuals, because residuals depend on `softmax_temperature`: changing it derives them
    again and needs no second pass over the training set.
    """

    name: ClassVar[str]

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """`C`."""

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """Targets of all rows, shape `(N,)` or `(N, C)`."""

    @property
    @abstractmethod
    def outputs(self) -> Tensor:
        """Outputs of all rows, shape `(N, C)`."""

    @abstractmethod
    def append(self, outputs: Tensor, targets: Tensor) -> None:
        """Add rows: outputs `(n, C)` and checked targets."""

    @abstractmethod
    def reserve(self, rows: int) -> None:
        """Expect `rows` more rows."""

    @abstractmethod
    def finish(self, order: Tensor | None) -> None:
        """Join the chunks; with `order` `(N,)`, row `i` becomes what row `order[i]` was."""

    @abstractmethod
    def select(self, positions: Tensor) -> "Values":
        """The rows at `positions` `(n,)`."""

    @abstractmethod
    def residual_sum(self, positions: Tensor, weights: Tensor, softmax_temperature: float) -> Tensor:
        """Weighted sum of the residuals at `positions` `(B, k)` (-1 is missing): shape `(B, C)`."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move all rows."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved."""

    @abstractmethod
    def replace(self, tensors: dict[str, Tensor]) -> None:
        """Hold exactly the rows that `tensors` returned somewhere else."""

    def label_sum(self, positions: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the labels at `positions` `(B, k)` (-1 is missing): shape `(B, C)`."""
        return self.task.label_average(positions, weights, self.targets, self.num_outputs)

    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class DenseValues(Values):
    """Outputs in full, shape `(N, C)`, in the dtype they came in; residuals are derived once per temperature.

    Args:
        task: Derives residuals from outputs and targets.
    """

    name = "dense"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._outputs, self._targets = GrowingTensor(), GrowingTensor()
        self._residuals: tuple[float, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._outputs)

    @property
    def num_outputs(self) -> int:
        return self.outputs.shape[1]

    @property
    def outputs(self) -> Tensor:
        return self._outputs.finish()

    @property
    def targets(self) -> Tensor:
        return self._targets.finish()

    def append(self, outputs: Tensor, targets: Tensor) -> None:
        self._outputs.append(outputs)
        self._targets.append(targets)
        self._residuals = None

    def reserve(self, rows: int) -> None:
        self._outputs.reserve(rows)
        self._targets.reserve(rows)

    def finish(self, order: Tensor | None) -> None:
        for rows in (self._outputs, self._targets):
            joined = rows.finish()
            if order is not None:
                rows.replace(joined[order])
        self._residuals = None

    def select(self, positions: Tensor) -> "DenseValues":
        selected = DenseValues(self.task)
        selected._outputs.replace(self.outputs[positions])
        selected._targets.replace(self.targets[positions])
        return selected

    def residual_sum(self, positions: Tensor, weights: Tensor, softmax_temperature: float) -> Tensor:
        return functional.weighted_residual(positions, weights, self._derived(softmax_temperature))

    def to(self, device: torch.device) -> None:
        if len(self) and self.outputs.device != device:
            self._outputs.replace(self.outputs.to(device))
            self._targets.replace(self.targets.to(device))
            self._residuals = None

    def tensors(self) -> dict[str, Tensor]:
        return {"outputs": self.outputs, "targets": self.targets}

    def replace(self, tensors: dict[str, Tensor]) -> None:
        self._outputs.replace(tensors["outputs"])
        self._targets.replace(tensors["targets"])
        self._residuals = None

    def _derived(self, softmax_temperature: float) -> Tensor:
        """The residual table for this temperature, `(N, C)` in the outputs' dtype (at least float32 inside)."""
        if self._residuals is None or self._residuals[0] != softmax_temperature:
            self._residuals = None  # free the old table first
            outputs, targets = self.outputs, self.targets
            table = torch.empty_like(outputs)
            for start in range(0, len(table), _DERIVE_ROWS):
                rows = slice(start, start + _DERIVE_ROWS)
                table[rows] = self.task.residuals(outputs[rows], targets[rows], softmax_temperature)
            self._residuals = (softmax_temperature, table)
        return self._residuals[1]
