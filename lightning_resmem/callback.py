"""ResMemCallback: when a memory is filled, and when it answers. No maths."""

import copy
import gc
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_resmem.collection.ranks import Ranks, check_strategy
from lightning_resmem.errors import EmptyMemoryError, InputError, MemoryPassError, ResMemWarning, StorageError
from lightning_resmem.memorization import Memorizer, choose_tuner
from lightning_resmem.memory.interface import ResidualMemory, check_memory
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage import disk
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.metrics.reported import UserMetrics, as_collection
from lightning_resmem.model.batches import BatchReader, ForwardFn, IdsFn, TargetsFn
from lightning_resmem.model.fingerprint import check_fingerprint
from lightning_resmem.module import ResMemModule
from lightning_resmem.progress import shows_progress, working
from lightning_resmem.reporting.report import Report
from lightning_resmem.reporting.wandb_report import finish_forked_run
from lightning_resmem.routing import Routing
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.tuner import Tuner


class ResMemCallback(Callback):
    """Memorize the training residuals when training ends; afterwards validate, test and predict with base + memory.

    After `trainer.fit`, one pass over the training set fills the memory, and the validation set tunes it. In
    `trainer.validate`, `test` and `predict` the output of the model's head is replaced by the combined prediction, so
    the model's own steps and metrics see it; `{stage}/acc_base`, `{stage}/acc_knn` and `{stage}/acc_resmem` are logged
    beside them (`val` or `test` for the stage; `mse` in regression), and what else `ResMemMetrics` shows at a glance.
    Validation during `fit` shows the base.

    Args:
        memory: Where the rows go; `LocalMemory()` by default. It may already be filled, for use without `fit`.
        tuner: Chooses the memory's params on the validation set, or without one on 5,000 rows of the memory, each left
            out of it in turn. `"auto"` is `GridTuner()`, unless the memory was given params; None keeps them.
        head: Name of the module whose input is the embedding and whose output is the logits, e.g. `"net.fc"`; by
            default the last `nn.Linear` that a forward executes.
        embedding: Name of the module whose output is the key, e.g. `"net.layer4"`; by default the head's input.
        targets_fn: `targets_fn(batch)` returns the targets; by default the second of a pair, or the entry `labels`,
            `label`, `target`, `targets` or `y` of a dict.
        forward_fn: `forward_fn(model, batch)` runs the model in the memory pass; by default `model(inputs)`.
        ids_fn: `ids_fn(batch)` returns the rows' ids, unique over the training set; by default their positions in the
            dataset. Needed to detect rows that an IterableDataset gives to several ranks.
        memory_dataloader: The rows to memorize, e.g. without augmentation; by default those of the training loader.
        weights: `"last"` memorizes the weights at the end of training; `"best"` those of the best checkpoint, for
            `trainer.test(ckpt_path="best")`.
        dirpath: Where the memory is saved after the pass; a memory that is there is replaced. By default beside the
            trainer's `checkpoints` directory, if it writes checkpoints, with a version if there is one already.
        name: Tells several callbacks on one trainer apart; also the name of the default directory.
        route: Whether the model's own metrics see the combined prediction. Of several callbacks only one may.
        metrics: Your own torchmetrics metrics, reported as `{stage}/{name}_base`, `_knn` and `_resmem`; see
            `ResMemMetrics`.
        log_memory_artifact: Whether a `WandbLogger`'s run gets the memory as an artifact, for
            `ResMemModule.from_wandb`. It is as large as the memory.

    Attributes:
        tuning: What the tuner chose and gained in the last `fit`, or None.
        evaluations: What the last validate or test run showed, for each of its dataloaders; empty before.

    Example:
        >>> trainer = L.Trainer(callbacks=[ResMemCallback()], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        memory: ResidualMemory | None = None,
        tuner: Tuner | Literal["auto"] | None = "auto",
        head: str | None = None,
        embedding: str | None = None,
        targets_fn: TargetsFn | None = None,
        forward_fn: ForwardFn | None = None,
        ids_fn: IdsFn | None = None,
        memory_dataloader: Any = None,
        weights: Literal["last", "best"] = "last",
        dirpath: str | Path | None = None,
        name: str = "resmem",
        route: bool = True,
        metrics: UserMetrics | None = None,
        log_memory_artifact: bool = False,
    ) -> None:
        if memory is not None:
            check_memory(memory)
        if weights not in ("last", "best"):
            raise InputError(f'weights={weights!r} is not known: give "last" or "best".')
        if not isinstance(name, str) or not name or Path(name).name != name or name == "..":
            raise InputError(f"name={name!r}: give a plain name, it also names a directory.")
        for flag, value in (("route", route), ("log_memory_artifact", log_memory_artifact)):
            if not isinstance(value, bool):
                raise InputError(f"{flag}={value!r}: give True or False.")
        if dirpath is not None and (not isinstance(dirpath, (str, os.PathLike)) or not os.fspath(dirpath)):
            raise InputError(f"dirpath={dirpath!r} is not a path: give a directory for the memory, or None.")
        self._memory: ResidualMemory = LocalMemory() if memory is None else memory
        self.tuning: TuningResult | None = None
        self.evaluations: tuple[Evaluation, ...] = ()
        self._tuner = choose_tuner(tuner, self._memory)
        self._head, self._embedding = head, embedding
        self._targets_fn, self._forward_fn = targets_fn, forward_fn
        self._reader = BatchReader(targets_fn, forward_fn, ids_fn)
        self._memory_dataloader, self._weights, self._dirpath = memory_dataloader, weights, dirpath
        self._name, self._route = name, route
        self._report = Report(name, log_memory_artifact)
        self._metrics = None if metrics is None else as_collection(metrics, self._memory.task)
        self._base: L.LightningModule | None = None
        self._directory: Path | None = None  # where the memory was saved
        self._memorized = False  # in the current fit
        self._routing: Routing | None = None
        # Under spawn and fork nothing comes back to this process; the others find this name in their copy, too.
        self._token = uuid.uuid4().hex[:8]

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self._name)

    @property
    def evaluation(self) -> Evaluation | None:
        """What the last validate or test run showed on its first dataloader; None before any."""
        return self.evaluations[0] if self.evaluations else None

    @property
    def memory(self) -> ResidualMemory:
        """The memory; empty until `fit` has filled it."""
        self._found_base()
        return self._memory

    @property
    def module(self) -> ResMemModule:
        """Base and memory as one LightningModule, for inference, saving and serving.

        Raises:
            EmptyMemoryError: If nothing was memorized yet.
            StaleMemoryError: If the model has other weights by now.
        """
        base = self._found_base()
        if base is None or not len(self._memory):
            raise EmptyMemoryError("Nothing was memorized yet: ResMemCallback.module is there after trainer.fit(...).")
        return ResMemModule(
            base, self._memory, targets_fn=self._targets_fn, forward_fn=self._forward_fn, metrics=self._metrics
        )

    # -- fit: fill the memory

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy)
        _check_siblings([c for c in trainer.callbacks if isinstance(c, ResMemCallback)])  # type: ignore[attr-defined]
        if stage != TrainerFn.FITTING:
            return
        self._memorized, self.tuning = False, None
        if self._weights == "best" and not _is_fast_dev_run(trainer) and not _checkpoints(trainer):
            raise InputError('weights="best" needs a ModelCheckpoint with a monitor among the Trainer\'s callbacks.')
        # Weight averaging swaps its weights in, and checkpoints are written, in on_train_end: memorize after them.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        directory = self._save_directory(trainer)
        with Ranks(trainer).together("looking where the memory will be saved"):
            if directory is not None and trainer.is_global_zero:
                disk.check_target(directory)
        self._memorizer(trainer).rehearse(
            trainer, pl_module, self._memory_loaders(trainer), self._limit_batches(trainer), self._metrics
        )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._base, started = pl_module, time.monotonic()
        if trainer.val_dataloaders is None and trainer.enable_validation:  # no epoch was validated
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
        with self._chosen_weights(trainer, pl_module):
            self.tuning = self._memorizer(trainer).run(
                trainer,
                pl_module,
                self._memory_loaders(trainer),
                trainer.val_dataloaders,
                self._limit_batches(trainer),
                _limit(trainer.limit_val_batches, trainer.num_val_batches),
            )
        self._memorized, seconds = True, time.monotonic() - started
        if self.tuning is None and self._memory.tunable:
            params = self._memory.params
            rank_zero_info(
                f"ResMem: without a tuner, or without validation rows and with few others, params are measured, not "
                f"tuned: k={params.k}, sigma={params.sigma:.4g}."
            )
        self._directory = trainer.strategy.broadcast(self._free_directory(trainer))
        if self._directory is not None:
            showing = trainer.is_global_zero and shows_progress(trainer)
            with Ranks(trainer).together("saving the memory"), working(showing, "saving the memory"):
                if trainer.is_global_zero:
                    self._memory.save(self._directory)
            rank_zero_info(f"ResMem: saved the memory to {self._directory}.")
        loaders = None if self._reader.gives_ids else self._memory_loaders(trainer)  # ids are positions in them
        self._report.memorized(trainer, self._memory, self.tuning, seconds, self._directory, loaders)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._base = pl_module
        if self._memorized:
            return
        if self._has_rows():
            rank_zero_info("ResMem: no training took place, so the memory stays as it is.")
        else:
            rank_zero_warn(
                "ResMem: no training took place (limit_train_batches=0, or a checkpoint that had reached max_epochs), "
                "so there is no memory. Fill one with memorize(trainer, model, dataloader).",
                category=ResMemWarning,
            )

    def state_dict(self) -> dict[str, Any]:
        return {} if self._directory is None else {"directory": str(self._directory)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "directory" in state_dict and not len(self._memory):
            self._directory = Path(state_dict["directory"])

    # -- validate, test, predict: answer from it

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not in fit
            self._start(trainer, pl_module, "val")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, None)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._routing is not None:
            self._routing.start_batch()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._routing is not None:
            self._routing.end_batch(batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._routing is not None:
            self.evaluations = self._routing.evaluate()
            for evaluation in self.evaluations:
                # The same on every rank already; without sync_dist the trainer warns that it might not be.
                pl_module.log_dict(evaluation.shown_scores(), sync_dist=True, add_dataloader_idx=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._routing is not None:
            self._stop()
            self._report.evaluated(trainer, self._memory, self.evaluations)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    # Once it has started, a run is a run.
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()
        finish_forked_run(trainer, succeeded=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        finish_forked_run(trainer, succeeded=True)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str | None) -> None:
        self._stop()  # of a run that was killed between its hooks
        if stage is not None:
            self.evaluations = ()
        if isinstance(pl_module, ResMemModule):  # it combines by itself
            return
        self._find_saved(trainer)
        if not self._has_rows():
            rank_zero_warn(
                "ResMemCallback has no memory yet, so this run shows the base model alone. Call trainer.fit first, or "
                "give it a filled one: ResMemCallback(memory=LocalMemory.load(directory)).",
                category=ResMemWarning,
            )
            return
        assert trainer.state.fn is not None
        check_fingerprint(pl_module, self._memory.provenance, f"trainer.{trainer.state.fn.value} runs")
        if "head" not in self._memory.provenance and self._head is not None:  # it was filled by hand
            names = {"head": self._head, "embedding": self._embedding}
            self._memory.provenance.update({name: value for name, value in names.items() if value is not None})
        if "head" not in self._memory.provenance:
            raise InputError(
                'The memory does not know the head of the model: give ResMemCallback(memory=..., head="net.fc").'
            )
        with torch.inference_mode(False):  # what is made in inference mode can never be changed again
            self._memory.build()
        _follow_to_gpu(self._memory, pl_module.device)
        prefix = stage if stage is None or self._name == "resmem" else f"{stage}/{self._name}"
        self._base = pl_module
        self._routing = Routing(trainer, pl_module, self._memory, self._reader, self._route, prefix, self._metrics)

    def _stop(self) -> None:
        if self._routing is not None:
            self._routing.close()
            self._routing = None

    # -- details

    def _memorizer(self, trainer: L.Trainer) -> Memorizer:
        return Memorizer(self._memory, self._tuner, self._reader, self._head, self._embedding, shows_progress(trainer))

    def _memory_loaders(self, trainer: L.Trainer) -> Any:
        return trainer.train_dataloader if self._memory_dataloader is None else self._memory_dataloader

    def _limit_batches(self, trainer: L.Trainer) -> int | None:
        """How many batches of training rows a rank memorizes, None for all of them."""
        if self._memory_dataloader is not None and not _is_fast_dev_run(trainer):
            return None
        return _limit(trainer.limit_train_batches, [trainer.num_training_batches])

    def _found_base(self) -> L.LightningModule | None:
        """The base, if there is one; the memory is then there as well, if it was filled or saved."""
        base = self._base
        if base is None and (trainer := _owner(self)) is not None:
            base = trainer.lightning_module
            self._find_saved(trainer)
        self._has_rows()
        return base

    def _has_rows(self) -> bool:
        """Whether there is a memory, if need be from where it was saved."""
        if not len(self._memory) and self._directory is not None:
            try:
                with torch.inference_mode(False):  # what is made in inference mode can never be changed again
                    self._memory = LocalMemory.load(self._directory)
            except StorageError as error:
                raise StorageError(
                    f"{error} That is where ResMemCallback saved it. If it is elsewhere now, give "
                    "ResMemCallback(memory=LocalMemory.load(directory)); if it is lost, fill it again: "
                    "memorize(trainer, model, dataloader)."
                ) from error
        return len(self._memory) > 0

    def _find_saved(self, trainer: L.Trainer) -> None:
        """Under spawn and fork the memory was filled in processes that are gone: look where they saved it."""
        if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            return
        if self._directory is None:
            directory = self._save_directory(trainer)
            self._directory = directory if directory is not None and directory.is_dir() else None
        elif len(self._memory) and self._directory.is_dir():
            # What this process loaded after one fit is replaced by the next.
            saved = disk.read_manifest(self._directory).get("provenance")
            self._memory = self._memory if saved == self._memory.provenance else LocalMemory()

    def _save_directory(self, trainer: L.Trainer) -> Path | None:
        if self._dirpath is not None:
            return Path(self._dirpath).expanduser().absolute()
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            # The only way back to the main process, which does not know the log_dir of the others.
            return Path(trainer.default_root_dir).absolute() / f"{self._name}-{self._token}"
        if _is_fast_dev_run(trainer) or not any(isinstance(c, ModelCheckpoint) for c in trainer.callbacks):  # type: ignore[attr-defined]
            return None
        dirpath = trainer.checkpoint_callback.dirpath  # type: ignore[union-attr]
        if dirpath is None or "://" in str(dirpath):
            return Path(trainer.default_root_dir).absolute() / self._name
        checkpoints = Path(dirpath).absolute()  # relative where the logger's directory is: TensorBoardLogger("logs")
        return (checkpoints.parent if checkpoints.name == "checkpoints" else checkpoints) / self._name

    def _free_directory(self, trainer: L.Trainer) -> Path | None:
        """Where to save without replacing the memory of another run, as checkpoints get a version then, too."""
        directory = self._save_directory(trainer)
        if directory is None or self._dirpath is not None or self._token in directory.name:
            return directory
        versions = (directory.with_name(f"{directory.name}-v{version}") for version in count(1))
        return next(free for free in chain([directory], versions) if not free.exists())

    @contextmanager
    def _chosen_weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
        """The weights to memorize, and those at the end of training again afterwards."""
        if self._weights == "last" or _is_fast_dev_run(trainer):
            yield
            return
        path = next((c.best_model_path for c in _checkpoints(trainer) if c.best_model_path), None)
        if path is None:
            raise MemoryPassError(
                'weights="best": no best checkpoint was saved in this fit. The model is trained, and '
                "memorize(trainer, model, dataloader) gives it a memory."
            )
        last = copy.deepcopy(pl_module.state_dict())
        try:
            # This very fit wrote it, with whatever hyperparameters the model has: it can be trusted.
            best = trainer.strategy.load_checkpoint(path, weights_only=False)["state_dict"]
            pl_module.load_state_dict(best, strict=pl_module.strict_loading)
            yield
        finally:
            pl_module.load_state_dict(last, strict=pl_module.strict_loading)


def _checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    """The checkpoints that know a best epoch."""
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]


def _is_fast_dev_run(trainer: L.Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def _limit(setting: int | float | None, num_batches: list[int | float]) -> int | None:
    """How many batches a rank reads, or None for all of them: `1.0` is all, `1` is one batch."""
    if isinstance(setting, float) and setting == 1.0:
        return None
    return int(min(num_batches, default=0))


def _check_siblings(callbacks: list[ResMemCallback]) -> None:
    if sum(callback._route for callback in callbacks) > 1:
        raise InputError(
            f"{len(callbacks)} ResMemCallbacks would each replace the head's output. Keep one of them, and give the "
            'others name="..." and route=False: they fill memories and log scores of their own under that name.'
        )


def _owner(callback: ResMemCallback) -> L.Trainer | None:
    """The trainer of a callback whose hooks ran in other processes only: spawn and fork call none in this one."""
    # `isinstance` would also ask proxies for the class they stand for, and some of them warn.
    trainers = (o for o in gc.get_objects() if issubclass(type(o), L.Trainer))
    return next((t for t in trainers if callback in t.callbacks), None)


def _follow_to_gpu(memory: ResidualMemory, device: torch.device) -> None:
    """Search on the model's GPU where the memory takes no more than half of what is free there."""
    if device.type == "cuda" and memory.device.type == "cpu":
        free, _ = torch.cuda.mem_get_info(device)
        if memory.stats()["bytes"] < free / 2:
            with torch.inference_mode(False):
                memory.to(device)
