"""Pictures of rows, where a dataset's inputs are images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset

from lightning_resmem.explanation import entries

Picture = npt.NDArray[np.uint8]
# A row of two dimensions is taken for an image if it has at least so many pixels either way.
_SMALLEST_SIDE = 6


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


def find_picture(row: Any) -> Picture | None:
    """The first image among the entries of a dataset's row, a tensor, array or PIL image, or None.

    Returns:
        Shape `(H, W)` or `(H, W, 3)`. What is not uint8 is shown from its darkest to its brightest value, since inputs
        are often normalised.
    """
    for entry in entries(row):
        if isinstance(entry, Tensor):
            entry = entry.detach().cpu().float().numpy() if entry.is_floating_point() else entry.detach().cpu().numpy()
        elif hasattr(entry, "getbands"):  # a PIL image
            entry = np.asarray(entry.convert("L" if entry.mode in ("1", "L") else "RGB"))
        if not isinstance(entry, np.ndarray) or entry.ndim not in (2, 3) or entry.dtype.kind not in "uif":
            continue
        if entry.ndim == 3 and entry.shape[0] in (1, 3, 4):
            entry = np.moveaxis(entry, 0, 2)
        if min(entry.shape[:2]) < _SMALLEST_SIDE or (entry.ndim == 3 and entry.shape[2] not in (1, 3, 4)):
            continue
        if entry.ndim == 3:
            entry = entry[..., 0] if entry.shape[2] == 1 else entry[..., :3]
        return entry if entry.dtype == np.uint8 else _stretched(entry)
    return None


def _has_positions(loader: Any) -> bool:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_size is not None or loader.batch_sampler is not None  # else its items are batches


def _stretched(image: npt.NDArray[Any]) -> Picture:
    image = np.nan_to_num(image.astype(np.float64))
    low, high = image.min(), image.max()
    return np.asarray((image - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)
