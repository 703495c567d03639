"""Each metric against a few lines of NumPy, scikit-learn, or torchmetrics where it has the same."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, r2_score, top_k_accuracy_score
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from lightning_resmem.metrics import functional


def multiclass(rows, classes, seed=0):
    """Probabilities `(rows, classes)` and targets that they know something about."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    targets = (2 * logits + torch.randn(rows, classes, generator=generator)).argmax(dim=1)
    return (3 * logits).softmax(dim=1), targets


def multilabel(rows, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, labels, generator=generator)
    targets = ((logits + torch.randn(rows, labels, generator=generator)) > 0).float()
    return torch.sigmoid(2 * logits), targets


@pytest.mark.parametrize("rows", [1, 2, 50])
@pytest.mark.parametrize("as_labels", [False, True])
def test_flip_rates_of_classes(rows, as_labels):
    base, targets = multiclass(rows, 4, seed=rows)
    resmem, _ = multiclass(rows, 4, seed=rows + 1)
    before, after = base.argmax(dim=1), resmem.argmax(dim=1)
    given = (before, after, targets) if as_labels else (base, resmem, targets)
    wrong_before, wrong_after = (before != targets).numpy(), (after != targets).numpy()
    assert functional.positive_flip_rate(*given).item() == pytest.approx(np.mean(wrong_before & ~wrong_after))
    assert functional.negative_flip_rate(*given).item() == pytest.approx(np.mean(~wrong_before & wrong_after))


def test_flip_rates_of_labels():
    base, targets = multilabel(30, 3, seed=1)
    resmem, _ = multilabel(30, 3, seed=2)
    before = ((base >= 0.5) == (targets >= 0.5)).numpy()
    after = ((resmem >= 0.5) == (targets >= 0.5)).numpy()
    assert functional.positive_flip_rate(base, resmem, targets).item() == pytest.approx(np.mean(after & ~before))
    assert functional.negative_flip_rate(base, resmem, targets).item() == pytest.approx(np.mean(before & ~after))
    assert torch.equal(functional.all_right(resmem, targets), torch.from_numpy(after.all(axis=1)))


def test_flips_are_the_gain():
    base, targets = multiclass(200, 5, seed=3)
    resmem, _ = multiclass(200, 5, seed=4)
    gain = functional.is_right(resmem, targets).double().mean() - functional.is_right(base, targets).double().mean()
    net = functional.positive_flip_rate(base, resmem, targets) - functional.negative_flip_rate(base, resmem, targets)
    assert net.item() == pytest.approx(gain.item(), abs=1e-6)


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
    found = functional.neighborhoods(torch.from_numpy(distances), torch.from_numpy(scores), num_bins)
    upper, counts, means = neighborhoods_in_numpy(distances, scores, num_bins)
    np.testing.assert_array_equal(found.upper, upper)
    np.testing.assert_array_equal(found.counts, counts)
    np.testing.assert_allclose(found.scores, means, rtol=1e-12)  # NaN in the same places
    assert found.counts.sum() == rows
    if kind == "different" and rows >= num_bins:
        assert found.counts.max() - found.counts.min() <= 1


def test_neighborhoods_of_nobody():
    found = functional.neighborhoods(torch.zeros(0), torch.zeros(0, 3))
    assert found.counts.tolist() == [0] * 10
    assert found.upper.isnan().all()
    assert found.scores.isnan().all()
    assert found.scores.shape == (10, 3)


@pytest.mark.parametrize("num_bins", [1, 7, 15])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (40, 3), (500, 10)])
def test_calibration_of_classes(num_bins, rows, classes):
    probabilities, targets = multiclass(rows, classes)
    confidences, right = probabilities.double().amax(dim=1), probabilities.argmax(dim=1) == targets
    bins = functional.ReliabilityBins.from_sums(functional.reliability(confidences, right, num_bins))
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
    found = functional.ReliabilityBins.from_sums(functional.reliability(probabilities.flatten(), targets.flatten()))
    assert found.counts.sum() == 300
    wanted = binary_calibration_error(probabilities.flatten(), targets.long().flatten(), n_bins=15)
    assert found.calibration_error.item() == pytest.approx(wanted.item(), abs=1e-6)


def test_certain_rows_are_in_the_last_bin():
    sums = functional.reliability(torch.tensor([1.0, 0.95]), torch.tensor([True, False]))
    found = functional.ReliabilityBins.from_sums(sums)
    assert found.counts.tolist() == [0] * 14 + [2]
    assert found.calibration_error.item() == pytest.approx(0.475)


def test_likelihood_and_brier_of_classes():
    probabilities, targets = multiclass(60, 7)
    p, onehot = probabilities.double().numpy(), np.eye(7)[targets]
    nll = functional.negative_log_likelihoods(probabilities, targets)
    np.testing.assert_allclose(nll, -np.log((p * onehot).sum(axis=1)), rtol=1e-5)
    np.testing.assert_allclose(functional.brier_scores(probabilities, targets), ((p - onehot) ** 2).sum(1), atol=1e-6)


def test_likelihood_and_brier_of_labels():
    probabilities, targets = multilabel(60, 7)
    p, y = probabilities.double().numpy(), targets.double().numpy()
    entropy = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(axis=1)
    np.testing.assert_allclose(functional.negative_log_likelihoods(probabilities, targets), entropy, rtol=1e-4)
    np.testing.assert_allclose(functional.brier_scores(probabilities, targets), ((p - y) ** 2).mean(axis=1), rtol=1e-5)


def test_impossible_targets_have_a_finite_likelihood():
    certain = torch.tensor([[1.0, 0.0]])
    assert 80 < functional.negative_log_likelihoods(certain, torch.tensor([1])).item() < 90
    assert functional.negative_log_likelihoods(certain, torch.tensor([[0.0, 1.0]])).isfinite().all()
    assert functional.brier_scores(certain, torch.tensor([1])).item() == 2.0
    assert functional.brier_scores(certain, torch.tensor([0])).item() == 0.0


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k(k):
    probabilities, targets = multiclass(80, 6)
    found = functional.top_k_right(probabilities, targets, k).double().mean().item()
    wanted = top_k_accuracy_score(targets, probabilities, k=k, labels=range(6))
    assert found == pytest.approx(wanted)


def test_a_tie_is_not_in_favour_of_the_target():
    """Who knows nothing gets no points."""
    assert not functional.top_k_right(torch.full((1, 6), 1 / 6), torch.tensor([0]), 5).any()


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_f1_of_classes(classes):
    probabilities, targets = multiclass(12, classes)
    counts = functional.f1_counts(probabilities, targets, classes + 3)  # three that never occur
    assert functional.macro_f1(counts).item() == pytest.approx(
        f1_score(targets, probabilities.argmax(1), average="macro")
    )
    assert torch.equal(counts, functional.f1_counts(probabilities.argmax(dim=1), targets, classes + 3))


def test_f1_of_labels():
    probabilities, targets = multilabel(50, 4)
    found = functional.macro_f1(functional.f1_counts(probabilities, targets, 4)).item()
    assert found == pytest.approx(f1_score(targets, probabilities >= 0.5, average="macro"))


@pytest.mark.parametrize("outputs", [1, 3])
def test_regression(outputs):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(40, outputs, generator=generator).double() + 100
    predictions = targets + torch.randn(40, outputs, generator=generator) / 2
    sums = torch.stack([targets, targets.square(), (targets - predictions).square()]).sum(dim=1)
    assert functional.r2(sums, torch.tensor(40)).item() == pytest.approx(r2_score(targets, predictions), rel=1e-6)
    errors = functional.absolute_errors(predictions, targets)
    np.testing.assert_allclose(errors, np.abs((predictions - targets).numpy()).mean(axis=1))


def test_r2_leaves_out_constant_targets():
    sums = torch.tensor([[6.0, 6.0], [12.0, 14.0], [1.0, 0.0]])  # of the targets 2, 2, 2 and 1, 2, 3
    assert functional.r2(sums, torch.tensor(3)).item() == 1.0
    assert functional.r2(sums[:, :1], torch.tensor(3)).isnan()
