"""Rows that the memory turned right or wrong, the first of either kind, over the batches and ranks of a run."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lightning_resmem.memory.transfer import CPU, moved
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.evaluation import Flip
from lightning_resmem.metrics.functional import is_right
from lightning_resmem.tasks import Regression, Task

_MOST_FLIPS = 100  # of either kind


class FirstFlips:
    """The first rows of this rank that the memory turned right, and the first that it turned wrong.

    Args:
        task: Of the memory; in regression there are no flips.

    Attributes:
        found: Of either kind, in the order of the rows.
        stride: From the number of a sequence's first position to that of the next one's; 1 where rows are rows.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self.found: tuple[list[Flip], list[Flip]] = [], []
        self.stride = 1

    def add(self, answer: Answer, targets: Tensor, positions: range | None, numbers: Tensor) -> None:
        """Look at rows, which have these numbers `(n,)` among those that this rank reads."""
        if isinstance(self._task, Regression) or all(len(flips) >= _MOST_FLIPS for flips in self.found):
            return
        base, _, resmem = answer.predictions
        before, after = is_right(base, targets), is_right(resmem, targets)
        for flips, flipped in zip(self.found, (after & ~before, before & ~after), strict=True):
            if len(flips) >= _MOST_FLIPS:
                continue
            places = flipped.nonzero()[: _MOST_FLIPS - len(flips)]
            rows, outputs = places[:, 0], places[:, 1:]  # (n,), and (n, 1) in multilabel tasks, else (n, 0)
            columns = [
                *_labels(base[rows], self._task.predict(answer.outputs[rows]), outputs),
                *_labels(resmem[rows], self._task.probabilities(resmem[rows], base[rows]), outputs),
                targets[rows].gather(1, outputs)[:, 0].round().long() if outputs.shape[1] else targets[rows],
                answer.neighbors.ids[rows],
                answer.neighbors.distances[rows],
            ]
            columns = [numbers[rows], outputs, *columns]
            for row, output, *values in zip(*(c.tolist() for c in moved(CPU, *columns)), strict=True):
                label, confidence, new_label, new_confidence, target, ids, distances = values
                flips.append(
                    Flip(
                        position=None if positions is None else positions[row // self.stride],
                        token=None if self.stride == 1 else row % self.stride,
                        target=target,
                        base=label,
                        resmem=new_label,
                        base_confidence=confidence,
                        resmem_confidence=new_confidence,
                        neighbor_ids=tuple(ids),
                        neighbor_distances=tuple(distances),
                        output=output[0] if output else None,
                    )
                )


def _labels(predictions: Tensor, probabilities: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The label of each row (or of one output of it, outputs `(n, 1)`), and its probability."""
    if outputs.shape[1]:
        chosen = predictions.gather(1, outputs)[:, 0] >= 0.5
        yes = probabilities.gather(1, outputs)[:, 0]
        return chosen.long(), torch.where(chosen, yes, 1 - yes)
    labels = predictions.argmax(dim=1)
    return labels, probabilities.gather(1, labels[:, None])[:, 0]


def first_flips(ranks: Sequence[Any]) -> tuple[Flip, ...]:
    """The first flips of either kind over all ranks, by position."""
    kinds = (chain.from_iterable(kind) for kind in zip(*ranks, strict=True))
    first = (sorted(kind, key=_position)[:_MOST_FLIPS] for kind in kinds)
    return tuple(sorted(chain.from_iterable(first), key=_position))


def _position(flip: Flip) -> tuple[int, int]:
    return -1 if flip.position is None else flip.position, flip.token or 0
