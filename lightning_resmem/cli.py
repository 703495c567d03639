"""The `resmem` command: LightningCLI with `memorize` and `tune`, and `inspect`, which needs no config."""

import argparse
import dataclasses
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console

from lightning_resmem.callback import ResMemCallback
from lightning_resmem.errors import InputError, ResMemError, ResMemWarning, StorageError
from lightning_resmem.memorization import Memorizer
from lightning_resmem.memory.storage import disk
from lightning_resmem.model.fingerprint import check_fingerprint
from lightning_resmem.module import ResMemModule
from lightning_resmem.progress import shows_progress
from lightning_resmem.reporting.html_report import write_report
from lightning_resmem.trainer.job import Job, run_job
from lightning_resmem.trainer.limits import given_val_limit
from lightning_resmem.trainer.save_directory import check_replaceable
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.tuner import GridTuner, Tuner

_DESCRIPTION = (
    "Train, memorize, tune and test with a YAML file that names a LightningModule (model), a LightningDataModule "
    "(data) and callbacks, of them lightning_resmem.ResMemCallback (trainer.callbacks). Modules in the current "
    "directory can be named. `resmem inspect DIR` writes an HTML report of a saved memory and needs no YAML."
)


def main() -> int:
    """Run the command that the command line gives.

    Returns:
        The exit status: 0, or 1 after an error, which is told in one message.
    """
    try:
        if sys.argv[1:2] == ["inspect"]:
            _inspect(sys.argv[2:])
        else:
            _run_lightning()
    except ResMemError as error:
        sys.stderr.write("\n".join([f"resmem: {error}", *getattr(error, "__notes__", [])]) + "\n")
        return 1
    return 0


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
                    f"{disk.as_path(place)} holds a memory: it is left as it is. Give --overwrite to replace it, or "
                    "name another place with --directory."
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
            names = {name: memory.provenance.get(name, getattr(reader, name)) for name in ("head", "embedding")}
            reader = dataclasses.replace(reader, **names)
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
            parts = self._plan(reading, val_loaders, given_val_limit(trainer, val_loaders))
            result = self._tune(reading, self.tuner or GridTuner(), parts)
        if result is None:
            raise InputError("The validation loader yielded no rows to tune on.")
        self.memory.params = result.params
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


def _run_lightning() -> None:
    if importlib.util.find_spec("jsonargparse") is None:
        raise InputError(
            'resmem needs jsonargparse, for all but `resmem inspect`: pip install "lightning-resmem[cli]".'
        )
    from lightning.pytorch.cli import LightningCLI

    class ResMemCLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            ours = {name: {"model", "datamodule"} for name in ("memorize", "tune")}
            return {**LightningCLI.subcommands(), **ours}

        def before_validate(self) -> None:
            _use_saved(self.trainer)

        before_test = before_predict = before_validate

    _check_command([*ResMemCLI.subcommands(), "inspect"])
    # As `python -m` does, so that the YAML may name the user's own modules.
    sys.path.insert(0, str(Path.cwd()))
    ResMemCLI(
        trainer_class=ResMemTrainer,
        parser_kwargs={"prog": "resmem", "description": _DESCRIPTION},
        save_config_kwargs={"overwrite": True},
    )


def _check_command(known: list[str]) -> None:
    """End with an error unless the first word is a subcommand: LightningCLI's own message would leave out `inspect`."""
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word not in known and not word.startswith("-"):
        choices = ", ".join(known)
        problem = f"{word!r} is no subcommand" if word else "a subcommand is missing"
        argparse.ArgumentParser(prog="resmem", usage=f"resmem {{{','.join(known)}}} ...").error(
            f"{problem}: give one of {choices}, or --help."
        )


def _inspect(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="resmem inspect",
        description="Write a self-contained HTML report of a saved memory: what it holds, its rows' neighbours, and "
        "likely label errors.",
    )
    parser.add_argument("directory", help="the saved memory")
    parser.add_argument("--output", help="the HTML file (default: NAME-report.html in the current directory)")
    parser.add_argument("--rows", type=int, default=1000, help="rows whose neighbours are searched (default: 1000)")
    parser.add_argument("--k", type=int, default=5, help="neighbours shown of a row (default: 5)")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the files' checksums")
    given = parser.parse_args(arguments)
    place = disk.as_path(given.directory)
    output = given.output or f"{place.resolve().name if isinstance(place, Path) else place.name}-report.html"
    _say(f"Wrote {write_report(given.directory, output, given.rows, given.k, not given.no_verify)}")


def _say(words: str) -> None:
    # File names need not be text.
    printable = words.encode(errors="backslashreplace").decode()
    Console(soft_wrap=True, highlight=False).print(printable, markup=False)
