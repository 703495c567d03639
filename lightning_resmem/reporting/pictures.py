"""What people see of rows by their ids: pictures, or the text around tokens, from a loader's dataset."""

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from lightning_resmem.errors import ResMemWarning
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


def text_lookups(decode: Any, *loaders: Any) -> list[Look]:
    """How to get the text around positions of sequences, of each of some loaders.

    Args:
        decode: Of a datamodule, where it has one. Once it fails, which is warned about, there is no text.
        loaders: As for `row_lookup`.
    """
    finds = [row_lookup(rows, decode) for rows in loaders]
    works = callable(decode)

    def look_up(find: Look, id: int) -> Shown | None:
        nonlocal works
        if not works:
            return None
        try:
            return find(id)
        except Exception as error:  # whatever a user's method can raise
            works = False
            rank_zero_warn(
                f"ResMem: flipped tokens are shown without text: {type(error).__name__}: {error}. Give the datamodule "
                "a decode(tokens) that takes a list of tokens and returns text, or none.",
                category=ResMemWarning,
            )
            return None

    return [partial(look_up, find) for find in finds]


def _has_positions(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_size is not None or loader.batch_sampler is not None  # else its items are batches
