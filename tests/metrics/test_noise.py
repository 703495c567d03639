"""The error of a gain where groups of rows go right or wrong together, against NumPy in float64."""

import math

import numpy as np
import pytest
import torch

from lightning_resmem.metrics.noise import Groups, decisive, error_of_rows, told
from lightning_resmem.metrics.sums import MeanScores


def clustered(gains, groups):
    """Squares of the sums over each group of what is above the mean."""
    apart, numbers = gains - gains.mean(), np.unique(groups)
    sums = np.array([apart[groups == number].sum() for number in numbers])
    return np.sqrt((sums**2).sum() * len(numbers) / (len(numbers) - 1)) / len(gains)


def in_ten_stretches(times):
    moments, place = np.unique(times, return_inverse=True)
    return place * 10 // len(moments)


def correlated(count, groups, seed=0):
    """Gains whose half is their group's, in any order; groups of different sizes, with gaps between their numbers."""
    draw = np.random.default_rng(seed)
    of_rows = draw.integers(groups, size=count) ** 2 // groups
    gains = draw.normal(size=groups)[of_rows] + draw.normal(size=count)
    return torch.from_numpy(gains), torch.from_numpy(7 * of_rows)


def test_the_error_of_a_mean_is_that_of_its_rows():
    rows = torch.randn(50, dtype=torch.float64)
    found = error_of_rows(rows.square().mean()[None], rows.mean()[None], 50)
    torch.testing.assert_close(found[0], rows.std() / 50**0.5)
    assert error_of_rows(torch.ones(1), torch.ones(1), 1).isinf()
    torch.testing.assert_close(Groups(torch.arange(50)).errors(rows[None]), found)


def test_the_error_of_groups_is_that_of_their_sums():
    gains, groups = correlated(500, 20)
    found = Groups(groups).errors(torch.stack([gains, 3 * gains]))
    expected = clustered(gains.numpy(), groups.numpy())
    np.testing.assert_allclose(found.numpy(), [expected, 3 * expected], rtol=1e-12)
    assert expected > 2 * gains.std() / 500**0.5
    some = torch.arange(0, 500, 3)
    expected = clustered(gains[some].numpy(), groups[some].numpy())
    assert Groups(groups).errors(gains[None, some], some).item() == pytest.approx(expected, rel=1e-12)


def test_rows_that_go_right_or_wrong_together_in_time_count_less():
    moments = torch.randn(200, dtype=torch.float64)
    times = torch.arange(200.0).repeat_interleave(50)
    order = torch.randperm(len(times))
    alike, times = moments.repeat_interleave(50)[order], times[order]
    found = Groups(times).errors(alike[None]).item()
    assert found == pytest.approx(clustered(alike.numpy(), in_ten_stretches(times.numpy())), rel=1e-12)
    assert 0.5 < found / (alike.std().item() / 200**0.5) < 2


@pytest.mark.parametrize("groups", [torch.zeros(6, dtype=torch.int64), torch.tensor([0.5, 0.5, 0.5, 2, 2, 2])], ids=str)
def test_one_or_two_groups_tell_no_error(groups):
    of_groups = Groups(groups).errors(torch.rand(1, 6)).item()
    assert math.isnan(of_groups)
    assert math.isnan(told(0.1, of_groups))
    assert decisive(0.1, of_groups) == 0.1  # there is no better one to decide by
    assert Groups(None).errors(torch.rand(1, 6)).item() == 0.0


@pytest.mark.parametrize("size", [1, 7, 100, 500])
@pytest.mark.parametrize("kind", ["sequences", "times"])
def test_scores_over_batches_of_any_size(kind, size):
    gains, groups = correlated(500, 40, seed=1)
    scores = torch.stack([torch.zeros_like(gains), gains, gains], dim=1)
    given = groups if kind == "sequences" else 1_700_000_000 + groups.double() / 7  # float32 has no such seconds
    metric = MeanScores()
    for start in range(0, 500, size):
        metric.update(scores[start : start + size], given[start : start + size])
    together = groups.numpy() if kind == "sequences" else in_ten_stretches(given.numpy())
    expected = clustered(gains.numpy(), together)
    assert metric.compute()["gain_error"].item() == pytest.approx(expected, rel=1e-9)
    assert expected > 2 * gains.std() / 500**0.5
    metric.reset()
    metric.update(scores)
    assert metric.compute()["gain_error"].item() == pytest.approx(gains.std().item() / 500**0.5)


def test_the_error_is_never_below_that_of_independent_rows():
    gains = torch.tensor([1.0, -1.0] * 50, dtype=torch.float64)
    metric = MeanScores()
    metric.update(torch.stack([0 * gains, gains, gains], dim=1), torch.arange(100) // 10)  # sums of all groups are 0
    assert metric.compute()["gain_error"].item() == pytest.approx(gains.std().item() / 10)


def test_groups_may_have_any_numbers():
    gains, groups = correlated(500, 40, seed=1)
    scores = torch.stack([torch.zeros_like(gains), gains, gains], dim=1)
    errors = []
    for first in (0, 2**62, -(2**62)):  # float64 has not all of these
        metric = MeanScores()
        metric.update(scores, groups + first)
        errors.append(metric.compute()["gain_error"].item())
    assert errors[0] == errors[1] == errors[2]
