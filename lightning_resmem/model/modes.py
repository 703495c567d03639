"""Evaluation mode for a while."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from lightning_resmem.together import together

_Function = TypeVar("_Function", bound=Callable[..., Any])

# By how many units in the last place of the largest weight an addition that was undone may differ.
_ROUNDING = 64


def eager() -> AbstractContextManager[None]:
    """No compiled graphs: hooks that are added after torch.compile has compiled a module are skipped silently.

    Unlike `torch.compiler.set_stance` it may be left in any order, as threads and the hooks of several callbacks do.
    """
    return together("eager", lambda: torch.compiler.set_stance("force_eager"))


def uncompiled(function: _Function) -> _Function:
    """Keep a function out of compiled graphs, of which a search and hooks that come and go can be no part."""
    reason = "a memory is searched, which no graph can hold: compile or export the base instead"
    return cast(_Function, torch.compiler.disable(function, reason=reason))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, no compiled graphs; every module's own mode is restored afterwards."""
    with torch.no_grad(), eager(), evaluating(model):
        yield


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Evaluation mode as PyTorch has it: by the modules' own `eval` and `train`, which may do more than set a flag.

    Adapters, say, are merged into the weights and taken out again, with rounding. The weights that are trained have to
    be those that would have been trained without us, so they are put back to the last bit. Of several threads, the last
    one puts everything back.
    """
    return together(("evaluating", id(model)), lambda: _evaluating(model))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    if not any(training for _, training in modes):
        yield
        return
    weights = _copies(model) if any(_does_more(module) for module, _ in modes) else {}
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:  # parents first: most children follow them
            if module.training != training:
                module.train(training)
        if not _put_back(model, weights):
            # It was in evaluation mode but for its flags, which is how the trainer's validation leaves it.
            model.eval()
            _put_back(model, weights)
        for module, training in modes:
            module.training = training


def _does_more(module: nn.Module) -> bool:
    """Whether a module does more than to pass its mode on."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


def _copies(model: nn.Module) -> dict[str, Tensor]:
    """All parameters, on the CPU: a GPU may have no room for them."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in model.named_parameters()}


def _put_back(model: nn.Module, weights: dict[str, Tensor]) -> bool:
    """Undo what rounding has done to weights; whether nothing else has happened to them."""
    alike = True
    for name, parameter in model.named_parameters():
        saved, found = weights.get(name), parameter.detach().cpu()
        if saved is None or (saved.shape, saved.dtype) != (found.shape, found.dtype) or torch.equal(found, saved):
            continue
        close = _ROUNDING * torch.finfo(found.dtype).eps * float(saved.abs().max())
        if torch.allclose(found, saved, rtol=0, atol=close):
            parameter.data.copy_(saved)
        else:
            alike = False
    return alike
