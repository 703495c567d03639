"""kNN-LM beside ResMem: the best of its settings, by loops in float64, and what it predicts."""

import itertools

import numpy as np
import pytest
import torch

from lightning_resmem import GridTuner, LocalMemory, ResMemParams, SparseConfig
from lightning_resmem.memory.knn_lm import knn_lm_params, note_knn_lm, predict_knn_lm
from lightning_resmem.tuning.tuner import SHARES
from tests import oracle

CLASSES, K = 20, 6
SIGMAS, TEMPERATURES = (0.2, 1.0), (0.7, 1.5)


def rows(count, seed):
    """Tokens that their embeddings tell something about, and a base that knows some of it."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 3, generator=generator)
    truth = embeddings.repeat(1, 7)[:, :CLASSES] * 2 + torch.arange(CLASSES) / 10
    outputs = truth + torch.randn(count, CLASSES, generator=generator)
    return embeddings, outputs, torch.distributions.Categorical(logits=truth).sample()


def filled(values, count=80):
    torch.manual_seed(0)
    memory = LocalMemory(values=values)
    memory.add(*rows(count, seed=1))
    memory.provenance["stride"] = str(2**20)  # rows are positions of sequences
    return memory


def peer(params, queries, outputs, count=80):
    """Base and prediction of kNN-LM, `(B, C)`."""
    torch.manual_seed(0)
    keys, stored, targets = rows(count, seed=1)
    shared = {"k": params.k, "sigma": params.sigma, "softmax_temperature": params.softmax_temperature}
    wanted = oracle.predict(keys, stored, targets, queries, outputs, **shared, strength=1.0)
    return wanted.base, (1 - params.strength) * wanted.base + params.strength * wanted.knn


@pytest.mark.parametrize("values", ["dense", SparseConfig(top_m=2)], ids=["dense", "sparse"])
@pytest.mark.parametrize("objective", ["auto", "accuracy"])
def test_the_best_setting_is_found(values, objective):
    memory = filled(values)
    torch.manual_seed(1)
    queries, outputs, targets = rows(60, seed=2)
    tuner = GridTuner([K], SIGMAS, TEMPERATURES, objective=objective, refinements=0, calibrate=False)
    result = tuner.tune(memory, queries, outputs, targets)
    scale = oracle.neighbors(*[rows(80, seed=1)[0], None, queries], K)[0].mean(axis=1)
    scale = float(np.sort(scale)[(len(scale) - 1) // 2])  # torch's median: the lower of the two in the middle

    def measured(params):
        _, found = peer(params, queries, outputs)
        return (found.argmax(axis=1) == np.asarray(targets)).mean(), -np.log(found[range(60), targets]).mean()

    grid = [
        ResMemParams(K, sigma * scale, temperature, share)
        for sigma, temperature, share in itertools.product(SIGMAS, TEMPERATURES, SHARES)
    ]
    score, loss = measured(result.knn_lm)
    if objective == "auto":
        best = min(grid, key=lambda params: measured(params)[1])
        assert result.knn_lm.sigma == pytest.approx(best.sigma)
        assert (result.knn_lm.softmax_temperature, result.knn_lm.strength) == (best.softmax_temperature, best.strength)
        assert f"nll {loss:.4f} on these rows" in result.summary()
    assert f"acc {score:.4f}" in result.summary()


def test_rows_that_are_no_positions_have_no_peer():
    memory = filled("dense")
    memory.provenance.clear()
    assert GridTuner([K], SIGMAS, TEMPERATURES).tune(memory, *rows(60, seed=2)).knn_lm is None


@pytest.mark.parametrize("values", ["dense", SparseConfig(top_m=2)], ids=["dense", "sparse"])
@pytest.mark.parametrize("count", [80, 4])
def test_predictions_are_those_of_the_params_noted_with_the_memory(values, count, tmp_path):
    params = ResMemParams(k=K, sigma=0.3, softmax_temperature=1.4, strength=0.35)
    memory = filled(values, count)
    memory.params = ResMemParams(k=9, sigma=0.8, softmax_temperature=0.9)
    note_knn_lm(memory, params)
    memory.save(tmp_path / "memory")
    memory = LocalMemory.load(tmp_path / "memory")
    assert knn_lm_params(memory) == params
    queries, outputs, _ = rows(7, seed=3)
    found = predict_knn_lm(memory, params, outputs, memory.search(queries, 9))
    np.testing.assert_allclose(found, peer(params, queries, outputs, count)[1], atol=1e-5)
    note_knn_lm(memory, None)
    assert knn_lm_params(memory) is None


def test_it_has_a_temperature_of_its_own():
    memory = filled("dense")
    queries, outputs, targets = rows(2000, seed=2)
    outputs *= 4  # a base that is much too sure
    tuner = GridTuner([K], SIGMAS, [1.0], refinements=0)
    params = tuner.tune(memory, queries, outputs, targets).knn_lm
    assert params.combined_temperature > 1
    found = predict_knn_lm(memory, params, outputs, memory.search(queries, K))
    _, plain = peer(params, queries, outputs)
    wanted = np.maximum(plain, 0) ** (1 / params.combined_temperature)
    np.testing.assert_allclose(found, wanted / wanted.sum(axis=1, keepdims=True), atol=1e-4)


def test_without_neighbors_the_base_predicts():
    memory = filled("dense")
    queries, outputs, _ = rows(2, seed=3)
    near = memory.search(queries, 3)
    nobody = near._replace(distances=torch.full((2, 3), torch.inf), ids=torch.full((2, 3), -1))
    found = predict_knn_lm(memory, ResMemParams(strength=0.5), outputs, nobody)
    torch.testing.assert_close(found, outputs.softmax(dim=1))
