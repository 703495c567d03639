"""Which weights are memorized: the last of a fit, or those of its best checkpoint. And which a run may find instead."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.callbacks import WeightAveraging

from lightning_resmem.errors import InputError, MemoryPassError, StaleMemoryError
from lightning_resmem.trainer.limits import is_fast_dev_run

Weights = Literal["last", "best"]


def check_weights(weights: Weights, trainer: L.Trainer) -> None:
    """Refuse weights that this trainer will not have.

    Raises:
        InputError: If the best are wanted, and `trainer.test(ckpt_path="best")` would find none.
    """
    if weights == "last" or is_fast_dev_run(trainer):
        return
    first = trainer.checkpoint_callback
    if first is None:
        raise InputError('weights="best" needs a ModelCheckpoint with a monitor among the Trainer\'s callbacks.')
    if not hasattr(first, "best_model_path") or getattr(first, "save_top_k", None) == 0:
        raise InputError(
            f'weights="best" takes the checkpoint of ckpt_path="best", which is that of the first checkpoint callback '
            f"({type(first).__name__}), and this one keeps no best one (save_top_k=0 saves none): put one that "
            "does before it."
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
    path = getattr(trainer.checkpoint_callback, "best_model_path", None)
    if not path:
        raise MemoryPassError(
            'weights="best": no best checkpoint was saved in this fit. The model is trained, and '
            "memorize(trainer, model, dataloader) gives it a memory."
        )
    # What the model would save now, without optimizers: its hooks may keep more than weights.
    last = copy.deepcopy(trainer._checkpoint_connector.dump_checkpoint(weights_only=True))
    # This very fit wrote it, with whatever hyperparameters the model has: it can be trusted.
    best = trainer.strategy.load_checkpoint(path, weights_only=False)
    try:
        _restore(trainer, model, best)
        yield
    finally:
        _restore(trainer, model, {**best, **last})


@contextmanager
def naming_averaging(trainer: L.Trainer) -> Iterator[None]:
    """Say with a `StaleMemoryError` if the weights are those of a checkpoint that averaging has replaced."""
    try:
        yield
    except StaleMemoryError as error:
        # It does so only on the Trainer whose fit made the averages: to go on training, as it believes.
        averages = [c for c in trainer.callbacks if getattr(c, "_average_model", None) is not None]  # type: ignore[attr-defined]
        if trainer.ckpt_path is not None and any(isinstance(c, WeightAveraging) for c in averages):
            error.add_note(
                f"The {type(averages[0]).__name__} of this Trainer gives the model the weights that were not averaged "
                '(the checkpoint\'s "current_model_state") when the Trainer that trained loads a checkpoint. The '
                "averaged ones, which were memorized, are loaded by a Trainer without it: "
                f"Trainer(callbacks=[resmem]).test(model, ckpt_path={str(trainer.ckpt_path)!r})."
            )
        raise


def _restore(trainer: L.Trainer, model: L.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Load a checkpoint as the trainer does, whose own way also restores callbacks and loops."""
    checkpoint = dict(checkpoint)
    model.on_load_checkpoint(checkpoint)
    trainer.strategy.load_model_state_dict(checkpoint, strict=model.strict_loading)
    model.to(trainer.strategy.root_device)  # the hook may have made layers anew
