"""What one rank reads of one loader: batches, and the ids of their rows."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.samplers import WAY_OUT, Positions, length, own_batches
from lightning_resmem.errors import InputError

# Rows per batch where the user's loader does not say.
_BATCH_SIZE = 64
# Batches of an iterable whose order is compared between two readings.
_COMPARED_BATCHES = 4


@dataclass(frozen=True)
class Part:
    """What one rank reads of one loader.

    Attributes:
        batches: Yields the batches.
        ids: `ids(batch_index, first_row, count)` are the ids of a batch of `count` rows, after `first_row` rows of the
            batches before it.
        num_batches: How many batches there are, if it is known.
        num_rows: How many rows there are, if it is known.
        sample: Yields one small batch, for a rehearsal; None where reading a row would use it up.
        others: Yield another such batch each, from elsewhere in the dataset.
        start: Yields the first batches of an iterable without positions that can be read again, else None.
        drawn: The rows of all ranks, in short: the same on every rank.
        dataset: What the rows belong to, for messages.
        kind: Of rows that are not to be memorized, for messages: "validation rows".
        first_id: The id of its first row.
        stride: Of sequences, ids from one to the next: then `first_id`, `num_rows` and `ids` are those of sequences.
        note: What the user should know about the choice of rows.
    """

    batches: Iterable[Any]
    ids: Callable[[int, int, int], Tensor]
    num_batches: int | None = None
    num_rows: int | None = None
    sample: Iterable[Any] | None = None
    others: Sequence[Iterable[Any]] = ()
    start: Iterable[Any] | None = None
    drawn: str = ""
    dataset: str = ""
    kind: str = ""
    first_id: int = 0
    stride: int = 1
    note: str = ""

    @property
    def named(self) -> str:
        """The dataset, and which rows of it, for messages."""
        return f"the {self.kind} of {self.dataset}" if self.kind else self.dataset

    def numbers(self, ids: Tensor) -> Tensor:
        """The ids of rows, counted from the first of the dataset."""
        return ids - self.first_id * self.stride


@dataclass(frozen=True)
class Share:
    """Which of the rows are read: those of rank `rank` of `world_size`, at most `limit` batches of them."""

    rank: int = 0
    world_size: int = 1
    limit: int | None = None

    def of(self, rows: Sequence[Any]) -> Sequence[Any]:
        return rows[self.rank :: self.world_size]


def part_of_rows(loader: DataLoader[Any], positions: Sequence[int], share: Share, first_id: int) -> Part:
    """A loader that collates rows into batches."""
    rows = share.of(positions)
    batch_size = _batch_size(loader)
    most = None if share.limit is None else share.limit * share.world_size
    batches = own_batches(loader, rows, most) if len(rows) else None
    if batches is not None:
        rows = [row for batch in batches for row in batch]
    elif share.limit is not None:
        rows = rows[: share.limit * batch_size]
    # A collate_fn of the user's own may want a whole batch, and any batch may be of rows that fit no others.
    small = min(2, batch_size) if loader.collate_fn is default_collate else batch_size

    def sample(start: int) -> DataLoader[Any]:
        if batches is not None:
            return rebuilt(loader, batches=batches[start : start + 1], num_workers=0)
        return rebuilt(loader, rows[start : start + small], small, num_workers=0)

    def ids(_: int, first_row: int, count: int) -> Tensor:
        taken = rows[first_row : first_row + count]
        if len(taken) < count:
            raise InputError(
                f"The batches of {type(loader.dataset).__name__} have more rows than it has positions "
                f"({first_row + count} for {len(rows)}), so a row has no id: does collate_fn repeat or cut rows, or "
                "put the positions of sequences first, (T, B)? "
                f"{WAY_OUT}"
            )
        found: Tensor = torch.from_numpy(as_array(taken) + first_id)
        return found

    places = range(len(rows) if batches is None else len(batches))
    last = max(0, len(rows) - small) if batches is None else len(places) - 1
    return Part(
        batches=rebuilt(loader, rows, batch_size) if batches is None else rebuilt(loader, batches=batches),
        ids=ids,
        num_batches=-(-len(rows) // batch_size) if batches is None else len(batches),
        num_rows=len(rows),
        sample=sample(0) if places else None,
        others=[sample(len(places) // 2), sample(last)] if len(places) > 1 else [],
        dataset=type(loader.dataset).__name__,
        first_id=first_id,
    )


def part_of_items(
    loader: DataLoader[Any],
    items: Sequence[int],
    share: Share,
    first_id: int,
    count_rows: Callable[[Any], int],
) -> tuple[Part, int]:
    """`batch_size=None`: every item is a batch already, of as many rows as the first (the last may have less)."""
    size = 0
    if len(items):
        with isolate_rng(include_cuda=False):
            size = count_rows(next(iter(rebuilt(loader, items[:1], num_workers=0))))
    last = items[-1] if len(items) else 0
    mine = share.of(items)[: share.limit]

    def ids(batch_index: int, _: int, count: int) -> Tensor:
        item = mine[batch_index]
        if count != size and not (item == last and count < size):
            raise InputError(
                f"With batch_size=None item {item} of {type(loader.dataset).__name__} has {count} rows and the first "
                f"has {size}, so rows have no positions. {WAY_OUT}"
            )
        start: int = first_id + item * size
        return torch.arange(start, start + count)

    part = Part(
        batches=rebuilt(loader, mine),
        ids=ids,
        num_batches=len(mine),
        sample=rebuilt(loader, mine[:1], num_workers=0) if len(mine) else None,
        dataset=type(loader.dataset).__name__,
        first_id=first_id,
    )
    return part, size * length(loader.dataset)


def part_of_batches(batches: Sequence[Any], count_rows: Callable[[Any], int], share: Share) -> Part:
    """A list of batches, the same on every rank."""
    counts = [count_rows(batch) for batch in batches]
    starts = [0, *accumulate(counts)]
    mine = share.of(range(len(batches)))[: share.limit]

    def ids(index: int, _: int, count: int) -> Tensor:
        start: int = starts[mine[index]]
        return torch.arange(start, start + count)

    return Part(
        batches=[batches[place] for place in mine],
        ids=ids,
        num_batches=len(mine),
        num_rows=sum(counts[place] for place in mine),
        sample=[batches[place] for place in mine[:1]] or None,
        drawn=f"{starts[-1]} rows in a list of {len(batches)} batches",
        dataset="the list of batches",
    )


def part_of_iterable(batches: Iterable[Any], share: Share) -> Part:
    """Batches without positions: rows are counted in the order they come.

    Where a length is known, it is that of an epoch, and what yields the batches may have no end.
    """
    start: Iterable[Any] | None = None
    dataset: Any = batches
    if isinstance(batches, DataLoader):
        dataset = batches.dataset
        if batches.drop_last and type(batches).__iter__ is DataLoader.__iter__:
            batches = rebuilt(batches, batch_size=batches.batch_size)
    elif iter(batches) is not iter(batches):
        start = First(batches, _COMPARED_BATCHES)
    size = sized_len(batches)
    # Each worker has a last batch of its own, which the length does not count.
    most = None if size is None else size + getattr(batches, "num_workers", 0)
    limit = min((count for count in (share.limit, most) if count is not None), default=None)
    return Part(
        batches=batches if limit is None else First(batches, limit),
        ids=lambda _, first_row, count: share.rank + share.world_size * torch.arange(first_row, first_row + count),
        num_batches=min((count for count in (share.limit, size) if count is not None), default=None),
        start=start,
        dataset=type(dataset).__name__,
    )


def rebuilt(
    loader: DataLoader[Any],
    rows: Sequence[int] | None = None,
    batch_size: int | None = None,
    num_workers: int | None = None,
    batches: list[list[int]] | None = None,
) -> DataLoader[Any]:
    """A plain DataLoader that reads `rows` of the same dataset (None: all) in their order, or these `batches` of them.

    Rows are collated as the user's loader does.
    """
    workers = loader.num_workers if num_workers is None else num_workers
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": loader.collate_fn, "pin_memory": loader.pin_memory}
    if workers:
        options |= {
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "worker_init_fn": loader.worker_init_fn,
        }
    if batches is not None:
        return DataLoader(loader.dataset, batch_sampler=batches, **options)
    sampler: Any = rows
    if type(loader.dataset) is TensorDataset and loader.collate_fn is default_collate and rows and batch_size:
        # The same batches, several times faster: one gather per tensor instead of a look-up per row and a stack.
        sampler, batch_size = torch.from_numpy(as_array(rows)).split(batch_size), None
        options["collate_fn"] = list
    return DataLoader(loader.dataset, batch_size=batch_size, sampler=sampler, **options)


def as_array(numbers: Sequence[int]) -> Positions:
    """Positions as an array."""
    if isinstance(numbers, range):  # a hundred times faster than one by one
        return np.arange(numbers.start, numbers.stop, numbers.step, dtype=np.int64)
    return np.asarray(numbers, dtype=np.int64)


class First:
    """The first batches of an iterable."""

    def __init__(self, batches: Iterable[Any], count: int) -> None:
        self._batches, self._count = batches, count

    def __iter__(self) -> Iterator[Any]:
        return islice(self._batches, self._count)


def _batch_size(loader: DataLoader[Any]) -> int:
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return size if isinstance(size, int) and size > 0 else _BATCH_SIZE


def count_rows(ranks: Ranks, parts: list[Part]) -> int | None:
    """How many rows all ranks will read, None if that is not known."""
    counts = [part.num_rows for part in parts if part.num_rows is not None]
    gathered = ranks.gather_objects(sum(counts) if len(counts) == len(parts) else None)
    known = [count for count in gathered if isinstance(count, int)]
    return sum(known) if len(known) == len(gathered) else None
