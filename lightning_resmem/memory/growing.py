"""Rows that arrive chunk by chunk, kept without ever needing twice their memory."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# Large enough that the allocator maps each block on its own and returns it when it is freed.
_BLOCK_BYTES = 32 * 2**20


class Mark(NamedTuple):
    """What a tensor consisted of before rows were appended."""

    blocks: tuple[Tensor, ...]
    filled: int
    length: int
    reserved: int


class GrowingTensor:
    """A tensor `(N, ...)` that grows along its first dimension.

    Chunks are copied into blocks of 32 MiB; `finish` joins the blocks one by one, freeing each as it goes. The peak is
    the bytes of the rows plus one block, whatever the number of chunks. With `reserve`, nothing is ever copied again.

    Examples:
        >>> rows = GrowingTensor()
        >>> rows.append(torch.zeros(2, 3)); rows.append(torch.ones(1, 3))
        >>> len(rows), rows.finish().shape
        (3, torch.Size([3, 3]))
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._filled = 0  # rows in use of the last block
        self._length = 0
        self._reserved = 0

    def __len__(self) -> int:
        return self._length

    @property
    def dtype(self) -> torch.dtype | None:
        """What rows are stored as; None before the first."""
        return self._blocks[0].dtype if self._blocks else None

    @property
    def nbytes(self) -> int:
        """Bytes of the rows."""
        first = self._blocks[0] if self._blocks else torch.empty(0)
        return self._length * first.shape[1:].numel() * first.element_size()

    def mark(self) -> Mark:
        """What there is now, for `restore`."""
        return Mark(tuple(self._blocks), self._filled, self._length, self._reserved)

    def restore(self, mark: Mark) -> None:
        """Forget what was appended since."""
        self._blocks = list(mark.blocks)
        _, self._filled, self._length, self._reserved = mark

    def reserve(self, rows: int) -> None:
        """Expect `rows` more rows: the next block is made large enough for all of them."""
        self._reserved = max(self._reserved, rows)

    def append(self, chunk: Tensor) -> None:
        """Copy the rows of `chunk` `(n, ...)` to the end."""
        if not self._blocks and not chunk.shape[0]:
            self._blocks = [chunk]  # no rows, but their shape and dtype
        self._length += chunk.shape[0]
        while chunk.shape[0]:
            if not self._blocks or self._filled == self._blocks[-1].shape[0]:
                row_bytes = max(1, chunk[0].numel() * chunk.element_size())
                rows = max(self._reserved, _BLOCK_BYTES // row_bytes, 1)
                self._blocks.append(torch.empty(rows, *chunk.shape[1:], dtype=chunk.dtype, device=chunk.device))
                self._filled = self._reserved = 0
            block = self._blocks[-1]
            taken = min(block.shape[0] - self._filled, chunk.shape[0])
            block[self._filled : self._filled + taken] = chunk[:taken]
            self._filled += taken
            chunk = chunk[taken:]

    def finish(self) -> Tensor:
        """All rows as one tensor; more may be appended afterwards."""
        if not self._blocks:
            raise ValueError("no rows were appended")
        if len(self._blocks) == 1:
            return self._blocks[0][: self._filled]
        first = self._blocks[0]
        joined = torch.empty(self._length, *first.shape[1:], dtype=first.dtype, device=first.device)
        del first
        start, blocks = 0, self._blocks[::-1]
        self._blocks = [joined]
        while blocks:
            block = blocks.pop()
            rows = block[: self._filled] if not blocks else block
            joined[start : start + rows.shape[0]] = rows
            start += rows.shape[0]
            del block, rows
        self._filled = self._length
        return joined

    def replace(self, rows: Tensor) -> None:
        """Hold exactly `rows` from now on."""
        self._blocks, self._filled, self._length, self._reserved = [rows], rows.shape[0], rows.shape[0], 0

    def reorder(self, order: Tensor) -> None:
        """Row `i` becomes what row `order[i]` was; an eighth of the rows' bytes is needed meanwhile."""
        columns = self.finish().flatten(1) if self.finish().ndim > 1 else self.finish()[:, None]
        for part in columns.split(max(1, columns.shape[1] // 8), dim=1):
            part.copy_(part[order])

    def keep(self, kept: Tensor) -> None:
        """Drop the rows where `kept` `(N,)` is false; the others move together in place."""
        rows, end = self.finish(), 0
        step = max(1, _BLOCK_BYTES // max(1, rows[:1].numel() * rows.element_size()))
        for start in range(0, len(rows), step):
            moved = rows[start : start + step][kept[start : start + step]]  # a copy, so regions may overlap
            rows[end : end + len(moved)] = moved
            end += len(moved)
        self._length = self._filled = end

    def __getstate__(self) -> dict[str, Any]:
        rows = self.finish() if self._blocks else None
        if rows is not None and rows.untyped_storage().nbytes() > 2 * rows.nbytes:
            # Much of the block is empty. The copy is kept: processes that are spawned map it from here.
            rows = rows.clone()
            self._blocks = [rows]
        blocks = [] if rows is None else [rows]
        return {"_blocks": blocks, "_filled": self._length, "_length": self._length, "_reserved": self._reserved}
