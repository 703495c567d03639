"""The gate does what its formula says, is fitted only if unseen rows gain, and is saved with the memory."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from lightning_resmem import Gate, GridTuner, LocalMemory, ResMemParams
from lightning_resmem.errors import InputError
from lightning_resmem.memory.storage import disk
from lightning_resmem.tasks import TASKS, Multiclass
from lightning_resmem.tuning.gate import fit_gate
from tests import oracle

GATE = Gate(bias=0.3, distance=-0.8, confidence=-0.4)


def rows(count, seed, task="multiclass"):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (count,), generator=generator)
    if task != "multiclass":
        targets = torch.randint(0, 2, (count, 3), generator=generator).float()
    return torch.randn(count, 4, generator=generator), 2 * torch.randn(count, 3, generator=generator), targets


@pytest.mark.parametrize("task", TASKS)
def test_predictions_with_a_gate_are_those_of_the_formula(task):
    params = ResMemParams(k=4, sigma=0.7, softmax_temperature=1.3, strength=0.8, gate=GATE)
    memory = LocalMemory(task=TASKS[task](), params=params)
    keys, key_outputs, key_targets = rows(30, 1, task)
    memory.add(keys, key_outputs, key_targets)
    queries, outputs, _ = rows(9, 2, task)
    full = oracle.predict(
        keys,
        key_outputs,
        key_targets,
        queries,
        outputs,
        k=4,
        sigma=0.7,
        softmax_temperature=1.3,
        strength=1.0,
        task=task,
    )
    nearest = oracle.neighbors(keys, None, queries, 1)[0]
    likeliest = {
        "multiclass": full.base.max(axis=1, keepdims=True),
        "multilabel": np.maximum(full.base, 1 - full.base),
        "regression": np.full((9, 1), 0.5),
    }[task]
    logits = 0.3 - 0.8 * np.log(1 + nearest / 0.7) - 0.4 * np.log(likeliest / (1 - likeliest))
    expected = full.base + 0.8 * 2 / (1 + np.exp(-logits)) * (full.resmem - full.base)
    np.testing.assert_allclose(memory.predict(queries, outputs), expected, atol=2e-6)


def test_a_gate_without_coefficients_changes_nothing():
    memory = LocalMemory(params=ResMemParams(k=4))
    memory.add(*rows(30, 1))
    queries, outputs, _ = rows(9, 2)
    expected = memory.predict(queries, outputs)
    memory.params = dataclasses.replace(memory.params, gate=Gate())
    torch.testing.assert_close(memory.predict(queries, outputs), expected)


def test_factors_are_finite_for_a_sure_base_and_for_rows_without_neighbours():
    base = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    factors = GATE.factors(Multiclass(), base, torch.tensor([0.0, torch.inf]), sigma=1e-30)
    assert factors.isfinite().all()
    assert ((factors > 0) & (factors < 2)).all()


def gated_rows(count, seed, useful):
    """A memory that is right where it is near (`useful`), or that helps the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (count,), generator=generator)
    base = torch.softmax(torch.randn(count, 3, generator=generator), dim=1)
    distances = 5 * torch.rand(count, generator=generator)
    labels = torch.nn.functional.one_hot(targets, 3).float()
    wrong = torch.nn.functional.one_hot(torch.randint(0, 3, (count,), generator=generator), 3).float()
    near = distances[:, None] < 1 if useful else torch.rand(count, 1, generator=generator) < 0.5
    return base, 0.5 * (torch.where(near, labels, wrong) - base), distances, targets


def test_a_gate_that_helps_is_found():
    fit = fit_gate(Multiclass(), *gated_rows(600, 3, useful=True), sigma=1.0, strength=1.0)
    assert fit.helps
    assert fit.gate.distance < -0.5
    assert fit.loss < fit.constant_loss - fit.error
    base, residual, distances, targets = gated_rows(600, 2, useful=True)  # other rows
    gated = base + fit.gate.factors(Multiclass(), base, distances, 1.0) * residual
    losses = [Multiclass().loss(found, base, targets).mean() for found in (gated, base + residual)]
    assert losses[0] < losses[1] - 0.01


def test_a_gate_that_does_not_help_is_not_used():
    """The constant strength is the best of all: fitted first, so that only distance and confidence could gain."""
    base, residual, distances, targets = gated_rows(600, 1, useful=False)
    strength = min(
        (0.1 * step for step in range(1, 20)),
        key=lambda s: float(Multiclass().loss(base + s * residual, base, targets).mean()),
    )
    assert not fit_gate(Multiclass(), base, residual, distances, targets, sigma=1.0, strength=strength).helps


def test_the_loss_on_unseen_rows_is_that_of_gates_fitted_without_them():
    base, residual, distances, targets = gated_rows(100, 1, useful=True)
    fit = fit_gate(Multiclass(), base, residual, distances, targets, sigma=1.0, strength=1.0)
    losses = torch.zeros(100)
    for part in range(5):
        out = torch.arange(100) % 5 == part
        gate = fit_gate(Multiclass(), base[~out], residual[~out], distances[~out], targets[~out], 1.0, 1.0).gate
        gated = base[out] + gate.factors(Multiclass(), base[out], distances[out], 1.0) * residual[out]
        losses[out] = Multiclass().loss(gated, base[out], targets[out])
    assert fit.loss == pytest.approx(float(losses.mean()), abs=1e-4)
    constant = Multiclass().loss(base + residual, base, targets)
    assert fit.constant_loss == pytest.approx(float(constant.mean()), abs=1e-5)
    assert fit.error == pytest.approx(float((constant - losses).std()) / 10, rel=1e-2)


def test_a_gate_is_fitted_in_inference_mode():
    """As when `memorize` tunes."""
    expected = fit_gate(Multiclass(), *gated_rows(200, 1, useful=True), sigma=1.0, strength=1.0)
    with torch.inference_mode():
        assert fit_gate(Multiclass(), *gated_rows(200, 1, useful=True), sigma=1.0, strength=1.0) == expected


def helpful_memory():
    """Rows far from all keys get wrong residuals, rows near to them right ones."""
    generator = torch.Generator().manual_seed(3)
    keys = torch.randn(300, 2, generator=generator)
    labels = (keys[:, 0] > 0).long()
    memory = LocalMemory()
    memory.add(keys, torch.zeros(300, 2), labels)
    near, far = 0.8 * torch.randn(320, 2, generator=generator), 6 * torch.randn(80, 2, generator=generator)
    queries = torch.cat([near, far])
    targets = torch.cat([(near[:, 0] > 0).long(), (far[:, 0] < 0).long()])
    return memory, (queries, torch.zeros(400, 2), targets)


def test_the_tuner_fits_a_gate_on_request_only():
    memory, validation = helpful_memory()
    grid = {
        "k": [5, 20],
        "sigma": [0.5],
        "softmax_temperature": [1.0],
        "strength": [0.5],
        "noise": 0,
        "objective": "nll",
    }
    assert GridTuner(**grid).tune(memory, *validation).params.gate is None
    result = GridTuner(**grid, gate=True).tune(memory, *validation)
    assert result.params.gate is not None
    assert result.params.gate.distance < 0
    assert "with a gate, loss" in result.summary()
    memory.params = result.params
    right = (memory.predict(*validation[:2]).argmax(1) == validation[2]).float()
    assert float(right.mean()) == pytest.approx(result.score)


def test_a_gate_is_saved_with_the_memory(tmp_path):
    memory = LocalMemory(params=ResMemParams(gate=GATE))
    memory.add(*rows(5, 1))
    loaded = LocalMemory.load(memory.save(tmp_path / "memory"))
    assert loaded.params == memory.params
    assert json.loads(json.dumps(disk.read_manifest(tmp_path / "memory")["params"]))["gate"]["distance"] == -0.8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True, [1]])
@pytest.mark.parametrize("name", ["bias", "distance", "confidence"])
def test_coefficients_are_finite_numbers(name, value):
    with pytest.raises(InputError, match=f"{name}="):
        Gate(**{name: value})


@pytest.mark.parametrize("value", ["gate", 1.0, {"slope": 1.0}, {"bias": "big"}])
def test_params_take_a_gate_or_none(value):
    with pytest.raises(InputError, match=r"gate=|bias="):
        ResMemParams(gate=value)
