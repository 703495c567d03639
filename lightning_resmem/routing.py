"""One validate, test or predict run with the memory: the head's output is replaced, the predictions are scored."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.collection.loaders import evaluation_loaders
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import HeadError, InputError, ResMemWarning
from lightning_resmem.memory.following import build_near
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.weights_watch import WeightsWatch
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.reported import UserMetrics
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.fingerprint import check_fingerprint
from lightning_resmem.model.head import Captured, HeadTap
from lightning_resmem.model.ignored import ignored_labels
from lightning_resmem.model.modes import eager
from lightning_resmem.model.names import likely_head
from lightning_resmem.model.places import AUTO
from lightning_resmem.model.placing import device_of
from lightning_resmem.model.sequences import RowReader
from lightning_resmem.model.times import asked_at


def make_ready(memory: ResidualMemory, model: L.LightningModule, reader: BatchReader, doing: str) -> None:
    """Let a memory that is filled answer for a model: its weights and its head are the same, its index is built.

    Args:
        memory: Filled with the model's residuals.
        model: On its device.
        reader: Names the head, if the memory was filled by hand.
        doing: What is about to happen, for the message: "trainer.test runs".

    Raises:
        StaleMemoryError: If the model has other weights than the memory was filled with.
        InputError: If nobody knows the head.
    """
    check_fingerprint(model, memory.provenance, doing)
    if "head" not in memory.provenance and reader.head is not None and reader.embedding != AUTO:  # filled by hand
        names = {"head": reader.head, "embedding": reader.embedding}
        memory.provenance.update({name: value for name, value in names.items() if value is not None})
    if "head" not in memory.provenance:
        raise InputError(
            "The memory does not know the head of the model, nor where its keys are from: give "
            f'ResMemCallback(memory=..., head="{likely_head(model)}"), or what its name is, and the name of '
            "embedding= if that is not the head's input."
        )
    build_near(memory, device_of(model))


class Routing:
    """From the start of a run to `close`, which leaves the model as it was.

    Args:
        trainer: At the start of `validate`, `test` or `predict`.
        model: The model that is run.
        memory: Filled with its residuals.
        reader: Reads targets.
        replace: Whether the head's output is replaced, or only looked at.
        prefix: Of the scores' names; None scores nothing.
        metrics: The user's own metrics.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        memory: ResidualMemory,
        reader: BatchReader,
        replace: bool,
        prefix: str | None,
        metrics: UserMetrics | None = None,
    ) -> None:
        self._memory, self._ranks, self._times_fn = memory, Ranks(trainer), reader.times_fn
        self._asked = memory  # when the batch is
        self._rows = RowReader(reader, model, memory.task, memory.provenance)
        self._why_no_scores: str | None = None
        self._answers: list[Answer] = []  # of this batch, if they are to be scored
        self._found: list[Found] = []  # the same of sequences
        self._shape: tuple[int, ...] = ()  # of what the head returned last
        self._was_asked = False
        self._board: Scoreboard | None = None
        self._ignored = ignored_labels(model)
        if prefix is not None:
            loaders = evaluation_loaders(trainer)
            self._board = Scoreboard(memory, prefix, loaders, device_of(model), metrics, self._ignored)
        assert trainer.state.fn is not None
        # The steps may count in buffers; the next run compares these, too.
        self._weights = WeightsWatch(model, memory, buffers=False)
        self._weights.start_run(f"trainer.{trainer.state.fn.value} runs")
        known = memory.provenance
        self._tap = HeadTap(model, known["head"], known.get("embedding"), known.get("channels"))
        self._stack = ExitStack()
        self._stack.enter_context(eager())
        self._stack.enter_context(self._tap.route(self._combined) if replace else self._tap.capture(self._look))

    def start_batch(self, batch: Any) -> None:
        """Before the model's step."""
        self._asked = self._memory.at(asked_at(self._times_fn, batch))
        self._tap.clear()
        self._was_asked = False
        self._answers.clear()
        self._found.clear()

    def end_batch(self, batch: Any, dataloader_idx: int) -> None:
        """After the model's step: score what the head was asked for.

        Raises:
            HeadError: If the step did not call the head, so that nothing was combined.
        """
        if not self._was_asked:
            raise HeadError(self._tap.silent_message())
        if self._board is None or self._why_no_scores is not None:
            return
        try:
            read = self._rows.targets(batch, self._shape)
            if self._found:
                self._board.update_tokens(self._of_sequences(), read, dataloader_idx)
            else:
                self._board.update(self._of_batch(read.targets), read.targets, dataloader_idx, self._asked.asked_at)
        except InputError as error:
            # The model's step has accepted the batch; a test set without labels is no reason to stop the run.
            self._why_no_scores = str(error)

    def check_end(self) -> None:
        """After the last batch, before numbers are logged.

        Raises:
            StaleMemoryError: If the model has lost its weights meanwhile.
        """
        with self._ranks.together("checking the weights at the end of the run"):
            self._weights.check_end()

    def evaluate(self) -> tuple[Evaluation, ...]:
        """What the run showed, over all ranks; nothing, with a warning, if a rank could not score a batch."""
        if self._board is None:
            return ()
        try:
            self._board.finish()
        except InputError as error:
            self._why_no_scores = self._why_no_scores or str(error)
        reasons = [why for why in self._ranks.gather_objects(self._why_no_scores) if why is not None]
        if reasons:
            rank_zero_warn(
                "ResMem scores (base, knn, resmem) are left out of this run; the model's own are not affected. "
                f"{reasons[0]}",
                category=ResMemWarning,
            )
            return ()
        return self._board.evaluate(self._ranks)

    def close(self) -> None:
        """Take all hooks off the model."""
        self._stack.close()

    def _combined(self, captured: Captured) -> Tensor:
        if self._board is not None:
            self._look(captured)
            if captured.output.ndim == 3:
                return self._found[-1].combined(self._memory)
            return self._answers[-1].combined(self._memory.task)
        with self._asking():
            return Answer.outputs_of(self._asked, captured.embedding.float(), captured.output)

    def _look(self, captured: Captured) -> None:
        with self._asking():
            if self._board is None:
                return
            # A copy is kept: the model may go on in place.
            self._shape, asked = captured.output.shape, (captured.embedding.float(), captured.output.clone())
            if len(self._shape) == 3:
                self._found.append(Found.of(self._asked, *asked))
            else:
                self._answers.append(Answer.of(self._asked, *asked))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        self._was_asked = True
        self._weights.check_first()
        with self._memory.reading():
            self._weights.check("The run goes on")
            yield

    def _of_sequences(self) -> Found:
        if len(self._found) > 1:
            raise InputError(
                f"The step called the head {self._tap.head!r} {len(self._found)} times for one batch of sequences, so "
                "a position has no single answer: name a module that is called once with head=."
            )
        return self._found[0]

    def _of_batch(self, targets: Tensor) -> Answer:
        """One answer for each target: to the last call of the head, or to several calls on parts of the batch."""
        count = len(targets) if targets.ndim else 0
        if len(self._answers[-1].outputs) == count:
            return self._answers[-1]
        if sum(len(answer.outputs) for answer in self._answers) == count:
            return Answer.cat(self._answers)
        ignored = self._memory.task.ignored(targets, self._memory.num_outputs, self._ignored) if count else None
        if ignored is not None and 0 < len(self._answers[-1].outputs) == int((~ignored).sum()):
            # The step has dropped the rows that its loss ignores, which are not scored: any answer will do for them.
            return self._answers[-1].rows(((~ignored).cumsum(dim=0) - 1).clamp(min=0))
        raise InputError(f"The step called the head for other rows than the batch's {count} targets.")
