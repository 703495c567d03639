"""Functions of users are called for a batch: an error in one names it, what it was given, and the way out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lightning_resmem.errors import HeadError, InputError, ResMemError


@contextmanager
def calling(name: str, batch: Any, way_out: str) -> Iterator[None]:
    """Say which argument an error comes from.

    Args:
        name: Of the argument whose function is called within.
        batch: That it is given.
        way_out: What the function should be.

    Raises:
        InputError: In place of an error of the function, which is its cause. Ours says more, and whoever tries smaller
            batches looks for torch's when memory runs out: these stay.
    """
    try:
        yield
    except ResMemError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} failed for a batch that is {_described(batch)} ({said}): {way_out}") from error


@contextmanager
def calling_forward(model: str, batch: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """Add to an error how a model was called for a batch, which may be the cause.

    Args:
        model: The name of its class.
        batch: That the arguments were read from.
        args: Of the call within.
        kwargs: Of the call within.
    """
    try:
        yield
    except Exception as error:
        # Of the head and of places of keys ours says all; memory runs out whatever the arguments are.
        if isinstance(error, HeadError) or _is_out_of_memory(error):
            raise
        given = [*map(in_short, args), *(f"{name}={in_short(value)}" for name, value in kwargs.items())]
        whole = "the whole batch, call its argument `batch`, or give forward_fn=lambda model, batch: model(batch); "
        entry = repr(next(iter(batch), "...")) if isinstance(batch, Mapping) else "..."
        note = (
            f"ResMem called {model}({', '.join(given)}) for a batch that is {_described(batch)}. If forward wants "
            f"{'' if len(args) == 1 and args[0] is batch else whole + 'if it wants '}something else of it, "
            f"give forward_fn=lambda model, batch: model(batch[{entry}])."
        )
        is_batch = any(isinstance(value, Tensor) and value.ndim > 1 for value in (*args, *kwargs.values()))
        if isinstance(error, ResMemError) and is_batch:  # rows that are no batch within: ours knows less of the cause
            raise type(error)(f"{note} {error}") from error
        error.add_note(note)
        raise


def in_short(value: Any) -> str:
    """The type of a value, and the shape of a tensor."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + shape


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # It fails on messages that are no text.
    return isinstance(error, RuntimeError) and is_oom_error(RuntimeError(str(error)))


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        parts = [f"{key!r}: {in_short(value)}" for key, value in batch.items()]
    elif isinstance(batch, (list, tuple)):
        parts = [*map(in_short, batch)]
    else:
        return f"a {in_short(batch)}"
    return f"a {type(batch).__name__} of {', '.join(parts)}" if parts else f"an empty {type(batch).__name__}"
