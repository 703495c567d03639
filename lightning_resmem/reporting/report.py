"""What is reported of a memory, and when: summaries for people, and all of it to the trainer's loggers."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import rich
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_resmem.collection.loaders import evaluation_loaders
from lightning_resmem.errors import ResMemWarning
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.storage.paths import Url
from lightning_resmem.memory.token_ids import of_sequences
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.progress import shows_progress
from lightning_resmem.reporting import wandb_report
from lightning_resmem.reporting.loggers import each_logger, log_figures, log_hyperparameters, log_metrics, warn_only
from lightning_resmem.reporting.pictures import row_lookup, text_lookups
from lightning_resmem.reporting.summary import chosen_flip_rate, evaluation_summary, memory_summary, num_shards
from lightning_resmem.tuning.result import TuningResult


class Report:
    """Tells people and loggers what a memory holds and did. What cannot be reported is warned about, never raised.

    What memorizing found is printed if the trainer shows progress bars, what a run found if the trainer prints its
    results (`trainer.test(verbose=True)`, the default).

    Args:
        name: Of the callback; the memory's numbers are logged as `{name}/rows` and so on.
        log_memory_artifact: Whether a Weights & Biases run gets the memory itself.
    """

    def __init__(self, name: str = "resmem", log_memory_artifact: bool = False) -> None:
        self._name, self._log_memory_artifact = name, log_memory_artifact
        self._memory_loaders: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Not every dataset can be pickled, and other processes do well without pictures of neighbours.
        return {**vars(self), "_memory_loaders": None}

    def memorized(
        self,
        trainer: L.Trainer,
        memory: ResidualMemory,
        tuning: TuningResult | None,
        seconds: float,
        directory: Path | Url | None,
        loaders: Any = None,
    ) -> None:
        """After the memory pass, on all ranks.

        Args:
            trainer: In `on_train_end`.
            memory: Just filled.
            tuning: What the tuner found, if there was one.
            seconds: That memorizing took, tuning included.
            directory: Where it was saved, if it was.
            loaders: That it was filled from, for pictures or text of neighbours, if ids are positions in its datasets.
        """
        self._memory_loaders = loaders
        with warn_only("the memory is not reported"):
            stats = memory.stats()
            if tuning is None and memory.tunable:
                rank_zero_info(
                    f"ResMem: params are measured, not tuned (there is no tuner, there are no validation rows and few "
                    f"others, or tuning has failed): k={memory.params.k}, sigma={memory.params.sigma:.4g}."
                )
            numbers = {
                f"{self._name}/{name}": value for name, value in memory_numbers(memory, stats, tuning, seconds).items()
            } | memory.metrics()
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in numbers.items()})
            if not trainer.is_global_zero:
                return
            if shows_progress(trainer):
                rich.print(*memory_summary(stats, seconds, tuning), sep="\n")
            step = trainer.global_step
            _each_wandb(trainer, "definitions", lambda run: wandb_report.hide_metrics(run, numbers))
            log_hyperparameters(trainer, self._name, hyperparameters(memory, stats), numbers)
            if tuning is not None:
                name = f"{self._name}/tuning"
                log_figures(trainer, {name: lambda plots: plots.tuning_map(tuning)})
                _each_wandb(
                    trainer, f"{name}_table", lambda run: wandb_report.log_tuning(run, f"{name}_table", tuning, step)
                )
            if self._log_memory_artifact:
                if not any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
                    words = "log_memory_artifact=True, but the Trainer has no WandbLogger to log the memory to."
                    rank_zero_warn(f"ResMem: {words}", category=ResMemWarning)
                artifact = wandb_report.artifact_name(self._name)
                _each_wandb(
                    trainer, "the memory", lambda run: wandb_report.log_memory(run, artifact, memory, directory)
                )

    def not_memorized(self, has_rows: bool) -> None:
        """After a fit that trained nothing.

        Args:
            has_rows: Whether there is a memory from before.
        """
        if has_rows:
            rank_zero_info("ResMem: no training took place, so the memory stays as it is.")
        else:
            rank_zero_warn(
                "ResMem: no training took place (limit_train_batches=0, or a checkpoint that had reached max_epochs), "
                "so there is no memory. Fill one with memorize(trainer, model, dataloader).",
                category=ResMemWarning,
            )

    def evaluated(self, trainer: L.Trainer, memory: ResidualMemory, evaluations: Sequence[Evaluation]) -> None:
        """After a validate or test run, on all ranks.

        Args:
            trainer: In `on_validation_end` or `on_test_end`.
            memory: That answered.
            evaluations: What the run showed on each dataloader.
        """
        # A run that could not be scored has no evaluations.
        for evaluation, loader in zip(evaluations, evaluation_loaders(trainer), strict=False):
            with warn_only(f"{evaluation.prefix}{evaluation.suffix} is not reported"):
                self._evaluated(trainer, memory, evaluation, loader)

    def _evaluated(self, trainer: L.Trainer, memory: ResidualMemory, evaluation: Evaluation, loader: Any) -> None:
        shown = evaluation.shown_scores()  # the trainer has logged them
        others = {name: value for name, value in evaluation.named_scores().items() if name not in shown}
        others |= memory.metrics()
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in others.items()})
        if not trainer.is_global_zero:
            return
        if (trainer.test_loop if trainer.testing else trainer.validate_loop).verbose:
            rich.print(*evaluation_summary(evaluation, memory.stats()), sep="\n")
        log_metrics(trainer, "scores", others)

        def named(name: str) -> str:
            return f"{evaluation.prefix}/{name}{evaluation.suffix}"

        log_figures(
            trainer,
            {
                named("by_distance"): lambda plots: plots.by_distance(evaluation),
                named("reliability"): lambda plots: plots.reliability(evaluation),
                named("flips"): lambda plots: plots.flips(evaluation),
            },
        )
        name, step = named("scores"), trainer.global_step
        _each_wandb(trainer, name, lambda run: wandb_report.log_scores(run, name, evaluation, step))
        flips = named("flipped_rows")
        rows = loader, self._memory_loaders
        if of_sequences(memory.provenance):
            # A model's own `decode` may be anything: of a code, of a beam.
            datamodule = trainer.datamodule  # type: ignore[attr-defined]
            look, look_behind = text_lookups(getattr(datamodule, "decode", None), *rows)
        else:
            look, look_behind = (row_lookup(each) for each in rows)
        _each_wandb(
            trainer, flips, lambda run: wandb_report.log_flips(run, flips, evaluation, memory, look, look_behind, step)
        )


def memory_numbers(
    memory: ResidualMemory, stats: dict[str, Any], tuning: TuningResult | None, seconds: float
) -> dict[str, float]:
    """Numbers about a memory, by short name.

    Args:
        memory: Filled.
        stats: `memory.stats()`.
        tuning: What the tuner found, if there was one.
        seconds: That memorizing took.
    """
    numbers = {"rows": stats["rows"], "bytes": stats["bytes"], "seconds": seconds}
    if stats.get("recall") is not None:
        numbers["recall"] = stats["recall"]
    if "shards" in stats:
        numbers["shards"] = num_shards(stats)
    numbers.update({name: value for name, value in asdict(memory.params).items() if isinstance(value, int | float)})
    if tuning is not None:
        numbers.update(
            {
                f"tuning_{tuning.score_name}_base": tuning.base_score,
                f"tuning_{tuning.score_name}_resmem": tuning.score,
                "tuning_gain": tuning.gain,
                "tuning_gain_error": tuning.gain_error,
                "tuning_rows": tuning.rows,
            }
        )
        if tuning.balanced is not None and tuning.balanced.uneven:
            score = f"tuning_{tuning.balanced.score}"
            numbers[f"{score}_base"], numbers[f"{score}_resmem"], *_ = tuning.balanced
        lost = chosen_flip_rate(tuning)
        if lost is not None:
            numbers["tuning_negative_flip_rate"] = lost
    return {name: float(value) for name, value in numbers.items()}


def hyperparameters(memory: ResidualMemory, stats: dict[str, Any]) -> dict[str, Any]:
    """What a memory was made with: its params, task, index and values, and the weights and the head it belongs to."""
    kinds: dict[str, Any] = {name: stats[name] for name in ("index", "values", "key_dtype") if name in stats}
    known = {name: value for name, value in memory.provenance.items() if name != "tensors"}  # checksums of each tensor
    return {**asdict(memory.params), "task": memory.task.name, **kinds, **known}


def _each_wandb(trainer: L.Trainer, what: str, tell: Callable[[WandbLogger], object]) -> None:
    each_logger(trainer, what, tell, WandbLogger)
