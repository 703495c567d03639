"""Plots show the numbers they are given."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from lightning_resmem import ResMemParams, TuningResult
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.bins import ReliabilityBins, neighborhoods, reliability
from lightning_resmem.metrics.evaluation import Evaluation
from lightning_resmem.reporting import plots


def tuning(settings, base=0.5, score_name="acc", **chosen):
    table = [{"k": 9, "sigma": 1.0, "softmax_temperature": 1.0, "strength": 0.0, "score": base, "loss": 1.0}]
    for k, sigma, strength, score in settings:
        row = {"k": k, "sigma": sigma, "softmax_temperature": 1.0, "strength": strength, "score": score, "loss": 1.0}
        table.append(row)
    params = ResMemParams(**chosen)
    return TuningResult(params, table, base, base, score_name, rows=100, gain_error=0.0)


GRID = [(k, sigma, strength, 0.4 + k / 100 + sigma * strength / 10) for k in (5, 20) for sigma in (0.1, 1.0, 2.0)
        for strength in (0.5, 1.0)]  # fmt: skip


def cells(figure):
    mesh = figure.axes[0].collections[0]
    return np.asarray(mesh.get_array())


def star(figure):
    (x, y), = figure.axes[0].collections[-1].get_offsets()  # fmt: skip
    return float(x), float(y)


def words(axes):
    return [text.get_text() for text in axes.texts]


def test_cells_hold_the_best_score_of_their_settings():
    figure = plots.tuning_map(tuning(GRID, k=20, sigma=1.0))
    wanted = [[0.4 + k / 100 + sigma / 10 for sigma in (0.1, 1.0, 2.0)] for k in (5, 20)]
    np.testing.assert_allclose(cells(figure), wanted)
    assert words(figure.axes[0])[:6] == [f"{score:.4f}" for row in wanted for score in row]
    assert star(figure) == (1.0, 20.0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["5", "20"]


def test_of_errors_the_smallest_is_the_best():
    figure = plots.tuning_map(tuning(GRID, score_name="mse", k=5, sigma=0.1))
    np.testing.assert_allclose(cells(figure)[0, 2], 0.4 + 0.05 + 2.0 * 0.5 / 10)
    more, less = (plots.tuning_map(tuning(GRID, score_name=name)).axes[0].collections[0].cmap(1.0)
                  for name in ("acc", "mse"))  # fmt: skip
    assert more[2] > more[0], "better than the base is blue"
    assert less[0] > less[2], "worse than the base is red"


def test_settings_between_the_grid_are_dots():
    figure = plots.tuning_map(tuning([*GRID, (12, 0.5, 1.0, 0.9)], k=12, sigma=0.5))
    assert cells(figure).shape == (2, 3)
    dots = figure.axes[0].collections[1]
    np.testing.assert_allclose(dots.get_offsets(), [[0.5, 12.0]])
    np.testing.assert_allclose(dots.get_array(), [0.9])
    assert star(figure) == (0.5, 12.0)


def test_settings_around_the_best_one_leave_the_cells_of_the_grid():
    around = [(k, sigma, 1.0, 0.9) for k in (10, 20) for sigma in (0.3, 1.0, 1.4)]  # share a k and a sigma with it
    figure = plots.tuning_map(dataclasses.replace(tuning([*GRID, *around], k=10, sigma=0.3), refined=len(around)))
    assert cells(figure).shape == (2, 3)
    assert len(figure.axes[0].collections[1].get_offsets()) == 5, "all but (20, 1.0), which has a cell"


def test_a_grid_that_is_not_full_has_gaps():
    figure = plots.tuning_map(tuning([(5, 0.1, 1.0, 0.6), (20, 1.0, 1.0, 0.7)]))
    scores = np.ma.filled(np.ma.asarray(figure.axes[0].collections[0].get_array()), np.nan)
    np.testing.assert_allclose(scores, [[0.6, math.nan], [math.nan, 0.7]])
    assert words(figure.axes[0])[:4] == ["0.6000", "", "", "0.7000"]


def test_no_star_where_nothing_was_chosen_and_no_map_of_nothing():
    assert len(plots.tuning_map(tuning(GRID, strength=0.0)).axes[0].collections) == 1
    assert plots.tuning_map(tuning([])) is None


def test_a_setting_that_changes_nothing_can_be_drawn():
    figure = plots.tuning_map(tuning([(5, 0.1, 1.0, 0.5)]))
    assert plots.pixels(figure).shape[2] == 3


def test_many_cells_have_no_numbers():
    many = [(k, sigma, 1.0, 0.5) for k in range(1, 12) for sigma in range(1, 12)]
    assert words(plots.tuning_map(tuning(many)).axes[0]) == []


def bins(probabilities, targets):
    confidences, labels = probabilities.max(dim=1)
    return ReliabilityBins.from_sums(reliability(confidences, (labels == targets).float(), 15))


def evaluation(**changed):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(4, (200,), generator=generator)
    base, knn, resmem = (torch.rand(200, 4, generator=generator).mul(3).softmax(1) for _ in range(3))
    right = torch.stack([functional.is_right(part, targets).float() for part in (base, knn, resmem)], dim=1)
    scores = {f"acc_{name}": float(mean) for name, mean in zip(("base", "knn", "resmem"), right.mean(0), strict=True)}
    scores["positive_flip_rate"] = float(functional.positive_flip_rate(base, resmem, targets))
    scores["negative_flip_rate"] = float(functional.negative_flip_rate(base, resmem, targets))
    found = Evaluation(
        prefix="test",
        suffix="",
        rows=200,
        scores=scores,
        shown=(),
        gain=scores["acc_resmem"] - scores["acc_base"],
        gain_error=0.01,
        flips=(),
        reliability={name: bins(part, targets) for name, part in (("base", base), ("resmem", resmem))},
        neighborhoods=neighborhoods(torch.rand(200, generator=generator), right),
    )
    return dataclasses.replace(found, **changed)


def test_lines_show_scores_by_distance():
    found = evaluation()
    lines = plots.by_distance(found).axes[0].lines
    assert [line.get_label() for line in lines] == ["base", "knn", "resmem"]
    for line, scores in zip(lines, found.neighborhoods.scores.T, strict=True):
        np.testing.assert_allclose(line.get_ydata(), scores)


def test_one_row_is_no_rows():
    one = neighborhoods(torch.zeros(1), torch.ones(1, 3))
    found = evaluation(rows=1, neighborhoods=one)
    assert plots.by_distance(found).axes[0].get_xlabel().endswith("(about 1 row each)")
    assert plots.flips(found).axes[0].get_xlabel().endswith(" of 1 row")
    single = dataclasses.replace(tuning(GRID), rows=1)
    assert plots.tuning_map(single).axes[0].get_title(loc="left") == "Tuning on 1 validation row"


def test_empty_groups_of_distances_are_left_out():
    same = neighborhoods(torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.eye(4)[:, :3], num_bins=4)
    axes = plots.by_distance(evaluation(neighborhoods=same)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]
    assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)
    empty = neighborhoods(torch.zeros(0), torch.zeros(0, 3))
    assert plots.by_distance(evaluation(neighborhoods=empty)) is None


def test_reliability_shows_both_and_their_error():
    found = evaluation()
    top, bottom = plots.reliability(found).axes
    for line, name in zip(top.lines[1:], ("base", "resmem"), strict=True):
        wanted = found.reliability[name]
        filled = wanted.counts > 0
        np.testing.assert_allclose(line.get_ydata(), wanted.accuracies[filled])
        np.testing.assert_allclose(line.get_xdata(), wanted.confidences[filled])
        assert f"{name} (calibration error {wanted.calibration_error.item():.3f})" == line.get_label()
    heights = [bar.get_height() for bar in bottom.patches]
    assert sum(heights) == pytest.approx(2.0), "the shares of the rows, for both"


def test_flips_are_the_four_shares():
    found = evaluation()
    axes = plots.flips(found).axes[0]
    before, after = found.scores["acc_base"], found.scores["acc_resmem"]
    shares = {label: float(share.rstrip("%")) / 100 for share, label in zip(*[iter(words(axes))] * 2, strict=True)}
    assert sum(shares.values()) == pytest.approx(1.0, abs=2e-4)
    assert shares["stays right"] + shares["turned wrong"] == pytest.approx(before, abs=2e-4)
    assert shares["stays right"] + shares["turned right"] == pytest.approx(after, abs=2e-4)
    assert f"{found.gain:+.2%}" in axes.get_xlabel()


def test_regression_has_neither_flips_nor_confidence():
    regression = evaluation(scores={"mse_base": 1.0, "mse_knn": 2.0, "mse_resmem": 0.5}, reliability={})
    assert plots.flips(regression) is None
    assert plots.reliability(regression) is None
    assert plots.by_distance(regression).axes[0].get_ylabel() == "mean squared error"


def test_pixels_are_an_image_and_pyplot_knows_of_no_figure():
    figures = [plots.tuning_map(tuning(GRID)), *(draw(evaluation()) for draw in (plots.by_distance, plots.flips))]
    for figure in figures:
        image = plots.pixels(figure)
        assert image.dtype == np.uint8
        assert image.shape == (*(figure.get_size_inches() * figure.dpi).round().astype(int)[::-1], 3)
        assert len(np.unique(image)) > 10
    assert pyplot.get_fignums() == []


def test_names_are_no_mathtext():
    found = dataclasses.replace(evaluation(), prefix="test/$x_$")
    for draw in (plots.by_distance, plots.reliability, plots.flips):
        figure = draw(found)
        plots.pixels(figure)  # what cannot be read as mathtext raises here
        assert figure.axes[0].get_title(loc="left").startswith("test/$x_$: ")
