"""In which space rows are near each other: a map of keys and queries before Euclidean distances are taken."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Metric = Literal["euclidean", "within_class"]

# Entries of the keys that are mapped or counted at once, in float64.
_BLOCK_ENTRIES = 2**22
# Of all spread, the share within classes below which there is none: it is what rounding leaves of equal keys.
_NO_SPREAD = 1e-12


class KeyMap(NamedTuple):
    """`z' = matrix (z - mean)`.

    Attributes:
        mean: Shape `(D,)`, float64.
        matrix: Shape `(D, D)`, float64, symmetric.
    """

    mean: Tensor
    matrix: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows `(n, D)` as they are compared, float32: a row is mapped to the same numbers in any batch."""
        mapped = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        # A trainer's autocast would round the products.
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            for out, block in zip(_blocks(mapped), _blocks(rows.detach()), strict=True):
                out.copy_((block.to(self.mean.dtype) - self.mean) @ self.matrix)
        return mapped

    def to(self, device: torch.device) -> "KeyMap":
        """On a device; in float32 on one that has no float64."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return KeyMap(self.mean.to(device, dtype), self.matrix.to(device, dtype))


class Moments(NamedTuple):
    """Sums over some rows, from which those over more rows follow; float64, on the CPU.

    Attributes:
        counts: Rows of each class, shape `(C,)`.
        sums: Of their keys, shape `(C, D)`.
        squares: Of the products of a key's entries over all rows, shape `(D, D)`.
    """

    counts: Tensor
    sums: Tensor
    squares: Tensor


def moments(keys: Tensor, targets: Tensor, num_classes: int) -> Moments:
    """The sums over rows with keys `(n, D)` and class labels `(n,)`."""
    width, keys, targets = keys.shape[1], keys.detach().cpu(), targets.cpu().to(torch.int64)
    sums, squares = torch.zeros(num_classes, width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    for block, labels in zip(_blocks(keys), _blocks(targets, width), strict=True):
        wide = block.double()
        sums.index_add_(0, labels, wide)
        squares.addmm_(wide.T, wide)
    return Moments(torch.bincount(targets, minlength=num_classes).double(), sums, squares)


def within_class(parts: Sequence[Moments]) -> KeyMap:
    """Whiten by the covariance within classes: `U (L + mean(L) I)^(-1/2) U^T (z - mean)`.

    `U L U^T` is the covariance of the keys around the means of their classes, pooled over all; `mean(L) I` keeps
    directions in which keys hardly differ from being blown up. Where the keys of a class are equal, it is the identity.

    Args:
        parts: Of all rows, however they are parted.
    """
    counts, sums, squares = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
    rows = counts.sum()
    mean = sums.sum(dim=0) / rows
    between = (sums / counts.clamp_min(1).sqrt()[:, None]).T
    covariance = (squares - between @ between.T) / rows
    spread, directions = torch.linalg.eigh((covariance + covariance.T) / 2)
    spread = spread.clamp_min(0)
    if spread.mean() <= _NO_SPREAD * squares.trace() / rows / len(mean):
        return KeyMap(mean, torch.eye(len(mean), dtype=torch.float64))
    return KeyMap(mean, (directions * (spread + spread.mean()).rsqrt()) @ directions.T)


def _blocks(rows: Tensor, width: int | None = None) -> Iterator[Tensor]:
    yield from rows.split(max(1, _BLOCK_ENTRIES // (width or rows.shape[1])))
