"""What the loss of the first training step is given, against what the head returns and the batch holds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError, InputError
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.ignored import ignored_labels
from lightning_resmem.model.loss_graph import CLASSES, DISTANCES, compared, compared_by_hand, exponentials
from lightning_resmem.model.names import likely_heads, named_modules, submodule
from lightning_resmem.model.relation import OFF, Relation, relation
from lightning_resmem.model.returned import same
from lightning_resmem.model.sequences import RowReader
from lightning_resmem.model.token_loss import TokenRows, moved
from lightning_resmem.tasks import Multiclass, Regression, Task

# Rows that tell a line from chance.
_LEAST_ROWS = 4
# Rows that tell a mapping of labels from chance.
_LEAST_LABELS = 8
# The share of rows without a target from which on the step must mean it: the pass leaves out one in a hundred.
_MISSING = 0.1

_Pairs = Sequence[tuple[Tensor, Tensor]]


class FirstLoss:
    """Looks at one training step, and changes nothing of it.

    What follows the head, or what is done to targets, in the steps alone shows nowhere else before training. It is read
    from the graph of the loss; where that compares nothing with the targets of the batch that can be told, nothing is
    said.

    Args:
        model: That is trained.
        head: Name of its head.
        reader: Reads targets.
        task: Of the memory, if the batches that are trained on are memorized: says what their labels may be.
    """

    def __init__(self, model: nn.Module, head: str, reader: BatchReader, task: Task | None = None) -> None:
        self._head, self._name, self._reader = submodule(model, "head", head), head, reader
        self._model, self._task = model, task
        self._batch: Any = None
        self._outputs: list[tuple[Tensor, Any]] = []  # with the nodes that made them
        self._others: list[tuple[str, Tensor]] = []
        self._hooks = ExitStack()
        self._watches = False

    def watch(self, batch: Any) -> None:
        """Before the step on a batch."""
        self._batch, self._watches = batch, True
        keep = self._head.register_forward_hook(lambda _module, _args, output: self._keep(output))
        self._hooks.callback(keep.remove)
        if self._reader.head is None:  # it was found, and may be the wrong one
            for name, module in named_modules(self._model).items():
                if isinstance(module, nn.Linear) and module is not self._head:
                    self._hooks.callback(module.register_forward_hook(self._keeper(name)).remove)

    def _keep(self, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs.append((output, output.grad_fn))

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim in (2, 3):
                self._others.append((name, output.detach()))

        return keep

    def close(self) -> None:
        """After the step; calling it again does nothing."""
        self._hooks.close()
        self._batch, self._watches = None, False
        self._outputs, self._others = [], []

    def check(self, loss: Tensor) -> None:
        """Look at the loss of the step, before its backward.

        Raises:
            InputError: If its targets, or what is compared with them, are in other units than those memorized, or hold
                labels that are no class.
            HeadError: If its classes are not those of the head, or the output of another module is compared.
        """
        if not self._watches:  # a second loss of the step
            return
        outputs, others, batch = self._outputs, self._others, self._batch
        self.close()
        if len(outputs) != 1 or outputs[0][0].ndim not in (2, 3):
            return
        returned, end = outputs[0][0].detach(), outputs[0][1]

        def laid(part: Tensor) -> Tensor:
            """What is laid out as what the head returned, in the layout of the targets: `(B, C)` or `(B, T, C)`."""
            swaps = isinstance(self._head, nn.Conv1d) and part.shape == returned.shape and part.ndim == 3
            return part.transpose(1, 2) if swaps else part

        output = laid(returned)
        try:
            reader = RowReader(self._reader, self._model, self._task or Multiclass())
            read = reader.targets(batch, tuple(output.shape))
        except InputError:  # the rehearsal has said so where it matters
            return
        targets, others = read.targets.detach(), [other for other in others if other[1].ndim == output.ndim]
        kinds: list[_Pairs] = [
            [(laid(seen), laid(wanted)) for seen, wanted in compared(loss, kind)] for kind in (DISTANCES, CLASSES)
        ]
        kinds.append(list(compared_by_hand(loss, output.flatten(0, -2), end, targets, laid)))
        labels = targets
        if read.kept is not None:
            self._check_shift(moved(output, read, kinds[1]))
            rows, labels = TokenRows.of(output, read), targets[read.kept]
            kinds = [list(rows.pairs(pairs)) for pairs in kinds]
            others = [(name, rows.of_them(other)) for name, other in others if other.shape[:2] == rows.shape[:2]]
            output, targets = rows.output, rows.targets
        distances, classes, by_hand = kinds
        self._check_classes(output, targets, classes)
        self._check_head(output, targets, [*distances, *classes], others)
        self._check_units(output, targets, [*distances, *by_hand])
        self._check_labels(output, targets, classes)
        self._check_range(labels, output.shape[1], len(output) if read.kept is None else len(labels))
        self._check_missing(targets)
        if isinstance(self._task, Regression) and not distances and exponentials(loss, end):
            raise InputError(
                f"The loss of the first training step takes the exponential of what the head {self._name!r} returns, "
                "as F.poisson_nll_loss does: the outputs are logarithms of the predictions. A memory would take them "
                "for predictions of the targets, and be wrong. Make the exponential a part of the head, name it with "
                "head=, and tell the loss (log_input=False)."
            )

    def _check_head(self, output: Tensor, targets: Tensor, pairs: _Pairs, others: list[tuple[str, Tensor]]) -> None:
        """Whether the loss is given the output of another module, and not the head's at all."""
        on_targets = [seen for seen, wanted in pairs if wanted.numel() == targets.numel() and _equal(wanted, targets)]
        if not on_targets or any(same(output, seen) for seen in on_targets):
            return
        for name, other in others:
            if any(same(other, seen) for seen in on_targets):
                raise HeadError(
                    f"The head {self._name!r} is not what is trained on the targets: the loss of the first training "
                    f"step compares the output of {name!r} with them. Name that one: head={name!r}, and if the model's "
                    "forward does not call it, give forward_fn=lambda model, batch: ... that does."
                )

    def _check_shift(self, ahead: int | None) -> None:
        """Whether the loss is given the labels of other positions than are memorized."""
        if ahead is None:
            return
        theirs, ours = ("next", "same") if ahead > 0 else ("same", "next")
        raise InputError(
            f"The loss of the first training step compares what the head {self._name!r} returns at a position with the "
            f"label of the {theirs} one, but a memory of the batch would hold that of the {ours} one there: labels are "
            "moved only where they are the model's inputs, the entry input_ids or the first of a pair. Give "
            "targets_fn=lambda batch: ... that returns the targets (B, T) of the outputs' own positions, with -100 "
            "where there is none."
        )

    def _check_units(self, output: Tensor, targets: Tensor, pairs: _Pairs) -> None:
        found: InputError | None = None
        for seen, wanted in pairs:
            sizes = {seen.numel(), wanted.numel(), targets.numel(), output.numel()}
            if len(sizes) > 1 or len(output) < _LEAST_ROWS:
                continue
            ours, theirs = relation(output, seen), relation(targets, wanted)
            if ours is None or theirs is None or (ours.is_curve & theirs.is_curve).any():
                continue
            error = self._mapped(output, seen, targets, wanted, ours, theirs) or self._rescaled(ours, theirs, targets)
            if error is None:
                return  # an auxiliary loss may be in other units
            found = found or error
        if found is not None:
            raise found

    def _mapped(
        self, output: Tensor, seen: Tensor, targets: Tensor, wanted: Tensor, ours: Relation, theirs: Relation
    ) -> InputError | None:
        """What is wrong where a curve lies between what is compared and what is memorized."""
        if theirs.is_curve.any():
            return InputError(
                f"The head {self._name!r} is trained on other targets than those of the batch: "
                f"{_example(targets, wanted, theirs.is_curve)} in the loss of the first training step. A memory would "
                "hold the targets of the batch, and be wrong. Map the targets in the dataset, or give "
                "targets_fn=lambda batch: ... that returns them as the loss is given them."
            )
        if ours.is_curve.any():
            return InputError(
                f"Something follows the head {self._name!r} in the steps: its output "
                f"{_example(output, seen, ours.is_curve)} in the loss of the first training step. A memory would take "
                "the head's outputs for predictions of the targets, and be wrong. Make what follows it a part of the "
                'head, self.head = nn.Sequential(self.fc, nn.Sigmoid()) with head="head", or give a targets_fn that '
                "returns the targets in the units of the head."
            )
        return None

    def _rescaled(self, ours: Relation, theirs: Relation, targets: Tensor) -> InputError | None:
        """What is wrong where a line lies between them."""
        (a, b, _), (c, d, _) = ours, theirs
        spread = targets.double().reshape(len(targets), -1).std(dim=0)
        differ = ((a / c - 1).abs() > OFF) | ((b - d).abs() > OFF * (c * spread).abs())
        if not differ.any():
            return None
        place = int(differ.nonzero()[0])
        return InputError(
            f"The head {self._name!r} and the targets are in different units: the loss of the first training step "
            "compares {:.4g} * output + {:.4g} with {:.4g} * target + {:.4g}. ".format(
                *(float(part[place]) for part in (a, b, c, d))
            )
            + "A memory would take the head's outputs for predictions of the targets, and be wrong. Standardise "
            "targets in the dataset, or make what rescales the outputs a part of the head and name it with head=, "
            "or give a targets_fn that returns the targets as the loss is given them."
        )

    def _check_classes(self, output: Tensor, targets: Tensor, pairs: _Pairs) -> None:
        widths = {seen.shape[1] for seen, wanted in pairs if seen.ndim == 2 and torch.equal(wanted, targets)}
        if widths and output.shape[1] not in widths:
            fitting = [n for n in likely_heads(self._model) if _width(submodule(self._model, "head", n)) in widths]
            name = fitting[-1] if fitting else "head"
            raise HeadError(
                f"The head {self._name!r} makes outputs of width {output.shape[1]}, but the loss of the first training "
                f"step compares {' and '.join(map(str, sorted(widths)))} with the labels of the batch: it is not the "
                f"head. Name the module that makes the logits, {f'head={name!r}' if fitting else 'with head='}, and if "
                f"the model's forward does not call it, give forward_fn=lambda model, batch: "
                f"model.{name}(model(batch[0]))."
            )

    def _check_labels(self, output: Tensor, targets: Tensor, pairs: _Pairs) -> None:
        found, kept = None, self._labelled(targets, output.shape[1])
        for seen, wanted in pairs:
            if seen.shape != output.shape or wanted.shape != targets.shape or targets.is_floating_point():
                continue
            wanted = wanted[kept]  # what is no label need not be the same one for the loss
            if torch.equal(wanted, targets[kept]):
                return
            labels, places = targets[kept].unique(return_inverse=True)
            mapped = wanted.new_zeros(len(labels)).index_put((places,), wanted)
            # Labels of other rows, as in mixup, are no function of the row's own.
            if len(wanted) >= max(_LEAST_LABELS, 2 * len(labels)) and torch.equal(mapped[places], wanted):
                place = int((mapped != labels).nonzero()[0])
                found = found or (int(labels[place]), int(mapped[place]))
        if found is not None:
            raise InputError(
                f"The head {self._name!r} is trained on other labels than those of the batch: {found[0]} is {found[1]} "
                "in the loss of the first training step. A memory would hold the labels of the batch, and be wrong. "
                "Map the labels in the dataset, or give a targets_fn that returns them as the loss is given them."
            )

    def _check_range(self, targets: Tensor, num_classes: int, rows: int) -> None:
        """Labels of all rows of the batch: fewer were read before training."""
        if not isinstance(self._task, Multiclass) or targets.shape != (rows,) or targets.is_floating_point():
            return
        kept = self._labelled(targets, num_classes)
        try:
            self._task.check_targets(targets[kept], num_classes, kept)
        except InputError as error:
            raise InputError(f"In the batch of the first training step: {error}") from error

    def _check_missing(self, targets: Tensor) -> None:
        """Targets that the step masks: the pass would refuse so many after training."""
        if self._task is None or not targets.is_floating_point():
            return
        missing = int((~torch.isfinite(targets.reshape(len(targets), -1))).any(dim=1).sum())
        if missing >= _LEAST_ROWS and missing > _MISSING * len(targets):
            raise InputError(
                f"{missing} of {len(targets)} rows of the first training batch have targets that are NaN or infinite. "
                "A memory needs whole rows, and leaves out at most one in a hundred: give it those that have all "
                "targets, memory_dataloader=DataLoader(whole_rows, batch_size=...)."
            )

    def _labelled(self, targets: Tensor, num_classes: int) -> Tensor:
        """Numbers of the rows that are memorized: those whose label is not ignored."""
        ignored = Multiclass().ignored(targets, num_classes, ignored_labels(self._model))
        rows = torch.arange(len(targets), device=targets.device)
        return rows if ignored is None else rows[~ignored]


def _width(module: nn.Module) -> int | None:
    return module.out_features if isinstance(module, nn.Linear) else None


def _equal(wanted: Tensor, targets: Tensor) -> bool:
    return torch.equal(wanted.reshape(-1).double(), targets.to(wanted.device).reshape(-1).double())


def _example(given: Tensor, seen: Tensor, is_curve: Tensor) -> str:
    """One number and what it became, in a column of those: the largest, where there is most to see."""
    place = int(is_curve.nonzero()[0])
    column = given.reshape(len(given), -1)[:, place]
    row = int(column.abs().argmax())
    return f"{float(column[row]):.4g} is {float(seen.detach().reshape(len(seen), -1)[row, place]):.4g}"
