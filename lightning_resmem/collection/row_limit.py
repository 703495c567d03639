"""A sample of the rows of a pass: which of them a memory keeps, where it is to hold no more than so many."""

from dataclasses import dataclass
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.checks import repeated
from lightning_resmem.memory.growing import GrowingTensor
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.tasks import Task

_LAST = 2**63 - 1  # of all places


@dataclass(frozen=True)
class RowLimit:
    """How many rows a memory keeps, and which.

    The same rows are kept whatever the number of ranks, the batches and the order of the rows.

    Args:
        max_rows: At most so many; None for all.
        keep: `"uniform"`, or those that the base has most wrong, `"residual"`.

    Raises:
        InputError: If an argument is none of these.
    """

    max_rows: int | None = None
    keep: Literal["uniform", "residual"] = "uniform"

    def __post_init__(self) -> None:
        rows = self.max_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise InputError(f"max_rows={rows!r}: give a whole number of rows of at least 1, or None to keep all.")
        if self.keep not in ("uniform", "residual"):
            raise InputError(f'keep={self.keep!r} is not known: give "uniform" or "residual".')
        if self.keep != "uniform" and rows is None:
            raise InputError(f"keep={self.keep!r} chooses max_rows rows: give max_rows=... beside it.")

    def of(self, rows: int | None) -> int | None:
        """How many of so many rows are kept, as far as that is known."""
        return rows if self.max_rows is None else min(self.max_rows, self.max_rows if rows is None else rows)

    def check_tuning(self, on_own_rows: bool) -> None:
        """Raise an error if a memory is to be tuned on its own rows, and these are not rows like any."""
        if on_own_rows and self.keep == "residual":
            raise InputError(
                'keep="residual" keeps the rows that the base has most wrong, and tuned on these the memory would be '
                'trusted too much: give validation rows, tuner=None with params of your own, or keep="uniform".'
            )

    def may_tune(self) -> bool:
        """Whether a memory without validation rows may be tuned on its own; says so if not."""
        if self.keep == "residual":
            rank_zero_warn(
                'The memory is not tuned: there were no validation rows, and keep="residual" kept the training rows '
                "that the base has most wrong. Its params are those given, or measured; give validation rows to tune.",
                category=ResMemWarning,
            )
        return self.keep != "residual"

    def told(self, memory: ResidualMemory) -> str:
        """How many rows were memorized, for the log."""
        if self.max_rows is None:
            return f"{len(memory)} training rows"
        return f"{len(memory)} of {memory.provenance['rows_seen']} training rows, chosen by keep={self.keep!r}"

    def places(self, task: Task, chunk: Chunk) -> Tensor:
        """Where rows stand in line, shape `(n,)`, int64, on the CPU: the first `max_rows` are kept."""
        hashed = _hashed(chunk.ids.cpu())
        if self.keep == "uniform":
            return hashed
        wrong = task.residuals(chunk.outputs, task.check_targets(chunk.targets, chunk.outputs.shape[1]))
        # The upper bits of a float, two digits, are in its order; what differs by less is in that of the hashes.
        size = wrong.abs().sum(dim=1).float().cpu().view(torch.int32).long() >> 16
        return ((2**15 - 1 - size) << 48) | (hashed & (2**48 - 1))


class Kept:
    """Takes the rows of a pass, and has a memory keep those of a `RowLimit`.

    A rank never holds more than an eighth above `max_rows`, and one chunk.

    Args:
        limit: How many rows, and which.
        memory: Without rows.
    """

    def __init__(self, limit: RowLimit, memory: ResidualMemory) -> None:
        self._limit, self._memory, self._most = limit, memory, limit.max_rows
        self._staged = memory if limit.max_rows is None else memory.staged()
        self._ids, self._places = GrowingTensor(), GrowingTensor()
        self._last = _LAST  # places beyond it are not kept
        self._seen = 0

    def add(self, chunk: Chunk) -> None:
        """Take rows."""
        self._seen += len(chunk.ids)
        if self._most is not None:
            places = self._limit.places(self._memory.task, chunk)
            near = places <= self._last
            chunk, places = chunk.rows(near), places[near]
            self._ids.append(chunk.ids.cpu())
            self._places.append(places)
        if len(chunk.ids):
            self._staged.add(*chunk[:4], chunk.given_times)
        if self._most is not None and len(self._ids) > self._most + self._most // 8:
            self._cut(int(self._places.finish().kthvalue(self._most).values))

    def finish(self, ranks: Ranks) -> None:
        """Drop what is not kept, over all ranks: each of them calls this."""
        seen = sum(_counts(ranks, self._seen))
        if self._most is None or not seen:
            return
        places = self._places.finish().sort().values if len(self._places) else torch.zeros(0, dtype=torch.int64)
        if sum(_counts(ranks, len(places))) > self._most:
            low, high = -_LAST - 1, _LAST
            while low < high:
                middle = (low + high) // 2
                before = int(torch.searchsorted(places, middle, right=True))
                low, high = (low, middle) if sum(_counts(ranks, before)) >= self._most else (middle + 1, high)
            self._cut(low)
        if self._staged is not self._memory and len(self._staged):
            self._memory.take(self._staged)
        self._memory.provenance |= {"max_rows": str(self._most), "keep": self._limit.keep, "rows_seen": str(seen)}

    def _cut(self, last: int) -> None:
        """Keep no place beyond this one."""
        self._last = last
        if not len(self._ids):
            return
        kept = self._places.finish() <= last
        if not kept.all():
            gone, left = self._ids.finish()[~kept], self._ids.finish()[kept]
            both = gone[torch.isin(gone, left)].unique()
            if len(both):
                raise repeated(both)
            self._staged.remove(gone)
            self._ids.keep(kept)
            self._places.keep(kept)


def _counts(ranks: Ranks, count: int) -> list[int]:
    return [of_rank for of_rank in ranks.gather_objects(count) if isinstance(of_rank, int)]


def _hashed(ids: Tensor) -> Tensor:
    """A number for each id `(n,)` that looks random, another one for each: the finalizer of SplitMix64."""
    mixed = ids + -0x61C8864680B583EB
    mixed = (mixed ^ ((mixed >> 30) & (2**34 - 1))) * -0x40A7B892E31B1A47
    mixed = (mixed ^ ((mixed >> 27) & (2**37 - 1))) * -0x6B2FB644ECCEEE15
    return mixed ^ ((mixed >> 31) & (2**33 - 1))
