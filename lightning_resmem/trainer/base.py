"""The hooks with which a base makes its layers, when the trainer runs a module around it."""

from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden


def set_up(base: L.LightningModule, stage: str, datamodule: L.LightningDataModule | None = None) -> None:
    """Call the base's `setup` as the trainer does for a model of its own.

    Args:
        base: Attached to the trainer.
        stage: The trainer's.
        datamodule: What the base finds as `self.trainer.datamodule` meanwhile; by default the trainer's.
    """
    trainer = base.trainer
    attached = trainer.datamodule  # type: ignore[attr-defined]
    trainer.datamodule = datamodule or attached  # type: ignore[attr-defined]
    try:
        with _keeping_what_is_learned(base, "setup"):
            base.setup(stage)
    except Exception as error:
        error.add_note(
            f"This was {type(base).__name__}.setup({stage!r}), which ResMem calls as the trainer would. If it needs "
            "the datamodule, give the datamodule in place of loaders."
        )
        raise
    finally:
        trainer.datamodule = attached  # type: ignore[attr-defined]


def configure(base: L.LightningModule) -> None:
    """Call the base's `configure_model` as the trainer does for a model of its own."""
    with _keeping_what_is_learned(base, "configure_model"):
        base.configure_model()


@contextmanager
def _keeping_what_is_learned(base: L.LightningModule, hook: str) -> Iterator[None]:
    """Layers that a hook makes anew get the weights that they had: there may be no checkpoint to give them back."""
    if not is_overridden(hook, base, L.LightningModule):
        yield
        return
    before = {name: value.clone() for name, value in _tensors(base).items()}
    yield
    with torch.no_grad():
        for name, value in _tensors(base).items():
            learned = before.get(name)
            if learned is not None and learned.shape == value.shape:
                value.copy_(learned)


def _tensors(base: L.LightningModule) -> dict[str, torch.Tensor]:
    state = base.state_dict().items()
    return {name: value.detach() for name, value in state if isinstance(value, torch.Tensor)}
