"""Rows that follow a module to another device."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class Movable(nn.Module):
    """A module whose rows, which are neither parameters nor buffers, move with `.to(device)` and keep their dtype."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the rows are."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `.to(device)` moves the rows, but `.half()` or a trainer's precision must not round keys and residuals.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = fn(torch.empty(0)).device
        if device != self.device:
            self._move(device)
        return self

    def _move(self, device: torch.device) -> None:
        """Move all rows to a device."""
