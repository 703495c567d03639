"""Queries and their neighbours as a picture grid; needs matplotlib, but no pyplot, no global state, no window."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explain import Explanation, entries

# Distinguishable without colour vision (Okabe and Ito).
_TOWARDS, _AWAY = "#009e73", "#d55e00"


def gallery(
    explanation: Explanation,
    images: Tensor | None = None,
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
    max_queries: int = 8,
) -> Figure:
    """The picture grid of an explanation; see `Explanation.figure`."""
    images = explanation.images if images is None else torch.as_tensor(images)
    if images is None or images.ndim not in (3, 4) or len(images) != len(explanation):
        found = "no images in the batch" if images is None else f"images of shape {tuple(images.shape)}"
        raise InputError(
            f"There are {found}: give figure(images=...) of shape ({len(explanation)}, H, W) or "
            f"({len(explanation)}, channels, H, W)."
        )
    queries, places = min(max_queries, len(explanation)), int(explanation.weights.shape[1])
    figure = Figure(figsize=(1.5 * (places + 1) + 0.6, 1.9 * queries), layout="constrained")
    grid = figure.subplots(queries, places + 1, squeeze=False)
    shown: dict[int, list[dict[str, Any]]] = {query: [] for query in range(queries)}
    for row in explanation.rows:
        if row["query"] in shown and row["id"] is not None:
            shown[row["query"]].append(row)
    for query, rows in shown.items():
        title = explanation.title(query, class_names).partition(": ")[2]
        _picture(grid[query, 0], images[query], title.replace(" → ", "\n→ ").replace(", target", "\ntarget"))
        for axes, row in zip(grid[query, 1:], rows, strict=False):
            label = row["label"]
            name = class_names[label] if class_names is not None and isinstance(label, int) else f"{label:.4g}"
            change = row["change_resmem" if "change_resmem" in row else "change"]
            title = f"#{row['id']}: {name}\nd={row['distance']:.3g}, w={row['weight']:.2f}\n{change:+.3f}"
            image = None if dataset is None else _image_of(dataset[row["id"]], row["id"])
            _picture(axes, image, title, _TOWARDS if change >= 0 else _AWAY)
        for axes in grid[query, 1 + len(rows) :]:
            axes.set_axis_off()
    return figure


def _image_of(item: Any, id: int) -> Tensor:
    """The image of a dataset's row: its first entry with two or three dimensions, a tensor, array or PIL image."""
    for entry in entries(item):
        if not isinstance(entry, str | bytes | int | float | None):
            image = torch.as_tensor(np.asarray(entry))
            if image.ndim == 3 and image.shape[0] not in (1, 3, 4):  # height, width, channels
                image = image.movedim(2, 0)
            if image.ndim in (2, 3):
                return image
    raise InputError(f"dataset[{id}] is a {type(item).__name__} without an image (H, W) or (channels, H, W) in it.")


def _picture(axes: Axes, image: Tensor | None, title: str, color: str | None = None) -> None:
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    if image is None:
        axes.text(0.5, 0.5, "no dataset given", ha="center", va="center", fontsize=7, transform=axes.transAxes)
    else:
        pixels = image.detach().cpu().float().numpy()
        if pixels.ndim == 3:
            pixels = pixels[0] if pixels.shape[0] == 1 else np.moveaxis(pixels, 0, 2)
        low, high = pixels.min(), pixels.max()
        # Inputs are often normalised; pictures are shown from their darkest to their brightest value.
        axes.imshow((pixels - low) / ((high - low) or 1), cmap="gray", interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(visible=color is not None, color=color, linewidth=2)
