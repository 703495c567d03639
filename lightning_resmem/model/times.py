"""When the rows of a batch are asked for, and when their targets are known."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.model.calling import calling

# It returns two of what torch.as_tensor takes: the command line would refuse functions that do not say so.
TimesFn = Callable[[Any], Any]

_AS_IN = "times_fn=lambda batch: (batch[2], batch[2] + horizon)"


def read_times(times_fn: TimesFn, batch: Any) -> Tensor:
    """When each row of a batch is asked for, and when its target is known: shape `(n, 2)`.

    Raises:
        InputError: If the function returns something else than a pair of those.
    """
    with calling("times_fn", batch, f"give one that returns a pair of times, as in {_AS_IN}."):
        given = times_fn(batch)
    try:
        if not isinstance(given, (tuple, list)):
            raise TypeError
        # Of Python's floats torch would make float32, which rounds times.
        pair = (part if isinstance(part, Tensor) else torch.as_tensor(np.asarray(part)) for part in given)
        asked_at, available_at = pair
        times = torch.stack(torch.broadcast_tensors(asked_at, available_at), dim=-1)
        if times.ndim != 2:
            raise ValueError
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"times_fn returned a {type(given).__name__} for a batch, expected a pair of tensors (n,): when each row "
            f"is asked for, and when its target is known, as in {_AS_IN}."
        ) from None
    return times


def asked_at(times_fn: TimesFn | None, batch: Any) -> Tensor | None:
    """When each row of a batch is asked for, shape `(n,)`; None where nobody says."""
    return None if times_fn is None else read_times(times_fn, batch)[:, 0]
