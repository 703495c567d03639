"""ResMemCallback: when a memory is filled, and when it answers. No maths."""

import time
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.collection.ranks import Ranks, check_strategy
from lightning_resmem.collection.row_limit import RowLimit
from lightning_resmem.errors import EmptyMemoryError, InputError, ResMemWarning
from lightning_resmem.memorizer import Memorizer
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.evaluation import Evaluation, first_of
from lightning_resmem.metrics.reported import UserMetrics, as_collection
from lightning_resmem.model.batches import BatchReader, ForwardFn, IdsFn, TargetsFn
from lightning_resmem.model.times import TimesFn
from lightning_resmem.module import ResMemModule
from lightning_resmem.progress import shows_progress
from lightning_resmem.reporting.report import Report
from lightning_resmem.reporting.wandb_report import finish_forked_run
from lightning_resmem.routing import Routing, make_ready
from lightning_resmem.trainer.fit_watch import FitWatch
from lightning_resmem.trainer.limits import given_limit, train_limit, val_limit
from lightning_resmem.trainer.loaders import offered_loader, validation_loaders
from lightning_resmem.trainer.processes import trainer_of
from lightning_resmem.trainer.restoring import RestorableMemory
from lightning_resmem.trainer.save_directory import SaveDirectory
from lightning_resmem.trainer.siblings import Sibling, check_siblings
from lightning_resmem.trainer.weights import check_weights, memorized_weights, naming_averaging
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.tuner import Tuner, choose_tuner


class ResMemCallback(Callback):
    """Memorize the training residuals when training ends; afterwards validate, test and predict with base + memory.

    After `trainer.fit`, one pass over the training set fills the memory, and the validation set tunes it. In
    `trainer.validate`, `test` and `predict` the output of the model's head is replaced by the combined prediction, so
    the model's own steps and metrics see it; `{stage}/acc_base`, `{stage}/acc_knn` and `{stage}/acc_resmem` are logged
    beside them (`val` or `test` for the stage; `mse` in regression), and what else `ResMemMetrics` shows at a glance.
    Validation during `fit` shows the base.

    Methods for users are `memory`, `module` and `evaluation`; the others are Lightning's hooks, in the order of a run:
    `fit` fills the memory, checkpoints keep its path, and validate, test and predict answer from it.

    Args:
        memory: Where the rows go; `LocalMemory()` by default. It may already be filled, for use without `fit`.
        tuner: Chooses the memory's params on the validation set, or without one on 5,000 rows of the memory, each left
            out of it in turn. `"auto"` is `GridTuner()`, unless the memory was given params; None keeps them.
        head: Name of the module whose input is the embedding and whose output is the logits, e.g. `"net.fc"`; by
            default the last `nn.Linear` that a forward executes.
        embedding: Name of the module whose output is the key, or input, `"net.mlp:input"`; by default the head's input.
            `"auto"` tries the last few places on validation rows: see the page on tuning.
        targets_fn: `targets_fn(batch)` returns the targets; by default the second of a pair, or the entry `labels`,
            `label`, `target`, `targets` or `y` of a dict (or an attribute of that name).
        forward_fn: `forward_fn(model, batch)` runs the model in the memory pass; by default `model(inputs)`, with the
            entries of a dict by the names of `forward`'s arguments. A model without a `forward` of its own is run
            through its `predict_step`, `validation_step` or `test_step`, with logging switched off.
        ids_fn: `ids_fn(batch)` returns the rows' ids, unique over the training set; by default their positions in the
            dataset. Needed to detect rows that an IterableDataset gives to several ranks.
        times_fn: `times_fn(batch)` returns when each row is asked for and when its target is known, a pair of `(n,)`:
            then a query recalls only what was known when it was asked. See the page on series.
        memory_dataloader: The rows to memorize, e.g. without augmentation; by default what a method
            `memory_dataloader()` of the datamodule or the model returns, else those of the training loader. Of a stream
            without a length at most as many rows are read as training has read.
        max_rows: Keep at most so many rows, the same for any number of ranks and any batches; by default all.
        keep: Which of more rows than that: `"uniform"`, chosen by a hash of their ids, or `"residual"`, those that the
            base has most wrong, which is cheaper in rows and biased: see the page on training.
        weights: `"last"` memorizes the weights at the end of training; `"best"` those of the checkpoint that
            `trainer.test(ckpt_path="best")` takes.
        dirpath: Where the memory is saved after the pass, a path or a URL such as `s3://bucket/memory`. A memory of the
            same model that is there is replaced (with a warning, if another fit saved it), one of another class of
            model is refused. By default beside the trainer's `checkpoints` directory, if it writes checkpoints, with a
            version if there is one already.
        name: Tells several callbacks on one trainer apart, of which no two may have the same ("Found more than one
            stateful callback", the Trainer says); also the name of the default directory.
        route: Whether the model's own metrics see the combined prediction. Of several callbacks only one may.
        metrics: Your own torchmetrics metrics, reported as `{stage}/{name}_base`, `_knn` and `_resmem`; see
            `ResMemMetrics`.
        log_memory_artifact: Whether a `WandbLogger`'s run gets the memory as an artifact, for
            `ResMemModule.from_wandb`. It is as large as the memory.

    Attributes:
        tuning: What the tuner chose and gained in the last `fit`, or None.
        evaluations: What the last validate or test run showed, for each of its dataloaders; empty before.

    Examples:
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
        times_fn: TimesFn | None = None,
        memory_dataloader: Any = None,
        max_rows: int | None = None,
        keep: Literal["uniform", "residual"] = "uniform",
        weights: Literal["last", "best"] = "last",
        dirpath: str | Path | None = None,
        name: str = "resmem",
        route: bool = True,
        metrics: UserMetrics | None = None,
        log_memory_artifact: bool = False,
    ) -> None:
        if weights not in ("last", "best"):
            raise InputError(f'weights={weights!r} is not known: give "last" or "best".')
        for flag, value in (("route", route), ("log_memory_artifact", log_memory_artifact)):
            if not isinstance(value, bool):
                raise InputError(f"{flag}={value!r}: give True or False.")
        self._kept = RestorableMemory(memory, SaveDirectory(dirpath, name))
        self.tuning: TuningResult | None = None
        self.evaluations: tuple[Evaluation, ...] = ()
        self._tuner = choose_tuner(tuner, self._memory)
        self._reader = BatchReader(targets_fn, forward_fn, ids_fn, head, embedding, times_fn)
        self._limit = RowLimit(max_rows, keep)
        self._memory_dataloader, self._weights, self._dirpath = memory_dataloader, weights, dirpath
        self._name, self._route = name, route
        self._report = Report(name, log_memory_artifact)
        self._metrics = None if metrics is None else as_collection(metrics, self._memory.task)
        self._offered: Any = None  # rows to memorize, by the datamodule or the model of the current fit
        self._base: L.LightningModule | None = None
        self._memorized = False  # in the current fit
        self._routing: Routing | None = None
        self._watch = FitWatch(self._reader, self._memory.task)

    @property
    def state_key(self) -> str:
        return self._generate_state_key(name=self._name)

    @property
    def evaluation(self) -> Evaluation:
        """What the last validate or test run showed on its first dataloader; an error before any."""
        return first_of(self.evaluations)

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
        reader = self._reader
        functions = {name: getattr(reader, name) for name in ("targets_fn", "forward_fn", "times_fn")}
        return ResMemModule(base, self._memory, metrics=self._metrics, **functions)

    # -- fit: fill the memory

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        check_strategy(trainer.strategy)
        siblings = [c for c in trainer.callbacks if isinstance(c, ResMemCallback)]  # type: ignore[attr-defined]
        check_siblings([Sibling(type(c).__name__, c._name, c._route) for c in siblings])
        if stage != TrainerFn.FITTING:
            return
        self._memorized, self.tuning = False, None
        self._watch = FitWatch(self._reader, self._memory.task, tunes=self._tuner is not None)
        check_weights(self._weights, trainer)
        # Weight averaging swaps its weights in, and checkpoints are written, in on_train_end: memorize after them.
        others = [c for c in trainer.callbacks if c is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._kept.check_target(trainer)
        with Ranks(trainer).together("making the loaders"):
            self._offered = offered_loader(trainer.datamodule, pl_module) if self._memory_dataloader is None else None  # type: ignore[attr-defined]
            val_loaders = None if self._tuner is None else validation_loaders(trainer)
        loaders, limit_batches = self._rows(trainer)
        memorizer = self._memorizer(trainer)
        rehearsed = memorizer.rehearse(trainer, pl_module, loaders, val_loaders, limit_batches, self._metrics)
        self._watch.start(trainer, rehearsed, memorizes=loaders is trainer.train_dataloader)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._watch.start_step(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._watch.check_loss(loss)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch.end_step()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._base, started = pl_module, time.monotonic()
        val_loaders = None if self._tuner is None else validation_loaders(trainer)
        loaders, limit_batches = self._rows(trainer)
        with memorized_weights(self._weights, trainer, pl_module):
            self.tuning, failure = self._memorizer(trainer).run(
                trainer, pl_module, loaders, val_loaders, limit_batches, val_limit(trainer)
            )
        self._memorized, seconds = True, time.monotonic() - started
        self._kept.save(trainer)
        shown = None if self._reader.gives_ids else loaders  # ids are positions in them
        self._report.memorized(trainer, self._memory, self.tuning, seconds, self._kept.directory, shown)
        if failure is not None:  # of tuning alone
            raise failure

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._base = pl_module
        if not self._memorized:
            self._report.not_memorized(self._kept.has_rows())

    def state_dict(self) -> dict[str, Any]:
        return self._kept.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._kept.load_state_dict(state_dict)

    # -- validate, test, predict: answer from it

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # not in fit
            self._start(trainer, pl_module, "val")

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, "test")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module, None)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._routing is not None:
            self._routing.start_batch(batch)
        else:
            self._watch.look(batch, batch_idx, dataloader_idx)

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
        self._watch.end_validation(trainer)
        if self._routing is not None:
            self._routing.check_end()
            self.evaluations = self._routing.evaluate()
            for evaluation in self.evaluations:
                # The same on every rank already; without sync_dist the trainer warns that it might not be.
                pl_module.log_dict(evaluation.shown_scores(), sync_dist=True, add_dataloader_idx=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._routing is not None:
            self._stop()
            self._report.evaluated(trainer, self._memory, self.evaluations)

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._routing is not None:
            self._routing.check_end()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    # Once it has started, a run is a run.
    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._watch.explain(exception)
        self._stop()
        finish_forked_run(trainer, succeeded=False)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._watch = FitWatch(self._reader, self._memory.task)
        finish_forked_run(trainer, succeeded=True)

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str | None) -> None:
        self._stop()  # of a run that was killed between its hooks
        if stage is not None:
            self.evaluations = ()
        if isinstance(pl_module, ResMemModule):  # it combines by itself
            return
        self._kept.look(trainer)
        if not self._kept.has_rows(Ranks(trainer).group):
            rank_zero_warn(
                "ResMemCallback has no memory yet, so this run shows the base model alone. Call trainer.fit first, or "
                "give it a filled one: ResMemCallback(memory=LocalMemory.load(directory)).",
                category=ResMemWarning,
            )
            return
        assert trainer.state.fn is not None
        with naming_averaging(trainer):
            make_ready(self._memory, pl_module, self._reader, f"trainer.{trainer.state.fn.value} runs")
        prefix = stage if stage is None or self._name == "resmem" else f"{stage}/{self._name}"
        self._base = pl_module
        self._routing = Routing(trainer, pl_module, self._memory, self._reader, self._route, prefix, self._metrics)

    def _stop(self) -> None:
        if self._routing is not None:
            self._routing.close()
            self._routing = None

    # -- details

    @property
    def _memory(self) -> ResidualMemory:
        return self._kept.memory

    def _memorizer(self, trainer: L.Trainer) -> Memorizer:
        return Memorizer(self._memory, self._tuner, self._reader, shows_progress(trainer), self._limit)

    def _rows(self, trainer: L.Trainer) -> tuple[Any, int | None]:
        """The rows to memorize: their loaders, and how many batches of them a rank reads, None for all."""
        given = self._offered if self._memory_dataloader is None else self._memory_dataloader
        if given is None:
            return trainer.train_dataloader, train_limit(trainer)
        return given, given_limit(trainer, given)

    def _found_base(self) -> L.LightningModule | None:
        """The base, if there is one; the memory is then there as well, if it was filled or saved."""
        base = self._base
        if base is None and (trainer := trainer_of(self)) is not None:
            base = trainer.lightning_module
            self._kept.look(trainer)
        self._kept.has_rows()
        return base
