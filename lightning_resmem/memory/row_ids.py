"""The ids of the rows of a memory, and where each of them is."""

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import check_different
from lightning_resmem.memory.growing import GrowingTensor, Mark

# Ids for each row up to which a table says where a row is; beyond, ids are searched for, which is slower.
_TABLE_IDS = 8


class RowIds:
    """Ids in the order of the rows, which is ascending once they are sorted.

    Attributes:
        last: The largest id that was ever added, -1 before.

    Examples:
        >>> ids = RowIds()
        >>> ids.append(torch.tensor([3, 7])); ids.append(torch.tensor([5]))
        >>> ids.sort()
        tensor([0, 2, 1])
        >>> ids.positions(torch.tensor([7, 4]))
        tensor([ 2, -1])
    """

    def __init__(self) -> None:
        self.last = -1
        self._ids = GrowingTensor()
        self._ascending = True  # they arrived so, as far as they did
        self._table: Tensor | None = None  # of the ids as they are now
        self._largest: int | None = None  # of them

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the ids."""
        return self._ids.nbytes

    def finish(self) -> Tensor:
        """All ids, shape `(N,)`."""
        return self._ids.finish()

    def reserve(self, rows: int) -> None:
        """Expect `rows` more ids."""
        self._ids.reserve(rows)

    def append(self, ids: Tensor, device: torch.device | None = None) -> None:
        """Add the ids `(n,)` of new rows, which are best looked at on the CPU, and keep them on a device."""
        if len(ids):
            self._ascending &= int(ids[0]) > self.last and bool((ids[1:] > ids[:-1]).all())
            self.last = max(self.last, int(ids.max()))
        self._ids.append(ids.to(device))
        self._changed()

    def mark(self) -> tuple[Mark, int, bool]:
        """What there is now, for `restore`."""
        return self._ids.mark(), self.last, self._ascending

    def restore(self, mark: tuple[Mark, int, bool]) -> None:
        """Forget what was appended since."""
        held, self.last, self._ascending = mark
        self._ids.restore(held)
        self._changed()

    def replace(self, ids: Tensor) -> None:
        """Hold exactly these ids `(N,)`, ascending."""
        self._ids.replace(ids)
        self.last, self._ascending = int(ids[-1]), True
        self._changed()

    def keep(self, kept: Tensor) -> None:
        """Drop the ids where `kept` `(N,)` is false; the tensor that `finish` returned before stays as it is."""
        self._ids.replace(self._ids.finish()[kept])
        self._changed()

    def sort(self) -> Tensor | None:
        """Put the ids in ascending order.

        Returns:
            Where each was, shape `(N,)`, for the rows to follow; None if nothing has to move.

        Raises:
            InputError: If an id is repeated; nothing is changed then.
        """
        if self._ascending:
            return None
        ordered, order = self._ids.finish().sort()
        check_different(ordered)
        self._ids.replace(ordered)
        self._ascending = True
        self._changed()
        return order

    def to(self, device: torch.device) -> None:
        """Move all ids."""
        self._ids.replace(self._ids.finish().to(device))
        self._changed()

    def positions(self, ids: Tensor) -> Tensor:
        """Where ids of any shape are among the sorted ones, -1 for those that are not."""
        if not len(self):
            return torch.full_like(ids, -1)
        known, largest = self._ids.finish(), self._last()
        if largest == len(known) - 1:  # ids are 0, 1, 2, ...: the position is the id
            return ids.where(ids < len(known), -1)
        if largest >= _TABLE_IDS * len(known):
            positions = torch.searchsorted(known, ids).clamp_max(len(known) - 1)
            return positions.where(known[positions] == ids, -1)
        table = self._table
        if table is None:
            table = torch.full((largest + 2,), -1, device=known.device)
            table[known] = torch.arange(len(known), device=known.device)
            self._table = table
        return table[ids.clamp(-1, len(table) - 1)]  # its last entry is for ids that are too large

    def at(self, positions: Tensor) -> Tensor:
        """The sorted ids at positions of any shape, -1 for -1. There have to be some."""
        if self._last() == len(self._ids) - 1:  # as above
            return positions
        return self._ids.finish()[positions].masked_fill_(positions < 0, -1)

    def _last(self) -> int:
        """The largest of the sorted ids, read once: a GPU would be waited for every time."""
        if self._largest is None:
            self._largest = int(self._ids.finish()[-1])
        return self._largest

    def known_positions(self, ids: Tensor) -> Tensor:
        """Where ids `(n,)` are among the sorted ones.

        Raises:
            InputError: If one is not.
        """
        positions = self.positions(ids)
        _check_known(ids, positions >= 0)
        return positions

    def all_positions(self, ids: Tensor) -> Tensor:
        """Where the rows of ids `(n,)` are, in any order: of an id that is repeated, all of them.

        Raises:
            InputError: If an id is not in the memory.
        """
        if self._ascending:
            return self.known_positions(ids)
        known = self._ids.finish()
        _check_known(ids, torch.isin(ids, known))
        return torch.isin(known, ids).nonzero()[:, 0]

    def _changed(self) -> None:
        self._table = self._largest = None


def _check_known(ids: Tensor, known: Tensor) -> None:
    if not known.all():
        raise InputError(f"ids {ids[~known][:5].tolist()} are not in the memory. `memory.ids` lists those that are.")
