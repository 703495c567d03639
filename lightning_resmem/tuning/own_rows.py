"""Rows of a memory that it is tuned on itself."""

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.interface import ResidualMemory


def drawn_rows(memory: ResidualMemory, rows: int, seed: int) -> Tensor:
    """Ids of some of its rows at random, ascending, shape `(n,)`, on the CPU.

    Args:
        memory: Filled.
        rows: How many; all, if there are not more.
        seed: Of the draw.

    Raises:
        InputError: If none of them can be left out, or these are not rows like any.
    """
    if len(memory) < 2:
        raise InputError(f"The memory has {len(memory)} rows: leaving one out takes at least two.")
    if rows < 1:
        raise InputError(f"rows={rows!r}: give a number of rows of at least 1.")
    if memory.provenance.get("keep") == "residual":
        raise InputError(
            'The memory has the rows that the base has most wrong (keep="residual"), and tuned on these it would be '
            "trusted too much: tune it on validation rows."
        )
    drawn = torch.randperm(len(memory), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
    return memory.ids.cpu()[drawn]
