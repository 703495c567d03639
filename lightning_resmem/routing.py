"""One validate, test or predict run with the memory: the head's output is replaced, the predictions are scored."""

from contextlib import ExitStack
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.batches import BatchReader
from lightning_resmem.errors import HeadError, InputError, ResMemWarning
from lightning_resmem.head import Captured, HeadTap
from lightning_resmem.memory.base import Predictions, ResidualMemory
from lightning_resmem.metrics import Scoreboard
from lightning_resmem.modes import eager
from lightning_resmem.module import evaluation_loaders
from lightning_resmem.ranks import Ranks
from lightning_resmem.samplers import num_unpadded_rows


class Routing:
    """From the start of a run to `close`, which leaves the model as it was.

    Args:
        trainer: At the start of `validate`, `test` or `predict`.
        model: The model that is run.
        memory: Filled with its residuals.
        reader: Reads targets.
        replace: Whether the head's output is replaced, or only looked at.
        prefix: Of the scores' names; None scores nothing.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        memory: ResidualMemory,
        reader: BatchReader,
        replace: bool,
        prefix: str | None,
    ) -> None:
        self._memory, self._reader, self._ranks = memory, reader, Ranks(trainer)
        self._why_no_scores: str | None = None
        self._predictions: list[Predictions] = []
        self._loaders = [] if prefix is None else evaluation_loaders(trainer)
        self._scores = None if prefix is None else Scoreboard(memory.task, prefix, len(self._loaders), model.device)
        self._tap = HeadTap(model, memory.provenance["head"], memory.provenance.get("embedding"))
        self._stack = ExitStack()
        self._stack.enter_context(eager())
        self._stack.enter_context(self._tap.route(self._combined) if replace else self._tap.capture(self._look))

    def start_batch(self) -> None:
        """Before the model's step."""
        self._tap.clear()
        self._predictions.clear()

    def end_batch(self, batch: Any, dataloader_idx: int) -> None:
        """After the model's step: score what the head was asked for.

        Raises:
            HeadError: If the step did not call the head, so that nothing was combined.
        """
        if not self._predictions:
            raise HeadError(self._tap.silent_message())
        if self._scores is None or self._why_no_scores is not None:
            return
        try:
            targets = self._reader.targets(batch)
            num_rows = num_unpadded_rows(self._loaders[dataloader_idx])
            self._scores.update(self._of_batch(targets), targets, dataloader_idx, num_rows)
        except InputError as error:
            # The model's step has accepted the batch; a test set without labels is no reason to stop the run.
            self._why_no_scores = str(error)

    def scores(self) -> dict[str, float]:
        """The scores of the run, over all ranks; none, with a warning, if a rank could not score a batch."""
        if self._scores is None:
            return {}
        reasons = [why for why in self._ranks.gather_objects(self._why_no_scores) if why is not None]
        if reasons:
            rank_zero_warn(
                "ResMem scores (base, knn, resmem) are left out of this run; the model's own are not affected. "
                f"{reasons[0]}",
                category=ResMemWarning,
            )
            return {}
        return self._scores.compute()

    def close(self) -> None:
        """Take all hooks off the model."""
        self._stack.close()

    def _predicted(self, captured: Captured) -> Predictions:
        predictions = self._memory.predictions(captured.embedding.float(), captured.output)
        self._predictions.append(predictions)
        return predictions

    def _combined(self, captured: Captured) -> Tensor:
        predictions = self._predicted(captured)
        # A copy: the step may change it in place before it is scored.
        return self._memory.task.to_outputs(predictions.resmem, predictions.base).clone()

    def _look(self, captured: Captured) -> None:
        self._predicted(captured)

    def _of_batch(self, targets: Tensor) -> Predictions:
        """One prediction for each target: of the last call of the head, or of several calls on parts of the batch."""
        count = len(targets) if targets.ndim else 0
        if len(self._predictions[-1].base) == count:
            return self._predictions[-1]
        if sum(len(predictions.base) for predictions in self._predictions) == count:
            return Predictions(*(torch.cat(parts) for parts in zip(*self._predictions, strict=True)))
        raise InputError(f"The step called the head for other rows than the batch's {count} targets.")
