"""How many batches a Trainer's settings let a rank read."""

import lightning.pytorch as L


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the trainer only tries out whether everything runs."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def train_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its training rows a rank reads, None for all of them."""
    return _limit(trainer.limit_train_batches, [trainer.num_training_batches])


def val_limit(trainer: L.Trainer) -> int | None:
    """How many batches of its validation rows a rank reads, None for all of them."""
    return _limit(trainer.limit_val_batches, trainer.num_val_batches)


def _limit(setting: int | float | None, num_batches: list[int | float]) -> int | None:
    # `1.0` is all, `1` is one batch.
    if isinstance(setting, float) and setting == 1.0:
        return None
    return int(min(num_batches, default=0))
