"""A temperature after combining is that of its formula, is kept only where the loss falls, and leaves answers alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from lightning_resmem import GridTuner, InputError, LocalMemory, ResMemParams
from lightning_resmem.functional import log_predictions, tempered
from lightning_resmem.tasks import TASKS
from lightning_resmem.tuning.calibration import with_temperature
from lightning_resmem.tuning.rows import Rows
from lightning_resmem.tuning.sweep import Sweep
from tests import oracle
from tests.saved_files import edited
from tests.tuning.validation import filled, rows

PARAMS = ResMemParams(k=7, sigma=0.6, softmax_temperature=1.3, combined_temperature=1.7)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_predictions_with_a_temperature_are_those_of_the_formula(task, temperature, tmp_path):
    memory = filled(task, params=replace(PARAMS, combined_temperature=temperature))
    queries, outputs, _ = rows(30, task, seed=2)
    plain = filled(task, params=replace(PARAMS, combined_temperature=1.0))
    before = plain.predictions(queries, outputs)
    combined, base = before.resmem.double().numpy(), before.base.double().numpy()
    if task == "multiclass":
        powers = np.exp(oracle.log_predictions(combined, base)) ** (1 / temperature)
        powers /= powers.sum(axis=1, keepdims=True)
        expected = oracle.above_floor(powers, base)
        assert (abs(expected - powers) > 1e-3).any() == (temperature < 1)
    elif task == "multilabel":
        clamped = combined.clip(1e-4, 1 - 1e-4)
        expected = (1 / (1 + ((1 - clamped) / clamped) ** (1 / temperature))).clip(1e-4, 1 - 1e-4)
    else:
        expected = combined
    memory.save(tmp_path)
    for same in (memory, LocalMemory.load(tmp_path)):
        after = same.predictions(queries, outputs)
        np.testing.assert_allclose(after.resmem, expected, atol=1e-6)
        assert torch.equal(same.predict(queries, outputs), after.resmem)
        assert torch.equal(after.base, before.base)
        assert torch.equal(after.knn, before.knn)
        # What a model's own loss is given follows from what `predict` returns, the floor being no longer felt.
        routed = memory.task.to_outputs(after.resmem, after.base)
        torch.testing.assert_close(memory.task.predict(routed), after.resmem, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(memory.task.probabilities(after.resmem, after.base), after.resmem)


@pytest.mark.parametrize("temperature", [0.02, 0.5, 0.9, 1.1, 4.0])
def test_the_floor_has_the_last_word(temperature):
    """Of many classes the base may be sure of one that the memory has ruled out."""
    generator = torch.Generator().manual_seed(0)
    base = torch.softmax(4 * torch.randn(100, 500, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.softmax(4 * torch.randn(100, 500, generator=generator, dtype=torch.float64), dim=1)
    found = tempered(1.5 * labels - 0.5 * base, base, temperature)
    torch.testing.assert_close(log_predictions(found, base), found.log(), rtol=0, atol=1e-7)
    assert (found > 0.0999 * torch.minimum(base, found.amax(dim=1, keepdim=True))).all()


def test_memories_that_were_saved_without_one_have_none(tmp_path):
    filled(params=PARAMS).save(tmp_path)
    edited(tmp_path, lambda manifest: manifest["params"].pop("combined_temperature"))
    assert LocalMemory.load(tmp_path).params == replace(PARAMS, combined_temperature=1.0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 0.7, 1.3, 1e3, 1e300])
def test_the_answer_stays_whatever_the_temperature(temperature):
    generator = torch.Generator().manual_seed(0)
    base = torch.softmax(3 * torch.randn(200, 10, generator=generator), dim=1)
    combined = base + 0.3 * torch.randn(200, 10, generator=generator)
    combined[:100, 7] = torch.nextafter(combined[:100].amax(dim=1), torch.tensor(torch.inf))  # as near as can be
    for each in (combined, combined.flip(1)):
        found = tempered(each, base, temperature)
        assert torch.equal(found.argmax(dim=1), each.argmax(dim=1))
        assert torch.equal(log_predictions(found, base).argmax(dim=1), each.argmax(dim=1))
        torch.testing.assert_close(found.sum(dim=1), torch.ones(200))


def loss_of(memory, params, validation):
    memory.params = params
    found = memory.predictions(*validation[:2])
    return memory.task.loss(found.resmem, found.base, validation[2])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_tuner_finds_the_one_with_the_least_loss(task):
    memory, validation = filled(task, count=200), rows(400, task, seed=2)
    validation[1].mul_(4)  # a base that is far too sure
    grid = {"k": [3], "softmax_temperature": [1.0], "strength": [0.5], "refinements": 0}
    plain = GridTuner(**grid, calibrate=False).tune(memory, *validation)
    result = GridTuner(**grid).tune(memory, *validation)
    chosen = result.params.combined_temperature
    assert result.params == replace(plain.params, combined_temperature=chosen)
    assert (result.score, result.table) == (plain.score, plain.table)
    losses = {
        t: float(loss_of(memory, replace(plain.params, combined_temperature=t), validation).mean())
        for t in [chosen, *np.geomspace(0.5, 4, 60)]
    }
    assert losses[chosen] <= min(losses.values()) + 1e-4
    assert chosen > 1.2
    assert f"combined_temperature={chosen:.4g}" in result.summary()


def test_one_that_gains_no_more_than_its_error_is_left_out():
    memory, validation = filled(count=200), rows(400, "multiclass", seed=2)
    validation[1].mul_(4)
    result = GridTuner(k=[3], strength=[0.5], refinements=0, calibrate=False).tune(memory, *validation)
    sweep = Sweep(memory, Rows(*validation, None), [3], lambda tensor: tensor)
    assert with_temperature(result, sweep, noise=1.0).params.combined_temperature > 1
    assert with_temperature(result, sweep, noise=1e6) == result
    assert with_temperature(replace(result, params=replace(result.params, strength=0)), sweep, 1.0).notes == ()
    assert GridTuner(k=[3], refinements=0).tune_leave_one_out(memory).params.combined_temperature == 1


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), "hot"])
def test_what_is_no_temperature_is_refused(value):
    with pytest.raises(InputError, match="combined_temperature"):
        ResMemParams(combined_temperature=value)
    with pytest.raises(InputError, match="calibrate"):
        GridTuner(calibrate=value)
