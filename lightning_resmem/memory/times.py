"""When rows were known, and when a memory is asked: a query recalls only what was known by then."""

import copy
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import as_tensor

# Whole numbers up to this are float64 numbers, and so are their comparisons.
_LARGEST = 2**53


def as_times(name: str, value: Any) -> Tensor:
    """Times as float64; raises an error for what float64 would round, or another dtype has rounded, and for NaN."""
    if isinstance(value, (int, float, list, tuple)):
        with suppress(ValueError, TypeError):
            value = np.asarray(value)  # of Python's floats torch would make float32
    times = as_tensor(name, value).detach()
    _check_exact(name, times)
    times = times.double()
    if bool(times.isnan().any()):
        raise InputError(f"{name} holds NaN: give inf for a row that is never known, -inf for one that always is.")
    return times


def _check_exact(name: str, times: Tensor) -> None:
    is_half = times.dtype in (torch.float16, torch.bfloat16)
    largest = int(2 / torch.finfo(times.dtype).eps) if times.is_floating_point() else _LARGEST
    wide = times.dtype == torch.float64 or not times.numel()
    sizes = (times if times.is_floating_point() else times.long()).abs()  # in int32 the largest would wrap around
    if wide or not (is_half or bool((sizes.where(times.isfinite(), 0) > largest).any())):
        return
    if times.is_floating_point():
        raise InputError(
            f"{name} has dtype {times.dtype}, which rounds times: it has every whole number up to {largest} only. Give "
            "float64 or int64. From int64, `column + 0.5` makes float32 (`column.double() + 0.5` does not), and a "
            'Trainer with precision="16-true" or "bf16-true" halves the floats of a batch: there, give int64.'
        )
    raise InputError(
        f"{name} holds {int(times.abs().max())}, times are compared as float64, which has every whole number up to "
        "2**53 only: give microseconds (// 1000) in the place of nanoseconds, or seconds."
    )


def checked_times(times: Any, count: int) -> Tensor:
    """Times of `count` rows as `ResidualMemory.add` takes them, `(count, 2)`, float64, on the CPU."""
    checked = as_times("times", times).cpu()
    if checked.shape != (count, 2):
        raise InputError(
            f"times has shape {tuple(checked.shape)}, expected ({count}, 2): for every row when it is asked for, and "
            "when its target is known."
        )
    return checked


class Dated:
    """Asks a memory at a time.

    Attributes:
        asked_at: When it is asked: one time for all queries, or one for each, `(B,)`; None for a memory as it is.
    """

    asked_at: Tensor | None = None
    build: Callable[[], None]

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def are_dated(self) -> bool:
        """Whether rows have times."""

    def at(self, asked_at: Any) -> Self:
        """This memory as it was known at some time, that moment included: rows that were known later do not count.

        It is for asking, in any way that a memory can be asked: `memory.at(now).predict(queries, outputs)`. Where
        fewer than `k` rows were known, those answer; where none was, the base alone. Make one for each question: it has
        the params of now, and the rows until `clear`.

        Args:
            asked_at: A number, or one for each of the queries that follow, shape `(B,)`; None is the memory itself.

        Raises:
            InputError: If these are no times.

        Examples:
            >>> import torch
            >>> from lightning_resmem import LocalMemory, ResMemParams
            >>> memory = LocalMemory(params=ResMemParams(k=1))
            >>> times = torch.tensor([[0, 2], [3, 5]])  # the second row is asked for at 3 and known from 5 on
            >>> memory.add(torch.eye(2), torch.zeros(2, 2), torch.tensor([0, 1]), times=times)
            >>> memory.at([4, 5]).search(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), k=2).ids
            tensor([[ 0, -1],
                    [ 1,  0]])
        """
        if asked_at is None:
            return self
        times = as_times("asked_at", asked_at)
        if times.ndim > 1:
            raise InputError(f"asked_at has shape {tuple(times.shape)}, expected (B,), or a single number.")
        if len(self):
            _ = self.params  # type: ignore[attr-defined]  # measured once: each view would do it for itself
        return self._view(times)

    def for_queries(self, rows: slice | Tensor) -> Self:
        """This memory, asked when some of the queries are."""
        times = self.asked_at
        return (
            self
            if times is None or not times.ndim
            else self.at(times[rows if isinstance(rows, slice) else rows.to(times.device)])
        )

    def at_rows(self, ids: Tensor) -> Self:
        """This memory, asked when the queries that became these rows `(n,)` were; itself, if rows have no times."""
        return self._view(self._row_times(ids)[:, 0].contiguous()) if self.are_dated else self

    def _view(self, times: Tensor) -> Self:
        if len(self):
            self.build()
        view = copy.copy(self)
        view.asked_at = times
        return view

    def _asked(self, count: int) -> Tensor | None:
        """When each of so many queries is asked, `(count,)`."""
        times = self.asked_at
        if times is None or not times.ndim:
            return None if times is None else times.expand(count).contiguous()
        if len(times) != count:
            raise InputError(
                f"The memory is asked at {len(times)} times for {count} queries: give one for every query."
            )
        return times

    @abstractmethod
    def _row_times(self, ids: Tensor) -> Tensor:
        """When rows `(n,)` were asked for and known, `(n, 2)`; for rows that have times."""


def check_asked(asked_at: Tensor | None, are_dated: bool) -> None:
    """Raise an error if rows have times and a query has none, or the other way round."""
    if are_dated and asked_at is None:
        raise InputError(
            "The rows of this memory have times, so it must be told when it is asked: memory.at(now), "
            "module.predictions(batch, at=now), or times_fn= for ResMemCallback, memorize and ResMemModule."
        )
    if asked_at is not None and not are_dated:
        raise InputError(
            "The memory is asked at some time, but its rows have none: give memory.add(times=...), or the times_fn "
            "that the queries have to ResMemCallback or memorize as well."
        )


def mixed_times(are_dated: bool) -> InputError:
    """The error for rows with times beside rows without."""
    held, new = ("times", "none") if are_dated else ("no times", "some")
    return InputError(
        f"The rows of this memory have {held}, and the new ones {new}: give times= with all, or with none."
    )
