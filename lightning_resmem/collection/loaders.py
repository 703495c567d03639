"""Every row of a training set exactly once: a loader that reads a rank's part of the rows that a user's loader draws.

A user's loader shuffles, drops the last batch, repeats rows, or yields different rows on every rank. The memory needs
each row once, in the dataset's order, with its position as id. So the loader is rebuilt around the same dataset and
`collate_fn`, with the positions as its sampler.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from lightning_resmem.collection.samplers import WAY_OUT, length, training_positions
from lightning_resmem.errors import InputError

# Rows per batch where the user's loader does not say (a batch sampler of the user's own).
_BATCH_SIZE = 64


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
        raise InputError(f"There is no loader to read rows from. {WAY_OUT}")
    parts, first_id = [], 0
    for loader in flat:
        if isinstance(loader, (str, bytes, Tensor, Dataset)) or not isinstance(loader, Iterable):
            raise InputError(
                f"A {type(loader).__name__} ({str(loader)[:50]!r}) is not a loader of batches: give a DataLoader, such "
                "as DataLoader(dataset, batch_size=128)."
            )
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if len(flat) > 1:
                raise InputError(
                    f"{type(loader).__name__} is one of {len(flat)} loaders and has no positions, so the ids of the "
                    f"others have no start. {WAY_OUT}"
                )
            return [_plan_iterable(loader, rank, world_size, limit_batches)]
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise InputError(
                f"{type(loader).__name__} has an __iter__ of its own, so its batches cannot be rebuilt row by row. "
                f"{WAY_OUT}"
            )
        if loader.batch_size is None and loader.batch_sampler is None:
            part, size = _plan_items(loader, count_rows, rank, world_size, limit_batches, first_id)
        else:
            part, size = _plan_rows(loader, rank, world_size, limit_batches, first_id), length(loader.dataset)
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
                f"{WAY_OUT}"
            )
        return torch.from_numpy(_as_array(taken)) + first_id

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
                f"has {size}, so rows have no positions. {WAY_OUT}"
            )
        return torch.arange(count) + (first_id + item * size)

    part = Part(
        batches=rebuilt(loader, mine, None),
        ids=ids,
        num_batches=len(mine),
        sample=rebuilt(loader, mine[:1], None, num_workers=0) if len(mine) else None,
        drawn=_in_short(loader.dataset, items),
    )
    return part, size * length(loader.dataset)


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
    words = f"{len(positions)} of the {length(dataset)} rows of a {type(dataset).__name__}"
    if isinstance(dataset, Subset):
        words += f" ({_checksum(dataset.indices)})"
    return words if len(positions) == length(dataset) else f"{words} at positions ({_checksum(positions)})"


def _checksum(numbers: Sequence[int]) -> str:
    return str(numbers) if isinstance(numbers, range) else f"crc32 {zlib.crc32(_as_array(numbers).tobytes()):08x}"


def _as_array(numbers: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    if isinstance(numbers, range):  # a hundred times faster than one by one
        return np.arange(numbers.start, numbers.stop, numbers.step, dtype=np.int64)
    return np.asarray(numbers, dtype=np.int64)


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
                f"among the ranks itself, so every rank needs the whole dataset and the same sampler. {WAY_OUT}"
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
        batch_size, sampler, collate_fn = None, torch.from_numpy(_as_array(rows)).split(batch_size), list
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate_fn,
        pin_memory=loader.pin_memory,
        **parallel,
    )


class _Limited:
    """The first batches of an iterable."""

    def __init__(self, batches: Iterable[Any], limit: int) -> None:
        self._batches, self._limit = batches, limit

    def __iter__(self) -> Any:
        for index, batch in enumerate(self._batches):
            if index >= self._limit:
                return
            yield batch


def evaluation_loaders(trainer: L.Trainer) -> list[Any]:
    """The loaders that the trainer's current validate or test run reads."""
    return CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
