"""What single rows add to a prediction, one by one, where a weighted sum will not do."""

import torch
from torch import Tensor

from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.values.interface import Values


def fetch_neighbors(memory: ResidualMemory, ids: Tensor) -> tuple[Values, Tensor]:
    """The stored rows of neighbours `(B, n)`, each once, and where among them each neighbour is (-1 is missing)."""
    known, positions = ids.unique(return_inverse=True)
    missing = int((known < 0).sum())  # an approximate index may leave places empty; -1 comes first
    return memory.fetch(known[missing:]), (positions.reshape(ids.shape) - missing).to(memory.device)


def row_residuals(values: Values, positions: Tensor, softmax_temperature: float) -> Tensor:
    """The residuals of single rows: positions `(B, n)` (-1 gives 0) to `(B, n, C)`."""
    single = positions.reshape(-1, 1)
    residuals = values.residual_sum(single, torch.ones_like(single, dtype=torch.float32), softmax_temperature)
    return residuals.reshape(*positions.shape, residuals.shape[-1])


def per_neighbor(strength: float | Tensor) -> float | Tensor:
    """Strengths, which may differ by query and output `(B, C)`, for contributions `(B, n, C)`."""
    return strength[:, None] if isinstance(strength, Tensor) else strength
