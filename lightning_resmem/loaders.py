"""Every row of a training set exactly once: which rows a loader trains on, and a loader that reads a rank's part.

A user's loader shuffles, drops the last batch, repeats rows, or yields different rows on every rank. The memory needs
each row once, in the dataset's order, with its position as id. So the loader is rebuilt around the same dataset and
`collate_fn`, with the positions as its sampler.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_resmem.errors import InputError

# Rows per batch where the user's loader does not say (a batch sampler of the user's own).
_BATCH_SIZE = 64
_WAY_OUT = (
    "Give memory_dataloader=DataLoader(dataset, batch_size=..., shuffle=False) with the rows to memorize, each of them "
    "once."
)


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
    """

    batches: Iterable[Any]
    ids: Callable[[int, int, int], Tensor]
    num_batches: int | None = None
    num_rows: int | None = None
    sample: Iterable[Any] | None = None


def plan(
    loaders: Any,
    count_rows: Callable[[Any], int],
    rank: int = 0,
    world_size: int = 1,
    limit_batches: int | None = None,
) -> list[Part]:
    """Plan how a rank reads its rows of a loader.

    Rank `r` reads the rows `r, r + world_size, ...` of those that the loader trains on. An iterable without positions
    (an `IterableDataset`, a generator) is read as it is: its rows are counted, and over several
    ranks the user shards it.

    Args:
        loaders: A `DataLoader`, any iterable of batches, or a dict, list or `CombinedLoader` of them. The ids of a
            second loader continue after the dataset of the first.
        count_rows: The number of rows of a batch.
        rank: This process.
        world_size: Number of processes.
        limit_batches: Read only so many batches of each loader on each rank.

    Raises:
        InputError: If a loader's rows cannot be read exactly once; the message says what to do.
    """
    flat = [loader for loader in CombinedLoader(loaders).flattened if loader is not None]
    if not flat:
        raise InputError(f"There is no loader to read rows from. {_WAY_OUT}")
    parts, first_id = [], 0
    for loader in flat:
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if len(flat) > 1:
                raise InputError(
                    f"{type(loader).__name__} is one of {len(flat)} loaders and has no positions, so the ids of the "
                    f"others have no start. {_WAY_OUT}"
                )
            return [_plan_iterable(loader, rank, world_size, limit_batches)]
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise InputError(
                f"{type(loader).__name__} has an __iter__ of its own, so its batches cannot be rebuilt row by row. "
                f"{_WAY_OUT}"
            )
        if loader.batch_size is None and loader.batch_sampler is None:
            part, size = _plan_items(loader, count_rows, rank, world_size, limit_batches, first_id)
        else:
            part, size = _plan_rows(loader, rank, world_size, limit_batches, first_id), _length(loader.dataset)
        parts.append(part)
        first_id += size
    return parts


def _plan_rows(loader: DataLoader[Any], rank: int, world_size: int, limit: int | None, first_id: int) -> Part:
    """A loader that collates rows into batches."""
    rows = training_positions(loader)[rank::world_size]
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or _BATCH_SIZE
    if limit is not None:
        rows = rows[: limit * batch_size]
    all_ids = torch.tensor(rows, dtype=torch.int64) + first_id

    def ids(_: int, first_row: int, count: int) -> Tensor:
        taken = all_ids[first_row : first_row + count]
        if len(taken) < count:
            raise InputError(
                f"The batches of {type(loader.dataset).__name__} have more rows than it has positions "
                f"({first_row + count} for {len(all_ids)}), so a row has no id: does collate_fn repeat or cut rows? "
                f"{_WAY_OUT}"
            )
        return taken

    return Part(
        batches=rebuilt(loader, rows, batch_size),
        ids=ids,
        num_batches=-(-len(rows) // batch_size),
        num_rows=len(rows),
        sample=rebuilt(loader, rows[:2], 2, num_workers=0) if len(rows) else None,
    )


def _plan_items(
    loader: DataLoader[Any],
    count_rows: Callable[[Any], int],
    rank: int,
    world_size: int,
    limit: int | None,
    first_id: int,
) -> tuple[Part, int]:
    """`batch_size=None`: every item is a batch already, of as many rows as the first (the last may have less)."""
    items = training_positions(loader)
    size = 0
    if len(items):
        with isolate_rng():
            size = count_rows(next(iter(rebuilt(loader, items[:1], None, num_workers=0))))
    last = items[-1] if len(items) else 0
    mine = items[rank::world_size] if limit is None else items[rank::world_size][:limit]

    def ids(batch_index: int, _: int, count: int) -> Tensor:
        item = mine[batch_index]
        if count != size and not (item == last and count < size):
            raise InputError(
                f"With batch_size=None item {item} of {type(loader.dataset).__name__} has {count} rows and the first "
                f"has {size}, so rows have no positions. {_WAY_OUT}"
            )
        return torch.arange(count) + (first_id + item * size)

    part = Part(
        batches=rebuilt(loader, mine, None),
        ids=ids,
        num_batches=len(mine),
        sample=rebuilt(loader, mine[:1], None, num_workers=0) if len(mine) else None,
    )
    return part, size * _length(loader.dataset)


def _plan_iterable(batches: Iterable[Any], rank: int, world_size: int, limit: int | None) -> Part:
    """Batches without positions: rows are counted in the order they come."""
    return Part(
        batches=batches if limit is None else _Limited(batches, limit),
        ids=lambda _, first_row, count: rank + world_size * torch.arange(first_row, first_row + count),
        num_batches=limit,
    )


def rebuilt(
    loader: DataLoader[Any], rows: Sequence[int], batch_size: int | None, num_workers: int | None = None
) -> DataLoader[Any]:
    """A plain DataLoader that reads `rows` of the same dataset, in their order, collated the same way."""
    workers = loader.num_workers if num_workers is None else num_workers
    parallel: dict[str, Any] = {}
    if workers:
        parallel = {
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "worker_init_fn": loader.worker_init_fn,
        }
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=rows,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        **parallel,
    )


def training_positions(loader: DataLoader[Any]) -> Sequence[int]:
    """The dataset positions that a loader draws from, ascending, each once.

    Args:
        loader: A loader over a map-style dataset.

    Raises:
        InputError: If that cannot be told from its sampler.

    Example:
        >>> data = torch.utils.data.TensorDataset(torch.arange(4))
        >>> training_positions(DataLoader(data, batch_size=2, shuffle=True, drop_last=True))
        range(0, 4)
        >>> training_positions(DataLoader(data, sampler=SubsetRandomSampler([3, 1])))
        [1, 3]
    """
    everything = range(_length(loader.dataset))
    batch_sampler = loader.batch_sampler
    if batch_sampler is None or type(batch_sampler) is BatchSampler:
        sampler: Any = loader.sampler
    else:
        # DataLoader puts a SequentialSampler beside a batch sampler of the user's own; it is not the one that is used.
        sampler = getattr(batch_sampler, "sampler", batch_sampler)
    if isinstance(sampler, DistributedSamplerWrapper):
        sampler = getattr(sampler.dataset, "_sampler", sampler)
    kind = type(sampler)
    if kind in (SequentialSampler, RandomSampler) or isinstance(sampler, DistributedSampler):
        return everything
    if kind is SubsetRandomSampler or isinstance(sampler, (list, range)):
        rows = sorted({int(row) for row in (sampler.indices if kind is SubsetRandomSampler else sampler)})
        return everything if len(rows) == len(everything) else rows
    if kind is WeightedRandomSampler:
        drawn: list[int] = torch.as_tensor(sampler.weights).nonzero()[:, 0].tolist()
        return everything if len(drawn) == len(everything) else drawn
    return _drawn_in_one_epoch(sampler, loader, everything)


def _drawn_in_one_epoch(sampler: Any, loader: DataLoader[Any], everything: range) -> range:
    """All rows, if one epoch of an unknown sampler draws all of them but for what `drop_last` drops."""
    with isolate_rng():
        drawn: set[int] = set()
        try:
            for item in copy.deepcopy(sampler):
                drawn.update(
                    map(int, item) if isinstance(item, (list, tuple, np.ndarray, torch.Tensor)) else (int(item),)
                )
        except TypeError:
            raise InputError(
                f"{type(sampler).__name__} yields something else than positions, so the rows it trains on cannot be "
                f"told. {_WAY_OUT}"
            ) from None
    largest_dropped = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None) or _BATCH_SIZE
    if len(everything) - len(drawn) >= largest_dropped:
        raise InputError(
            f"{type(sampler).__name__} draws {len(drawn)} of the dataset's {len(everything)} rows in an epoch, so it "
            f"is not clear which rows it trains on in all. {_WAY_OUT}"
        )
    return everything


class _Limited:
    """The first batches of an iterable."""

    def __init__(self, batches: Iterable[Any], limit: int) -> None:
        self._batches, self._limit = batches, limit

    def __iter__(self) -> Any:
        for index, batch in enumerate(self._batches):
            if index >= self._limit:
                return
            yield batch


def _length(dataset: Any) -> int:
    try:
        return len(dataset)
    except TypeError:
        raise InputError(f"{type(dataset).__name__} has no length, so its rows cannot be counted. {_WAY_OUT}") from None


def num_unpadded_rows(loader: Any) -> int | None:
    """How many of this rank's rows of an evaluation loader are not padding; None if none is.

    `DistributedSampler` repeats the first rows at the end, so that all ranks have equally many.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.shuffle or sampler.drop_last:
        return None
    rows = _length(sampler.dataset)
    return max(0, -(-(rows - sampler.rank) // sampler.num_replicas))
