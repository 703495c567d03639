"""Each metric against a few lines of NumPy, scikit-learn, or torchmetrics where it has the same."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score, r2_score, top_k_accuracy_score

from lightning_resmem.metrics import functional
from tests.metrics.rows import multiclass, multilabel


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


@pytest.mark.parametrize("classes", [2, 5, 9])
def test_balanced_accuracy_of_classes(classes):
    probabilities, targets = multiclass(12, classes)  # of nine classes some have no rows, but are predicted
    found = functional.balanced_accuracy(functional.f1_counts(probabilities, targets, classes)).item()
    recalls = [(probabilities.argmax(1) == targets)[targets == label].double().mean() for label in targets.unique()]
    assert found == pytest.approx(float(torch.stack(recalls).mean()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes without rows
        assert found == pytest.approx(balanced_accuracy_score(targets, probabilities.argmax(1)))


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [
        ([700, 300], True),
        ([600, 400], False),
        ([7, 3], False),  # may be chance
        ([100] * 9 + [10], False),  # nine in ten
        ([100] * 5 + [20] * 5, True),
        ([0, 0, 50, 50, 0], False),  # the others do not occur
        ([40], False),
        ([0, 0], False),
    ],
)
def test_far_from_uniform(counts, wanted):
    assert functional.far_from_uniform(torch.tensor(counts)) is wanted


@pytest.mark.parametrize(("rows", "classes"), [(30, 3), (2000, 1000), (4096, 200)])
def test_what_is_drawn_from_equal_classes_is_not_far_from_uniform(rows, classes):
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(0, classes, (rows,), generator=generator) for _ in range(50)]
    assert not any(functional.far_from_uniform(torch.bincount(labels, minlength=classes)) for labels in draws)


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
    assert functional.r2(sums, torch.tensor(40)).item() == pytest.approx(
        r2_score(targets.numpy(), predictions.numpy()), rel=1e-6
    )
    errors = functional.absolute_errors(predictions, targets)
    np.testing.assert_allclose(errors, np.abs((predictions - targets).numpy()).mean(axis=1))


def test_r2_leaves_out_constant_targets():
    sums = torch.tensor([[6.0, 6.0], [12.0, 14.0], [1.0, 0.0]])  # of the targets 2, 2, 2 and 1, 2, 3
    assert functional.r2(sums, torch.tensor(3)).item() == 1.0
    assert functional.r2(sums[:, :1], torch.tensor(3)).isnan()
