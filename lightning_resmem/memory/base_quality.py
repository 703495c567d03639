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
# A line or a curve through the base's outputs that fits the targets better is looked at where the outputs explain the
# targets (by their correlation), and tells something where its slope is outside of these, its shift above a share of
# the targets' standard deviation, or a curve saves such shares of the line's squared error and the targets' variance.
# Weight decay and early stopping shrink outputs a little.
_EXPLAINS, _SLOPES, _SHIFT = 0.6, (0.75, 1.5), 0.5
_CURVE_SAVES, _CURVE_SHARE = 0.5, 0.03
# Parts of the rows, by output, in each of which the mean target is taken; and rows in each at least.
_PARTS, _PART_ROWS = 10, 10
# Of the way from chance to perfection: above it, classes are told apart, by a base that was trained for rare ones, say.
_TELLS_APART = 0.25


def look_at_base(memory: ResidualMemory) -> None:
    """Warn if the base does worse on its own training rows than a constant would, or follows targets in other units.

    The constant of regression is the mean of the targets, that of classes the most frequent one. A trained network is
    not worse, and no line through its outputs fits the targets much better than they do, unless the outputs or the
    targets that were memorized are others than those that it was trained with.

    Args:
        memory: Filled.
    """
    if memory.provenance.get("keep") == "residual":  # the rows that it has most wrong
        return
    ids, count = memory.ids, min(len(memory), _ROWS, max(_LEAST_ROWS, _ENTRIES // max(1, memory.num_outputs)))
    if count < _LEAST_ROWS:
        return
    rows = memory.fetch(ids[torch.arange(count) * len(ids) // count])
    outputs, targets = rows.outputs.cpu(), rows.targets.cpu()
    found = _in_regression(outputs, targets) if isinstance(memory.task, Regression) else None
    found = found or _never_labels(memory.task, outputs, targets) or _against_constant(memory.task, outputs, targets)
    if found is not None:
        warnings.warn(
            f"On {count} of its own training rows {found} If the base is trained to the end, this suggests that its "
            f"predictions are not what the head {memory.provenance.get('head', '')!r} returns, or not in the units of "
            "the targets: outputs that are rescaled after the head, targets that are standardised or mapped in the "
            "steps, an embedding in the place of the logits, or a loss that does not aim at the mean (quantiles). The "
            "combined prediction is wrong then: name another head=, make what follows it a part of it, or give a "
            "targets_fn that returns what the loss is given.",
            ResMemWarning,
            stacklevel=2,
        )


def _in_regression(outputs: Tensor, targets: Tensor) -> str | None:
    """The outputs that are worse than their mean."""
    wide, true = outputs.double(), targets.double().reshape(outputs.shape)
    errors, spread = (wide - true).square(), (true - true.mean(dim=0)).square()
    worse = _is_worse(spread - errors)
    if not worse.any():
        found = ((place, _in_other_units(wide[:, place], true[:, place])) for place in range(wide.shape[1]))
        return next((f"{_named(place, wide)} {said}" for place, said in found if said is not None), None)
    place = int(worse.nonzero()[0])
    correlation = torch.corrcoef(torch.stack([wide[:, place], true[:, place]]))[0, 1]
    follows = f" They do follow the targets (correlation {correlation:.2f})." if correlation > 0.5 else ""
    return (
        f"{_named(place, wide)} has a mean squared error of {errors[:, place].mean():.4g}; the mean of the targets has "
        f"{spread[:, place].mean():.4g}.{follows}"
    )


def _named(place: int, outputs: Tensor) -> str:
    return f"output {place} of the base" if outputs.shape[1] > 1 else "the base"


def _in_other_units(output: Tensor, target: Tensor) -> str | None:
    """Whether a line or a curve through the outputs `(N,)` fits the targets much better than the outputs do."""
    correlation = torch.corrcoef(torch.stack([output, target]))[0, 1]
    if not correlation > _EXPLAINS:  # NaN where one of them is constant
        return None
    rows, spread, error = len(output), target.var(), (target - output).square().mean()
    slope = correlation * (spread / output.var()).sqrt()
    noise = _ERRORS * slope * ((1 / correlation.square() - 1) / (rows - 2)).sqrt()
    shift = (target - output).mean().abs() - _ERRORS * (target - output).std() / rows**0.5
    left = (1 - correlation.square()) * spread  # by the line
    if slope + noise < _SLOPES[0] or slope - noise > _SLOPES[1] or shift > _SHIFT * spread.sqrt():
        line = f"{slope:.3g} * output {target.mean() - slope * output.mean():+.3g}"
        return (
            f"follows the targets (correlation {correlation:.2f}), but {line} does so much better: with a mean squared "
            f"error of {left:.4g} instead of {error:.4g}."
        )
    if rows < _PARTS * _PART_ROWS:
        return None
    off = (target - target.mean() - slope * (output - output.mean()))[output.argsort()]
    means = torch.stack([part.mean() for part in off.chunk(_PARTS)])
    saved = means.square().mean() - left / rows * _PARTS  # what means of noise would seem to save
    if saved > _CURVE_SAVES * left and saved > _CURVE_SHARE * spread:
        return (
            f"follows the targets along a curve (correlation {correlation:.2f}): the mean targets of rows of like "
            f"outputs predict them with a mean squared error of {left - saved:.4g} instead of {error:.4g}."
        )
    return None


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
