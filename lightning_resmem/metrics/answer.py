"""What the memory said to a call of the head, as it is kept until it is counted."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.answers import Neighbors, Predictions, in_blocks
from lightning_resmem.memory.checks import as_compared, matching_batch
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.knn_lm import knn_lm_params, predict_knn_lm
from lightning_resmem.tasks import Task, all_finite

_FLIP_NEIGHBORS = 5  # that a flip shows


class Answer(NamedTuple):
    """What the memory said to a call of the head.

    Attributes:
        outputs: What the head returned, shape `(B, C)`.
        predictions: Each of shape `(B, C)`.
        neighbors: At least the nearest, shapes `(B, k)`.
        knn_lm: The prediction of kNN-LM, shape `(B, C)`, where it is to be scored.
    """

    outputs: Tensor
    predictions: Predictions
    neighbors: Neighbors
    knn_lm: Tensor | None = None

    @classmethod
    def of(cls, memory: ResidualMemory, embeddings: Tensor, outputs: Tensor) -> "Answer":
        """What a memory says to rows; to those that are NaN or infinite nothing: the base's own prediction stays.

        Args:
            memory: Filled.
            embeddings: Shape `(B, D)`; of sequences `(B, T, D)`, of which each position is a row.
            outputs: Shape `(B, C)`, or `(B, T, C)`.
        """
        embeddings, outputs = matching_batch(_as_rows(embeddings), _as_rows(outputs))
        if all_finite(as_compared(embeddings), outputs):
            return cls(outputs, *memory.predictions_of_finite(embeddings, outputs))
        usable = torch.isfinite(as_compared(embeddings)).all(dim=1) & torch.isfinite(outputs).all(dim=1)
        found, near = memory.for_queries(usable).predictions_of_finite(embeddings[usable], outputs[usable])
        base = memory.task.predict(outputs, memory.params.softmax_temperature)
        predictions = Predictions(*(base.clone() for _ in Predictions._fields))
        for whole, part in zip(predictions, found, strict=True):
            whole[usable] = part.to(whole.dtype)
        distances = near.distances.new_full((len(base), near.distances.shape[1]), torch.nan)
        neighbors = Neighbors(distances, torch.full_like(distances, -1, dtype=near.ids.dtype))
        for whole, part in zip(neighbors, near, strict=True):
            whole[usable] = part
        return cls(outputs, predictions, neighbors)

    @staticmethod
    def outputs_of(memory: ResidualMemory, embeddings: Tensor, outputs: Tensor) -> Tensor:
        """`Answer.of(...).combined(memory.task)`, a block of rows at a time, so that of many classes little is held.

        In the shape of `outputs`.
        """
        shape, embeddings, outputs = outputs.shape, _as_rows(embeddings), _as_rows(outputs)
        return in_blocks(
            lambda rows: Answer.of(memory.for_queries(rows), embeddings[rows], outputs[rows]).combined(memory.task),
            *outputs.shape,
        ).reshape(shape)

    @property
    def is_combined(self) -> Tensor:
        """Which rows the memory had its say in, shape `(B,)`: all but those that are NaN or infinite."""
        return ~torch.isnan(self.neighbors.distances[:, 0])

    def combined(self, task: Task) -> Tensor:
        """What the head has to return: the combined prediction, or what the base returned where there is none.

        A copy, which may be changed in place. Shape `(B, C)`.
        """
        combined = task.to_outputs(self.predictions.resmem, self.predictions.base)
        outputs = self.outputs.to(combined.dtype)
        return torch.where(self.is_combined[:, None].to(combined.device), combined, outputs)

    def resmem(self, memory: ResidualMemory) -> Tensor:
        """The combined prediction."""
        return self.predictions.resmem

    def shaped(self, outputs: Tensor) -> Predictions:
        """The predictions in the shape of what the head returned, `(B, C)` or `(B, T, C)`."""
        return Predictions(*(prediction.reshape(outputs.shape) for prediction in self.predictions))

    def with_knn_lm(self, memory: ResidualMemory) -> "Answer":
        """With the prediction of kNN-LM, if tuning has found out how `memory` is read for it."""
        params = knn_lm_params(memory)
        if params is None:
            return self
        return self._replace(knn_lm=predict_knn_lm(memory, params, self.outputs, self.neighbors))

    def rows(self, kept: Tensor) -> "Answer":
        """The rows of a mask `(B,)`, or with these numbers."""
        return self._each(lambda part: part[kept])

    @classmethod
    def cat(cls, answers: Sequence["Answer"]) -> "Answer":
        """The rows of several answers, one after the other."""
        if len(answers) == 1:
            return answers[0]
        outputs, predictions, neighbors, knn_lm = zip(*answers, strict=True)
        return cls(
            torch.cat(outputs),
            Predictions(*map(torch.cat, zip(*predictions, strict=True))),
            Neighbors(*map(torch.cat, zip(*neighbors, strict=True))),
            None if knn_lm[0] is None else torch.cat(knn_lm),
        )

    def head(self, rows: int) -> "Answer":
        """The first rows, with as many neighbours as a flip shows."""
        near = min(_FLIP_NEIGHBORS, self.neighbors.ids.shape[1])
        # A copy, as a view would keep all neighbours.
        nearest = Neighbors(*(part[:rows, :near].clone() for part in self.neighbors))
        return self._each(lambda part: part[:rows])._replace(neighbors=nearest)

    def to(self, device: torch.device) -> "Answer":
        return self._each(lambda part: part.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Answer":
        return Answer(
            change(self.outputs),
            Predictions(*map(change, self.predictions)),
            Neighbors(*map(change, self.neighbors)),
            None if self.knn_lm is None else change(self.knn_lm),
        )


def _as_rows(tensor: Tensor) -> Tensor:
    """Positions of sequences `(B, T, ...)` as rows `(B * T, ...)`."""
    return tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
