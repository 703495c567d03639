"""How numbers follow from others, told by a few rows: along a line, along a curve, or not at all."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# How far numbers may be off a line, in standard deviations.
OFF = 1e-2
# Distinct numbers that tell a curve from noise, and how near a point is to its neighbours' mean then, as a share of how
# far it is off the line: noise is as far from either.
_LEAST_POINTS, _NEAR = 12, 0.2
# Equal numbers may become this unequal, in standard deviations: they are computed from differences.
_ROUNDED = 1e-4


class Relation(NamedTuple):
    """How numbers follow from others, by column, each of shape `(C,)`.

    Attributes:
        slope: Of the best line.
        shift: Of it.
        is_curve: Whether they follow along a curve that rises, or falls, everywhere; else along the line.
    """

    slope: Tensor
    shift: Tensor
    is_curve: Tensor


def relation(given: Tensor, seen: Tensor) -> Relation | None:
    """How `seen` follows from `given`, `(B, C)` or as many numbers; None if it does not."""
    given = given.double().reshape(len(given), -1)
    seen = seen.detach().double().reshape(given.shape)
    x, y = given - given.mean(dim=0), seen - seen.mean(dim=0)
    slope = (x * y).sum(dim=0) / x.square().sum(dim=0)
    rest = (slope * x - y).abs()
    is_line = (rest.amax(dim=0) < OFF * y.std(dim=0)) & (slope != 0)  # NaN where nothing varies: not so
    is_curve = torch.zeros_like(is_line)
    for column in (~is_line).nonzero()[:, 0].tolist():
        is_curve[column] = _is_curve(given[:, column], seen[:, column], rest[:, column])
        if not is_curve[column]:
            return None
    return Relation(slope, seen.mean(dim=0) - slope * given.mean(dim=0), is_curve)


def _is_curve(given: Tensor, seen: Tensor, rest: Tensor) -> bool:
    """Whether numbers `(B,)` follow from others in order and without noise; `rest` is how far they are off a line."""
    points, where = given.unique(return_inverse=True)
    first = torch.empty_like(where[: len(points)]).scatter_(0, where, torch.arange(len(where), device=where.device))
    curve = seen[first]  # at each point
    steps = curve.diff()
    rises = (steps > 0).all() or (steps < 0).all()
    if len(points) < 3 or not rises or (curve[where] - seen).abs().max() > _ROUNDED * seen.std():
        return False
    if 2 * len(points) <= len(given):  # equal numbers stay equal, as with noise they would not
        return True
    if len(points) < _LEAST_POINTS:
        return False
    share = points.diff()[:-1] / (points[2:] - points[:-2])
    between = curve[:-2] + share * (curve[2:] - curve[:-2])
    return bool((between - curve[1:-1]).abs().median() < _NEAR * rest.median())
