"""Whose rows are memorized, and whose are tuned on."""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.seed import isolate_rng


def offered_loader(*owners: Any) -> Any:
    """What the `memory_dataloader()` of the first owner that has one (a datamodule, the model) returns, else None."""
    for owner in owners:
        offer = getattr(owner, "memory_dataloader", None)
        if callable(offer):
            return offer()
    return None


def validation_loaders(trainer: L.Trainer) -> Any:
    """The validation loaders of a fit, if it has any; made now if no epoch was validated yet."""
    if trainer.val_dataloaders is None and trainer.enable_validation:
        with isolate_rng(include_cuda=False):  # the trainer asks for them later, if it ever does
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
    return trainer.val_dataloaders
