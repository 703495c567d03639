"""Bins against a few lines of NumPy, and against torchmetrics where it has the same."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_resmem.metrics.bins import ReliabilityBins, neighborhoods, reliability
from tests.metrics.rows import multiclass, multilabel


def neighborhoods_in_numpy(distances, scores, num_bins):
    """Rows in order of distance, cut where a tenth is full; equal distances stay together."""
    ordered = np.sort(distances)
    upper = [ordered[int(np.ceil((i + 1) * len(ordered) / num_bins - 1e-9)) - 1] for i in range(num_bins)]
    counts, means, lower = [], [], -np.inf
    for limit in upper:
        inside = (distances > lower) & (distances <= limit)
        counts.append(inside.sum())
        means.append(scores[inside].mean(axis=0) if inside.any() else np.full(scores.shape[1], np.nan))
        lower = limit
    return np.array(upper), np.array(counts), np.array(means)


@pytest.mark.parametrize("rows", [1, 3, 10, 11, 99, 1000])
@pytest.mark.parametrize("num_bins", [1, 4, 10])
@pytest.mark.parametrize("kind", ["different", "ties", "equal", "some without neighbours"])
def test_neighborhoods(rows, num_bins, kind):
    rng = np.random.default_rng(rows)
    distances = rng.exponential(size=rows)
    if kind == "ties":
        distances = np.round(distances, 1)
    if kind == "equal":
        distances[:] = 2.5
    if kind == "some without neighbours":
        distances[rng.random(rows) < 0.2] = np.inf
    scores = rng.integers(0, 2, (rows, 3)).astype(float)
    found = neighborhoods(torch.from_numpy(distances), torch.from_numpy(scores), num_bins)
    upper, counts, means = neighborhoods_in_numpy(distances, scores, num_bins)
    np.testing.assert_array_equal(found.upper, upper)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.scores, means, rtol=1e-12)  # NaN in the same places
    assert found.counts.sum() == rows
    if kind == "different" and rows >= num_bins:
        assert found.counts.max() - found.counts.min() <= 1


def test_neighborhoods_of_nobody():
    found = neighborhoods(torch.zeros(0), torch.zeros(0, 3))
    assert found.counts.tolist() == [0] * 10
    assert found.upper.isnan().all()
    assert found.scores.isnan().all()
    assert found.scores.shape == (10, 3)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (40, 3), (500, 10)])
def test_calibration_of_classes(num_bins, rows, classes):
    probabilities, targets = multiclass(rows, classes)
    confidences, right = probabilities.double().amax(dim=1), probabilities.argmax(dim=1) == targets
    bins = ReliabilityBins.from_sums(reliability(confidences, right, num_bins))
    confidence, right = confidences.numpy(), right.numpy()
    for i in range(num_bins):
        inside = (confidence >= i / num_bins) & (confidence < (i + 1) / num_bins)
        assert bins.counts[i] == inside.sum()
        if inside.any():
            assert bins.confidences[i].item() == pytest.approx(confidence[inside].mean())
            assert bins.accuracies[i].item() == pytest.approx(right[inside].mean())
        else:
            assert bins.confidences[i].isnan()
            assert bins.accuracies[i].isnan()
    wanted = multiclass_calibration_error(probabilities, targets, classes, n_bins=num_bins)
    assert bins.calibration_error.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_calibration_of_labels():
    probabilities, targets = multilabel(100, 3)
    found = ReliabilityBins.from_sums(reliability(probabilities.flatten(), targets.flatten()))
    assert found.counts.sum() == 300
    wanted = binary_calibration_error(probabilities.flatten(), targets.long().flatten(), n_bins=15)
    assert found.calibration_error.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_certain_rows_are_in_the_last_bin():
    sums = reliability(torch.tensor([1.0, 0.95]), torch.tensor([True, False]))
    found = ReliabilityBins.from_sums(sums)
    assert found.counts.tolist() == [0] * 14 + [2]
    assert found.calibration_error.item() == pytest.approx(0.475)
