"""Bars and ticks of the HTML report's charts."""

import numpy as np
import pytest

from lightning_resmem.reporting.charts import bar_chart, histogram


def test_bars_are_in_proportion():
    chart = bar_chart("Labels", [3, 0, 6], "class", "rows")
    assert [bar.height for bar in chart.bars] == [80, 0, 160]
    assert [bar.y + bar.height for bar in chart.bars] == [160, 160, 160]
    assert chart.summary == "From 0 rows (1) to 6 rows (2)."
    assert [label for _, label in chart.ticks] == ["0", "1", "2"]
    assert bar_chart("Labels", [0], "class", "rows").bars[0].height == 0


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        (-3.0, 47.0, ["0", "10", "20", "30", "40"]),
        (1.23, 1.24, ["1.23", "1.232", "1.234", "1.236", "1.238", "1.24"]),
    ],
)
def test_ticks_are_round(low, high, ticks):
    chart = histogram("Norms", np.array([low, high]), "norm", "rows")
    assert [label for _, label in chart.ticks] == ticks
    for x, label in chart.ticks:
        assert x == pytest.approx((float(label) - low) / (high - low) * 480)


def test_histogram_of_equal_values():
    chart = histogram("Norms", np.full(5, 2.0), "norm", "rows")
    assert sum(bar.count for bar in chart.bars) == 5
    assert chart.summary == "All are 2."
