"""Evaluation mode for a while."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

# Those inside `eager`: the compiler's stance is changed by the first and restored by the last.
_inside = 0
_stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """No compiled graphs: hooks that are added after torch.compile has compiled a module are skipped silently.

    Unlike `torch.compiler.set_stance` it may be left in any order, as the hooks of several callbacks do.
    """
    global _inside, _stance
    if not _inside:
        _stance = torch.compiler.set_stance("force_eager")
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1
        if not _inside:
            _stance.__exit__(None, None, None)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled graphs; every module's own mode is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    with torch.no_grad(), eager():
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
