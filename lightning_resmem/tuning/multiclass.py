"""The tuner's hot loop: many strengths at once for classes, block by block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_resmem.functional import FLOOR
from lightning_resmem.memory.transfer import beside

# Predictions that are judged at once: what stays in a core's cache, and what keeps a GPU busy.
_CPU_ENTRIES, _GPU_ENTRIES = 2**16, 2**24
# With fewer rows at once the runs of many classes are too short for vectors.
_LEAST_ROWS = 16


def multiclass_sweep(
    base: Tensor, residual: Tensor, strengths: Sequence[float], targets: Tensor, has_rest: bool = False
) -> tuple[Tensor, Tensor]:
    """`Multiclass.score` and `.loss` of `base + strength * residual` for several strengths, ten times as fast.

    The classes come first in memory, so that the reductions over them run along contiguous rows, and blocks of rows
    stay in the cache.

    Args:
        base: Probabilities, shape `(V, C)`.
        residual: Shape `(V, C)`.
        strengths: `S` of them.
        targets: Class labels, shape `(V,)`.
        has_rest: Whether the last column is that of many classes together, none of which is the prediction.

    Returns:
        Whether the prediction is right (bool) and its negative log-likelihood, both `(S, V)`.

    Examples:
        >>> base, residual = torch.tensor([[0.75, 0.25]]), torch.tensor([[-0.5, 0.5]])
        >>> multiclass_sweep(base, residual, [0.0, 1.0], torch.tensor([1]))[0]
        tensor([[False],
                [ True]])
    """
    rows, classes = base.shape
    factors = beside(base, strengths)[:, None]  # (S, 1)
    right = torch.empty(len(strengths), rows, dtype=torch.bool, device=base.device)
    losses = base.new_empty(len(strengths), rows)
    tiny = torch.finfo(base.dtype).tiny
    entries = _GPU_ENTRIES if base.is_cuda else _CPU_ENTRIES
    block = max(_LEAST_ROWS, entries // (classes * len(strengths)))
    for start in range(0, rows, block):
        here = slice(start, start + block)
        first = base[here].T.contiguous()[:, None]  # (C, 1, b)
        combined = torch.addcmul(first, factors, residual[here].T.contiguous()[:, None].to(base.dtype))  # (C, S, b)
        single = combined[:-1] if has_rest else combined
        label = targets[here].expand(1, len(strengths), -1)
        top = single.amax(dim=0)
        hit = single.gather(0, label)[0] == top
        # Of equal entries only the first is the prediction; to ask a GPU if there are any takes longer than to look.
        if base.device.type != "cpu" or torch.count_nonzero(single == top) > top.numel():
            hit &= single.argmax(dim=0) == label[0]
        right[:, here] = hit
        # The floor of `functional.log_predictions`, multiplied and clamped before it has an entry for every strength.
        floor = torch.minimum(*((FLOOR * part).clamp_min(tiny) for part in (first, top)))
        if has_rest:
            floor[-1] = FLOOR * first[-1]  # each of its classes is below the prediction
        raised = torch.maximum(combined, floor, out=floor)
        losses[:, here] = raised.sum(dim=0).log() - raised.gather(0, label)[0].log()
    return right, losses
