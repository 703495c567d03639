"""Values for many classes: of every row the label and its few largest base probabilities."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import narrowed
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.values.interface import Values
from lightning_resmem.tasks import Multiclass, Task

# Entries of temporary tables: rows x classes when rows are added, queries x neighbours x top_m when they are summed.
_ENTRIES = 2**21
# Logarithms below this are stored as this: float16 ends at -65504.
_LOWEST = -60000.0


@dataclass(frozen=True)
class SparseConfig:
    """Keep the label, the `top_m` largest base probabilities and the mass of all others (the tail).

    Args:
        top_m: How many probabilities are kept of a row; all, if there are not more classes.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> LocalMemory(values=SparseConfig(top_m=16)).estimate_bytes(1000, 64, 30_000)["values"]
        84000
    """

    top_m: int = 16

    def __post_init__(self) -> None:
        if self.top_m < 1:
            raise InputError(f"top_m={self.top_m!r}: give a number of probabilities of at least 1.")

    def build(self, task: Task, num_outputs: int) -> "SparseValues":
        """Values without rows, for outputs of width `num_outputs`."""
        return SparseValues(task, num_outputs, self.top_m)

    def bytes_per_row(self, num_outputs: int) -> int:
        """Classes, log-probabilities and the tail."""
        return min(self.top_m, num_outputs) * ((2 if num_outputs <= 2**15 else 4) + 2) + 4


class SparseValues(Values):
    """The label, the `m` largest base probabilities and the mass of the others, 76 bytes a row for `m = 16`.

    Where a residual is read for a query, the tail has the shape of the query's own base prediction, whose neighbour the
    row is, so a residual still sums to 0. At `softmax_temperature = 1` a row's probabilities are then wrong by at most
    the tail mass in total variation. At another temperature `T` the kept probabilities `p` become `p^(1/T)`, exactly,
    while the mass of the tail, whose shape is not known, becomes that of an even one: the total variation is at most
    the largest tail mass at `T` that fits what is stored, `error_bound(T)`. A weighted sum of residuals is off by at
    most the weighted mean of its rows' bounds.

    Args:
        task: `Multiclass()`.
        num_outputs: `C`.
        top_m: `m`.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory(values=SparseConfig(top_m=1))
        >>> memory.add(torch.eye(2), outputs=torch.tensor([[2.0, 0.0], [0.0, 3.0]]), targets=torch.tensor([0, 0]))
        >>> probabilities, tail = memory.fetch(torch.tensor([1])).probabilities(1.0)
        >>> probabilities.shape, round(float(tail), 3)
        (torch.Size([1, 1]), 0.047)
    """

    name = "sparse"
    labels = ("targets", "classes")

    def __init__(self, task: Task, num_outputs: int, top_m: int) -> None:
        super().__init__(task)
        if not isinstance(task, Multiclass):
            raise InputError(f'values="sparse" is for task=Multiclass(), not {type(task).__name__}(): use "dense".')
        self._num_outputs, self._top_m = num_outputs, min(top_m, num_outputs)
        self._classes, self._logs, self._log_tail = GrowingTensor(), GrowingTensor(), GrowingTensor()

    def parts(self) -> dict[str, GrowingTensor]:
        return {
            "targets": self._targets,
            "classes": self._classes,  # (N, m) int16 or int32
            "log_probabilities": self._logs,  # (N, m) float16, descending
            "log_tail": self._log_tail,  # (N,) float32
        }

    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        kept = (rows, self._top_m)
        return {
            "targets": self._targets_shape(rows),
            "classes": kept,
            "log_probabilities": kept,
            "log_tail": (rows,),
        }

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    @property
    def outputs(self) -> Tensor:
        """Log-probabilities `(N, C)`, the tail spread evenly: of a few selected rows, not of all of a large memory."""
        even = (self._log_tail.finish() - math.log(max(1, self._others))).clamp_min(_LOWEST)
        dense = even[:, None].repeat(1, self._num_outputs)
        return dense.scatter_(1, self._classes.finish().long(), self._logs.finish().float())

    @property
    def classes(self) -> Tensor:
        """The classes whose probabilities are kept, shape `(N, m)`, the most probable first."""
        return self._classes.finish()

    @property
    def is_cut(self) -> bool:
        """Whether there are more classes than are kept of a row."""
        return self._others > 0

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "top_m": self._top_m}

    def like(self) -> "SparseValues":
        return SparseValues(self.task, self._num_outputs, self._top_m)

    def stored(self, outputs: Tensor | None, targets: Tensor | None) -> dict[str, Tensor]:
        stored = {} if targets is None else {"targets": targets}
        if outputs is not None:
            blocks = narrowed("outputs", outputs, torch.float32).split(max(1, _ENTRIES // self._num_outputs))
            reduced = zip(*(self._reduced(rows) for rows in blocks), strict=True)
            names = ("classes", "log_probabilities", "log_tail")
            stored |= {name: torch.cat(parts) for name, parts in zip(names, reduced, strict=True)}
        return stored

    def residual_sum(
        self, positions: Tensor, weights: Tensor, softmax_temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        weights = weights.float().masked_fill(positions < 0, 0)
        positions = positions.clamp_min(0)
        sums, tails = weights.new_zeros(len(positions), self._num_outputs), weights.new_zeros(len(positions))
        block = max(1, _ENTRIES // max(1, positions.shape[1] * self._top_m))
        for start in range(0, len(positions), block):
            rows, share = positions[start : start + block], weights[start : start + block]
            probabilities, tail = self._probabilities(rows, softmax_temperature)  # (b, k, m), (b, k)
            kept = share[:, :, None] * probabilities
            total = sums[start : start + block]
            total.scatter_add_(1, self.classes[rows].long().flatten(1), -kept.flatten(1))
            total.scatter_add_(1, self.targets[rows], share)
            tails[start : start + block] = (share * tail).sum(dim=1)
        return sums, tails if self.is_cut else None

    def probabilities(self, softmax_temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities of the kept classes `(N, m)` and of all others together `(N,)`: of a few selected rows."""
        return self._probabilities(torch.arange(len(self), device=self.targets.device), softmax_temperature)

    def error_bound(self, softmax_temperature: float = 1.0) -> Tensor:
        """How far each row's base probabilities can be off, as total variation, whatever the query's are.

        Args:
            softmax_temperature: `T`.

        Returns:
            Shape `(N,)`; at `T = 1` the tail mass. The rounding of the kept logarithms to float16 is included.
        """
        logs, log_tail = self._logs.finish().float(), self._log_tail.finish()
        inverse = 1 / softmax_temperature
        if softmax_temperature >= 1:  # x^(1/T) is concave: an even tail weighs the most
            log_others = math.log(max(1, self._others))
            tail = (log_tail - log_others) * inverse + log_others
        else:  # convex: few entries weigh the most, each as large as the smallest one kept
            tail = log_tail + (inverse - 1) * logs[:, -1]
        kept = torch.logsumexp(logs * inverse, dim=1)
        entropy = (torch.softmax(logs * inverse, dim=1) * logs.abs()).sum(dim=1)
        return torch.sigmoid(tail - kept) + entropy * inverse * 2**-10

    @property
    def _others(self) -> int:
        return self._num_outputs - self._top_m

    def _reduced(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored of outputs `(n, C)`: classes and log-probabilities `(n, m)`, log tail mass `(n,)`."""
        logs = torch.log_softmax(outputs.float(), dim=1)
        top, classes = logs.topk(self._top_m, dim=1)
        if self._others:
            log_tail = logs.scatter_(1, classes, -torch.inf).logsumexp(dim=1)
        else:
            log_tail = top.new_full((len(top),), -torch.inf)
        small = torch.int16 if self._num_outputs <= 2**15 else torch.int32
        return classes.to(small), top.clamp_min(_LOWEST).to(torch.float16), log_tail

    def _probabilities(self, positions: Tensor, softmax_temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities of the kept classes `(..., m)` and of all others together `(...)`, for rows `(...)`."""
        log_others = math.log(max(1, self._others))
        logs = self._logs.finish()[positions].float() / softmax_temperature
        tail = (self._log_tail.finish()[positions] - log_others) / softmax_temperature + log_others
        total = torch.logaddexp(torch.logsumexp(logs, dim=-1), tail)
        return torch.exp(logs - total[..., None]), torch.exp(tail - total)
