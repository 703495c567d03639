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


class Nearest(NamedTuple):
    """What a search by half precision finds.

    Attributes:
        distances: Shape `(b, k)`, float32.
        positions: Of the keys, `(b, k)`, int64.
        unsure: The queries that may have nearer ones, `(u,)`, int64; None if there are none.
    """

    distances: Tensor
    positions: Tensor
    unsure: Tensor | None


class Found(NamedTuple):
    """Where a GPU writes what it finds.

    Attributes:
        distances: Shape `(b, k)`, float32.
        positions: Of the keys, `(b, k)`, int64.
        sure: For which queries they certainly are the nearest, `(b,)`, bool.
        all_sure: Shape `()`, bool: True until a query is found not to be, of those there are for padding, too. In
            memory of the host, where nothing has to be copied to know it.
    """

    distances: Tensor
    positions: Tensor
    sure: Tensor
    all_sure: Tensor

    @staticmethod
    def bytes_of(rows: int, k: int) -> int:
        """What `empty` takes."""
        return rows * (12 * k + 1) + 1

    @classmethod
    def empty(cls, rows: int, k: int, device: torch.device) -> "Found":
        """With nothing found yet."""
        distances = torch.empty(rows, k, dtype=torch.float32, device=device)
        sure = torch.empty(rows, dtype=torch.bool, device=device)
        all_sure = torch.ones((), dtype=torch.bool, pin_memory=device.type == "cuda")
        return cls(distances, torch.empty_like(distances, dtype=torch.int64), sure, all_sure)

    def wait(self) -> None:
        """Let the GPU finish what was started on the caller's stream. Before, nothing of this may be freed."""
        if self.sure.is_cuda:
            torch.cuda.current_stream(self.sure.device).synchronize()

    def unsure(self, count: int) -> Tensor | None:
        """Which of the first `count` queries are not sure, as in `Nearest`; see `wait`."""
        self.wait()
        if self.all_sure.item():  # nearly always
            return None
        unsure = (~self.sure[:count]).nonzero()[:, 0]
        return unsure if len(unsure) else None
