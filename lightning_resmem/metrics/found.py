"""What is kept of a call of the head until it is scored, where predictions of all rows at once would be too large."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_resmem.memory.answers import Neighbors, combined, in_blocks, rows_at_once
from lightning_resmem.memory.checks import as_compared
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.answer import Answer


class Found(NamedTuple):
    """The neighbours of the positions of sequences, from which predictions follow a block of rows at a time.

    One search serves the answer and the scores; the sums over neighbours are made twice.

    Attributes:
        outputs: What the head returned, shape `(B, T, C)`.
        neighbors: Of the positions, shapes `(B * T, k)`; of an embedding that is NaN or infinite none.
    """

    outputs: Tensor
    neighbors: Neighbors

    @classmethod
    def of(cls, memory: ResidualMemory, embeddings: Tensor, outputs: Tensor) -> "Found":
        """Look for the neighbours of embeddings `(B, T, D)`, for which the head returned outputs `(B, T, C)`."""
        rows = embeddings.flatten(0, -2)
        usable = torch.isfinite(as_compared(rows)).all(dim=1)
        near = memory.for_queries(usable).search(rows[usable], min(memory.params.k, max(1, len(memory))))
        distances = near.distances.new_full((len(rows), near.distances.shape[1]), torch.nan)
        neighbors = Neighbors(distances, torch.full_like(distances, -1, dtype=near.ids.dtype))
        for whole, part in zip(neighbors, near, strict=True):
            whole[usable] = part
        return cls(outputs, neighbors)

    def answer(self, memory: ResidualMemory, rows: slice | Tensor) -> Answer:
        """The memory's answer to some of the positions: as that of `Answer.of`."""
        outputs, near = self.outputs.flatten(0, -2)[rows], Neighbors(*(part[rows] for part in self.neighbors))
        finite = torch.isfinite(outputs).all(dim=1)
        lost = ~finite | torch.isnan(near.distances[:, 0])
        near = Neighbors(near.distances.masked_fill(lost[:, None], torch.nan), near.ids.masked_fill(lost[:, None], -1))
        return Answer(outputs, combined(memory.task, memory.params, outputs, near, memory.sums(near)), near)

    def answers(self, memory: ResidualMemory, kept: Tensor) -> Iterator[tuple[slice, Answer]]:
        """A few positions at a time: which, and the answer to those of them that are kept, a mask `(B * T,)`."""
        step = rows_at_once(self.outputs.shape[-1])
        numbers = torch.arange(len(kept), device=kept.device)
        for start in range(0, len(kept), step):
            rows = slice(start, start + step)
            yield rows, self.answer(memory, numbers[rows][kept[rows]].to(self.outputs.device))

    def combined(self, memory: ResidualMemory) -> Tensor:
        """What the head has to return, shape `(B, T, C)`."""
        return self._whole(lambda rows: self.answer(memory, rows).combined(memory.task))

    def resmem(self, memory: ResidualMemory) -> Tensor:
        """The combined prediction, shape `(B, T, C)`."""
        return self._whole(lambda rows: self.answer(memory, rows).predictions.resmem)

    def _whole(self, compute: Callable[[slice], Tensor]) -> Tensor:
        count, columns = self.outputs.shape[:-1].numel(), self.outputs.shape[-1]
        return in_blocks(compute, count, columns).reshape(self.outputs.shape)


def ask(memory: ResidualMemory, embeddings: Tensor, outputs: Tensor) -> Answer | Found:
    """What a memory says to rows, or has found for the positions of sequences; arguments as for `Answer.of`."""
    return (Answer if outputs.ndim == 2 else Found).of(memory, embeddings, outputs)
