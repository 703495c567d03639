"""What the loss of the first training step is given, against what the head returns and the batch holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError, InputError
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.names import submodule

_DISTANCES = ("MseLossBackward0", "L1LossBackward0", "SmoothL1LossBackward0", "HuberLossBackward0")
_CLASSES = ("NllLossBackward0",)
# Nodes of the graph that are looked at: a loss is near its end.
_NODES = 1000
# Rows that tell a line from chance, and how far they may be off it, in standard deviations.
_LEAST_ROWS, _OFF = 4, 1e-2
# Rows that tell a mapping of labels from chance.
_LEAST_LABELS = 8


class FirstLoss:
    """Looks at one training step, and changes nothing of it.

    What follows the head, or what is done to targets, in the steps alone shows nowhere else before training. It is read
    from the graph of the loss; where that holds no loss of PyTorch's own on the targets of the batch, nothing is said.

    Args:
        model: That is trained.
        head: Name of its head.
        reader: Reads targets.
    """

    def __init__(self, model: nn.Module, head: str, reader: BatchReader) -> None:
        self._head, self._name, self._reader = submodule(model, "head", head), head, reader
        self._batch: Any = None
        self._outputs: list[Tensor] = []
        self._hook: Any = None

    def watch(self, batch: Any) -> None:
        """Before the step on a batch."""
        self._batch = batch
        self._hook = self._head.register_forward_hook(lambda _module, _args, output: self._outputs.append(output))

    def close(self) -> None:
        """After the step; calling it again does nothing."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._batch = None
        self._outputs = []

    def check(self, loss: Tensor) -> None:
        """Look at the loss of the step, before its backward.

        Raises:
            InputError: If its targets, or what is compared with them, are in other units than those memorized.
            HeadError: If its classes are not those of the head.
        """
        if self._hook is None:  # a second loss of the step
            return
        outputs, batch = self._outputs, self._batch
        self.close()
        try:
            targets = self._reader.targets(batch).detach()
        except InputError:  # the rehearsal has said so where it matters
            return
        if len(outputs) == 1 and isinstance(outputs[0], Tensor) and outputs[0].ndim == 2:
            output = outputs[0].detach()
            self._check_units(output, targets, list(_compared(loss, _DISTANCES)))
            classes = list(_compared(loss, _CLASSES))
            self._check_classes(output, targets, classes)
            self._check_labels(output, targets, classes)

    def _check_units(self, output: Tensor, targets: Tensor, compared: list[tuple[Tensor, Tensor]]) -> None:
        found = None
        for seen, wanted in compared:
            sizes = {seen.numel(), wanted.numel(), targets.numel(), output.numel()}
            if len(sizes) > 1 or len(output) < _LEAST_ROWS:
                continue
            line, target_line = _line(output, seen), _line(targets, wanted)
            if line is None or target_line is None:
                continue
            (a, b), (c, d) = line, target_line
            spread = targets.double().reshape(output.shape).std(dim=0)
            differ = ((a / c - 1).abs() > _OFF) | ((b - d).abs() > _OFF * (c * spread).abs())
            if not differ.any():
                return  # an auxiliary loss may be in other units
            place = int(differ.nonzero()[0])
            found = found or [float(part[place]) for part in (a, b, c, d)]
        if found is not None:
            raise InputError(
                f"The head {self._name!r} and the targets are in different units: the loss of the first training step "
                "compares {:.4g} * output + {:.4g} with {:.4g} * target + {:.4g}. ".format(*found)
                + "A memory would take the head's outputs for predictions of the targets, and be wrong. Standardise "
                "targets in the dataset, or make what rescales the outputs a part of the head and name it with head=, "
                "or give a targets_fn that returns the targets as the loss is given them."
            )

    def _check_classes(self, output: Tensor, targets: Tensor, compared: list[tuple[Tensor, Tensor]]) -> None:
        widths = {seen.shape[1] for seen, wanted in compared if seen.ndim == 2 and torch.equal(wanted, targets)}
        if widths and output.shape[1] not in widths:
            raise HeadError(
                f"The head {self._name!r} makes outputs of width {output.shape[1]}, but the loss of the first training "
                f"step compares {' and '.join(map(str, sorted(widths)))} with the labels of the batch: it is not the "
                "head. Name the module that makes the logits with head=, and if the model's forward does not call it, "
                "give forward_fn=lambda model, batch: model.head(model(batch[0]))."
            )

    def _check_labels(self, output: Tensor, targets: Tensor, compared: list[tuple[Tensor, Tensor]]) -> None:
        found = None
        for seen, wanted in compared:
            if seen.shape != output.shape or wanted.shape != targets.shape or targets.is_floating_point():
                continue
            if torch.equal(wanted, targets):
                return
            labels, places = targets.unique(return_inverse=True)
            mapped = wanted.new_zeros(len(labels)).index_put((places,), wanted)
            # Labels of other rows, as in mixup, are no function of the row's own.
            if len(targets) >= max(_LEAST_LABELS, 2 * len(labels)) and torch.equal(mapped[places], wanted):
                place = int((mapped != labels).nonzero()[0])
                found = found or (int(labels[place]), int(mapped[place]))
        if found is not None:
            raise InputError(
                f"The head {self._name!r} is trained on other labels than those of the batch: {found[0]} is {found[1]} "
                "in the loss of the first training step. A memory would hold the labels of the batch, and be wrong. "
                "Map the labels in the dataset, or give a targets_fn that returns them as the loss is given them."
            )


def _compared(loss: Tensor, kinds: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """What losses of these kinds compare in the graph of `loss`: predictions and targets."""
    waiting, met = [loss.grad_fn], set[Any]()
    while waiting and len(met) < _NODES:
        node = waiting.pop(0)
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() in kinds:
            try:
                yield node._saved_self, node._saved_target  # type: ignore[attr-defined]
            except RuntimeError:  # changed in place since
                continue
        else:
            waiting += [previous for previous, _ in node.next_functions]


def _line(given: Tensor, seen: Tensor) -> tuple[Tensor, Tensor] | None:
    """The slopes and shifts `(C,)` by which `seen` follows from `given`, `(B, C)`; None if it does not."""
    given = given.double().reshape(len(given), -1)
    seen = seen.detach().double().reshape(given.shape)
    x, y = given - given.mean(dim=0), seen - seen.mean(dim=0)
    slope = (x * y).sum(dim=0) / x.square().sum(dim=0)
    follows = (slope * x - y).abs().amax(dim=0) < _OFF * y.std(dim=0)
    if not follows.all() or not slope.all():  # NaN where nothing varies: not so
        return None
    return slope, seen.mean(dim=0) - slope * given.mean(dim=0)
