"""Queries and their neighbours as a picture grid; needs matplotlib, but no pyplot, no global state, no window."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explanation import Explanation, class_name
from lightning_resmem.params import checked_k
from lightning_resmem.pictures import Picture, find_picture

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
    queries, places = min(checked_k(max_queries, "max_queries"), len(explanation)), int(explanation.weights.shape[1])
    figure = Figure(figsize=(1.5 * (places + 1) + 0.6, 1.9 * queries), layout="constrained")
    grid = figure.subplots(queries, places + 1, squeeze=False)
    shown: dict[int, list[dict[str, Any]]] = {query: [] for query in range(queries)}
    for row in explanation.rows:
        if row["query"] in shown and row["id"] is not None:
            shown[row["query"]].append(row)
    for query, rows in shown.items():
        title = explanation.title(query, class_names).partition(": ")[2]
        image = _image_of(images[query], f"images[{query}]")
        _picture(grid[query, 0], image, title.replace(" → ", "\n→ ").replace(", target", "\ntarget"))
        for axes, row in zip(grid[query, 1:], rows, strict=False):
            label = row["label"]
            name = class_name(label, class_names)
            change = row["change_resmem" if "change_resmem" in row else "change"]
            title = f"#{row['id']}: {name}\nd={row['distance']:.3g}, w={row['weight']:.2f}\n{change:+.3f}"
            picture = None if dataset is None else _image_of(_row_of(dataset, row["id"]), f"dataset[{row['id']}]")
            _picture(axes, picture, title, _TOWARDS if change >= 0 else _AWAY)
        for axes in grid[query, 1 + len(rows) :]:
            axes.set_axis_off()
    return figure


def _row_of(dataset: Any, row_id: int) -> Any:
    try:
        return dataset[row_id]
    except (IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"dataset is a {type(dataset).__name__} that has no row {row_id} ({error}): give the dataset that was "
            "memorized, with dataset[id] a row."
        ) from error


def _image_of(row: Any, name: str) -> Picture:
    picture = find_picture(row)
    if picture is None:
        raise InputError(f"{name} is a {type(row).__name__} without an image (H, W) or (channels, H, W) in it.")
    return picture


def _picture(axes: Axes, picture: Picture | None, title: str, color: str | None = None) -> None:
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    if picture is None:
        axes.text(0.5, 0.5, "no dataset given", ha="center", va="center", fontsize=7, transform=axes.transAxes)
    else:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(visible=color is not None, color=color, linewidth=2)
