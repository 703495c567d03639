"""What the memory said to a call of the head, as it is kept until it is counted."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.answers import Neighbors, Predictions

_FLIP_NEIGHBORS = 5  # that a flip shows


class Answer(NamedTuple):
    """What the memory said to a call of the head.

    Attributes:
        outputs: What the head returned, shape `(B, C)`.
        predictions: Each of shape `(B, C)`.
        neighbors: At least the nearest, shapes `(B, k)`.
    """

    outputs: Tensor
    predictions: Predictions
    neighbors: Neighbors

    @classmethod
    def cat(cls, answers: Sequence["Answer"]) -> "Answer":
        """The rows of several answers, one after the other."""
        if len(answers) == 1:
            return answers[0]
        outputs, predictions, neighbors = zip(*answers, strict=True)
        return cls(
            torch.cat(outputs),
            Predictions(*map(torch.cat, zip(*predictions, strict=True))),
            Neighbors(*map(torch.cat, zip(*neighbors, strict=True))),
        )

    def head(self, rows: int) -> "Answer":
        """The first rows, with as many neighbours as a flip shows."""
        near = min(_FLIP_NEIGHBORS, self.neighbors.ids.shape[1])
        return Answer(
            self.outputs[:rows],
            Predictions(*(prediction[:rows] for prediction in self.predictions)),
            # A copy, as a view would keep all neighbours.
            Neighbors(*(part[:rows, :near].clone() for part in self.neighbors)),
        )

    def to(self, device: torch.device) -> "Answer":
        return Answer(
            self.outputs.to(device),
            Predictions(*(prediction.to(device) for prediction in self.predictions)),
            Neighbors(*(part.to(device) for part in self.neighbors)),
        )
