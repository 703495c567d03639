"""What the memory keeps of a row besides its key: the head's output and the target, from which residuals follow."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.tasks import Multiclass, Task


class Values(ABC):
    """The values of `N` rows, in the order of their keys.

    Outputs are kept rather than residuals, because residuals depend on `softmax_temperature`: changing it derives them
    again and needs no second pass over the training set.

    Examples:
        >>> from lightning_resmem import LocalMemory
        >>> memory = LocalMemory()
        >>> memory.add(torch.eye(3), outputs=torch.zeros(3, 2), targets=torch.tensor([0, 1, 1]))
        >>> memory.fetch(torch.tensor([2, 0])).targets
        tensor([1, 0])
    """

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...]] = ("targets",)  # the tensors that hold classes, with `Multiclass`

    def __init__(self, task: Task) -> None:
        self.task = task
        self._targets = GrowingTensor()

    def __len__(self) -> int:
        return len(self._targets)

    @abstractmethod
    def parts(self) -> dict[str, GrowingTensor]:
        """What is stored of the rows, by the name it is saved under."""

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """`C`."""

    @property
    @abstractmethod
    def outputs(self) -> Tensor:
        """Outputs of all rows, shape `(N, C)`, up to what the kind of values keeps of them."""

    @property
    def targets(self) -> Tensor:
        """Targets of all rows, shape `(N,)` or `(N, C)`."""
        return self._targets.finish()

    @abstractmethod
    def stored(self, outputs: Tensor | None, targets: Tensor | None) -> dict[str, Tensor]:
        """What is stored of outputs `(n, C)`, of checked targets, or of both, by the names of `parts`.

        Raises:
            InputError: If a number is too large for the dtype that it would be stored as.
        """

    @abstractmethod
    def like(self) -> "Values":
        """Values of the same kind and width without rows."""

    @abstractmethod
    def residual_sum(
        self, positions: Tensor, weights: Tensor, softmax_temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """Weighted sum of the residuals at `positions` `(B, k)` (-1 is missing), as far as they are kept.

        Returns:
            The sum `(B, C)`, and the weighted mass of base predictions that it lacks, `(B,)`, or None if it lacks
            none: see `functional.whole_residual`.
        """

    def describe(self) -> dict[str, Any]:
        """What the manifest says about the values besides their tensors."""
        return {"kind": self.name, "num_outputs": self.num_outputs}

    @abstractmethod
    def shapes(self, rows: int) -> dict[str, tuple[int, ...]]:
        """The shape that each tensor has to have, for that many rows."""

    def _targets_shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if isinstance(self.task, Multiclass) else (rows, self.num_outputs)

    @property
    def names(self) -> list[str]:
        """What the tensors are called."""
        return list(self.parts())

    def tensors(self) -> dict[str, Tensor]:
        """What has to be saved."""
        return {name: rows.finish() for name, rows in self.parts().items()}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold exactly these rows, named as by `tensors`, without a copy."""
        for name, rows in self.parts().items():
            rows.replace(tensors[name])
        self.changed()

    def select(self, positions: Tensor) -> "Values":
        """The rows at `positions` `(n,)`."""
        selected = self.like()
        selected.replace({name: rows[positions] for name, rows in self.tensors().items()})
        return selected

    def reserve(self, rows: int) -> None:
        """Expect `rows` more rows."""
        for part in self.parts().values():
            part.reserve(rows)

    def reorder(self, order: Tensor) -> None:
        """Row `i` becomes what row `order[i]` was."""
        for part in self.parts().values():
            part.reorder(order)
        self.changed()

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where `kept` `(N,)` is false."""
        for part in self.parts().values():
            part.keep(kept)
        self.changed()

    def to(self, device: torch.device) -> None:
        """Move all rows."""
        if len(self) and self.targets.device != device:
            self.replace({name: rows.to(device) for name, rows in self.tensors().items()})

    def changed(self) -> None:  # noqa: B027 -- for those that derive something from the rows
        """Forget what was derived from the rows: they are others now."""

    def label_sum(self, positions: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum of the labels at `positions` `(B, k)` (-1 is missing): shape `(B, C)`."""
        return self.task.label_average(positions, weights, self.targets, self.num_outputs)

    def nbytes(self) -> int:
        """Bytes of the stored rows."""
        return sum(rows.nbytes for rows in self.parts().values())
