"""Ids of the positions of sequences: each says the sequence and the position."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import LARGEST_ID, as_ids

# Ids from one sequence to the next. A constant, so that ids do not depend on how long the sequences of a batch are.
STRIDE = 2**20


class Places(NamedTuple):
    """Where rows of sequences are.

    Attributes:
        sequences: Ids of the sequences, as a rule their positions in the dataset; shape `(n,)`, int64.
        positions: Within the sequences, shape `(n,)`, int64.
    """

    sequences: Tensor
    positions: Tensor


def token_ids(sequences: Tensor, positions: Tensor) -> Tensor:
    """The ids of positions `(B, T)` of sequences `(B,)`, shape `(B, T)`.

    Raises:
        InputError: If a sequence or a position is too large for an id.

    Examples:
        >>> token_ids(torch.tensor([0, 2]), torch.tensor([[0, 1], [0, 1]]))
        tensor([[      0,       1],
                [2097152, 2097153]])
    """
    if positions.numel() and int(positions.max()) >= STRIDE:
        raise InputError(
            f"A sequence has {int(positions.max()) + 1:,} positions, ids have room for {STRIDE:,}: cut it into several."
        )
    if len(sequences) and not 0 <= int(sequences.min()) <= int(sequences.max()) <= LARGEST_ID // STRIDE:
        raise InputError(
            f"The sequences of a batch have ids from {int(sequences.min())} to {int(sequences.max())}, beside those of "
            f"positions there is room for 0 to {LARGEST_ID // STRIDE}: give an ids_fn that returns such ids."
        )
    return sequences[:, None] * STRIDE + positions


def of_sequences(provenance: Mapping[str, str]) -> bool:
    """Whether the rows of a memory are positions of sequences."""
    return "stride" in provenance


class Locating:
    """Says which sequence and position the ids of a memory stand for.

    Attributes:
        provenance: Of the memory.
    """

    provenance: dict[str, str]

    def locate(self, ids: Any) -> Places:
        """The sequences and the positions in them that ids stand for, where rows are positions of sequences.

        Args:
            ids: Shape `(n,)`, int64, such as `memory.ids`.

        Raises:
            InputError: If the rows of this memory are no positions of sequences.
        """
        if not of_sequences(self.provenance):
            raise InputError(
                "locate is for a memory that a pass over sequences has filled: here an id stands for a whole row."
            )
        ids, stride = as_ids(ids), int(self.provenance["stride"])
        return Places(torch.div(ids, stride, rounding_mode="floor"), ids % stride)

    def sequences_of(self, ids: Tensor) -> Tensor | None:
        """The sequences that ids `(n,)` stand for; None where rows are no positions of sequences."""
        return self.locate(ids).sequences if of_sequences(self.provenance) else None
