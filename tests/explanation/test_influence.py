"""Influence and usefulness against the float64 oracle."""

import dataclasses

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, ResMemParams, SparseConfig, explain, influence, usefulness
from lightning_resmem.params import Gate
from tests import oracle
from tests.explanation.filled import PARAMS, TASK_NAMES, error, filled, part

NUMBERS = {name: getattr(PARAMS, name) for name in ("k", "sigma", "softmax_temperature", "strength")}


@pytest.mark.parametrize("task", TASK_NAMES)
def test_influence_is_what_the_oracle_adds(task):
    memory, keys, outputs, targets, ids = filled(task)
    queries = part(task, 40, seed=7)[0]
    distances, positions = oracle.neighbors(keys, None, queries, PARAMS.k)
    weights = oracle.weights(distances, PARAMS.sigma)
    residuals = oracle.residuals(outputs, targets, task, PARAMS.softmax_temperature)
    for position in (0, 17, 59):
        found = influence(memory, int(ids[position]), queries, top=40)
        share = np.where(positions == position, weights, 0).sum(axis=1)
        wanted = [query for query in np.argsort(-share, kind="stable") if share[query] > 0]
        assert found.queries.tolist() == wanted
        assert f"queries=Tensor({len(wanted)},), distances=" in repr(found) or len(wanted) <= 20
        np.testing.assert_allclose(found.weights, share[wanted], rtol=1e-4)
        added = PARAMS.strength * share[wanted][:, None] * residuals[position]
        np.testing.assert_allclose(found.contributions, added, atol=1e-6)
        np.testing.assert_array_equal(found.label, targets[position])
        assert influence(memory, int(ids[position]), queries, top=1).queries.tolist() == wanted[:1]


def test_values_that_are_cut_need_the_queries_outputs():
    _, keys, outputs, targets, ids = filled()
    memory = LocalMemory(params=PARAMS, values=SparseConfig(2))
    memory.add(keys, outputs, targets, ids)
    queries, query_outputs, labels = part("multiclass", 40, seed=7)
    with pytest.raises(InputError, match=r"outputs is missing"):
        influence(memory, int(ids[17]), queries)
    kept, tails = oracle.cut(outputs, 2, PARAMS.softmax_temperature)
    base = oracle.softmax(query_outputs, PARAMS.softmax_temperature)
    residuals = oracle.labels(targets, base.shape[1])[17] - kept[17] - tails[17] * base
    behind = explain(memory, queries, query_outputs, top=PARAMS.k)
    total = behind.predictions.base + behind.contributions.sum(dim=1)
    torch.testing.assert_close(total, behind.predictions.resmem)
    found = influence(memory, int(ids[17]), queries, query_outputs, top=40)
    assert len(found.queries) > 1
    for query, weight, contribution in zip(found.queries.tolist(), found.weights, found.contributions, strict=True):
        np.testing.assert_allclose(contribution, PARAMS.strength * float(weight) * residuals[query], atol=1e-3)
        (place,) = (behind.neighbors.ids[query] == found.id).nonzero()[:, 0].tolist()
        torch.testing.assert_close(contribution, behind.contributions[query, place])

    useful = usefulness(memory, queries, query_outputs, labels)
    gains = behind.contributions.gather(2, labels[:, None, None].expand(-1, PARAMS.k, 1))[..., 0].double()
    scores = torch.zeros(60, dtype=torch.float64)
    scores.index_add_(0, torch.searchsorted(ids, behind.neighbors.ids.flatten()), gains.flatten())
    torch.testing.assert_close(useful.scores[useful.ids.argsort()], scores, rtol=0, atol=1e-5)


def test_influence_on_far_queries_is_none():
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.tensor([[0.0], [9.0]]), torch.zeros(2, 2), torch.tensor([0, 1]))
    found = influence(memory, 1, torch.zeros(3, 1))
    assert len(found.queries) == 0
    assert found.contributions.shape == (0, 2)


@pytest.mark.parametrize(("id", "top", "named"), [(4, 5, "ids"), (5, 0, "top"), (5.5, 5, "ids")])
def test_influence_checks_its_arguments(id, top, named):
    with pytest.raises(InputError, match=named):
        influence(filled()[0], id, torch.zeros(1, 4), top=top)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_gate(task):
    gated = dataclasses.replace(PARAMS, gate=Gate(bias=0.3, distance=-1, confidence=-0.5))
    memory, *_, ids = filled(task, params=gated)
    queries, outputs, targets = part(task, 40, seed=7)
    behind = explain(memory, queries, outputs, top=PARAMS.k)
    found = influence(memory, int(ids[17]), queries, outputs, top=40)
    assert len(found.queries)
    for query, contribution in zip(found.queries.tolist(), found.contributions, strict=True):
        (place,) = (behind.neighbors.ids[query] == found.id).nonzero()[:, 0].tolist()
        torch.testing.assert_close(contribution, behind.contributions[query, place])
    sizes = found.contributions.abs().amax(dim=1)
    assert (sizes[1:] <= sizes[:-1]).all()
    with pytest.raises(InputError, match="outputs="):
        influence(memory, int(ids[17]), queries)
    plain = usefulness(memory, queries, outputs, targets, params=PARAMS)
    assert not torch.equal(plain.scores, usefulness(memory, queries, outputs, targets).scores)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_usefulness_is_the_error_without_the_row(task, monkeypatch):
    memory, keys, outputs, targets, ids = filled(task)
    embeddings, val_outputs, val_targets = part(task, 30, seed=7)
    distances, positions = oracle.neighbors(keys, None, embeddings, PARAMS.k)
    weights = oracle.weights(distances, PARAMS.sigma)
    residuals = oracle.residuals(outputs, targets, task, PARAMS.softmax_temperature)
    combined = oracle.predict(keys, outputs, targets, embeddings, val_outputs, task=task, **NUMBERS).resmem
    wanted = np.zeros(60)
    for query in range(30):
        for place, position in enumerate(positions[query]):
            without = combined[query] - PARAMS.strength * weights[query, place] * residuals[position]
            wanted[position] += error(without, val_targets[query], task)
            wanted[position] -= error(combined[query], val_targets[query], task)
    found = usefulness(memory, embeddings, val_outputs, val_targets)
    assert (found.scores[1:] <= found.scores[:-1]).all()
    assert sorted(found.ids.tolist()) == ids.tolist()
    np.testing.assert_allclose(found.scores[found.ids.argsort()], wanted, rtol=1e-4, atol=2e-5)

    monkeypatch.setattr("lightning_resmem.explanation.influence._ENTRIES", 100)  # a few queries at a time
    blocks = usefulness(memory, embeddings, val_outputs, val_targets)
    np.testing.assert_allclose(blocks.scores, found.scores, rtol=1e-4, atol=2e-5)


def test_usefulness_with_other_params_leaves_the_memorys_alone():
    memory, *_ = filled()
    validation = part("multiclass", 30, seed=7)
    other = ResMemParams(k=3, sigma=0.1)
    found = usefulness(memory, *validation, params=other)
    assert memory.params == PARAMS
    memory.params = other
    assert torch.equal(usefulness(memory, *validation).scores, found.scores)


def test_rows_that_no_query_meets_score_0():
    memory = LocalMemory(params=ResMemParams(k=1))
    memory.add(torch.tensor([[0.0], [9.0], [1.0]]), torch.zeros(3, 2), torch.tensor([0, 1, 1]))
    found = usefulness(memory, [[0.0], [1.0]], [[0.0, 0.0]] * 2, [0, 0])
    assert found.ids.tolist() == [0, 1, 2]
    assert found.scores.tolist() == [0.5, 0.0, -0.5]


def test_usefulness_checks_widths():
    memory, *_ = filled()
    inputs, outputs, targets = part("multiclass", 5, seed=7)
    with pytest.raises(InputError, match="outputs has 3 columns, the memory was filled with 4"):
        usefulness(memory, inputs, outputs[:, :3], targets.clamp_max(2))
    with pytest.raises(InputError, match="number of rows"):
        usefulness(memory, inputs, outputs, targets[:4])
