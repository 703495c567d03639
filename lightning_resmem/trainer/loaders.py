"""Whose rows are memorized, and whose are tuned on."""

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_resmem.errors import ResMemWarning


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


def check_validated(trainer: L.Trainer) -> None:
    """Warn if there are validation rows that the Trainer leaves alone, so that nothing is tuned on them."""
    model, source = trainer.lightning_module, trainer.fit_loop.epoch_loop.val_loop._data_source  # has no public name
    if source.is_defined() and not is_overridden("validation_step", model) and trainer.limit_val_batches:
        rank_zero_warn(
            f"{type(model).__name__} has no validation_step, so the Trainer reads no validation rows, and the memory "
            "is tuned on its own, each left out of it. Add one, def validation_step(self, batch, batch_idx): pass, or "
            "tune after training with memorize(trainer, model, dataloader, val_dataloader).",
            category=ResMemWarning,
        )
