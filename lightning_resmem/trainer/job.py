"""Work of our own in the processes of a Trainer, outside its fit."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage import disk
from lightning_resmem.model.batches import TRANSFER_HOOKS, borrow_transfer_hooks
from lightning_resmem.trainer.base import configure, set_up
from lightning_resmem.trainer.loaders import offered_loader
from lightning_resmem.trainer.processes import runs_elsewhere

# `fill(trainer, model, loaders, val_loaders)`
Fill = Callable[[L.Trainer, L.LightningModule, Any, Any], object]


class Job(L.LightningModule):
    """A prediction over nothing: the trainer sets up processes, devices and precision, and this hook does the work.

    Args:
        model: The model that was trained.
        memory: What `fill` fills.
        fill: The work. Under spawn it travels to other processes.
        loaders: The training rows, or a LightningDataModule.
        val_loaders: The validation rows; None for those of the datamodule, if there is one.
        rows: Training rows in place of the datamodule's.
    """

    def __init__(
        self,
        model: L.LightningModule,
        memory: ResidualMemory,
        fill: Fill,
        loaders: Any,
        val_loaders: Any = None,
        rows: Any = None,
    ) -> None:
        super().__init__()
        self.model, self.memory = model, memory
        self._fill, self._loaders, self._val_loaders, self._rows = fill, loaders, val_loaders, rows
        self._datamodule = loaders if isinstance(loaders, L.LightningDataModule) else None
        self.directory: Path | None = None  # where the memory goes if this process ends with the job
        self.result: object = None  # of the work, if it was done in this process

    def prepare_data(self) -> None:
        if self._datamodule is not None:
            self._datamodule.prepare_data()

    def setup(self, stage: str) -> None:
        if self._datamodule is not None:
            self._datamodule.trainer = self.trainer
            with Ranks(self.trainer).together("setting up the datamodule"):
                self._datamodule.setup("fit")
        set_up(self.model, stage, self._datamodule)

    def configure_model(self) -> None:
        configure(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.model.on_load_checkpoint(checkpoint)
        self.strict_loading = self.model.strict_loading

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights of the model: the trainer restores checkpoints of it."""
        return self.model.load_state_dict(state_dict, strict, assign)

    def on_predict_model_eval(self) -> None:
        """Do nothing: the pass changes the model's mode, and restores it even when it fails."""

    def on_predict_start(self) -> None:
        borrow_transfer_hooks(self, [self.model] if self._datamodule is None else [self._datamodule, self.model])
        try:
            self._work()
        finally:  # they know nothing of the trainer's empty batch
            for hook in TRANSFER_HOOKS:
                vars(self).pop(hook, None)

    def _work(self) -> None:
        loaders, val_loaders = self._loaders, self._val_loaders
        if self._datamodule is not None:
            with Ranks(self.trainer).together("making the loaders"):
                loaders = offered_loader(self._datamodule, self.model) if self._rows is None else self._rows
                loaders = self._datamodule.train_dataloader() if loaders is None else loaders
                if val_loaders is None and is_overridden("val_dataloader", self._datamodule, L.LightningDataModule):
                    val_loaders = self._datamodule.val_dataloader()
        self.result = self._fill(self.trainer, self.model, loaders, val_loaders)
        if self.directory is not None:
            with Ranks(self.trainer).together("saving the memory"):
                if self.trainer.is_global_zero:
                    self.memory.save(self.directory)

    def predict_step(self, batch: Any) -> bool:
        return True  # the trainer warns about None


def run_job(
    trainer: L.Trainer, job: Job, ckpt_path: str | Path | None = None, weights_only: bool | None = None
) -> ResidualMemory:
    """Run a job without the trainer's callbacks, and leave the trainer as it was.

    Args:
        trainer: Does the work.
        job: The work.
        ckpt_path: Checkpoint with the model's weights, which the trainer loads after the model's hooks.
        weights_only: As for `trainer.test`.

    Returns:
        The filled memory: the job's own, or what other processes saved of theirs.
    """
    callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
    limit, trainer.limit_predict_batches = trainer.limit_predict_batches, 1
    attached = trainer.lightning_module or job.model
    try:
        if runs_elsewhere(trainer):
            return _run_elsewhere(trainer, job, ckpt_path, weights_only)
        _predict(trainer, job, ckpt_path, weights_only)
        return job.memory
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
        trainer.limit_predict_batches = limit
        trainer.strategy.connect(attached)  # `trainer.test()` means the model, not the job


class _Once:
    """One empty batch."""

    def __iter__(self) -> Iterator[None]:
        yield None

    def __len__(self) -> int:
        return 1


def _predict(trainer: L.Trainer, job: Job, ckpt_path: str | Path | None, weights_only: bool | None) -> None:
    trainer.predict(job, _Once(), return_predictions=False, ckpt_path=ckpt_path, weights_only=weights_only)


def _run_elsewhere(
    trainer: L.Trainer, job: Job, ckpt_path: str | Path | None, weights_only: bool | None
) -> ResidualMemory:
    """The memory comes back from other processes through the disk."""
    root = disk.as_path(trainer.default_root_dir)
    if isinstance(root, disk.Url):
        root = Path(tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="resmem-", dir=root) as directory:
        job.directory = Path(directory) / "memory"
        _predict(trainer, job, ckpt_path, weights_only)
        return LocalMemory.load(job.directory)
