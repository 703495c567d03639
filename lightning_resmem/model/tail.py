"""What comes between the head of a model and what the model returns, told by modules and by the graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError
from lightning_resmem.model.loss_graph import trained_between
from lightning_resmem.model.names import named_modules, quoted, submodule
from lightning_resmem.model.returned import WAY_OUT, same, tensors


def maker(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The innermost module whose output is what one run of the model returned; None if no module made that."""
    made: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                made.append((name, output, output.detach().clone()))  # the model may go on in place

        return hook

    with ExitStack() as stack:
        for name, module in named_modules(model).items():
            if name and not isinstance(module, torch.jit.ScriptModule):
                stack.callback(module.register_forward_hook(record(name)).remove)
        returned = list(tensors(run()))
    # Inner modules end before those that they are a part of.
    return next(
        (name for name, output, was in made if any(output is t for t in returned) and torch.equal(output, was)), None
    )


def check_tail(model: nn.Module, head: str, run: Callable[[], Any]) -> None:
    """Raise an error if something that is trained follows the head, though it changes no number yet.

    A BatchNorm that was never trained does not in evaluation mode, and no factor of one. After training it does, when
    an error would come too late.

    Args:
        model: Before it is trained.
        head: Name of its head.
        run: Runs a few rows through the model, in evaluation mode, and returns what the model returned.
    """
    ends: list[tuple[Tensor, Any]] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ends.append((output.detach().clone(), output.grad_fn))  # the model may go on in place

    hook = submodule(model, "head", head).register_forward_hook(keep)
    try:
        with torch.enable_grad():
            returned = list(tensors(run()))
    except RuntimeError:  # what is never asked for gradients may not do with them
        return
    finally:
        hook.remove()
    if len(ends) != 1:
        return
    output, end = ends[0]
    following = [trained_between(tensor, end) for tensor in returned if same(output, tensor)]
    if not following or not all(following):
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = [names[id(parameter)] for parameter in following[0] if id(parameter) in names]
    raise HeadError(
        f"Something that is trained follows the head {head!r}: {quoted(trained) or 'a BatchNorm'}. It does not "
        f"change what the head returns yet, but will. {by_module(maker(model, run), head) or WAY_OUT}"
    )


def by_module(made_by: str | None, linear: str) -> str | None:
    """For a message: the module that makes what the model returns is the head, and the key is that of a linear one."""
    if made_by is None or made_by == linear:
        return None
    return (
        f"What the model returns is made by {made_by!r}: name that one, and the input of {linear!r} as the key, "
        f'head={made_by!r}, embedding="{linear}:input".'
    )
