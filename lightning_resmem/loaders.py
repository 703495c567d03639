"""Every row of a training set exactly once: which rows a loader trains on, and a loader that reads a rank's part.

A user's loader shuffles, drops the last batch, repeats rows, or yields different rows on every rank. The memory needs
each row once, in the dataset's order, with its position as id. So the loader is rebuilt around the same dataset and
`collate_fn`, with the positions as its sampler.
"""

import copy
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_resmem.errors import InputError

# Rows per batch where the user's loader does not say (a batch sampler of the user's own).
_BATCH_SIZE = 64
# Epochs of an unknown sampler that are looked at; what `drop_last` drops differs from epoch to epoch.
_EPOCHS = 10
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
        drawn: The rows of all ranks, in short: the same on every rank.
    """

    batches: Iterable[Any]
    ids: Callable[[int, int, int], Tensor]
    num_batches: int | None = None
    num_rows: int | None = None
    sample: Iterable[Any] | None = None
    drawn: str = ""


def plan(
    loaders: Any,
    count_rows: Callable[[Any], int],
    rank: int = 0,
    world_size: int = 1,
    limit_batches: int | None = None,
) -> list[Part]:
    """Plan how a rank reads its rows of a loader.

    Rank `r` reads the rows `r, r + world_size, ...` of those that the loader trains on. An iterable without positions
    (an `IterableDataset`, a generator) is read as it is: its rows are counted, and over several ranks the user shards
    it.

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
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    flat = [
        loader
        for loader in combined.flattened
        if not (loader is None or (isinstance(loader, (list, tuple, dict)) and not loader))
    ]
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
    positions = training_positions(loader)
    rows = positions[rank::world_size]
    batch_size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    if not isinstance(batch_size, int) or batch_size < 1:
        batch_size = _BATCH_SIZE
    if limit is not None:
        rows = rows[: limit * batch_size]

    def ids(_: int, first_row: int, count: int) -> Tensor:
        taken = rows[first_row : first_row + count]
        if len(taken) < count:
            raise InputError(
                f"The batches of {type(loader.dataset).__name__} have more rows than it has positions "
                f"({first_row + count} for {len(rows)}), so a row has no id: does collate_fn repeat or cut rows? "
                f"{_WAY_OUT}"
            )
        return torch.tensor(taken, dtype=torch.int64) + first_id

    return Part(
        batches=rebuilt(loader, rows, batch_size),
        ids=ids,
        num_batches=-(-len(rows) // batch_size),
        num_rows=len(rows),
        sample=rebuilt(loader, rows[:2], 2, num_workers=0) if len(rows) else None,
        drawn=_in_short(loader.dataset, positions),
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
        with isolate_rng(include_cuda=False):
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
        drawn=_in_short(loader.dataset, items),
    )
    return part, size * _length(loader.dataset)


def _plan_iterable(batches: Iterable[Any], rank: int, world_size: int, limit: int | None) -> Part:
    """Batches without positions: rows are counted in the order they come."""
    if isinstance(batches, DataLoader) and batches.drop_last and type(batches).__iter__ is DataLoader.__iter__:
        batches = rebuilt(batches, None, batches.batch_size)
    return Part(
        batches=batches if limit is None else _Limited(batches, limit),
        ids=lambda _, first_row, count: rank + world_size * torch.arange(first_row, first_row + count),
        num_batches=limit,
    )


def _in_short(dataset: Any, positions: Sequence[int]) -> str:
    """The rows that positions stand for, to compare between ranks."""
    words = f"{len(positions)} of the {_length(dataset)} rows of a {type(dataset).__name__}"
    if isinstance(dataset, Subset):
        words += f" ({_checksum(dataset.indices)})"
    return words if len(positions) == _length(dataset) else f"{words} at positions ({_checksum(positions)})"


def _checksum(numbers: Sequence[int]) -> str:
    if isinstance(numbers, range):
        return str(numbers)
    return f"crc32 {zlib.crc32(np.asarray(numbers, dtype=np.int64).tobytes()):08x}"


def check_agreement(drawn: Sequence[object]) -> None:
    """Check that all ranks plan to divide the same rows.

    Args:
        drawn: `Part.drawn` of the parts of each rank.

    Raises:
        InputError: If they differ, so that rows would be left out or be there twice.
    """
    for rank, other in enumerate(drawn):
        if other != drawn[0]:
            raise InputError(
                f"The loaders differ by rank: rank 0 reads {drawn[0]}, rank {rank} {other}. ResMem divides the rows "
                f"among the ranks itself, so every rank needs the whole dataset and the same sampler. {_WAY_OUT}"
            )


def rebuilt(
    loader: DataLoader[Any], rows: Sequence[int] | None, batch_size: int | None, num_workers: int | None = None
) -> DataLoader[Any]:
    """A plain DataLoader that reads `rows` of the same dataset (None: all), in their order, collated the same way."""
    workers = loader.num_workers if num_workers is None else num_workers
    parallel: dict[str, Any] = {}
    if workers:
        parallel = {
            "timeout": loader.timeout,
            "multiprocessing_context": loader.multiprocessing_context,
            "prefetch_factor": loader.prefetch_factor,
            "worker_init_fn": loader.worker_init_fn,
        }
    collate_fn, sampler = loader.collate_fn, rows
    if type(loader.dataset) is TensorDataset and collate_fn is default_collate and rows and batch_size:
        # The same batches, several times faster: one gather per tensor instead of a look-up per row and a stack.
        batch_size, sampler, collate_fn = None, torch.tensor(rows, dtype=torch.int64).split(batch_size), list
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
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
    sampler = _sampler(loader)
    # Lightning's wrappers around the user's sampler have no public way to it.
    if isinstance(sampler, (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)):
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    if _draws_like(sampler, SequentialSampler, RandomSampler):
        return range(_length(sampler.data_source))
    if _draws_like(sampler, DistributedSampler, UnrepeatedDistributedSampler):
        return range(_length(sampler.dataset))
    rows: list[int]
    if _draws_like(sampler, SubsetRandomSampler):
        rows = torch.as_tensor(sampler.indices, dtype=torch.int64).unique().tolist()
    elif _draws_like(sampler, WeightedRandomSampler):
        rows = torch.as_tensor(sampler.weights).nonzero()[:, 0].tolist()
    elif isinstance(sampler, (Sequence, np.ndarray, Tensor)):
        rows = torch.as_tensor(sampler, dtype=torch.int64).unique().tolist()
    else:
        return _drawn(sampler, loader)
    everything = range(_length(loader.dataset))
    return everything if len(rows) == len(everything) else rows


def _sampler(loader: DataLoader[Any]) -> Any:
    """What draws the rows: the sampler, or a batch sampler of the user's own that has none."""
    if loader.batch_sampler is None:
        return loader.sampler
    # Beside a batch sampler of the user's own, `loader.sampler` is a SequentialSampler that is not used.
    return getattr(loader.batch_sampler, "sampler", loader.batch_sampler)


def _draws_like(sampler: Any, *kinds: Any) -> bool:
    """Whether the sampler is one of these kinds, or a subclass that draws the same rows."""
    return any(isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__ for kind in kinds)


def _drawn(sampler: Any, loader: DataLoader[Any]) -> range:
    """All rows, if a few epochs of an unknown sampler draw all of them."""
    dataset, in_batches = loader.dataset, sampler is loader.batch_sampler
    seen = np.zeros(_length(dataset), dtype=bool)
    try:
        with isolate_rng(include_cuda=False):
            # A copy, so that its generator stays as it is; without the dataset, which may be large.
            sampler = copy.deepcopy(sampler, {id(dataset): dataset})
            most = _EPOCHS * len(seen)
            for epoch in range(_EPOCHS):
                if hasattr(sampler, "set_epoch"):
                    sampler.set_epoch(epoch)
                most -= _mark_epoch(sampler, in_batches, seen, most)
                if seen.all() or most <= 0:
                    break
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"The rows that {type(sampler).__name__} draws cannot be told ({error}), so it is not clear which rows the "
            f"model is trained on. {_WAY_OUT}"
        ) from error
    if not seen.all():
        raise InputError(
            f"{type(sampler).__name__} draws {seen.sum()} of the dataset's {len(seen)} rows in {_EPOCHS} epochs, so it "
            f"is not clear which rows the model is trained on. {_WAY_OUT}"
        )
    return range(len(seen))


def _mark_epoch(sampler: Any, in_batches: bool, seen: np.ndarray[Any, Any], most: int) -> int:
    """Mark the rows that an epoch draws, and count its draws; stops after `most`, as an epoch may be endless."""
    count = 0
    for drawn in sampler:
        rows = np.asarray(list(drawn) if in_batches else drawn)
        if rows.ndim != in_batches or (rows.size and rows.dtype.kind not in "iu"):
            raise ValueError(f"it yields {drawn!r}, not {'lists of positions' if in_batches else 'positions'}")
        if rows.size:
            seen[rows] = True
        count += max(1, rows.size)
        if count >= most:
            break
    return count


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
    sampler = _sampler(loader) if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    rows = _length(sampler.dataset)
    return max(0, -(-(rows - sampler.rank) // sampler.num_replicas))
