"""What a residual is, by task: classification with one label, with several, and regression."""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import ClassVar

import torch
from torch import Tensor

from lightning_resmem import functional
from lightning_resmem.errors import InputError


def _rows(bad: Tensor, ids: Tensor | None, most: int = 5) -> str:
    """Name the first few bad rows, by id when ids are known."""
    where = bad.nonzero()[:, 0]
    names = where if ids is None else ids.to(where.device)[where]
    listed = ", ".join(str(int(i)) for i in names[:most])
    more = f" and {len(where) - most} more" if len(where) > most else ""
    return f"rows {listed}{more}"


def check_finite(name: str, tensor: Tensor, ids: Tensor | None = None) -> None:
    """Raise an error that names the rows of `tensor` (first dimension) with a NaN or an infinite entry."""
    if all_finite(tensor):
        return
    bad = ~torch.isfinite(tensor.reshape(len(tensor), -1)).all(dim=1)
    if bad.any():
        raise InputError(
            f"{name} has NaN or infinite entries in {_rows(bad, ids)}. Look at these rows: their input may hold such "
            "values, the training may have diverged, or a half-precision forward may overflow."
        )


def all_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite; False may also mean that a sum of finite entries is too large.

    The sum is finite almost always, and one reduction is much cheaper than a mask. The host waits once for all tensors.
    """
    # In half precision the sum of a few thousand logits is too large already.
    total, *others = (tensor.sum(dtype=torch.float32 if tensor.itemsize < 4 else None) for tensor in tensors)
    for other in others:
        total = total + other.to(total.device)
    return math.isfinite(total.item())  # to ask torch takes four operations


def _use(task: str) -> str:
    """How to change the task, wherever the memory is made."""
    return f"LocalMemory(task={task}()), with the callback ResMemCallback(memory=LocalMemory(task={task}()))"


_SINGLE_OUTPUT = (
    "A head with one output is a binary classifier or a regression, not task=Multiclass(). "
    f"For labels 0 and 1 use {_use('Multilabel')}; for real values use {_use('Regression')}."
)


_MEAN_AND_VARIANCE = (
    " If the head makes a mean and a variance, as gaussian_nll_loss wants them, make it two: self.mean = "
    'nn.Linear(...) and self.variance = nn.Linear(...), with head="mean".'
)


def _is_half(targets: Tensor, num_outputs: int) -> bool:
    """Whether there are two outputs for each number of a target."""
    return targets.ndim > 0 and 2 * targets[:1].numel() == num_outputs


class Task(ABC):
    """Turns the head's outputs and the targets into predictions and residuals.

    Shapes: outputs `(N, C)`; targets `(N,)` class labels for `Multiclass`, `(N, C)` otherwise (or `(N,)` if `C` is 1).

    Examples:
        >>> Multiclass().residuals(torch.zeros(1, 2), torch.tensor([1]))
        tensor([[-0.5000,  0.5000]])
    """

    name: ClassVar[str]
    score_name: ClassVar[str] = "acc"
    higher_is_better: ClassVar[bool] = True
    uses_softmax_temperature: ClassVar[bool] = True

    def target_shapes(self, num_outputs: int) -> set[tuple[int, ...]]:
        """Which shapes the targets of one row may have."""
        return {(num_outputs,), ()} if num_outputs == 1 else {(num_outputs,)}

    @abstractmethod
    def check_targets(self, targets: Tensor, num_outputs: int, ids: Tensor | None = None) -> Tensor:
        """Return the targets in the dtype and shape they are stored in, or raise an error that names the bad rows."""

    def ignored(self, targets: Tensor, num_outputs: int, labels: Collection[int]) -> Tensor | None:
        """Which rows `(N,)` have one of the labels that a loss ignores; None where a target is no label.

        Args:
            targets: As they come.
            num_outputs: `C`: what is a class, in [0, C), is not ignored.
            labels: That the loss ignores, such as -100.
        """
        return None

    @abstractmethod
    def predict(self, outputs: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        """The base prediction, shape `(N, C)`."""

    @abstractmethod
    def residuals(self, outputs: Tensor, targets: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        """Label minus base prediction, shape `(N, C)`."""

    def label_average(self, positions: Tensor, weights: Tensor, targets: Tensor, num_outputs: int) -> Tensor:
        """Weighted average of the labels at `positions` `(B, k)`: the kNN prediction, shape `(B, C)`."""
        return functional.weighted_residual(positions, weights, targets)

    @abstractmethod
    def to_outputs(self, combined: Tensor, base: Tensor) -> Tensor:
        """What the head has to return so that the user's own loss and metrics see the combined prediction."""

    @abstractmethod
    def probabilities(self, combined: Tensor, base: Tensor) -> Tensor:
        """What `to_outputs` stands for, as probabilities of a proper distribution (as it is, in regression)."""

    def tempered(self, combined: Tensor, base: Tensor, temperature: float) -> Tensor:
        """The combined prediction with its logarithm, or log-odds, divided by a temperature; in regression as it is.

        `to_outputs` and `probabilities` change it no more than by rounding.
        """
        return self.probabilities(self.predict(self.to_outputs(combined, base), temperature), base)

    @abstractmethod
    def loss(self, combined: Tensor, base: Tensor, targets: Tensor) -> Tensor:
        """Loss per row, shape `(B,)`: negative log-likelihood in nats, or the squared error."""

    @abstractmethod
    def score(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Score per row, shape `(B,)`; its mean is what is reported (`score_name`: accuracy, or mean squared error)."""


class Multiclass(Task):
    """One label out of `C`: residuals are `onehot(y) - softmax(f(x) / T)`.

    Examples:
        >>> Multiclass().predict(torch.tensor([[0.0, 0.0]]))
        tensor([[0.5000, 0.5000]])
    """

    name = "multiclass"

    def target_shapes(self, num_outputs: int) -> set[tuple[int, ...]]:
        return {()}

    def check_targets(self, targets: Tensor, num_outputs: int, ids: Tensor | None = None) -> Tensor:
        if targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets[:, 0]
        if targets.ndim != 1:
            raise InputError(
                f"targets has shape {tuple(targets.shape)}, expected (N,) class labels for task=Multiclass(). "
                f"For one-hot or soft labels give targets.argmax(1), for several labels a row use {_use('Multilabel')}."
            )
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
            raise InputError(
                f"targets has dtype {targets.dtype}, expected integer class labels for task=Multiclass(). "
                + (
                    _SINGLE_OUTPUT
                    if num_outputs == 1
                    else f"Convert class labels with targets.long(). For real values use {_use('Regression')}; for "
                    "several labels a row Multilabel() in its place."
                )
            )
        targets = targets.to(torch.int64)
        bad = (targets < 0) | (targets >= num_outputs)
        if bad.any():
            raise InputError(
                f"targets holds {int(targets[bad][0])} in {_rows(bad, ids)}, outside [0, {num_outputs}) for a head "
                + (
                    f"with one output. {_SINGLE_OUTPUT}"
                    if num_outputs == 1
                    else f"with {num_outputs} outputs. Map the labels to 0..{num_outputs - 1}, or leave such rows out "
                    "of the loader, or of the memory alone with a memory_dataloader. (A Trainer's pass leaves them out "
                    "by itself if the label is -100, or if the model holds its loss: self.loss = "
                    f"nn.CrossEntropyLoss(ignore_index={int(targets[bad][0])}).)"
                )
            )
        return targets

    def ignored(self, targets: Tensor, num_outputs: int, labels: Collection[int]) -> Tensor | None:
        if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool or not targets.ndim:
            return None
        rows = targets.to(torch.int64).flatten(1) if targets.ndim > 1 else targets.to(torch.int64)[:, None]
        found = torch.zeros_like(rows, dtype=torch.bool)
        for label in labels:  # one by one: a tensor of them would have to be sent to a GPU
            if not 0 <= label < num_outputs:
                found |= rows == label
        return found.all(dim=1)

    def predict(self, outputs: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        return functional.probabilities(outputs, softmax_temperature)

    def residuals(self, outputs: Tensor, targets: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        return functional.residuals(outputs, targets, softmax_temperature)

    def label_average(self, positions: Tensor, weights: Tensor, targets: Tensor, num_outputs: int) -> Tensor:
        return functional.weighted_labels(positions, weights, targets, num_outputs)

    def to_outputs(self, combined: Tensor, base: Tensor) -> Tensor:
        return functional.log_predictions(combined, base)

    def probabilities(self, combined: Tensor, base: Tensor) -> Tensor:
        return functional.proper_probabilities(combined, base)

    def tempered(self, combined: Tensor, base: Tensor, temperature: float) -> Tensor:
        return functional.tempered(combined, base, temperature)

    def loss(self, combined: Tensor, base: Tensor, targets: Tensor) -> Tensor:
        return functional.negative_log_likelihood(combined, base, targets)

    def score(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return (functional.argmax(prediction) == targets).to(torch.float32)


class Multilabel(Task):
    """Any number of `C` labels a row: residuals are `y - sigmoid(f(x) / T)`; the score is the share of right labels.

    Examples:
        >>> Multilabel().residuals(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.5000, -0.5000]])
    """

    name = "multilabel"
    margin = 1e-4  # routed probabilities stay this far from 0 and 1, so that their logits are finite

    def check_targets(self, targets: Tensor, num_outputs: int, ids: Tensor | None = None) -> Tensor:
        if targets.ndim == 1 and num_outputs == 1:
            targets = targets[:, None]
        if targets.ndim != 2 or targets.shape[1] != num_outputs:
            raise InputError(
                f"targets has shape {tuple(targets.shape)}, expected (N, {num_outputs}) with a 0 or 1 for every "
                "output for task=Multilabel(). For one class label a row use Multiclass(), the default."
            )
        targets = targets.float()
        bad = ~((targets >= 0) & (targets <= 1)).all(dim=1)
        if bad.any():
            raise InputError(
                f"targets has entries outside [0, 1] in {_rows(bad, ids)} for task=Multilabel(). Map labels such as -1 "
                "and 1 to 0 and 1, and leave out rows of which a label is missing."
            )
        return targets

    def predict(self, outputs: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        wide = outputs if outputs.dtype == torch.float64 else outputs.float()
        return torch.sigmoid(wide / softmax_temperature)

    def residuals(self, outputs: Tensor, targets: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        return targets - self.predict(outputs, softmax_temperature)

    def to_outputs(self, combined: Tensor, base: Tensor) -> Tensor:
        return torch.logit(combined, eps=self.margin)

    def probabilities(self, combined: Tensor, base: Tensor) -> Tensor:
        return combined.clamp(self.margin, 1 - self.margin)

    def loss(self, combined: Tensor, base: Tensor, targets: Tensor) -> Tensor:
        logits = self.to_outputs(combined, base)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none"
        ).mean(dim=1)

    def score(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return ((prediction >= 0.5) == (targets >= 0.5)).to(torch.float32).mean(dim=1)


class Regression(Task):
    """Real-valued outputs: residuals are `y - f(x)`, the score is the mean squared error (lower is better).

    Examples:
        >>> Regression().residuals(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
        tensor([[2.]])
    """

    name = "regression"
    score_name = "mse"
    higher_is_better = False
    uses_softmax_temperature = False

    def check_targets(self, targets: Tensor, num_outputs: int, ids: Tensor | None = None) -> Tensor:
        if targets.ndim == 1 and num_outputs == 1:
            targets = targets[:, None]
        if targets.ndim != 2 or targets.shape[1] != num_outputs:
            raise InputError(
                f"targets has shape {tuple(targets.shape)}, expected (N, {num_outputs}), a value for every output, "
                "for task=Regression(). If the head has others, give a targets_fn that returns them."
                f"{_MEAN_AND_VARIANCE if _is_half(targets, num_outputs) else ''}"
            )
        targets = targets if targets.dtype == torch.float64 else targets.float()
        check_finite("targets", targets, ids)
        return targets

    def predict(self, outputs: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        return outputs if outputs.dtype == torch.float64 else outputs.float()

    def residuals(self, outputs: Tensor, targets: Tensor, softmax_temperature: float = 1.0) -> Tensor:
        return targets - self.predict(outputs)

    def to_outputs(self, combined: Tensor, base: Tensor) -> Tensor:
        return combined

    def probabilities(self, combined: Tensor, base: Tensor) -> Tensor:
        return combined

    def loss(self, combined: Tensor, base: Tensor, targets: Tensor) -> Tensor:
        return self.score(combined, targets)

    def score(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return (prediction - targets).square().mean(dim=1)


TASKS: dict[str, type[Task]] = {task.name: task for task in (Multiclass, Multilabel, Regression)}
