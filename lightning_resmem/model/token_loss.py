"""What the loss of a training step compares at the positions of sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.model.returned import same
from lightning_resmem.model.sequences import RowTargets

# Rows that are looked at: of a large vocabulary all of them would take as much memory as the step.
_ROWS = 512
# Labels that tell a move from chance.
_LEAST_LABELS = 8

_Pair = tuple[Tensor, Tensor]


class TokenRows(NamedTuple):
    """The first rows of a batch of sequences.

    Attributes:
        shape: Of what the head returned, `(B, T, C)`.
        output: Of `n` rows, shape `(n, C)`.
        targets: Of the same rows, shape `(n, ...)`.
        places: Sequence and position of each, shape `(n, 2)`.
        total: How many rows there are in all.
    """

    shape: tuple[int, ...]
    output: Tensor
    targets: Tensor
    places: Tensor
    total: int

    @classmethod
    def of(cls, output: Tensor, read: RowTargets) -> TokenRows:
        """Those of what the head returned, `(B, T, C)`, and of the targets that were read."""
        assert read.kept is not None
        all_places = read.kept.nonzero()
        places = all_places[:_ROWS]
        at = places[:, 0], places[:, 1]
        return cls(tuple(output.shape), output[at], read.targets[at], places, len(all_places))

    def of_them(self, output: Tensor) -> Tensor:
        """What another module returned for these rows, of its `(B, T, ...)`."""
        return output[self.places[:, 0], self.places[:, 1]]

    def pairs(self, compared: Iterable[_Pair]) -> Iterator[_Pair]:
        """What a loss compares of these rows, `(n, C)` and `(n, ...)`, as far as it can be told where they are."""
        for seen, wanted in compared:
            laid = _by_position(seen, wanted, self.shape)
            if laid is not None and len(self.places) and int(self.places[:, 1].max()) < laid[0].shape[1]:
                at = self.places[:, 0], self.places[:, 1]
                yield laid[0][at], laid[1][at]
            elif seen.ndim == 2 and len(seen) == len(wanted) == self.total:  # the step has dropped the others
                yield seen[:_ROWS], wanted[:_ROWS]


def moved(output: Tensor, read: RowTargets, compared: Iterable[_Pair]) -> int | None:
    """By how many positions the labels that a loss is given are ahead of those that were read: 1 or -1.

    Args:
        output: Of the head, shape `(B, T, C)`.
        read: The targets, as they would be memorized.
        compared: What the loss compares.

    Returns:
        None where they are the same, or where that cannot be told.
    """
    assert read.kept is not None
    found = None
    for seen, wanted in compared:
        laid = _by_position(seen, wanted, tuple(output.shape))
        if laid is None or laid[1].shape != laid[0].shape[:2] or read.targets.shape != read.kept.shape:
            continue
        seen, wanted = laid
        length = wanted.shape[1]
        counts = (wanted >= 0) & (wanted < output.shape[2])
        places = counts.nonzero()[:_ROWS]
        at = places[:, 0], places[:, 1]
        if not same(output[at], seen[at]):
            continue
        for step in (0, 1, -1):
            targets, kept = (_ahead(part, step)[:, :length] for part in (read.targets, read.kept.long()))
            both = counts & (kept != 0)
            if int(both.sum()) >= _LEAST_LABELS and torch.equal(wanted[both], targets[both]):
                if step == 0:
                    return None
                found = found or step
    return found


def _ahead(rows: Tensor, step: int) -> Tensor:
    """Of each position what is so many positions ahead, 0 where there is none; shape `(B, T)`."""
    moved = torch.zeros_like(rows)
    if step >= 0:
        moved[:, : rows.shape[1] - step] = rows[:, step:]
    else:
        moved[:, -step:] = rows[:, :step]
    return moved


def _by_position(seen: Tensor, wanted: Tensor, shape: tuple[int, ...]) -> _Pair | None:
    """What is compared at the first positions of each sequence, all or all but the last: `(B, t, C)`, `(B, t, ...)`."""
    size, length, columns = shape
    if seen.ndim == 4:  # of logits (B, C, T)
        seen, wanted = seen[:, :, 0].transpose(1, 2), wanted[:, 0]
    for count in (length, length - 1):
        rows = size * count
        if rows and seen.numel() == rows * columns and wanted.numel() in (rows, rows * columns):
            per_row = () if wanted.numel() == rows and columns > 1 else (columns,)
            return seen.detach().reshape(size, count, columns), wanted.reshape(size, count, *per_row)
    return None
