"""Fill a memory from a model that is trained already: what `ResMemCallback` does after `fit`, as a function."""

from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L

from lightning_resmem.collection.loaders import check_limit
from lightning_resmem.collection.ranks import check_strategy
from lightning_resmem.collection.row_limit import RowLimit
from lightning_resmem.errors import check_type
from lightning_resmem.memorizer import Memorizer
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.model.batches import BatchReader, ForwardFn, IdsFn, TargetsFn
from lightning_resmem.model.times import TimesFn
from lightning_resmem.module import ResMemModule
from lightning_resmem.progress import shows_progress
from lightning_resmem.trainer.job import Job, run_job
from lightning_resmem.tuning.tuner import Tuner, choose_tuner


def memorize(
    trainer: L.Trainer,
    model: L.LightningModule,
    dataloader: Any,
    val_dataloader: Any = None,
    *,
    memory: ResidualMemory | None = None,
    tuner: Tuner | Literal["auto"] | None = "auto",
    head: str | None = None,
    embedding: str | None = None,
    targets_fn: TargetsFn | None = None,
    forward_fn: ForwardFn | None = None,
    ids_fn: IdsFn | None = None,
    times_fn: TimesFn | None = None,
    max_rows: int | None = None,
    keep: Literal["uniform", "residual"] = "uniform",
    limit_batches: int | float | None = None,
    ckpt_path: str | Path | None = None,
    weights_only: bool | None = None,
) -> ResMemModule:
    """Give a model that is already trained a memory of its training residuals.

    The model's `setup("predict")` and `configure_model` are called as `trainer.predict(model)` would; layers that are
    there keep their weights.

    Args:
        trainer: Its accelerator, devices and precision are used; its callbacks are not called.
        model: The trained model.
        dataloader: The training rows, a DataLoader (its shuffling, sampling and `drop_last` do not matter), a list of
            batches, or the LightningDataModule that the model was trained with: the rows of its `memory_dataloader()`
            (or that of the model) if it has such a method, else of its `train_dataloader()`.
        val_dataloader: Validation rows to tune on; by default those of the datamodule. Without them the memory is tuned
            on 5,000 of its own rows, each left out of it in turn. An IterableDataset without a length needs
            `Trainer(limit_val_batches=...)`.
        memory: Where the rows go; `LocalMemory()` by default. Rows that it holds are forgotten.
        tuner: Chooses the params on `val_dataloader`. `"auto"` is `GridTuner()` unless the memory was given params.
        head: As for `ResMemCallback`.
        embedding: As for `ResMemCallback`.
        targets_fn: As for `ResMemCallback`.
        forward_fn: As for `ResMemCallback`.
        ids_fn: As for `ResMemCallback`.
        times_fn: As for `ResMemCallback`.
        max_rows: As for `ResMemCallback`.
        keep: As for `ResMemCallback`.
        limit_batches: Read only so many batches of training rows on each rank. An IterableDataset without a length
            needs it, as it may have no end; `math.inf` reads it to its end.
        ckpt_path: Checkpoint with the weights, loaded after `configure_model`; by default the model has them.
        weights_only: As for `trainer.test`.

    Returns:
        Base and memory as one LightningModule.

    Examples:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(2, 2)
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> rows = DataLoader(TensorDataset(torch.eye(2), torch.tensor([0, 1])))
        >>> trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")
        >>> len(memorize(trainer, Net(), rows).memory)
        2
    """
    memory = LocalMemory() if memory is None else memory
    check_type("trainer", trainer, L.Trainer, "a lightning.pytorch Trainer")
    check_type("model", model, L.LightningModule, "the LightningModule that was trained")
    check_memory(memory)
    check_limit(limit_batches)
    check_strategy(trainer.strategy)
    reader, limit = BatchReader(targets_fn, forward_fn, ids_fn, head, embedding, times_fn), RowLimit(max_rows, keep)
    memorizer = Memorizer(memory, choose_tuner(tuner, memory), reader, shows_progress(trainer), limit)
    fill = partial(memorizer.rehearse_and_run, limit_batches=limit_batches)
    memory = run_job(trainer, Job(model, memory, fill, dataloader, val_dataloader), ckpt_path, weights_only)
    return ResMemModule(model, memory, targets_fn=targets_fn, forward_fn=forward_fn, times_fn=times_fn)
