"""What a Weights & Biases run gets on top of metrics and figures: tables, the memory itself, and a proper end."""

import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import WandbLogger

from lightning_resmem.errors import InputError, StorageError, check_type
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.single_rows import fetch_neighbors
from lightning_resmem.memory.storage.disk import local
from lightning_resmem.memory.storage.paths import Url
from lightning_resmem.memory.token_ids import STRIDE
from lightning_resmem.metrics.evaluation import Evaluation, Flip
from lightning_resmem.reporting.pictures import Look, Shown
from lightning_resmem.reporting.summary import score_columns, score_rows
from lightning_resmem.trainer.processes import runs_elsewhere
from lightning_resmem.tuning.result import TuningResult

if TYPE_CHECKING:
    import wandb

ARTIFACT_TYPE = "memory"
# Flips of either kind in the table; with pictures fewer, as each takes up to six files.
_MOST_ROWS, _MOST_PICTURED_ROWS = 100, 12
_MOST_CHARACTERS = 112  # of a callback's name in that of an artifact, which has 128


def hide_metrics(logger: WandbLogger, names: Iterable[str]) -> None:
    """No charts by themselves for numbers that have one value in a run; they stay in its summary.

    A `summary=` here would put `name.last` in the place of `name` there, and sweeps look for the latter.
    """
    for name in names:
        if "*" not in name:  # which means all of a kind there
            logger.experiment.define_metric(name, step_metric="trainer/global_step", hidden=True)


def log_tuning(logger: WandbLogger, name: str, tuning: TuningResult, step: int) -> None:
    """The settings that were tried, as a table."""
    columns = list(tuning.table[0])
    logger.log_table(name, columns, [[row[column] for column in columns] for row in tuning.table], step=step)


def log_scores(logger: WandbLogger, name: str, evaluation: Evaluation, step: int) -> None:
    """The scores of base, knn and resmem, as a table."""
    rows = [[stem, *scores, evaluation.gain_in(stem)] for stem, scores in score_rows(evaluation.scores)]
    logger.log_table(name, ["score", *score_columns(evaluation.scores), "gain"], rows, step=step)


def log_flips(
    logger: WandbLogger,
    name: str,
    evaluation: Evaluation,
    memory: ResidualMemory,
    look_at_row: Look,
    look_at_neighbor: Look,
    step: int,
) -> None:
    """The rows that the memory turned right or wrong, with their neighbours, as a table.

    Args:
        logger: Of the run.
        name: Of the table.
        evaluation: Of one dataloader.
        memory: That answered.
        look_at_row: Finds the picture or the text of a row of the dataloader by its id, if there is one.
        look_at_neighbor: Finds that of a memorized row.
        step: Of the trainer.
    """
    flips = [flip for right in (False, True) for flip in _first(evaluation.flips, right, _MOST_ROWS)]
    if not flips:
        return
    first = _shown(look_at_row, flips[0])
    kind = [] if first is None else ["text" if isinstance(first, str) else "image"]
    if kind == ["image"]:
        flips = [flip for right in (False, True) for flip in _first(evaluation.flips, right, _MOST_PICTURED_ROWS)]
    ids = torch.tensor([flip.neighbor_ids for flip in flips])
    labels = _labels_of(memory, ids, flips)
    with_neighbors = first is not None and look_at_neighbor(flips[0].neighbor_ids[0]) is not None
    takes_words = not (with_neighbors and kind == ["image"])  # beside images a column has nothing else
    about = ["flip", "position", "target", "base", "resmem", "base_confidence", "resmem_confidence"]
    about[2:2] = [name for name in ("token", "output") if getattr(flips[0], name) is not None]
    neighbors = [f"neighbor_{place}" for place in range(1, ids.shape[1] + 1)]
    rows: list[list[Any]] = []
    for flip, row_labels in zip(flips, labels, strict=True):
        values = {**asdict(flip), "flip": "turned right" if flip.is_positive else "turned wrong"}
        cells = [values[column] for column in about]
        if kind:
            cells.append(_cell(_shown(look_at_row, flip)))
        for id, distance, label in zip(flip.neighbor_ids, flip.neighbor_distances, row_labels, strict=True):
            words = f"{label:g} (#{id}, distance {distance:.3g})"
            shown = look_at_neighbor(id) if with_neighbors and id >= 0 else None
            bare = words if takes_words and id >= 0 else None
            cells.append(bare if shown is None else _cell(shown, words))
        rows.append(cells)
    logger.log_table(name, [*about, *kind, *neighbors], rows, step=step)


def artifact_name(name: str) -> str:
    """What the memory of a callback is called as an artifact, in the characters that these may have.

    Args:
        name: Of the callback.

    Examples:
        >>> artifact_name("resmem"), artifact_name("hidden"), artifact_name("layer 4")
        ('memory', 'memory-hidden', 'memory-layer-4-09adccb6')
    """
    if name == "resmem":
        return "memory"
    plain = re.sub(r"[^a-zA-Z0-9_.-]+", "-", name)[:_MOST_CHARACTERS]
    # Another name may look the same then.
    return f"memory-{plain}" if plain == name else f"memory-{plain}-{zlib.crc32(name.encode()):08x}"


def log_memory(logger: WandbLogger, name: str, memory: ResidualMemory, directory: Path | Url | None) -> None:
    """The memory itself, as an artifact with what it belongs to in its metadata.

    Args:
        logger: Of the run.
        name: Of the artifact.
        memory: To be logged.
        directory: Where it is saved, if it is.
    """
    import wandb

    run = logger.experiment
    with tempfile.TemporaryDirectory(prefix="resmem-") as temporary, ExitStack() as stack:
        saved = stack.enter_context(local(directory or memory.save(Path(temporary) / name)))
        known = {name: value for name, value in memory.provenance.items() if name != "tensors"}
        metadata = {"rows": len(memory), "task": memory.task.name, "params": asdict(memory.params), **known}
        # Neither has a public name: whether the run logs its checkpoints, and as what.
        if getattr(logger, "_log_model", False):
            metadata["model_artifact"] = getattr(logger, "_checkpoint_name", None) or f"model-{run.id}"
        artifact = wandb.Artifact(name, ARTIFACT_TYPE, "Training residuals of lightning_resmem", metadata)
        # Copied now, as the next fit may replace the files; but not into the cache of downloads as well.
        artifact.add_dir(str(saved), skip_cache=True, policy="mutable")
        run.log_artifact(artifact, aliases=["latest", f"run-{run.id}"])


def download_memory(name: str, root: str | os.PathLike[str] | None = None) -> Path:
    """Get a memory that a run has logged.

    Args:
        name: Of the artifact, `"entity/project/memory:v3"`, or a directory with a saved memory.
        root: Where it goes; by default the artifacts' directory of Weights & Biases.

    Returns:
        The directory.

    Raises:
        InputError: If `name` is no name, or wandb is not installed.
        StorageError: If it cannot be had, such as offline.
    """
    check_type("name", name, (str, os.PathLike), 'an artifact, such as "entity/project/memory:v3", or a directory')
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise InputError(f'name={name!r} needs wandb: pip install "lightning-resmem[wandb]".') from error
    way_out = (
        f"On a machine with access, `wandb artifact get {name} --root DIR` fetches it; then "
        "ResMemModule.load(DIR, base=...) needs no network."
    )
    run = None if wandb.run is None or wandb.run.disabled else wandb.run
    if run.offline if run is not None else os.environ.get("WANDB_MODE") in ("offline", "dryrun"):
        raise StorageError(f"The artifact {name} cannot be downloaded, because wandb is offline. {way_out}")
    try:
        # An active run notes what it has used.
        artifact = wandb.Api().artifact(name, ARTIFACT_TYPE) if run is None else run.use_artifact(name, ARTIFACT_TYPE)
        return Path(artifact.download(None if root is None else os.fspath(root)))
    except (wandb.Error, OSError, ValueError, TypeError) as error:
        raise StorageError(f"The artifact {name} cannot be downloaded: {error}. {way_out}") from error


def finish_forked_run(trainer: L.Trainer, succeeded: bool) -> None:
    """End a run that a forked process has begun: nothing else does, and its file would stay empty."""
    if not runs_elsewhere(trainer) or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        run = getattr(logger, "_experiment", None)  # `experiment` would begin one
        if not isinstance(logger, WandbLogger) or run is None:
            continue
        # A run of the main process goes on: one that the user began, or that spawned processes are attached to.
        if getattr(run, "_init_pid", None) == os.getpid() and not getattr(run, "_is_attached", False):
            if succeeded:
                logger.finalize("success")  # the trainer asks for it later, when the run can take no more
            run.finish(exit_code=0 if succeeded else 1)


def _first(flips: Sequence[Flip], right: bool, count: int) -> list[Flip]:
    return [flip for flip in flips if flip.is_positive == right][:count]


def _labels_of(memory: ResidualMemory, ids: torch.Tensor, flips: Sequence[Flip]) -> list[list[float]]:
    """The labels of neighbours, ids `(B, n)`; in multilabel tasks those of the output that flipped."""
    values, positions = fetch_neighbors(memory, ids)
    labels = values.targets.cpu()[positions.clamp_min(0).cpu()]
    if labels.ndim == 3:
        outputs = torch.tensor([flip.output for flip in flips])
        labels = labels.gather(2, outputs[:, None, None].expand(-1, labels.shape[1], 1))[..., 0]
    found: list[list[float]] = labels.tolist()
    return found


def _shown(look_at_row: Look, flip: Flip) -> Shown | None:
    if flip.position is None:
        return None
    return look_at_row(flip.position if flip.token is None else flip.position * STRIDE + flip.token)


def _cell(shown: Shown | None, caption: str = "") -> "wandb.Image | str | None":
    import wandb

    if isinstance(shown, str):
        return f"{shown}: {caption}" if caption else shown
    return None if shown is None else wandb.Image(shown, caption=caption)
