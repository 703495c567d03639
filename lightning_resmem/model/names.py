"""The modules of a model, by the names that users know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch
from torch import nn

from lightning_resmem.errors import HeadError


def named_modules(model: nn.Module, aliases: bool = False) -> dict[str, nn.Module]:
    """All submodules by the names the user knows: torch.compile's wrappers (`_orig_mod`) are left out.

    With `aliases`, a module that was assigned under several names has all of them.
    """
    names: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=not aliases):
        if hasattr(module, "_orig_mod"):  # a hook on the wrapper would not see a call of what it wraps
            continue
        names[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    return names


def submodule(model: nn.Module, argument: str, name: object) -> nn.Module:
    """The module of a name that was given as `argument`.

    Raises:
        HeadError: If there is none, with those that it may stand for, or if no hook can see it.
    """
    modules = named_modules(model, aliases=True)
    if not isinstance(name, str) or not name or name not in modules:
        close = difflib.get_close_matches(name, [n for n in modules if n], n=1) if isinstance(name, str) else []
        named = next((n for n, module in modules.items() if module is name), None)  # it was given itself
        meant = f"Give its name, {named!r}. " if named else f"Did you mean {close[0]!r}? " if close else ""
        raise HeadError(
            f"{argument}={name!r} is not a module of {type(model).__name__}. {meant}Its modules are named as in "
            f"model.named_modules(), for example {quoted(likely_heads(model)[-5:])}."
        )
    if isinstance(modules[name], torch.jit.ScriptModule):
        raise HeadError(
            f"{argument}={name!r} is part of a torch.jit.script or traced module, where no hook can see it. Memorize "
            "the model before it is compiled."
        )
    return modules[name]


def likely_heads(model: nn.Module) -> list[str]:
    """For a message: the names of a model's linear modules, or of all if it has none; the last may be its head."""
    modules = named_modules(model, aliases=True)
    return [n for n, module in modules.items() if n and isinstance(module, nn.Linear)] or [n for n in modules if n]


def likely_head(model: nn.Module) -> str:
    """For a message: the name that the head of a model may have."""
    return (likely_heads(model) or ["head"])[-1]


def largest_part(model: nn.Module) -> str:
    """For a message: the name of the part of a model that holds the most tensors of weights, perhaps its network."""
    sizes = {name: len(list(part.parameters())) for name, part in model.named_children()}
    return max(sizes, key=sizes.__getitem__, default="net")


def quoted(names: Iterable[str]) -> str:
    """Names for a message: `'fine', 'coarse'`."""
    return ", ".join(repr(name) for name in names)
