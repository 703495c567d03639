"""Values in full: every output of the head, and the residuals that follow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_resmem import functional
from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import narrowed
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.tasks import Task
from lightning_resmem.together import Lock

# Rows whose residuals are derived at once.
_DERIVE_ROWS = 65536


@dataclass(frozen=True)
class DenseConfig:
    """Keep outputs in full.

    Args:
        dtype: What outputs and residuals are stored as; by default what the first chunk's outputs are.
            `torch.float16` halves the bytes of float32 and changes a residual by less than 0.001.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> LocalMemory(values=DenseConfig(torch.float16)).estimate_bytes(1000, 64, 10)["values"]
        56000
    """

    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise InputError(f"dtype={self.dtype!r}: give torch.float32 or torch.float16.")

    def build(self, task: Task, num_outputs: int) -> "DenseValues":
        """Values without rows, for outputs of width `num_outputs`."""
        return DenseValues(task, num_outputs, self.dtype)

    def bytes_per_row(self, num_outputs: int) -> int:
        """Outputs and the residuals derived from them."""
        return 2 * num_outputs * (self.dtype or torch.float32).itemsize


class DenseValues(Values):
    """Outputs in full, shape `(N, C)`; residuals are derived once per temperature.

    Args:
        task: Derives residuals from outputs and targets.
        num_outputs: `C`.
        dtype: Of the outputs; by default that of the first chunk.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(values="dense")
        >>> memory.add(torch.eye(2), outputs=torch.tensor([[2.0, 0.0], [0.0, 3.0]]), targets=torch.tensor([0, 0]))
        >>> memory.fetch(torch.tensor([1])).outputs
        tensor([[0., 3.]])
    """

    name = "dense"

    def __init__(self, task: Task, num_outputs: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(task)
        self._num_outputs, self._dtype = num_outputs, dtype
        self._outputs = GrowingTensor()
        self._residuals: tuple[float, Tensor] | None = None
        self._deriving = Lock()

    def parts(self) -> dict[str, GrowingTensor]:
        return {"outputs": self._outputs, "targets": self._targets}

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        return {"outputs": (rows, self._num_outputs), "targets": self._targets_shape(rows)}

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    @property
    def outputs(self) -> Tensor:
        return self._outputs.finish()

    def stored(self, outputs: Tensor | None, targets: Tensor | None) -> dict[str, Tensor]:
        stored = {}
        if outputs is not None:
            stored["outputs"] = narrowed("outputs", outputs, self._dtype or self._outputs.dtype)
        return stored if targets is None else {**stored, "targets": targets}

    def like(self) -> "DenseValues":
        return DenseValues(self.task, self._num_outputs, self._dtype)

    def residual_sum(self, positions: Tensor, weights: Tensor, softmax_temperature: float) -> tuple[Tensor, None]:
        return functional.weighted_residual(positions, weights, self._derived(softmax_temperature)), None

    def changed(self) -> None:
        self._residuals = None

    def _derived(self, softmax_temperature: float) -> Tensor:
        """The residual table for this temperature, `(N, C)` in the outputs' dtype (at least float32 inside)."""
        with self._deriving:  # once, whoever else waits for it
            derived = self._residuals
            if derived is None or derived[0] != softmax_temperature:
                derived = self._residuals = None  # free the old table first
                outputs, targets = self.outputs, self.targets
                table = torch.empty_like(outputs)
                for start in range(0, len(table), _DERIVE_ROWS):
                    rows = slice(start, start + _DERIVE_ROWS)
                    table[rows] = self.task.residuals(outputs[rows], targets[rows], softmax_temperature)
                derived = self._residuals = (softmax_temperature, table)
        return derived[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_residuals": None}
