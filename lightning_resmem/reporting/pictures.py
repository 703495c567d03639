"""What people see of rows by their ids: pictures, or the text around tokens, from a loader's dataset."""

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from lightning_resmem.explanation.passages import passages
from lightning_resmem.explanation.pictures import Picture, find_picture

Shown = Picture | str
Look = Callable[[int], Shown | None]


def row_lookup(loaders: Any, decode: Callable[[list[int]], str] | None = None) -> Look:
    """How to get what is shown of the row with an id: its position in the datasets of the loaders, one after the other.

    Args:
        loaders: A DataLoader, or several of them in any collection. Where rows cannot be looked up by position nothing
            is shown.
        decode: Of tokens, where rows are positions of sequences: then the text around them is shown, else a picture.
    """
    flat = [] if loaders is None else CombinedLoader(loaders).flattened
    if not flat or not all(_has_positions(loader) for loader in flat):
        return lambda _: None
    rows: ConcatDataset[Any] = ConcatDataset([loader.dataset for loader in flat])

    def look_up(id: int) -> Shown | None:
        with isolate_rng():  # datasets may draw random augmentations
            return find_picture(rows[id]) if decode is None else passages(rows, decode)(id)

    return look_up


def _has_positions(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_size is not None or loader.batch_sampler is not None  # else its items are batches
