"""What every search answers."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Index(Protocol):
    """What finds the nearest keys of a query."""

    name: str

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find near keys.

        Args:
            queries: Shape `(B, D)`, float32, on the device of the keys.
            k: At most the number of keys.

        Raises:
            InputError: If queries have NaN or infinite entries.

        Returns:
            Euclidean distances `(B, k)`, ascending, float32, and positions `(B, k)`, int64. An approximate index may
            find fewer; missing places have position -1 and distance inf, and come last.
        """


class Found(NamedTuple):
    """What a search finds.

    Attributes:
        distances: Shape `(b, k)`, float32.
        positions: Of the keys, `(b, k)`, int64.
        sure: For which queries they certainly are the nearest, `(b,)`, bool.
        all_sure: Shape `()`, bool. It may be False where they are sure for all.
    """

    distances: Tensor
    positions: Tensor
    sure: Tensor
    all_sure: Tensor

    @staticmethod
    def bytes_of(rows: int, k: int) -> int:
        """What `within` takes."""
        return rows * (12 * k + 1) + 1

    @classmethod
    def room(cls, rows: int, k: int, device: torch.device) -> Tensor:
        """What `within` has place in."""
        return torch.empty(cls.bytes_of(rows, k), dtype=torch.uint8, device=device)

    @classmethod
    def within(cls, room: Tensor, rows: int, k: int) -> "Found":
        """All in one tensor of bytes, which is copied at once."""
        entries = rows * k
        return cls(
            room[8 * entries : 12 * entries].view(torch.float32).view(rows, k),
            room[: 8 * entries].view(torch.int64).view(rows, k),
            room[12 * entries : -1].view(torch.bool),
            room[-1].view(torch.bool),
        )
