"""What the steps of a fit show of targets that the memory pass, and tuning after it, will read."""

from contextlib import suppress
from typing import Any, NamedTuple

import lightning.pytorch as L
from torch import Tensor

from lightning_resmem.collection.chunks import Labels
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import InputError, ResMemError
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.first_loss import FirstLoss
from lightning_resmem.tasks import Task
from lightning_resmem.trainer.loaders import check_validated


class Rehearsed(NamedTuple):
    """What a rehearsal has found out: the name of the head, and the width of its outputs if it could read rows."""

    head: str
    num_outputs: int | None


class FitWatch:
    """Looks at the first training step, and at the targets of all batches of the first validation.

    Of a training step that fails it says which label of its batch is none, as the errors of losses do not.

    Args:
        reader: Reads batches.
        task: Of the memory.
        tunes: Whether there is a tuner, which will read the validation rows; outside of a fit nothing is watched.
    """

    def __init__(self, reader: BatchReader, task: Task, tunes: bool = False) -> None:
        self._reader, self._task = reader, task
        self._tunes = self._validates = tunes  # until a validation is over
        self._model: L.LightningModule | None = None
        self._rehearsed: Rehearsed | None = None
        self._memorizes = False
        self._first_loss: FirstLoss | None = None  # until the first step is over
        self._batch: Any = None  # of the training step that runs
        self._waiting: list[tuple[str, Tensor]] = []  # of the sanity check, when nobody knows the head
        self._found: InputError | None = None

    def start(self, trainer: L.Trainer, rehearsed: Rehearsed | None, memorizes: bool) -> None:
        """Before the first step.

        Args:
            trainer: That trains.
            rehearsed: What the rehearsal has found out, if anything.
            memorizes: Whether the batches that are trained on are memorized.

        Raises:
            InputError: If a target of the sanity check cannot be.
        """
        if self._tunes:
            check_validated(trainer)
        self._model, self._rehearsed, self._memorizes = trainer.lightning_module, rehearsed, memorizes
        if rehearsed is not None:
            task = self._task if memorizes else None
            self._first_loss = FirstLoss(self._model, rehearsed.head, self._reader, task)
            for where, targets in self._waiting:
                self._found = self._found or self._problem(where, targets)
        self._waiting.clear()
        self._raise(Ranks(trainer))

    def start_step(self, batch: Any) -> None:
        """Before a training step."""
        self._batch = batch
        if self._first_loss is not None:
            self._first_loss.watch(batch)

    def check_loss(self, loss: Tensor) -> None:
        """Raise what the loss of the first step shows: see `FirstLoss.check`."""
        if self._first_loss is not None:
            self._first_loss.check(loss)

    def end_step(self) -> None:
        """After a training step."""
        self._batch = None
        if self._first_loss is not None:
            self._first_loss.close()
            self._first_loss = None

    def look(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Before a validation step; what is wrong is raised by all ranks at the end."""
        if not self._validates or self._found is not None or (targets := self._targets(batch)) is None:
            return
        where = f"In batch {batch_idx} of the validation rows" + (
            f", loader {dataloader_idx}" if dataloader_idx else ""
        )
        if self._rehearsed is None:
            self._waiting.append((where, targets.cpu()))
        else:
            self._found = self._problem(where, targets)

    def end_validation(self, trainer: L.Trainer) -> None:
        """After a validation.

        Raises:
            InputError: If a target was wrong; after the sanity check it is raised at the start.
        """
        if self._validates and not trainer.sanity_checking:
            self._validates = False
            self._raise(Ranks(trainer))

    def explain(self, error: BaseException) -> None:
        """Add to an error of a step which label of its batch is none."""
        found = self._found
        if self._batch is not None and self._memorizes and (targets := self._targets(self._batch)) is not None:
            with suppress(RuntimeError):  # a GPU on which a loss has failed answers nothing any more
                found = self._problem("In the batch of this training step", targets)
        if found is not None and isinstance(error, Exception) and not isinstance(error, ResMemError):
            error.add_note(str(found))
        self.end_step()

    def _targets(self, batch: Any) -> Tensor | None:
        """Those of a batch whose rows are no sequences, if they can be told; else the rehearsal has said so."""
        try:
            targets = self._reader.targets(batch).detach()
        except InputError:
            return None
        return targets if targets.ndim else None

    def _problem(self, where: str, targets: Tensor) -> InputError | None:
        width = None if self._rehearsed is None else self._rehearsed.num_outputs
        if self._model is None or width is None:
            return None
        try:
            if tuple(targets.shape[1:]) in self._task.target_shapes(width):  # not of sequences, or of something else
                Labels(self._task, self._model).check_batch(targets, width)
        except InputError as error:
            return InputError(f"{where}: {error}")
        return None

    def _raise(self, ranks: Ranks) -> None:
        with ranks.together("looking at the targets of the validation rows"):
            if self._found is not None:
                raise self._found
