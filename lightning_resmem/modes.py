"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled graphs; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    # Hooks that are added after torch.compile has compiled a module are skipped silently.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
