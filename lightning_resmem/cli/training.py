"""The commands that train, test and fill: LightningCLI with `memorize` and `tune`."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_resmem.callback import ResMemCallback
from lightning_resmem.errors import InputError, ResMemWarning, StorageError
from lightning_resmem.memorizer import Memorizer
from lightning_resmem.memory.knn_lm import note_knn_lm
from lightning_resmem.memory.storage import disk
from lightning_resmem.model.fingerprint import check_fingerprint
from lightning_resmem.model.places import AUTO
from lightning_resmem.module import ResMemModule
from lightning_resmem.progress import shows_progress
from lightning_resmem.trainer.job import Job, run_job
from lightning_resmem.trainer.limits import given_val_limit
from lightning_resmem.trainer.save_directory import check_replaceable
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.tuner import GridTuner, Tuner

_DESCRIPTION = (
    "Train, memorize, tune and test with a YAML file that names a LightningModule (model), a LightningDataModule "
    "(data) and callbacks, of them lightning_resmem.ResMemCallback (trainer.callbacks). Modules in the current "
    "directory can be named."
)


class ResMemTrainer(L.Trainer):
    """The Trainer of the command line. What a `ResMemCallback` in its config is told holds for these methods, too."""

    def memorize(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        directory: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool = True,
        limit_batches: int | float | None = None,
        overwrite: bool = False,
    ) -> None:
        """Fill a memory with the training rows of a trained model, tune it on the validation rows, and save it.

        Args:
            model: The trained model.
            datamodule: Its data.
            directory: Where the memory is saved; by default the callback's `dirpath`, or its `name` in the current
                directory (`resmem`).
            ckpt_path: Checkpoint with the weights. Without it they are as the model's constructor leaves them.
            weights_only: False also reads checkpoints that hold other Python objects: only if you trust them.
            limit_batches: As for the function `memorize`: how many batches each rank reads of a stream, `.inf` for all.
            overwrite: Replace a memory that is there.
        """
        places = self._places(directory)
        for place in places.values():
            if not overwrite and _holds_a_memory(place):
                raise StorageError(
                    f"{disk.as_path(place)} holds a memory: it is left as it is. Give --overwrite=true to "
                    "replace it, or name another place with --directory."
                )
        _check_checkpoint(ckpt_path)
        if ckpt_path is None:
            rank_zero_warn(
                "Without --ckpt_path the weights are as the model's constructor leaves them: untrained, unless it "
                "loads some.",
                category=ResMemWarning,
            )
        for callback, place in places.items():
            reader = callback._reader
            fill = partial(callback._memorizer(self).rehearse_and_run, limit_batches=limit_batches)
            job = Job(model, callback._memory, fill, datamodule, rows=callback._memory_dataloader)
            memory = run_job(self, job, ckpt_path, weights_only)
            module = ResMemModule(model, memory, targets_fn=reader.targets_fn, forward_fn=reader.forward_fn)
            if self.is_global_zero:
                _say(f"Saved a memory of {len(memory)} rows to {module.save(place, overwrite=overwrite)}.")

    def tune(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule,
        directory: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool = True,
        tuner: Tuner | None = None,
    ) -> None:
        """Tune a saved memory on the validation rows, and save it with the params that were chosen.

        Args:
            model: The model that the memory was filled with.
            datamodule: Its data.
            directory: Of the memory; by default the callback's `dirpath`, or its `name` in the current directory
                (`resmem`).
            ckpt_path: Checkpoint with the weights.
            weights_only: False also reads checkpoints that hold other Python objects: only if you trust them.
            tuner: Chooses the params; by default that of the callback, or a GridTuner.
        """
        if self.world_size > 1:
            raise InputError(f"tune reads the validation rows in one process, not {self.world_size}: devices=1.")
        _check_checkpoint(ckpt_path)
        for callback, place in self._places(directory).items():
            memory, reader = callback._kept.read(place), callback._reader
            head, embedding = (
                memory.provenance.get(name, None if (given := getattr(reader, name)) == AUTO else given)
                for name in ("head", "embedding")
            )
            reader = dataclasses.replace(reader, head=head, embedding=embedding)
            chosen = tuner or callback._tuner
            memorizer = _Retuner(memory, chosen, reader, shows_progress(self))
            job = Job(model, memory, memorizer.tune, datamodule)
            tuned = run_job(self, job, ckpt_path, weights_only)
            if isinstance(job.result, TuningResult):
                _say(f"{job.result.summary()}.")
            check_replaceable(place, tuned.provenance)  # it may have been replaced meanwhile
            _say(f"Saved to {tuned.save(place)}.")

    def _places(self, directory: str | None) -> dict[ResMemCallback, str | Path]:
        """The callbacks of the config, or one as it is by default, and where the memory of each is saved."""
        callbacks = _callbacks(self) or [ResMemCallback()]
        if directory is not None and len(callbacks) > 1:
            names = ", ".join(callback._name for callback in callbacks)
            raise InputError(
                f"directory={directory!r} is for one memory, and the config has {len(callbacks)} callbacks ({names}): "
                "give each of them a dirpath."
            )
        return {callback: directory or _place(callback) for callback in callbacks}


class _Retuner(Memorizer):
    """Tunes a memory that is filled already."""

    def tune(self, trainer: L.Trainer, model: L.LightningModule, loaders: Any, val_loaders: Any = None) -> TuningResult:
        """Tune a memory that is filled already.

        Args:
            trainer: With its strategy set up.
            model: On its device.
            loaders: The training rows, which are not read.
            val_loaders: The validation rows.
        """
        check_fingerprint(model, self.memory.provenance, "resmem tune runs")
        reading, result = self._reading(trainer, model), None
        if val_loaders is not None and val_loaders != []:
            parts = self._plan_validation(reading, val_loaders, given_val_limit(trainer, val_loaders))
            result = self._tune(reading, self.tuner or GridTuner(), parts, keys={})
        if result is None:
            raise InputError("The validation loader yielded no rows to tune on.")
        self.memory.params = result.params
        note_knn_lm(self.memory, result.knn_lm)
        return result


def _callbacks(trainer: L.Trainer) -> list[ResMemCallback]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, ResMemCallback)]


def _place(callback: ResMemCallback) -> str | Path:
    return callback._dirpath or callback._name


def _holds_a_memory(place: str | Path) -> bool:
    return (disk.as_path(place) / disk.MANIFEST).is_file()


def _use_saved(trainer: L.Trainer) -> None:
    """Let callbacks answer from the memories that another command has saved."""
    for callback in _callbacks(trainer):
        if _holds_a_memory(place := _place(callback)):
            callback.load_state_dict({"directory": str(disk.as_path(place))})  # read when it is needed


def _check_checkpoint(ckpt_path: str | None) -> None:
    if ckpt_path is not None and "://" not in ckpt_path and not Path(ckpt_path).is_file():
        raise InputError(f"ckpt_path={ckpt_path!r}: there is no such file.")


def run_lightning() -> None:
    """Run the subcommand that the command line gives; needs jsonargparse."""
    from lightning.pytorch.cli import LightningCLI

    class ResMemCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            ours = {name: {"model", "datamodule"} for name in ("memorize", "tune")}
            every = {**LightningCLI.subcommands(), **ours}
            given = sys.argv[1] if len(sys.argv) > 1 else ""
            return {given: every[given]} if given in every else every  # to make the options of each takes long

        def before_validate(self) -> None:
            _use_saved(self.trainer)

        before_test = before_predict = before_validate

    # As `python -m` does, so that the YAML may name the user's own modules.
    sys.path.insert(0, str(Path.cwd()))
    ResMemCLI(
        trainer_class=ResMemTrainer,
        parser_kwargs={"prog": "resmem", "description": _DESCRIPTION},
        save_config_kwargs={"overwrite": True},
    )


def _say(words: str) -> None:
    # File names need not be text.
    printable = words.encode(errors="backslashreplace").decode()
    Console(soft_wrap=True, highlight=False).print(printable, markup=False)
