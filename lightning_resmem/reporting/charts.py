"""Bar charts and histograms as coordinates, for a template to draw as inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

# Of the drawing area, in units of the SVG's view box.
WIDTH, HEIGHT = 480.0, 160.0
_BINS = 30
_TICKS = 6


@dataclass(frozen=True)
class Bar:
    """One bar: where it is, and what it stands for."""

    x: float
    y: float
    width: float
    height: float
    label: str
    count: int


@dataclass(frozen=True)
class Chart:
    """Bars over a horizontal axis.

    Attributes:
        title: What is shown.
        summary: The same in a sentence.
        x_label: Of the horizontal axis.
        y_label: What is counted.
        bars: From left to right.
        ticks: Positions and labels along the horizontal axis.
        top: The largest count.
    """

    title: str
    summary: str
    x_label: str
    y_label: str
    bars: list[Bar]
    ticks: list[tuple[float, str]]
    top: int


def bar_chart(title: str, counts: Sequence[int], x_label: str, y_label: str) -> Chart:
    """A bar for each of 0, 1, 2, ...

    Examples:
        >>> bar_chart("Labels", [3, 1], "class", "rows").summary
        'From 1 rows (1) to 3 rows (0).'
    """
    names = [str(i) for i in range(len(counts))]
    step = math.ceil(len(counts) / 20)
    width = WIDTH / len(counts)
    ticks = [((i + 0.5) * width, names[i]) for i in range(0, len(counts), step)]
    low, high = int(np.argmin(counts)), int(np.argmax(counts))
    summary = f"From {counts[low]:,} {y_label} ({names[low]}) to {counts[high]:,} {y_label} ({names[high]})."
    return Chart(title, summary, x_label, y_label, _bars(counts, names, gap=0.15), ticks, max(counts))


def histogram(title: str, values: NDArray[np.float64], x_label: str, y_label: str) -> Chart:
    """How often values occur, in 30 bins from the smallest to the largest.

    Examples:
        >>> histogram("Norms", np.array([0.0, 1.0, 4.0]), "norm", "rows").summary
        'Median 1, middle half 0.5 to 2.5, range 0 to 4.'
    """
    low, quarter, median, three, high = (float(q) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    if not high > low:
        low, high = low - 0.5, high + 0.5
        summary = f"All are {median:.3g}."
    else:
        summary = f"Median {median:.3g}, middle half {quarter:.3g} to {three:.3g}, range {low:.3g} to {high:.3g}."
    counts, edges = np.histogram(values, _BINS, (low, high))
    names = [f"{left:.4g} to {right:.4g}" for left, right in pairwise(edges.tolist())]
    ticks = [((value - low) / (high - low) * WIDTH, f"{value:.6g}") for value in _round_values(low, high)]
    return Chart(title, summary, x_label, y_label, _bars(counts.tolist(), names, gap=0.05), ticks, int(counts.max()))


def _round_values(low: float, high: float) -> list[float]:
    """A few round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of 10."""
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _bars(counts: Sequence[int], names: Sequence[str], gap: float) -> list[Bar]:
    width, top = WIDTH / len(counts), max(1, *counts)
    return [
        Bar((i + gap / 2) * width, HEIGHT * (1 - count / top), (1 - gap) * width, HEIGHT * count / top, name, count)
        for i, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
