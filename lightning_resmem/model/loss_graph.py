"""What is compared in the graph of a loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# Losses of PyTorch's own, which keep what they compare.
DISTANCES = ("MseLossBackward0", "L1LossBackward0", "SmoothL1LossBackward0", "HuberLossBackward0")
CLASSES = ("NllLossBackward0", "NllLoss2DBackward0")
# What changes no number.
_SHAPES = {
    f"{name}Backward{version}" for name in ("Squeeze", "Unsqueeze", "View", "Reshape", "Flatten") for version in (0, 1)
}
# Nodes of the graph that are looked at: a loss is near its end.
_NODES = 1000
# How far a difference may be off a sum of its parts, as a share of the smaller one.
_OFF = 1e-2


def compared(loss: Tensor, kinds: tuple[str, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """What losses of these kinds compare in the graph of `loss`: predictions and targets."""
    waiting, met = [loss.grad_fn], set[Any]()
    while waiting and len(met) < _NODES:
        node = waiting.pop(0)
        if node is None or node in met:
            continue
        met.add(node)
        if node.name() in kinds:
            yield from zip(_kept(node, "_saved_self"), _kept(node, "_saved_target"), strict=False)
        else:
            waiting += [previous for previous, _ in node.next_functions]


def compared_by_hand(
    loss: Tensor, output: Tensor, end: Any, targets: Tensor, laid: Callable[[Tensor], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What a loss compares that users write themselves: `(output - targets) ** 2` keeps the difference.

    Args:
        loss: Of a step.
        output: Of the head, shape `(B, C)`.
        end: The node that made it.
        targets: Of the same rows, as many numbers.
        laid: Gives what is laid out as `end` made it the order of `output`.

    Yields:
        What may be compared, shapes `(B, C)`: a function of the outputs, and what is left of a difference then.
    """
    if output.numel() != targets.numel():
        return
    given, true = output.double(), targets.double().reshape(output.shape)
    for node in _between(loss, end):
        for kept in _kept(node, "_saved_self", "_saved_other"):
            if kept.numel() == output.numel() and kept.is_floating_point():
                yield from _parts(laid(kept.detach()).double().reshape(output.shape), given, true)


def _parts(difference: Tensor, output: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A difference `(B, C)` as `a * output + e` and `c * targets`; else as either of them itself and the rest."""
    ones = torch.ones_like(output)
    columns = torch.stack([output, targets, ones], dim=2).transpose(0, 1).cpu()  # (C, B, 3)
    found = torch.linalg.lstsq(columns, difference.T[..., None].cpu(), driver="gelsd").solution[..., 0]
    a, c, e = found.to(output.device).unbind(dim=1)  # (C,)
    smaller = torch.minimum((a * output).std(dim=0), (c * targets).std(dim=0))
    is_sum = (a * output + c * targets + e - difference).abs().amax(dim=0) < _OFF * smaller
    summands = -c.sign() * (a * output + e), c.abs() * targets
    if is_sum.all():
        yield summands
        return
    for rest in (difference, -difference):
        for parts in ((output, output - rest), (targets + rest, targets)):
            yield (
                torch.where(is_sum, summands[0], parts[0]),
                torch.where(is_sum, summands[1], parts[1]),
            )


def exponentials(loss: Tensor, end: Any) -> bool:
    """Whether a loss takes the exponential of what the node `end` made, perhaps in another shape."""
    return any(node.name() == "ExpBackward0" and _is_made_by(end, node) for node in _between(loss, end))


def normalized_between(tensor: Tensor, end: Any) -> bool:
    """Whether a BatchNorm made a tensor from what the node `end` made: its averages change in training."""
    return any("BatchNorm" in node.name() for node in _between(tensor, end))


def _is_made_by(end: Any, node: Any) -> bool:
    """Whether a node is given what `end` made, and nothing but its shape was changed in between."""
    [(given, _)] = node.next_functions
    while given is not None and given is not end and given.name() in _SHAPES:
        given = given.next_functions[0][0]
    return given is end


def _between(loss: Tensor, end: Any) -> list[Any]:
    """The nodes on all ways from a loss to a node: what is behind it belongs to the network."""
    above, waiting, met = defaultdict[Any, list[Any]](list), [loss.grad_fn], set[Any]()
    while waiting and len(met) < _NODES:
        node = waiting.pop(0)
        if node is None or node in met or node is end:
            continue
        met.add(node)
        for previous, _ in node.next_functions:
            above[previous].append(node)
            waiting.append(previous)
    found: list[Any] = []
    waiting = list(above[end])
    while waiting:
        node = waiting.pop(0)
        if node not in found:
            found.append(node)
            waiting += above[node]
    return found


def _kept(node: Any, *names: str) -> Iterator[Tensor]:
    """What a node keeps for its backward, under these names."""
    for name in names:
        try:
            kept = getattr(node, name, None)
        except RuntimeError:  # changed in place since
            continue
        if isinstance(kept, Tensor):
            yield kept
