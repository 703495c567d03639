"""Every row of a training set exactly once: a loader that reads a rank's part of the rows that a user's loader draws.

A user's loader shuffles, drops the last batch, repeats rows, or yields different rows on every rank. The memory needs
each row once, in the dataset's order, with its position as id. So the loader is rebuilt around the same dataset and
`collate_fn`, with the positions as its sampler.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_resmem.collection.parts import (
    Part,
    Share,
    as_array,
    part_of_batches,
    part_of_items,
    part_of_iterable,
    part_of_rows,
)
from lightning_resmem.collection.repeats import Repeats
from lightning_resmem.collection.samplers import WAY_OUT, length, training_positions
from lightning_resmem.errors import InputError
from lightning_resmem.model.batches import tensors_of


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
    it. A row that several loaders, or several entries of a `Subset`, take from one dataset is read once.

    Args:
        loaders: A `DataLoader`, a list of batches, any iterable of batches, or a dict, list or `CombinedLoader` of
            loaders. The ids of a second loader continue after the dataset of the first.
        count_rows: The number of rows of a batch.
        rank: This process.
        world_size: Number of processes.
        limit_batches: Read only so many batches of each loader on each rank.

    Raises:
        InputError: If a loader's rows cannot be read exactly once; the message says what to do.
    """
    share = Share(rank, world_size, limit_batches)
    if _are_batches(loaders):
        return [part_of_batches(loaders, count_rows, share)]
    flat = _flat(loaders)
    if not flat:
        raise InputError(f"There is no loader to read rows from. {WAY_OUT}")
    parts: list[Part] = []
    first_id, repeats = 0, Repeats()
    for loader in flat:
        _check_loader(loader)
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if len(flat) > 1:
                raise InputError(
                    f"{type(loader).__name__} is one of {len(flat)} loaders and has no positions, so the ids of the "
                    f"others have no start. {WAY_OUT}"
                )
            return [part_of_iterable(loader, share)]
        drawn = training_positions(loader)
        one_by_one = len(flat) == 1 and not isinstance(loader.dataset, Subset)
        positions = drawn if one_by_one else repeats.left(loader.dataset, drawn)
        if loader.batch_size is None and loader.batch_sampler is None:
            part, size = part_of_items(loader, positions, share, first_id, count_rows)
        else:
            part, size = part_of_rows(loader, positions, share, first_id), length(loader.dataset)
        note = "" if len(positions) == len(drawn) else _repeated(loader.dataset, len(drawn) - len(positions), len(flat))
        dataset = part.dataset if len(flat) == 1 else f"{part.dataset} (loader {len(parts) + 1} of {len(flat)})"
        parts.append(replace(part, drawn=_in_short(loader.dataset, positions), note=note, dataset=dataset))
        first_id += size
    return parts


def _flat(loaders: Any) -> list[Any]:
    """All loaders of a collection of them."""
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
    return [
        loader
        for loader in combined.flattened
        if not (loader is None or (isinstance(loader, (list, tuple, dict)) and not loader))
    ]


def _are_batches(loaders: Any) -> bool:
    """Whether these are batches rather than loaders: a list of what holds tensors."""
    if not isinstance(loaders, (list, tuple)) or not loaders:
        return False
    return all(isinstance(batch, (list, tuple, Mapping)) and any(True for _ in tensors_of(batch)) for batch in loaders)


def _check_loader(loader: Any) -> None:
    if isinstance(loader, (str, bytes, Tensor, Dataset)) or not isinstance(loader, Iterable):
        raise InputError(
            f"A {type(loader).__name__} ({str(loader)[:50]!r}) is not a loader of batches: give a DataLoader, such "
            "as DataLoader(dataset, batch_size=128), or a list of batches."
        )
    of_rows = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if of_rows and type(loader).__iter__ is not DataLoader.__iter__:
        raise InputError(
            f"{type(loader).__name__} has an __iter__ of its own, so its batches cannot be rebuilt row by row. "
            f"{WAY_OUT}"
        )


def _repeated(dataset: Any, count: int, num_loaders: int) -> str:
    who = "its indices" if num_loaders == 1 else f"several of the {num_loaders} loaders"
    return (
        f"{count} rows of a {type(dataset).__name__} are drawn more than once by {who}: each row is read once, under "
        "the first of its ids."
    )


def _in_short(dataset: Any, positions: Sequence[int]) -> str:
    """The rows that positions stand for, to compare between ranks."""
    words = f"{len(positions)} of the {length(dataset)} rows of a {type(dataset).__name__}"
    if isinstance(dataset, Subset):
        words += f" ({_checksum(dataset.indices)})"
    return words if len(positions) == length(dataset) else f"{words} at positions ({_checksum(positions)})"


def _checksum(numbers: Sequence[int]) -> str:
    return str(numbers) if isinstance(numbers, range) else f"crc32 {zlib.crc32(as_array(numbers).tobytes()):08x}"


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


def check_limit(limit_batches: object) -> None:
    """Raise an error unless an argument is a number of batches, `math.inf` or None."""
    whole = isinstance(limit_batches, int) and not isinstance(limit_batches, bool) and limit_batches > 0
    if not whole and limit_batches not in (None, math.inf):
        raise InputError(f"limit_batches={limit_batches!r}: give a number of batches of at least 1, or math.inf.")


def streams(loaders: Any) -> list[Any]:
    """The loaders that have neither positions nor a length, and so may have no end."""
    flat = [] if _are_batches(loaders) else _flat(loaders)
    return [
        loader
        for loader in flat
        if isinstance(loader, Iterable)
        and sized_len(loader) is None
        and not (isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset))
    ]


def check_has_end(loaders: Any, way_out: str) -> None:
    """Raise an error for an `IterableDataset` without a length, which may have no end."""
    for loader in streams(loaders):
        if isinstance(loader, DataLoader):
            raise InputError(f"{type(loader.dataset).__name__} has no length, so it may have no end: {way_out}")


def evaluation_loaders(trainer: L.Trainer) -> list[Any]:
    """The loaders that the trainer's current validate or test run reads."""
    return CombinedLoader(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders).flattened
