"""How many batches a rank reads: by a Trainer's settings, and of streams that may have no end."""

import math
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from lightning_resmem.collection.loaders import check_has_end, streams
from lightning_resmem.errors import ResMemWarning


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries out whether everything runs."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def train_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its training rows a rank reads, None for all of them.

    Of a stream without a length, those that training has read.
    """
    limit = _limit(trainer.limit_train_batches, [trainer.num_training_batches])
    read = _read(trainer.fit_loop.epoch_loop)
    if limit is None and math.isinf(trainer.num_training_batches) and read:  # it may have no end
        rank_zero_info(
            f"ResMem: the training loader has no length, so the pass reads at most the {read} batches of it that "
            "training has read on a rank."
        )
        return read
    return limit


def given_limit(trainer: L.Trainer, loaders: Any) -> int | None:
    """How many batches a rank reads of rows that were given to be memorized, None for all of them.

    Of a stream without a length as many rows as training has read.
    """
    if is_fast_dev_run(trainer):
        return train_limit(trainer)
    endless = streams(loaders)
    if not endless:
        return None
    read = _read(trainer.fit_loop.epoch_loop)
    if not read:
        rank_zero_warn(
            f"The rows to memorize (memory_dataloader) are a stream without a length ({_name(endless[0])}), which may "
            "have no end: at most as many of them are read as training reads rows. Give the dataset a __len__, and "
            "the pass reads so many.",
            category=ResMemWarning,
        )
        return None
    trained, given = _rows_per_batch(trainer.train_dataloader), _rows_per_batch(loaders)
    limit = read if trained is None or given is None else math.ceil(read * trained / given)
    rank_zero_info(
        f"ResMem: memory_dataloader has no length, so the pass reads at most {limit} batches of it on a rank, as many "
        "rows as training has read."
    )
    return limit


def val_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its validation rows a rank reads, None for all of them.

    Of a stream without a length, those that validation has read; without any, as many as training has.
    """
    limit = _limit(trainer.limit_val_batches, trainer.num_val_batches)
    if limit is None and any(map(math.isinf, trainer.num_val_batches)):
        loop = trainer.fit_loop.epoch_loop
        return _read(loop.val_loop) or _read(loop)
    return limit


def memorize_limits(
    trainer: L.Trainer, loaders: Any, val_loaders: Any, limit_batches: int | float | None
) -> tuple[int | None, int | None]:
    """How many batches of training and of validation rows a rank reads outside of a fit, None for all of them.

    Args:
        trainer: Whose `limit_val_batches` holds for validation rows without a length.
        loaders: The training rows.
        val_loaders: The validation rows, or None.
        limit_batches: The user's; `math.inf` reads streams to their end.

    Raises:
        InputError: For a stream without a length and without a limit.
    """
    if limit_batches is None:
        check_has_end(
            loaders,
            "give limit_batches=..., how many batches each rank is to read of it, or limit_batches=math.inf to read it "
            "to its end.",
        )
    limit = None if limit_batches is None or math.isinf(limit_batches) else int(limit_batches)
    return limit, given_val_limit(trainer, val_loaders)


def given_val_limit(trainer: L.Trainer, val_loaders: Any) -> int | None:
    """How many batches of validation rows a rank reads outside of a fit: `limit_val_batches` of a stream, else all.

    Raises:
        InputError: If there is a stream without a length, and the trainer has no such limit.
    """
    if not isinstance(trainer.limit_val_batches, float) and streams(val_loaders):
        return trainer.limit_val_batches
    check_has_end(
        val_loaders,
        "give Trainer(limit_val_batches=...), how many batches of validation rows each rank is to read. (A number "
        "beyond its end reads all of a stream that has one.)",
    )
    return None


def _read(loop: Any) -> int:
    """The batches that a loop has read on this rank."""
    return int(loop.batch_progress.total.ready)


def _limit(setting: int | float | None, num_batches: list[int | float]) -> int | None:
    # `1.0` is all, `1` is one batch.
    if isinstance(setting, float) and setting == 1.0:
        return None
    return int(min(num_batches, default=0))


def _rows_per_batch(loaders: Any) -> int | None:
    """The rows of one batch of each loader together, None where that is not known."""
    flat = (loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)).flattened
    sizes = [loader.batch_size for loader in flat if isinstance(loader, DataLoader) and loader.batch_size]
    return sum(sizes) if sizes and len(sizes) == len(flat) else None


def _name(loader: Any) -> str:
    return type(getattr(loader, "dataset", loader)).__name__
