"""Functions of users are called for a batch: an error in one names it, what it was given, and the way out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from lightning_resmem.errors import InputError, ResMemError


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
    except (ResMemError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # It fails on messages that are no text.
        if isinstance(error, RuntimeError) and is_oom_error(RuntimeError(str(error))):
            raise
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"{name} failed for a batch that is {_described(batch)} ({said}): {way_out}") from error


def in_short(value: Any) -> str:
    """The type of a value, and the shape of a tensor."""
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return type(value).__name__ + shape


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        parts = [f"{key!r}: {in_short(value)}" for key, value in batch.items()]
    elif isinstance(batch, (list, tuple)):
        parts = [*map(in_short, batch)]
    else:
        return f"a {in_short(batch)}"
    return f"a {type(batch).__name__} of {', '.join(parts)}" if parts else f"an empty {type(batch).__name__}"
