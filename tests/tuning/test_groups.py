"""Tuning on rows of which groups go right or wrong together: every decision counts groups, not rows."""

import math

import numpy as np
import pytest
import torch

from lightning_resmem import GridTuner, InputError, LocalMemory, Regression, ResMemParams
from lightning_resmem.metrics.noise import Groups
from lightning_resmem.tasks import Multiclass
from lightning_resmem.tuning.gate import fit_gate
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Sweep
from tests.metrics.test_noise import clustered
from tests.tuning.test_tuner_ranks import tuned_on_ranks
from tests.tuning.validation import GRID, filled, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance", "ignore:.*within the noise")


def copies(validation, times):
    """Every row so many times, and the number of the row."""
    repeated = [part.repeat_interleave(times, dim=0) for part in validation]
    return *repeated, torch.arange(len(repeated[0])) // times


@pytest.mark.parametrize("objective", ["accuracy", "nll", "f1"])
def test_copies_of_a_row_say_no_more_than_the_row(objective):
    """A choice on copies is the choice on the rows, and its error is that of the rows."""
    memory, validation = filled(count=200), rows(60, "multiclass", seed=2)
    tuner = GridTuner(**{**GRID, "noise": 1, "calibrate": True}, objective=objective)
    alone = tuner.tune(memory, *validation, groups=torch.arange(60))
    *many, groups = copies(validation, 20)
    together = tuner.tune(memory, *many, groups=groups)
    assert together.params == alone.params
    assert together.gain_error == pytest.approx(alone.gain_error, rel=1e-6)
    assert alone.gain_error == tuner.tune(memory, *validation).gain_error > 0
    assert together.balanced.error == pytest.approx(alone.balanced.error, rel=0.1)
    assert tuner.tune(memory, *many).gain_error < alone.gain_error / 4


def test_the_error_of_a_gain_against_numpy():
    memory, (embeddings, outputs, targets) = filled(count=200), rows(90, "multiclass", seed=2)
    groups = torch.arange(90) ** 2 // 900 * 5
    result = GridTuner(**GRID).tune(memory, embeddings, outputs, targets, groups=groups)
    memory.params = result.params
    right = memory.predict(embeddings, outputs).argmax(dim=1) == targets
    gains = (right.double() - (outputs.argmax(dim=1) == targets).double()).numpy()
    of_rows, of_groups = gains.std(ddof=1) / np.sqrt(90), clustered(gains, groups.numpy())
    assert result.gain_error == pytest.approx(max(of_rows, of_groups), rel=1e-6)


def one_shock_for_each_group():
    """What a memory gains on ten groups of 100 rows: nothing beyond the luck of the groups."""
    groups = torch.arange(10).repeat_interleave(100)
    targets = torch.tensor([2.0, -1, 1.2, -1, 1.5, -1.2, 1, -1, 2.5, 0])[groups][:, None]
    memory = LocalMemory(task=Regression())
    memory.add(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))
    return memory, (torch.ones(1000, 1), torch.zeros(1000, 1), targets), groups


def test_a_memory_that_helps_a_few_groups_by_luck_is_switched_off():
    memory, validation, groups = one_shock_for_each_group()
    tuner = GridTuner(k=[1], strength=[0.25], refinements=0)
    assert tuner.tune(memory, *validation).params.strength == 0.25
    assert tuner.tune(memory, *validation, groups=groups).params.strength == 0


@pytest.mark.parametrize("count", [1, 2])
def test_of_one_or_two_groups_rows_decide_and_no_error_is_told(count):
    memory, validation, _ = one_shock_for_each_group()
    groups = torch.arange(1000) % count
    result = GridTuner(k=[1], strength=[0.25], refinements=0).tune(memory, *validation, groups=groups)
    assert result.params.strength == 0.25
    assert math.isnan(result.gain_error)
    assert "± ?)" in result.summary()


def test_settings_are_compared_group_by_group():
    memory, validation = filled(count=200), rows(60, "multiclass", seed=2)
    *many, groups = copies(validation, 20)
    settings = [ResMemParams(k, 0.5, 1.0, 1.0) for k in (3, 12)]
    errors = []
    for given in (Rows(*validation), Rows(*many, groups=groups), Rows(*many)):
        sweep = Sweep(memory, given, (3, 12), lambda part: part)
        sweep.measure(settings)
        squares = sweep.squared_differences(torch.tensor([1]), 0)
        errors.append((float(sweep.score_errors(torch.tensor([1]), 0)), float(squares)))
    assert errors[0][0] == errors[2][0] == 0  # independent
    assert errors[0][1] == pytest.approx(errors[1][1])
    scores = [(sweep.predict(setting).argmax(dim=1) == many[2]).double().numpy() for setting in settings]
    assert errors[1][0] == pytest.approx(clustered(scores[1] - scores[0], groups.numpy()), rel=1e-6)


def test_a_gate_is_tried_on_groups_that_it_was_not_fitted_on():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(60, 3, generator=generator).softmax(dim=1)
    residual = torch.randn(60, 3, generator=generator) / 10
    one = base, residual, torch.rand(60, generator=generator), base.argmax(dim=1)
    *many, groups = copies(one, 20)
    alone = fit_gate(Multiclass(), *one, sigma=1.0, strength=1.0)
    together = fit_gate(Multiclass(), *many, sigma=1.0, strength=1.0, groups=groups)
    assert together.error > fit_gate(Multiclass(), *many, sigma=1.0, strength=1.0).error * 3
    assert together.constant_loss == pytest.approx(alone.constant_loss, abs=1e-6)


@pytest.mark.parametrize("sizes", [(13, 12), (25, 0)], ids=str)
def test_ranks_know_each_others_groups(sizes):
    memory, validation, groups = filled(), rows(25, "multiclass", seed=2), torch.arange(25) % 9
    tuner = GridTuner(**{**GRID, "noise": 1}, objective="accuracy", gate=True)
    alone = tuner.tune(memory, *validation, groups=groups)
    parts = list(zip(*(tensor.split(sizes) for tensor in validation), strict=True))
    found = tuned_on_ranks(tuner, [memory] * 2, parts, groups.split(sizes))
    assert found[0] == found[1]
    assert found[0].params == alone.params
    assert found[0].gain_error == pytest.approx(alone.gain_error, rel=1e-4)


def test_groups_are_checked():
    memory, validation = filled(), rows(5, "multiclass", seed=2)
    with pytest.raises(InputError, match=r"groups has shape \(4,\), expected \(5,\): one for every row"):
        GridTuner().tune(memory, *validation, groups=torch.arange(4))
    with pytest.raises(InputError, match=r"groups has shape .* and dtype torch.float32, expected \(n,\) and int64"):
        GridTuner().tune(memory, *validation, groups=torch.zeros(5))
    assert Groups(None).count == 0
