"""Base and memory as one LightningModule."""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor

from lightning_resmem.answering import Answering
from lightning_resmem.collection.loaders import evaluation_loaders
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import InputError, check_type
from lightning_resmem.explanation.neighbors import Explanation, check_no_row, explain
from lightning_resmem.explanation.pictures import find_images
from lightning_resmem.memory.answers import Predictions
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage.paths import Url
from lightning_resmem.memory.weights_watch import WeightsWatch
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.found import ask
from lightning_resmem.metrics.reported import UserMetrics, as_collection
from lightning_resmem.metrics.run import Run
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.batches import (
    BatchReader,
    ForwardFn,
    TargetsFn,
    borrow_transfer_hooks,
    check_batch,
)
from lightning_resmem.model.fingerprint import describe_weights
from lightning_resmem.model.ignored import ignored_labels
from lightning_resmem.model.modes import uncompiled
from lightning_resmem.model.places import AUTO
from lightning_resmem.model.placing import device_of
from lightning_resmem.model.sequences import RowReader
from lightning_resmem.model.times import TimesFn, asked_at
from lightning_resmem.reporting.wandb_report import download_memory
from lightning_resmem.trainer.base import configure, set_up
from lightning_resmem.trainer.save_directory import check_replaceable, kind


class ResMemModule(L.LightningModule):
    """A base model and its memory, for inference: `trainer.validate`, `test` and `predict`, saving and serving.

    Validation and test log `{stage}/acc_base`, `{stage}/acc_knn` and `{stage}/acc_resmem` (`mse` in regression), with
    `val` or `test` for the stage, and what else `ResMemMetrics` shows at a glance; `predict` returns `F(x)`. The base
    is always run in evaluation mode. Threads may call one at the same time, also while another changes the memory: each
    answer is that of before or after.

    Methods for users are `forward`, `combined`, `predictions`, `explain`, `save`, `load` and `from_wandb`; the others
    are Lightning's hooks and steps, which a trainer calls.

    Args:
        base: The trained model.
        memory: Filled with its embeddings and residuals.
        head: As for `ResMemCallback`; by default as it was when the memory was filled, or found with the first batch.
        embedding: As for `ResMemCallback`; by default as it was when the memory was filled.
        targets_fn: As for `ResMemCallback`.
        forward_fn: As for `ResMemCallback`.
        times_fn: As for `ResMemCallback`, of which only when rows are asked for is read.
        metrics: Your own torchmetrics metrics, reported as `{stage}/{name}_base`, `_knn` and `_resmem`; see
            `ResMemMetrics`.

    Attributes:
        evaluations: What the last validate or test run showed, for each of its dataloaders; empty before.

    Raises:
        EmptyMemoryError: If the memory has no rows.
        StaleMemoryError: If the memory was filled with other weights than the base has.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_resmem import LocalMemory, ResMemParams
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> memory = LocalMemory(params=ResMemParams(k=1))
        >>> memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]))
        >>> ResMemModule(Net(), memory)(torch.eye(2)).argmax(dim=1)
        tensor([0, 1])
    """

    def __init__(
        self,
        base: L.LightningModule,
        memory: ResidualMemory,
        head: str | None = None,
        embedding: str | None = None,
        targets_fn: TargetsFn | None = None,
        forward_fn: ForwardFn | None = None,
        times_fn: TimesFn | None = None,
        metrics: UserMetrics | None = None,
    ) -> None:
        super().__init__()
        check_type("base", base, L.LightningModule, "the LightningModule that was trained")
        check_memory(memory)
        memory.build()
        self.base, self.memory = base, memory
        self._watch = WeightsWatch(base, memory)
        self._check_weights("ResMemModule is made from a base")
        known = memory.provenance
        if embedding == AUTO and "head" not in known:
            raise InputError('embedding="auto" is for memorize and ResMemCallback: give the name of the module here.')
        embedding = known.get("embedding") if embedding in (None, AUTO) else embedding
        head = head or known.get("head")
        channels = known.get("channels") if embedding == known.get("embedding") else None
        self._reader = BatchReader(targets_fn, forward_fn, None, head, embedding, times_fn)
        self._answering = Answering(base, memory, self._watch, self._reader, channels)
        self._metrics = None if metrics is None else as_collection(metrics, memory.task, memory.num_outputs)
        self._run: Run | None = None
        self.evaluations: tuple[Evaluation, ...] = ()
        borrow_transfer_hooks(self, [base])

    @property
    def device(self) -> torch.device:  # Lightning notes only moves of the wrapper itself: the base moves alone, too
        return device_of(self.base)

    def setup(self, stage: str) -> None:
        set_up(self.base, stage)
        self._answering.find_again()

    def configure_model(self) -> None:
        configure(self.base)
        self._answering.find_again()

    @uncompiled
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The combined log-probabilities (logits for `Multilabel`, the prediction for `Regression`), shape `(B, C)`.

        Where the base returns `(B,)`, so does this; of sequences, whose positions are rows, it is `(B, T, C)`. Where it
        returns a dataclass with `logits`, such as a `ModelOutput` of transformers, that is returned with the combined
        ones, and what the base has computed of them, such as a `loss`, is of the combined ones, too.

        Args:
            *args: As for the base's `forward`; for a base without one, a batch as the loaders yield it.
            **kwargs: As for the base's `forward`.
        """
        if torch.compiler.is_exporting():
            raise InputError(
                "ResMemModule cannot be exported: a memory is searched, not computed, and its rows are no part of a "
                "graph. Export the base, and combine its outputs with memory.predict(embeddings, outputs)."
            )
        with self.memory.reading():
            return self._answering.answer(*args, **kwargs)

    @contextmanager
    def combined(self) -> Iterator[None]:
        """Within it, what the base is called for is answered with the memory, by the thread that has entered it.

        The base, or any model in it, may be called in whatever way: `with module.combined(): base.model.generate(...)`.
        What its head returns are the combined log-probabilities (see `forward`), and evaluation mode is on. Of contexts
        in one another the inner one counts.

        Raises:
            InputError: If nobody knows the head yet.
            StaleMemoryError: If the base has other weights than the memory was filled with.
        """
        with self._answering.combined():
            yield

    @uncompiled
    def predictions(self, batch: Any, at: Any = None) -> Predictions:
        """Base, knn and combined prediction for a batch as the loaders yield it, each `(B, C)` (or `(B, T, C)`).

        A list of rows of a dataset, `[dataset[0], dataset[1]]`, is made a batch.

        Args:
            batch: Inputs, with or without targets.
            at: When it is asked, as for `memory.at`, if the memory's rows have times; by default `times_fn` reads it.
        """
        check_batch(batch)
        with self.memory.reading():
            batch = self._reader.collate(batch, self.memory.task.target_shapes(self.memory.num_outputs))
            captured = self._answering.captured(batch)
            return Answer.of(self._asked(batch, at), *captured).shaped(captured.output)

    def explain(self, batch: Any, top: int = 5, at: Any = None) -> Explanation:
        """Why the predictions for a batch are what they are: the neighbours behind each, and what each of them added.

        Args:
            batch: As the loaders yield it, on any device, or a list of rows `[dataset[0], dataset[1]]`.
            top: How many neighbours are listed one by one; what the others add is summed up.
            at: As for `predictions`.

        Returns:
            A table (print it with rich), plain `rows`, and a picture grid `figure()` where inputs are images.
        """
        check_batch(batch)
        batch = self._reader.collate(batch, self.memory.task.target_shapes(self.memory.num_outputs))
        batch = self.transfer_batch_to_device(batch, self.device, 0)
        try:
            targets = self._reader.targets(batch)
        except InputError:  # a batch to predict has none
            targets = None
        check_no_row(batch, targets)
        with self.memory.reading():
            captured = self._answering.captured(batch)
            known = targets if captured.output.ndim == 2 else None  # of positions it is not told here which count
            explanation = explain(self._asked(batch, at), *captured.rows, top, known)
        return dataclasses.replace(explanation, images=find_images(batch))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Score a batch; returns `F(x)`, shape `(B, C)`."""
        return self._evaluate(batch, dataloader_idx)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """The combined prediction of a batch as `memory.predict` returns it, shape `(B, C)`."""
        if self._run is not None:
            self._run.answer()
        return self.predictions(batch).resmem

    def on_predict_start(self) -> None:
        self._start_run(None)

    def on_validation_epoch_start(self) -> None:
        self._start_run("val")

    def on_test_epoch_start(self) -> None:
        self._start_run("test")

    def on_validation_epoch_end(self) -> None:
        self._finish_run()

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> Path | Url:
        """Save the memory, with the fingerprint of the base and the name of its head. The base itself is not saved.

        Args:
            directory: A path, or a URL that fsspec knows, such as `s3://bucket/directory`. A memory of the same weights
                that is there is replaced.
            overwrite: Replace a memory of other weights, too.

        Returns:
            The absolute path of the directory, or the URL.

        Raises:
            StaleMemoryError: If the base has other weights by now than the memory was filled with.
            StorageError: If it cannot be written, or holds the memory of other weights.
        """
        self._check_weights("ResMemModule is saved with a base", surely=True)
        names = self._answering.describe()
        ignored = json.loads(self.memory.provenance.get("ignored", "[]"))
        weights = describe_weights(self.base, ignored) | {"base": kind(self.base)}
        self.memory.provenance.update(weights | names | self._reader.provenance)
        if not overwrite:
            check_replaceable(directory, self.memory.provenance)
        return self.memory.save(directory)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], base: L.LightningModule, **options: Any) -> "ResMemModule":
        """Load what `save` saved.

        Args:
            directory: As given to `save`.
            base: The model with the weights that the memory was filled with.
            **options: As for `ResMemModule`.

        Raises:
            InputError: If the memory was filled with a `forward_fn`, and none is given.
            StorageError: If the memory is missing, damaged or of another format version.
            StaleMemoryError: If the base has other weights.
        """
        memory = LocalMemory.load(directory)
        forward_name = memory.provenance.get("forward_fn")
        if forward_name is not None and options.get("forward_fn") is None:
            raise InputError(
                f"The memory in {directory} was filled with a forward_fn ({forward_name}), which cannot be saved, and "
                "without it batches may be run in another way: give it again, ResMemModule.load(directory, base, "
                "forward_fn=...)."
            )
        return cls(base, memory, **options)

    @classmethod
    def from_wandb(cls, name: str, base: L.LightningModule, root: str | None = None, **options: Any) -> "ResMemModule":
        """Load a memory that `ResMemCallback(log_memory_artifact=True)` has logged to Weights & Biases.

        An active run notes that it used the artifact.

        Args:
            name: `"entity/project/memory:v3"`, or a directory that the artifact was downloaded to.
            base: The model with the weights that the memory was filled with.
            root: Where the artifact is downloaded to; by default as wandb has it.
            **options: As for `ResMemModule`.

        Raises:
            InputError: If `name` is no name, or wandb is not installed.
            StorageError: If the artifact cannot be downloaded, e.g. offline, or is damaged.
            StaleMemoryError: If the base has other weights.
        """
        return cls.load(download_memory(name, root), base, **options)

    def _check_weights(self, doing: str, surely: bool = False) -> None:
        """Raise `StaleMemoryError` if the base or the memory is another by now: see `WeightsWatch.check`."""
        self._watch.check(doing, surely)

    def _asked(self, batch: Any, at: Any = None) -> ResidualMemory:
        """The memory as it was known when a batch is asked."""
        return self.memory.at(asked_at(self._reader.times_fn, batch) if at is None else at)

    def _start_run(self, stage: str | None) -> None:
        self._check_weights("ResMemModule runs", surely=True)
        board = None
        if stage is not None:
            self.evaluations = ()
            loaders = evaluation_loaders(self.trainer)
            board = Scoreboard(self.memory, stage, loaders, self.device, self._metrics, ignored_labels(self.base))
        self._watch.start_run("ResMemModule runs")
        rows = RowReader(self._reader, self.base, self.memory.task, self.memory.provenance)
        self._run = Run(self._watch, board, Ranks(self.trainer), rows)

    @uncompiled
    def _evaluate(self, batch: Any, dataloader_idx: int) -> Tensor:
        run = self._run  # None where a step is called by hand, outside a trainer
        if run is not None:
            run.answer()
        with self.memory.reading():
            asked = self._asked(batch)
            answer = ask(asked, *self._answering.captured(batch))
        if run is not None:
            run.score(answer, batch, dataloader_idx, asked.asked_at)
        return answer.resmem(self.memory)

    def _finish_run(self) -> None:
        run, self._run = self._run, None
        for evaluation in () if run is None else run.finish():
            self.evaluations += (evaluation,)
            # The same on every rank already; without sync_dist the trainer warns that it might not be.
            self.log_dict(evaluation.shown_scores(), sync_dist=True, add_dataloader_idx=False)
