"""Queries and their neighbours as a picture grid; needs matplotlib, but no pyplot, no global state, no window."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explanation.class_names import class_name
from lightning_resmem.explanation.pictures import Picture, find_picture, row_of

# Distinguishable without colour vision (Okabe and Ito).
_TOWARDS, _AWAY = "#009e73", "#d55e00"


def gallery(
    titles: Sequence[str],
    images: Tensor,
    neighbors: Sequence[Sequence[dict[str, Any]]],
    places: int,
    dataset: Any = None,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """The picture grid of an explanation; see `Explanation.figure`.

    Args:
        titles: Of the queries.
        images: Of the queries, `(B, H, W)` or `(B, channels, H, W)`.
        neighbors: Of each query, rows as `Explanation.rows_of` has them.
        places: For how many neighbours there is room.
        dataset: That `dataset[id]` is a row of with the neighbour's image.
        class_names: Shown in the place of numbers.
    """
    figure = Figure(figsize=(1.5 * (places + 1) + 0.6, 1.9 * len(titles)), layout="constrained")
    grid = figure.subplots(len(titles), places + 1, squeeze=False)
    for query, (title, rows) in enumerate(zip(titles, neighbors, strict=True)):
        image = _image_of(images[query], f"images[{query}]")
        _picture(grid[query, 0], image, title.replace(" → ", "\n→ ").replace(", target", "\ntarget"))
        for axes, row in zip(grid[query, 1:], rows, strict=False):
            label = row["label"]
            name = class_name(label, class_names)
            change = row["change_resmem" if "change_resmem" in row else "change"]
            about = f"#{row['id']}: {name}\nd={row['distance']:.3g}, w={row['weight']:.2f}\n{change:+.3f}"
            picture = None if dataset is None else _image_of(row_of(dataset, row["id"]), f"dataset[{row['id']}]")
            _picture(axes, picture, about, _TOWARDS if change >= 0 else _AWAY)
        for axes in grid[query, 1 + len(rows) :]:
            axes.set_axis_off()
    return figure


def _image_of(row: Any, name: str) -> Picture:
    picture = find_picture(row)
    if picture is None:
        raise InputError(f"{name} is a {type(row).__name__} without an image (H, W) or (channels, H, W) in it.")
    return picture


def _picture(axes: Axes, picture: Picture | None, title: str, color: str | None = None) -> None:
    axes.set_title(title, fontsize=8, parse_math=False)  # a class may be called "$x_$"
    axes.set_xticks([])
    axes.set_yticks([])
    if picture is None:
        axes.text(0.5, 0.5, "no dataset given", ha="center", va="center", fontsize=7, transform=axes.transAxes)
    else:
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    for spine in axes.spines.values():
        spine.set(visible=color is not None, color=color, linewidth=2)
