"""The `resmem` command: LightningCLI with `memorize` and `tune`, and `inspect`, which needs no config."""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_resmem.callback import ResMemCallback
from lightning_resmem.errors import InputError, ResMemError
from lightning_resmem.memorization import memorize
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.storage import disk
from lightning_resmem.module import ResMemModule
from lightning_resmem.reporting.html_report import write_report
from lightning_resmem.tuning.tuner import GridTuner, Tuner

_DIRECTORY = "resmem"
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
    ) -> None:
        """Fill a memory with the training rows of a trained model, tune it on the validation rows, and save it.

        Args:
            model: The trained model.
            datamodule: Its data.
            directory: Where the memory is saved; by default the callback's `dirpath`, or `resmem`. A memory that is
                there is replaced.
            ckpt_path: Checkpoint with the weights.
            weights_only: False also reads checkpoints that hold other Python objects: only if you trust them.
            limit_batches: As for the function `memorize`: how many batches each rank reads of a stream, `.inf` for all.
        """
        _load_weights(model, ckpt_path, weights_only)
        callback = self._callback()
        reader = callback._reader
        module = memorize(
            self,
            model,
            datamodule,
            memory=callback._memory,
            tuner=callback._tuner,
            head=reader.head,
            embedding=reader.embedding,
            targets_fn=reader.targets_fn,
            forward_fn=reader.forward_fn,
            ids_fn=reader.ids_fn,
            limit_batches=limit_batches,
        )
        if self.is_global_zero:
            saved = module.save(directory or callback._dirpath or _DIRECTORY)
            _say(f"Saved a memory of {len(module.memory)} rows to {saved}.")

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
            directory: Of the memory; by default the callback's `dirpath`, or `resmem`.
            ckpt_path: Checkpoint with the weights.
            weights_only: False also reads checkpoints that hold other Python objects: only if you trust them.
            tuner: Chooses the params; by default that of the callback, or a GridTuner.
        """
        if self.world_size > 1:
            raise InputError(f"tune reads the validation rows in one process, not {self.world_size}: devices=1.")
        _load_weights(model, ckpt_path, weights_only)
        callback = self._callback()
        directory = str(directory or callback._dirpath or _DIRECTORY)
        memory = LocalMemory.load(directory)
        reader = callback._reader
        module = _Collector(model, memory, targets_fn=reader.targets_fn, forward_fn=reader.forward_fn)
        with _without_callbacks(self):
            self.validate(module, datamodule=datamodule, verbose=False)
        if not module.rows:
            raise InputError("The validation loader yielded no rows to tune on.")
        embeddings, outputs, targets = (torch.cat(column) for column in zip(*module.rows, strict=True))
        result = (tuner or callback._tuner or GridTuner()).tune(memory, embeddings, outputs, targets)
        memory.params = result.params
        _say(f"{result.summary()}.\nSaved to {memory.save(directory)}.")

    def _callback(self) -> ResMemCallback:
        """The first ResMemCallback of the config, or one as it is by default."""
        callbacks = self.callbacks  # type: ignore[attr-defined]
        return next((each for each in callbacks if isinstance(each, ResMemCallback)), ResMemCallback())


def _use_saved(trainer: L.Trainer) -> None:
    """Let callbacks answer from the memory that another command saved to their `dirpath`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        path = callback._dirpath if isinstance(callback, ResMemCallback) else None
        if path is not None and (disk.as_path(path) / disk.MANIFEST).is_file():
            callback.load_state_dict({"directory": path})  # read when it is needed


@contextmanager
def _without_callbacks(trainer: L.Trainer) -> Iterator[None]:
    callbacks, trainer.callbacks = trainer.callbacks, []  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


class _Collector(ResMemModule):
    """Keeps the rows of a validation run: embeddings, outputs and targets, on the CPU."""

    rows: list[tuple[Tensor, Tensor, Tensor]]

    def on_validation_epoch_start(self) -> None:
        self._check_weights("resmem tune runs", surely=True)
        self.rows = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:  # type: ignore[override]
        embedding, output = self._captured(batch)
        self.rows.append((embedding.float().cpu(), output.cpu(), self._reader.targets(batch).cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log no scores: the params are about to change."""


def _load_weights(model: L.LightningModule, ckpt_path: str | None, weights_only: bool) -> None:
    if ckpt_path is None:
        return
    if not Path(ckpt_path).is_file():
        raise InputError(f"ckpt_path={ckpt_path!r}: there is no such file.")
    checkpoint = torch.load(ckpt_path, map_location="cpu", weights_only=weights_only)
    model.load_state_dict(checkpoint["state_dict"])


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
