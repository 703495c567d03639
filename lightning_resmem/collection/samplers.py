"""Which rows of a dataset a loader draws."""

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_resmem.errors import InputError

Positions = np.ndarray[Any, np.dtype[np.int64]]

# Samplers that care for single rows: any of what they draw may stand in one batch.
_KNOWN = (
    SequentialSampler,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    DistributedSampler,
    UnrepeatedDistributedSampler,
)
# Epochs of an unknown sampler that are looked at; what `drop_last` drops differs from epoch to epoch.
_EPOCHS = 10
# Weights whose standard deviation is more than this share of their mean are far from equal.
_UNEVEN = 1 / 3
WAY_OUT = (
    "Give memory_dataloader=DataLoader(dataset, batch_size=..., shuffle=False) with the rows to memorize, each of them "
    "once."
)


def training_positions(loader: DataLoader[Any]) -> Sequence[int]:
    """The dataset positions that a loader draws from, ascending, each once.

    Args:
        loader: A loader over a map-style dataset.

    Raises:
        InputError: If that cannot be told from its sampler.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.arange(4))
        >>> training_positions(DataLoader(data, batch_size=2, shuffle=True, drop_last=True))
        range(0, 4)
        >>> training_positions(DataLoader(data, sampler=SubsetRandomSampler([3, 1])))
        [1, 3]
    """
    sampler = _unwrapped(_sampler(loader))
    if _draws_like(sampler, SequentialSampler, RandomSampler):
        return range(length(sampler.data_source))
    if _draws_like(sampler, DistributedSampler, UnrepeatedDistributedSampler):
        return range(length(sampler.dataset))
    rows: list[int]
    if _draws_like(sampler, SubsetRandomSampler):
        rows = torch.as_tensor(sampler.indices, dtype=torch.int64).unique().tolist()
    elif _draws_like(sampler, WeightedRandomSampler):
        rows = torch.as_tensor(sampler.weights).nonzero()[:, 0].tolist()
    elif isinstance(sampler, (Sequence, np.ndarray, Tensor)):
        rows = torch.as_tensor(sampler, dtype=torch.int64).unique().tolist()
    else:
        return _drawn(sampler, loader)
    everything = range(length(loader.dataset))
    return everything if len(rows) == len(everything) else rows


def draws_unevenly(loaders: Any) -> bool:
    """Whether a loader draws its rows with weights that are far from equal, as to balance classes.

    Args:
        loaders: In any collection; those without a `WeightedRandomSampler` are not looked at.

    Examples:
        >>> data = torch.utils.data.TensorDataset(torch.arange(4))
        >>> draws_unevenly(DataLoader(data, sampler=WeightedRandomSampler([9.0, 1.0, 1.0, 1.0], 4)))
        True
    """
    flat = [loader for loader in CombinedLoader(loaders).flattened if isinstance(loader, DataLoader)]
    samplers = [
        sampler
        for sampler in (_unwrapped(_sampler(loader)) for loader in flat)
        if isinstance(sampler, WeightedRandomSampler)
    ]
    weights = [torch.as_tensor(sampler.weights, dtype=torch.float64) for sampler in samplers]
    drawn = [part[part > 0] for part in weights]
    return any(len(part) > 1 and bool(part.std() > _UNEVEN * part.mean()) for part in drawn)


def own_batches(loader: DataLoader[Any], rows: Sequence[int], most: int | None = None) -> list[list[int]] | None:
    """The batches that the user's sampler makes of `rows`, where it decides which rows stand together.

    Rows of one length, say, which cannot be stacked with others. A row is in the first batch that draws it, and alone
    if none of a few epochs does.

    Args:
        loader: A loader over a map-style dataset, with batches.
        rows: Positions of the dataset, from `training_positions`.
        most: Draw only so many batches of the user's.

    Returns:
        None where any rows may stand together.
    """
    sampler = _unwrapped(_sampler(loader))
    plain = _draws_like(loader.batch_sampler, BatchSampler)
    if plain and (isinstance(sampler, range) or _draws_like(sampler, *_KNOWN)):
        return None
    left = np.zeros(length(loader.dataset), dtype=bool)
    left[rows] = True
    batches: list[list[int]] = []
    with isolate_rng(include_cuda=False):
        for drawn in islice(_batches(loader, sampler, most=_EPOCHS * len(left)), most):
            new = list(dict.fromkeys(row for row in drawn.tolist() if left[row]))
            if new:
                left[new] = False
                batches.append(new)
                if not left.any():
                    break
    return batches if most is not None else batches + [[row] for row in left.nonzero()[0].tolist()]


def _batches(loader: DataLoader[Any], sampler: Any, most: int) -> Iterator[Positions]:
    """The batches of a few epochs, of at most so many draws, over all rows rather than those of a rank."""
    dataset: Any = loader.dataset
    batch_sampler: Any = loader.batch_sampler
    if hasattr(batch_sampler, "sampler"):
        batch_sampler = _copied(batch_sampler, dataset, batch_sampler.sampler)
        if _draws_like(sampler, DistributedSampler, UnrepeatedDistributedSampler):
            batch_sampler.sampler = range(length(sampler.dataset))
        else:
            batch_sampler.sampler = sampler if isinstance(sampler, Sequence) else _copied(sampler, dataset)
    else:
        batch_sampler = _copied(batch_sampler, dataset)
    for epoch in range(_EPOCHS):
        parts: list[Any] = [batch_sampler, getattr(batch_sampler, "sampler", None)]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        for drawn in batch_sampler:
            batch = np.asarray(list(drawn), dtype=np.int64)
            yield batch
            most -= max(1, len(batch))
            if most <= 0:
                return


def _copied(sampler: Any, *shared: Any) -> Any:
    """A copy, so that its generator stays as it is; without the dataset and what else may be large."""
    return copy.deepcopy(sampler, {id(part): part for part in shared})


def _sampler(loader: DataLoader[Any]) -> Any:
    """What draws the rows: the sampler, or a batch sampler of the user's own that has none."""
    if loader.batch_sampler is None:
        return loader.sampler
    # Beside a batch sampler of the user's own, `loader.sampler` is a SequentialSampler that is not used.
    return getattr(loader.batch_sampler, "sampler", loader.batch_sampler)


def _unwrapped(sampler: Any) -> Any:
    """The user's sampler; Lightning's wrappers around it have no public way to it."""
    if isinstance(sampler, (DistributedSamplerWrapper, UnrepeatedDistributedSamplerWrapper)):
        return sampler.dataset._sampler  # type: ignore[attr-defined]
    return sampler


def _draws_like(sampler: Any, *kinds: Any) -> bool:
    """Whether the sampler is one of these kinds, or a subclass that draws the same rows."""
    return any(isinstance(sampler, kind) and type(sampler).__iter__ is kind.__iter__ for kind in kinds)


def _drawn(sampler: Any, loader: DataLoader[Any]) -> range:
    """All rows, if a few epochs of an unknown sampler draw all of them."""
    dataset, in_batches = loader.dataset, sampler is loader.batch_sampler
    seen = np.zeros(length(dataset), dtype=bool)
    try:
        with isolate_rng(include_cuda=False):
            sampler = _copied(sampler, dataset)
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
            f"model is trained on. {WAY_OUT}"
        ) from error
    if not seen.all():
        raise InputError(
            f"{type(sampler).__name__} draws {seen.sum()} of the dataset's {len(seen)} rows in {_EPOCHS} epochs, so it "
            f"is not clear which rows the model is trained on. {WAY_OUT}"
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


def num_unpadded_rows(loader: Any) -> int | None:
    """How many of this rank's rows of an evaluation loader are not padding; None if none is.

    `DistributedSampler` repeats the first rows at the end, so that all ranks have equally many.
    """
    sampler = _sampler(loader) if isinstance(loader, DataLoader) else None
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return None
    rows = length(sampler.dataset)
    return max(0, -(-(rows - sampler.rank) // sampler.num_replicas))


def row_positions(loader: Any) -> range | None:
    """The dataset positions of this rank's rows in the order an evaluation loader reads them; None if it is not known.

    Examples:
        >>> row_positions(DataLoader(torch.utils.data.TensorDataset(torch.arange(3)), batch_size=2))
        range(0, 3)
    """
    if not isinstance(loader, DataLoader) or not _draws_like(loader.batch_sampler, BatchSampler):
        return None
    sampler = _sampler(loader)
    if _draws_like(sampler, SequentialSampler):
        return range(length(sampler.data_source))
    if _draws_like(sampler, DistributedSampler) and not sampler.shuffle:
        return range(sampler.rank, length(sampler.dataset), sampler.num_replicas)
    return None


def length(dataset: Any) -> int:
    """`len(dataset)`, or an error that says what to do without one."""
    try:
        return len(dataset)
    except TypeError:
        raise InputError(f"{type(dataset).__name__} has no length, so its rows cannot be counted. {WAY_OUT}") from None
