"""Pictures of rows by their ids, where a loader's dataset has images."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from lightning_resmem.explanation.pictures import Picture, find_picture


def picture_lookup(loaders: Any) -> Callable[[int], Picture | None]:
    """How to get the picture of the row with an id: its position in the datasets of the loaders, one after the other.

    Args:
        loaders: A DataLoader, or several of them in any collection. Where rows cannot be looked up by position there
            are no pictures.
    """
    flat = [] if loaders is None else CombinedLoader(loaders).flattened
    if not flat or not all(_has_positions(loader) for loader in flat):
        return lambda _: None
    rows: ConcatDataset[Any] = ConcatDataset([loader.dataset for loader in flat])

    def look_up(position: int) -> Picture | None:
        with isolate_rng():  # datasets may draw random augmentations
            return find_picture(rows[position])

    return look_up


def _has_positions(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_size is not None or loader.batch_sampler is not None  # else its items are batches
