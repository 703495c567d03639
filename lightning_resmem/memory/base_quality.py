"""A look at the base through a memory's rows: whether its outputs and the targets can belong together."""

import warnings

import torch
from torch import Tensor

from lightning_resmem.errors import ResMemWarning
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.tasks import Multiclass, Regression, Task

# Rows that are looked at, and how many there have to be for a verdict.
_ROWS, _LEAST_ROWS = 10_000, 30
# Entries of their outputs.
_ENTRIES = 2**26
# Standard errors by which the base has to be worse than a constant.
_ERRORS = 3.0
# Of the way from chance to perfection: above it, classes are told apart, by a base that was trained for rare ones, say.
_TELLS_APART = 0.25


def look_at_base(memory: ResidualMemory) -> None:
    """Warn if the base does worse on its own training rows than a constant would.

    That of regression is the mean of the targets, that of classes the most frequent one. A trained network is not worse
    unless the outputs or the targets that were memorized are others than those that it was trained with.

    Args:
        memory: Filled.
    """
    ids, count = memory.ids, min(len(memory), _ROWS, max(_LEAST_ROWS, _ENTRIES // max(1, memory.num_outputs)))
    if count < _LEAST_ROWS:
        return
    rows = memory.fetch(ids[torch.arange(count) * len(ids) // count])
    outputs, targets = rows.outputs.cpu(), rows.targets.cpu()
    found = _in_regression(outputs, targets) if isinstance(memory.task, Regression) else None
    found = found or _never_labels(memory.task, outputs, targets) or _against_constant(memory.task, outputs, targets)
    if found is not None:
        warnings.warn(
            f"On {count} of its own training rows {found} If the base is trained, this suggests that its predictions "
            f"are not what the head {memory.provenance.get('head', '')!r} returns, or not in the units of the targets: "
            "outputs that are rescaled after the head, targets that are standardised or mapped in the steps, an "
            "embedding in the place of the logits. The combined prediction is wrong then: name another head=, make "
            "what follows it a part of it, or give a targets_fn that returns what the loss is given.",
            ResMemWarning,
            stacklevel=2,
        )


def _in_regression(outputs: Tensor, targets: Tensor) -> str | None:
    """The outputs that are worse than their mean."""
    wide, true = outputs.double(), targets.double().reshape(outputs.shape)
    errors, spread = (wide - true).square(), (true - true.mean(dim=0)).square()
    worse = _is_worse(spread - errors)
    if not worse.any():
        return None
    place = int(worse.nonzero()[0])
    which = f"output {place} of the base has" if wide.shape[1] > 1 else "the base has"
    correlation = torch.corrcoef(torch.stack([wide[:, place], true[:, place]]))[0, 1]
    follows = f" They do follow the targets (correlation {correlation:.2f})." if correlation > 0.5 else ""
    return (
        f"{which} a mean squared error of {errors[:, place].mean():.4g}; the mean of the targets has "
        f"{spread[:, place].mean():.4g}.{follows}"
    )


def _never_labels(task: Task, outputs: Tensor, targets: Tensor) -> str | None:
    """Predictions of classes that no row has."""
    if not isinstance(task, Multiclass):
        return None
    strange = 1 - torch.isin(outputs.argmax(dim=1), targets).double().mean()
    if strange <= 0.5:
        return None
    return f"the base predicts outputs that never occur as labels, {strange:.0%} of the time."


def _against_constant(task: Task, outputs: Tensor, targets: Tensor) -> str | None:
    """The base against the most frequent class, or for several labels a row the more frequent value of each."""
    if isinstance(task, Regression):
        return None
    if isinstance(task, Multiclass):
        hit, counts = outputs.argmax(dim=1) == targets, torch.bincount(targets)
        right, frequent = hit.double(), (targets == counts.argmax()).double()
        found, occurs = torch.bincount(targets[hit], minlength=len(counts)), counts > 0
        recall, chance = (found[occurs].double() / counts[occurs]).mean(), 1 / max(1, int(occurs.sum()))
    else:
        truth, guess = (targets >= 0.5).double(), (task.predict(outputs) >= 0.5).double()
        right, frequent = (
            (truth == guess).double().mean(dim=1),
            (truth == truth.mean(dim=0).round()).double().mean(dim=1),
        )
        recall, chance = (_share(truth, guess) + _share(1 - truth, 1 - guess)).mean() / 2, 0.5
    if not _is_worse(right - frequent) or recall > chance + _TELLS_APART * (1 - chance):
        return None
    constant = "the most frequent class" if isinstance(task, Multiclass) else "the more frequent value of each label"
    return f"the base is right {right.mean():.1%} of the time; {constant} alone is {frequent.mean():.1%}."


def _share(truth: Tensor, guess: Tensor) -> Tensor:
    """Of the rows that have a label `(N, C)`, the share that is given it, `(C,)`."""
    return (truth * guess).sum(dim=0) / truth.sum(dim=0).clamp(min=1)


def _is_worse(gains: Tensor) -> Tensor:
    """Whether the mean of gains `(N, ...)` is below 0 beyond chance."""
    limit: Tensor = -_ERRORS * gains.std(dim=0) / len(gains) ** 0.5
    return gains.mean(dim=0) < limit
