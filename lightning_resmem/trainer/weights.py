"""Which weights are memorized: the last of a fit, or those of its best checkpoint."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_resmem.errors import InputError, MemoryPassError
from lightning_resmem.trainer.limits import is_fast_dev_run

Weights = Literal["last", "best"]


def check_weights(weights: Weights, trainer: L.Trainer) -> None:
    """Refuse weights that this trainer will not have.

    Raises:
        InputError: If the best are wanted, and no checkpoint knows which are.
    """
    if weights == "best" and not is_fast_dev_run(trainer) and not _checkpoints(trainer):
        raise InputError(
            'weights="best" needs a ModelCheckpoint with a monitor among the Trainer\'s callbacks, and one that saves '
            "the best epoch: save_top_k=0 saves none."
        )


@contextmanager
def memorized_weights(weights: Weights, trainer: L.Trainer, model: L.LightningModule) -> Iterator[None]:
    """Let the model have the weights to memorize, and those at the end of training again afterwards.

    Raises:
        MemoryPassError: If the best are wanted, and none were saved.
    """
    if weights == "last" or is_fast_dev_run(trainer):
        yield
        return
    path = next((c.best_model_path for c in _checkpoints(trainer) if c.best_model_path), None)
    if path is None:
        raise MemoryPassError(
            'weights="best": no best checkpoint was saved in this fit. The model is trained, and '
            "memorize(trainer, model, dataloader) gives it a memory."
        )
    last = copy.deepcopy(model.state_dict())
    try:
        # This very fit wrote it, with whatever hyperparameters the model has: it can be trusted.
        best = trainer.strategy.load_checkpoint(path, weights_only=False)["state_dict"]
        model.load_state_dict(best, strict=model.strict_loading)
        yield
    finally:
        model.load_state_dict(last, strict=model.strict_loading)


def _checkpoints(trainer: L.Trainer) -> list[ModelCheckpoint]:
    """The checkpoints that know a best epoch."""
    checkpoints = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    return [c for c in checkpoints if c.monitor is not None and c.save_top_k != 0]
