"""What comes between the head of a model and what the model returns, told by modules and by the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError
from lightning_resmem.model.loss_graph import normalized_between
from lightning_resmem.model.names import likely_heads, named_modules, quoted, submodule
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


def check_tail(
    model: nn.Module, head: str, run: Callable[[], Any], optimizers: Sequence[torch.optim.Optimizer] = ()
) -> None:
    """Raise an error if something that is trained follows the head, though it changes no number yet.

    A BatchNorm that was never trained does not in evaluation mode, and no factor of one, nor what is added and still
    zero. After training it does, when an error would come too late.

    Args:
        model: Before it is trained.
        head: Name of its head.
        run: Runs a few rows through the model, in evaluation mode, and returns what the model returned.
        optimizers: Hold what is trained. If they hold none of the model's parameters, because it is sharded or trained
            by other means, whatever requires gradients is.
    """
    ends: list[tuple[Tensor, Any]] = []

    def cut(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            # Gradients end here, so parameters that get some come after it. A copy: the model may go on in place.
            start = output.detach().requires_grad_(output.requires_grad).clone()
            ends.append((output.detach().clone(), start.grad_fn))
            return start
        return output

    trained = _trained(model, optimizers)
    hook = submodule(model, "head", head).register_forward_hook(cut)
    try:
        with torch.enable_grad():
            returned = list(tensors(run()))
        if len(ends) != 1:
            return
        output, end = ends[0]
        following = [_following(tensor, end, trained) for tensor in returned if same(output, tensor)]
    except RuntimeError:  # what is never asked for gradients may not do with them
        return
    finally:
        hook.remove()
    if not following or not all(following):
        return
    raise HeadError(
        f"Something that is trained follows the head {head!r}: {following[0]}. It does not "
        f"change what the head returns yet, but will. {by_module(maker(model, run), head) or WAY_OUT}"
    )


def _trained(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    held = {id(parameter) for group in groups for parameter in group["params"]}
    asking = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: parameter for name, parameter in asking.items() if id(parameter) in held} or asking


def _following(tensor: Tensor, end: Any, trained: Mapping[str, Tensor]) -> str:
    """What is trained and made a tensor from what the node `end` made, for a message; nothing if nothing did."""
    names: list[str] = []
    if trained and tensor.requires_grad:
        weights = torch.rand_like(tensor)  # the sum of a softmax has no gradient
        found = torch.autograd.grad(tensor, [*trained.values()], weights, retain_graph=True, allow_unused=True)
        # That of what is multiplied by a constant zero, so that every parameter is used, is zero.
        names = [name for name, grad in zip(trained, found, strict=True) if grad is not None and grad.abs().sum() != 0]
    return quoted(names) or ("a BatchNorm" if end is not None and normalized_between(tensor, end) else "")


def to_be_named(model: nn.Module, made_by: str | None) -> str:
    """For a message: the head of a model without linear modules is to be named; `made_by` as `maker` tells."""
    name = "Name the module whose input is the embedding and whose output is the logits"
    if made_by is not None:
        return f"{name}: head={made_by!r}."
    known = f", if it is one of {quoted(likely_heads(model)[-5:])}" if likely_heads(model) else ""
    return (
        f"What the model returned is the output of none of its modules. {name} with head={known}; what no module makes "
        'has to be made by one: self.head = MyHead(...) with head="head".'
    )


def by_module(made_by: str | None, linear: str) -> str | None:
    """For a message: the module that makes what the model returns is the head, and the key is that of a linear one."""
    if made_by is None or made_by == linear:
        return None
    return (
        f"What the model returns is made by {made_by!r}: name that one, and the input of {linear!r} as the key, "
        f'head={made_by!r}, embedding="{linear}:input".'
    )
