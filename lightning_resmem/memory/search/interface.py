"""What every search answers."""

from typing import Protocol

from torch import Tensor


class Index(Protocol):
    """What finds the nearest keys of a query."""

    name: str

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find near keys.

        Args:
            queries: Shape `(B, D)`, float32, on the device of the keys.
            k: At most the number of keys.

        Returns:
            Euclidean distances `(B, k)`, ascending, float32, and positions `(B, k)`, int64. An approximate index may
            find fewer; missing places have position -1 and distance inf, and come last.
        """
