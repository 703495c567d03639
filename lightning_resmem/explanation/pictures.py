"""Images among the entries of a batch, or of a row of a dataset."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lightning_resmem.errors import InputError

Picture = npt.NDArray[np.uint8]
# A row of two dimensions is taken for an image if it has at least so many pixels either way.
_SMALLEST_SIDE = 6


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


def _stretched(image: npt.NDArray[Any]) -> Picture:
    image = np.nan_to_num(image.astype(np.float64))
    low, high = image.min(), image.max()
    return np.asarray((image - low) / ((high - low) or 1.0) * 255).round().astype(np.uint8)


def find_images(batch: Any) -> Tensor | None:
    """The images of a batch: its first tensor `(B, H, W)` or `(B, channels, H, W)`, or None."""
    for entry in entries(batch):
        if isinstance(entry, Tensor) and (entry.ndim == 3 or (entry.ndim == 4 and entry.shape[1] in (1, 3, 4))):
            return entry.detach().cpu()
    return None


def row_of(dataset: Any, number: int) -> Any:
    """A row of a dataset, or an `InputError` if it has none there."""
    try:
        return dataset[number]
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"dataset is a {type(dataset).__name__} that has no row {number} ({error}): give the dataset that was "
            "memorized, with dataset[id] a row."
        ) from error


def entries(row: Any) -> list[Any]:
    """What a batch, or a row of a dataset, is made of."""
    if isinstance(row, Mapping):
        return list(row.values())
    return list(row) if isinstance(row, list | tuple) else [row]
