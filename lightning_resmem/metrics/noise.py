"""How much of a mean over rows is chance: its standard error, if rows are independent or only groups of them are.

The positions of a sequence go right or wrong together, and so do rows that are asked for at about the same time. Groups
are therefore told by the dtype: int64 numbers one for each row, as those of sequences are, and floating-point times.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Stretches of time whose means tell the error of rows that have times.
_STRETCHES = 10
# Of fewer groups the means tell next to nothing of how much they differ.
LEAST_GROUPS = 3


def error_of_rows(squares: Tensor, means: Tensor, rows: int) -> Tensor:
    """The standard error of means over independent rows, from means of squares; infinite for a single row.

    Examples:
        >>> error_of_rows(torch.tensor([0.5]), torch.tensor([0.5]), rows=2)
        tensor([0.5000])
    """
    if rows < 2:
        return torch.full_like(means, torch.inf)
    return ((squares - means.square()).clamp_min(0) / (rows - 1)).sqrt()


def error_of_groups(sums: Tensor, counts: Tensor) -> Tensor:
    """The standard error of means over rows of which only whole groups are independent (cluster-robust).

    Args:
        sums: Over the rows of each group, shape `(n, G)`, float64.
        counts: Of the rows of each group, shape `(G,)`; groups without rows are left out.

    Returns:
        Shape `(n,)`: that of independent rows if each is a group of its own; NaN for fewer than three groups.

    Examples:
        >>> error_of_groups(torch.tensor([[4.0, 0.0, 2.0, 2.0]]), torch.tensor([4.0, 4.0, 4.0, 4.0]))
        tensor([0.2041])
    """
    groups, rows = int((counts > 0).sum()), counts.sum()
    if groups < LEAST_GROUPS:
        return sums.new_full((len(sums),), torch.nan)
    apart = sums - counts * sums.sum(dim=1, keepdim=True) / rows
    error: Tensor = (apart.square().sum(dim=1) * groups / (groups - 1)).sqrt() / rows
    return error


def places(groups: Tensor, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> tuple[Tensor, int]:
    """Which group each row belongs to, `(n,)`, and how many there are on all ranks: G.

    Args:
        groups: Numbers of groups, or times, which make at most ten stretches of as many different times; shape `(n,)`.
        gather: Concatenates a tensor over all ranks.

    Examples:
        >>> places(torch.tensor([7, 7, 3]))
        (tensor([1, 1, 0]), 2)
    """
    groups = groups.cpu().contiguous()
    known = gather(groups).unique()
    place = torch.searchsorted(known, groups)
    if groups.is_floating_point():
        count = min(_STRETCHES, len(known))
        return place * count // max(1, len(known)), count
    return place, len(known)


class Groups:
    """Which of the rows of a process go right or wrong together, over all ranks.

    Args:
        groups: As for `places`; None where rows are independent.
        gather: Concatenates a tensor over all ranks.

    Attributes:
        place: Of each row among the groups, shape `(V,)`, on the CPU; None where rows are independent.
        count: How many groups there are; 0 where rows are independent.
    """

    def __init__(self, groups: Tensor | None, gather: Callable[[Tensor], Tensor] = lambda rows: rows) -> None:
        self.place: Tensor | None = None
        self.count = 0
        if groups is not None:
            self.place, self.count = places(groups, gather)
        self._gather = gather

    def errors(self, gains: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Standard errors of mean gains over the rows of all ranks.

        Args:
            gains: Of the rows of this rank, or of some of them, shape `(n, V)`.
            rows: Which they are, where these are some.

        Returns:
            Shape `(n,)`, float64, on the CPU: 0 where rows are independent, NaN where groups are too few to tell.
        """
        if self.place is None:
            return torch.zeros(len(gains), dtype=torch.float64)
        sums = self.sums(torch.cat([gains, torch.ones_like(gains[:1])]), rows)
        return error_of_groups(sums[:-1], sums[-1])

    def sums(self, columns: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """Of columns `(n, V)` over the rows of each group, of all ranks: `(n, G)`, float64, on the CPU."""
        assert self.place is not None
        columns = columns.double()
        place = self.place[rows if isinstance(rows, slice) else rows.cpu()].to(columns.device)
        sums = columns.new_zeros(len(columns), self.count).index_add_(1, place, columns)
        return self._gather(sums[None].cpu()).sum(dim=0)


def decisive(of_rows: float, of_groups: float) -> float:
    """The error that a decision is made by: the larger one; that of rows, where groups are too few to tell theirs."""
    return of_rows if math.isnan(of_groups) else max(of_rows, of_groups)


def told(of_rows: float, of_groups: float) -> float:
    """The error that is reported: the larger one; NaN, where groups are too few to tell theirs."""
    return of_groups if math.isnan(of_groups) else max(of_rows, of_groups)


def plus_minus(error: float, form: str = ".4f") -> str:
    """An error as it is written behind a gain.

    Examples:
        >>> plus_minus(0.01), plus_minus(math.nan)
        ('± 0.0100', '± ?')
    """
    return "± ?" if math.isnan(error) else f"± {error:{form}}"
