"""One run of a trainer with base and memory: the weights stay, and the answers are scored."""

from typing import Any

from torch import Tensor

from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.memory.weights_watch import WeightsWatch
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.sequences import RowReader


class Run:
    """From the start of a run to `finish`.

    Args:
        weights: Of the base, whose run has started.
        board: Scores the answers, if they are.
        ranks: Of the run.
        reader: Reads targets.
    """

    def __init__(self, weights: WeightsWatch, board: Scoreboard | None, ranks: Ranks, reader: RowReader) -> None:
        self._weights, self._board, self._ranks, self._reader = weights, board, ranks, reader

    def answer(self) -> None:
        """Before a batch is answered."""
        self._weights.check_first()

    def score(self, answer: Answer | Found, batch: Any, dataloader_idx: int, asked_at: Tensor | None) -> None:
        """After a batch was answered, as of these times `(B,)`, if rows have times."""
        if self._board is not None:
            read = self._reader.targets(batch, answer.outputs.shape)
            if isinstance(answer, Found):
                self._board.update_tokens(answer, read, dataloader_idx)
            else:
                self._board.update(answer, read.targets, dataloader_idx, asked_at)

    def finish(self) -> tuple[Evaluation, ...]:
        """What the run showed, over all ranks.

        Raises:
            StaleMemoryError: If the base has lost its weights meanwhile.
        """
        with self._ranks.together("checking the weights at the end of the run"):
            self._weights.check_end()
        if self._board is None:
            return ()
        self._board.finish()
        return self._board.evaluate(self._ranks)
