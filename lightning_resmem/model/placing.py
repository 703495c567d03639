"""Where a model is."""

from itertools import chain

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter or buffer.

    Lightning's own `device` is a note that only its own `to`, `cuda` and `cpu` keep: a model that was moved as a part
    of a plain `nn.Module`, or by its layers, says that it is where it was.

    Args:
        model: Any module; one without tensors is where Lightning says that it is, or on the CPU.

    Examples:
        >>> device_of(nn.Linear(2, 2).to("meta"))
        device(type='meta')
    """
    held = (tensor for tensor in chain(model.parameters(), model.buffers()) if not is_lazy(tensor))
    first = next(held, None)
    if first is not None:
        return first.device
    noted = getattr(model, "device", None)
    return noted if isinstance(noted, torch.device) else torch.device("cpu")
