"""Where a key is taken: what goes into a module of the model, or what comes out of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn

from lightning_resmem.errors import HeadError
from lightning_resmem.model.names import named_modules, submodule
from lightning_resmem.model.returned import tensors

Side = Literal["input", "output"]

# The name of the place that is to be chosen, and among several that of the head's input.
AUTO, HEAD = "auto", "head"


def joined(names: Sequence[str]) -> str:
    """The names of several places, whose keys stand side by side, as one string."""
    return json.dumps(list(names))


def parted(name: str | None) -> tuple[str, ...]:
    """The names that `joined` has joined, or the one; none for the head's input alone."""
    if name is None:
        return ()
    return tuple(json.loads(name)) if isinstance(name, str) and name.startswith("[") else (name,)


class Place(NamedTuple):
    """A module's input or its output; as a string the name that users give.

    Attributes:
        module: Name of the module, e.g. `"transformer.h.11.mlp"`.
        side: Of the module.

    Examples:
        >>> Place.parse("transformer.h.11.mlp:input")
        Place(module='transformer.h.11.mlp', side='input')
        >>> str(Place.parse("net.layer4:output"))
        'net.layer4'
    """

    module: str
    side: Side = "output"

    @classmethod
    def parse(cls, name: str) -> Place:
        """The place of a name: a module's, for its output, which may be followed by `:input` or `:output`."""
        module, _, side = name.rpartition(":") if isinstance(name, str) else ("", "", "")
        if side == "input":
            return cls(module, "input")
        return cls(module if side == "output" else name)

    def __str__(self) -> str:
        return f"{self.module}:input" if self.side == "input" else self.module

    def find(self, model: nn.Module) -> nn.Module:
        """The module, in a model.

        Raises:
            HeadError: If there is none of that name, or one that no hook can see.
        """
        names, (module, _, side) = named_modules(model, aliases=True), str(self.module).rpartition(":")
        if module in names and self.module not in names and module:
            known = " or ".join(repr(f"{module}:{known}") for known in get_args(Side))
            raise HeadError(f"embedding={self.module!r}: the key is {known}, and {side!r} is neither.")
        return submodule(model, "embedding", self.module)

    @property
    def verb(self) -> str:
        """What a module does there, for messages: it `returns` a tensor, or `is given` one."""
        return "is given" if self.side == "input" else "returns"


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor of floats that a module is given, in the order of its `forward`'s parameters."""
    if len(kwargs) > 1:  # a caller may give a mask before the states
        names = list(inspect.signature(module.forward).parameters)
        kwargs = dict(sorted(kwargs.items(), key=lambda item: names.index(item[0]) if item[0] in names else len(names)))
    return next((value for value in tensors((args, kwargs)) if value.is_floating_point()), None)


def output_of(output: Any) -> Tensor | None:
    """The first tensor that a module returns."""
    return next(iter(tensors(output)), None)


def same_positions(keys: Tensor, inputs: Tensor) -> Tensor | None:
    """The keys of those positions that a head was asked for, which models cut out of its inputs in generation.

    Args:
        keys: Of all positions, shape `(B, T, D)`.
        inputs: Of the head, shape `(B, t, H)`, `t < T`.

    Returns:
        Shape `(B, t, D)`; None if the inputs are not a view of states `(B, T, H)`, so that nothing tells which they
        are.
    """
    length, asked, step = keys.shape[1], inputs.shape[1], inputs.stride(1)
    if keys.shape[0] != inputs.shape[0] or not step or inputs.stride(0) != length * step:
        return None
    start = inputs.storage_offset() % (length * step) // step
    return keys[:, start : start + asked] if start + asked <= length else None
