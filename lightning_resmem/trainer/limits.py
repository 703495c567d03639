"""How many batches a Trainer's settings let a rank read."""

import math

import lightning.pytorch as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries out whether everything runs."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def train_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its training rows a rank reads, None for all of them.

    Of a stream without a length, those that training has read.
    """
    limit = _limit(trainer.limit_train_batches, [trainer.num_training_batches])
    read = int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
    if limit is None and math.isinf(trainer.num_training_batches) and read:  # it may have no end
        rank_zero_info(
            f"ResMem: the training loader has no length, so the pass reads at most the {read} batches of it that "
            "training has read on a rank."
        )
        return read
    return limit


def val_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its validation rows a rank reads, None for all of them."""
    return _limit(trainer.limit_val_batches, trainer.num_val_batches)


def _limit(setting: int | float | None, num_batches: list[int | float]) -> int | None:
    # `1.0` is all, `1` is one batch.
    if isinstance(setting, float) and setting == 1.0:
        return None
    return int(min(num_batches, default=0))
