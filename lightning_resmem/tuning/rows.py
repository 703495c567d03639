"""The rows that a memory is tuned on, and what settings give on them."""

from typing import Any, NamedTuple

from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import as_ids, as_tensor, check_shapes
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.tasks import check_finite


class Rows(NamedTuple):
    """Rows to tune on.

    Attributes:
        embeddings: Shape `(V, D)`.
        outputs: Shape `(V, C)`.
        targets: As the task wants them.
        ids: Shape `(V,)` if they are rows of the memory themselves, which are then not their own neighbours; or None.
        groups: Which go right or wrong together, shape `(V,)`: see `noise`; None where rows are independent.
    """

    embeddings: Tensor
    outputs: Tensor
    targets: Tensor
    ids: Tensor | None = None
    groups: Tensor | None = None

    def where(self, kept: Tensor) -> "Rows":
        """Those of a mask `(V,)`."""
        return Rows(*(None if part is None else part[kept.to(part.device)] for part in self))  # type: ignore[arg-type]


class Measured(NamedTuple):
    """Means over the rows of all ranks for `S` settings; each of shape `(S,)`, float64, on the CPU.

    Attributes:
        score: The task's score.
        loss: The task's loss.
        lost: The share of answers (in multilabel tasks of labels) that the base had right and the setting has wrong.
        squares: Squared difference of a row's score to that of the base.
        loss_gain: How much lower the loss is than that of the base at the same softmax_temperature.
        loss_squares: Squares of that.
    """

    score: Tensor
    loss: Tensor
    lost: Tensor
    squares: Tensor
    loss_gain: Tensor
    loss_squares: Tensor


class Pooled(NamedTuple):
    """A setting's predictions for the rows of all ranks, in an order that does not depend on their ranks.

    `groups` says which of them each row belongs to: `(V,)`, 0, 1, ...
    """

    base: Tensor
    residual: Tensor
    distances: Tensor
    targets: Tensor
    groups: Tensor | None


def checked_rows(
    memory: ResidualMemory, embeddings: Tensor, outputs: Tensor, targets: Tensor, ids: Any, groups: Any
) -> Rows:
    """What a tuner was given: see `Tuner.tune`."""
    embeddings, outputs = as_tensor("embeddings", embeddings), as_tensor("outputs", outputs)
    targets = as_tensor("targets", targets)
    check_shapes(embeddings, outputs, targets, None)
    width = memory.stats()["width"]
    if len(memory) and embeddings.shape[1] != width:
        raise InputError(
            f"embeddings has shape {tuple(embeddings.shape)}, the memory's keys have width {width}: tune on the same "
            "embedding that filled the memory."
        )
    check_finite("embeddings", embeddings)
    check_finite("outputs", outputs)
    targets = memory.task.check_targets(targets, outputs.shape[1])
    ids, groups = (_one_each(name, given, len(targets)) for name, given in (("ids", ids), ("groups", groups)))
    if groups is None and memory.asked_at is not None and memory.asked_at.ndim:
        groups = memory.asked_at
    return Rows(embeddings, outputs, targets, ids, groups)


def _one_each(name: str, numbers: Any, count: int) -> Tensor | None:
    if numbers is None:
        return None
    checked = as_ids(numbers, name)
    if len(checked) != count:
        raise InputError(f"{name} has shape {tuple(checked.shape)}, expected ({count},): one for every row.")
    return checked
