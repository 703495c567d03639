"""What single rows add to a prediction, one by one, where a weighted sum will not do."""

import torch
from torch import Tensor

from lightning_resmem.functional import whole_residual
from lightning_resmem.memory.checks import check_width, missing_outputs
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.values.interface import Values


def fetch_neighbors(memory: ResidualMemory, ids: Tensor) -> tuple[Values, Tensor]:
    """The stored rows of neighbours `(B, n)`, each once, and where among them each neighbour is (-1 is missing)."""
    known, positions = ids.unique(return_inverse=True)
    missing = int((known < 0).sum())  # an approximate index may leave places empty; -1 comes first
    return memory.fetch(known[missing:]), (positions.reshape(ids.shape) - missing).to(memory.device)


def row_residuals(values: Values, positions: Tensor, softmax_temperature: float, base: Tensor | None) -> Tensor:
    """The residuals of single rows as neighbours of queries.

    Args:
        values: Of the rows.
        positions: Which rows, shape `(B, n)`; -1 gives 0.
        softmax_temperature: What the logits are divided by.
        base: Base predictions of the queries, shape `(B, C)`; what was cut of a row's own has their shape. Where
            nothing is cut, None will do.

    Returns:
        Shape `(B, n, C)`.

    Raises:
        InputError: If `base` is missing, or has another width.
    """
    single = positions.reshape(-1, 1)
    known, tail = values.residual_sum(single, torch.ones_like(single, dtype=torch.float32), softmax_temperature)
    known = known.reshape(*positions.shape, known.shape[-1])
    if base is None:
        if tail is not None:
            raise missing_outputs()
        return known
    check_width(base, known.shape[-1])
    return whole_residual(known, None if tail is None else tail.reshape(positions.shape), base[:, None])


def per_neighbor(strength: float | Tensor) -> float | Tensor:
    """Strengths, which may differ by query and output `(B, C)`, for contributions `(B, n, C)`."""
    return strength[:, None] if isinstance(strength, Tensor) else strength
