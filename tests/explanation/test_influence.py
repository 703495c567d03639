"""Influence, usefulness and label errors against the float64 oracle, and on digits with flipped labels."""

import dataclasses
import inspect

import numpy as np
import pytest
import torch

from examples.label_errors import NETWORKS, RANKINGS, run
from lightning_resmem import InputError, LocalMemory, ResMemParams, explain, influence, label_errors, usefulness
from lightning_resmem.explanation.influence import other_neighbors
from lightning_resmem.params import Gate
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.models import num_outputs, rows

PARAMS = ResMemParams(k=7, sigma=0.8, softmax_temperature=1.3, strength=0.6)
NUMBERS = {name: getattr(PARAMS, name) for name in ("k", "sigma", "softmax_temperature", "strength")}
TASK_NAMES = sorted(TASKS)


def part(task, count, seed):
    inputs, targets = rows(count, seed, task)
    outputs = torch.randn(count, num_outputs(task), generator=torch.Generator().manual_seed(seed + 1))
    return inputs, outputs, targets


def filled(task="multiclass", count=60, params=PARAMS):
    """A memory with ids that are not positions, and what it was filled with."""
    row, ids = part(task, count, seed=1), torch.arange(count) * 3 + 5
    memory = LocalMemory(task=TASKS[task](), params=params)
    memory.add(*row, ids)
    return memory, *row, ids


def error(prediction, target, task):
    if task == "multiclass":
        return 1 - prediction[int(target)]
    difference = prediction - np.asarray(target, np.float64)
    return (difference**2 if task == "regression" else abs(difference)).mean()


# -- influence


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
        np.testing.assert_allclose(found.weights, share[wanted], rtol=1e-4)
        added = PARAMS.strength * share[wanted][:, None] * residuals[position]
        np.testing.assert_allclose(found.contributions, added, atol=1e-6)
        np.testing.assert_array_equal(found.label, targets[position])
        assert influence(memory, int(ids[position]), queries, top=1).queries.tolist() == wanted[:1]


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


# -- usefulness


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


# -- other neighbours


@pytest.mark.parametrize("k", [1, 4, 59, 80])
def test_other_neighbors_are_those_of_the_memory_without_the_row(k, monkeypatch):
    monkeypatch.setattr("lightning_resmem.explanation.influence._ROWS", 7)
    memory, keys, _, _, ids = filled()
    blocks = list(other_neighbors(memory, ids, k))
    assert torch.equal(torch.cat([block for block, _ in blocks]), ids)
    found = torch.cat([neighbors.ids for _, neighbors in blocks])
    for row in range(60):
        others = np.arange(60) != row
        _, wanted = oracle.neighbors(keys[others], ids[others], keys[row : row + 1], k)
        np.testing.assert_array_equal(found[row], wanted[0])


def test_other_neighbors_among_many_equal_rows():
    memory = LocalMemory()
    memory.add(torch.zeros(8, 2), torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64))
    ((_, neighbors),) = other_neighbors(memory, memory.ids, 3)
    assert not (neighbors.ids == memory.ids[:, None]).any()
    assert not neighbors.distances.any()


# -- label errors


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("by", ["disagreement", "self_confidence"])
def test_disagreement_is_the_error_of_the_other_rows_labels(task, by):
    memory, keys, outputs, targets, _ = filled(task)
    scale, wanted = memory.distance_scale(), []
    base = oracle.base_prediction(outputs, task)
    for row in range(60):
        others = np.arange(60) != row
        distances, positions = oracle.neighbors(keys[others], None, keys[row : row + 1], 4)
        weights = oracle.weights(distances, scale)
        average = oracle.label_average(positions, weights, targets[others], outputs.shape[1], task)
        wanted.append(error(average[0], targets[row], task))
        if by == "self_confidence":
            wanted[-1] = (wanted[-1] + error(base[row], targets[row], task)) / 2
    found = label_errors(memory, by, k=4)
    np.testing.assert_allclose(found.scores[found.ids.argsort()], wanted, rtol=1e-5, atol=1e-5)
    assert (found.scores[1:] <= found.scores[:-1]).all()
    memory.params = ResMemParams(sigma=1e-6, k=1)  # does not depend on how the memory is read
    np.testing.assert_allclose(label_errors(memory, by, k=4).scores, found.scores, rtol=1e-5, atol=1e-5)


def test_base_loss():
    memory, _, outputs, targets, ids = filled()
    found = label_errors(memory, by="base_loss")
    wanted = -np.log(oracle.softmax(outputs)[np.arange(60), targets])
    np.testing.assert_allclose(found.scores[found.ids.argsort()], wanted, rtol=1e-5)
    assert found.ids[0] == ids[wanted.argmax()]


def test_harm_is_the_opposite_of_usefulness():
    memory, *_ = filled()
    embeddings, outputs, targets = part("multiclass", 30, seed=7)
    found = label_errors(memory, "harm", embeddings=embeddings, outputs=outputs, targets=targets)
    params = ResMemParams(k=50, sigma=0.8, softmax_temperature=1.3, strength=1)
    wanted = usefulness(memory, embeddings, outputs, targets, params)
    assert torch.equal(found.scores, -wanted.scores.flip(0))


@pytest.mark.parametrize("by", ["self_confidence", "disagreement", "base_loss", "harm"])
def test_some_rows_only(by):
    memory, *_, ids = filled()
    names = ("embeddings", "outputs", "targets") if by == "harm" else ()
    validation = dict(zip(names, part("multiclass", 30, seed=7), strict=False))
    everything = label_errors(memory, by, **validation)
    chosen = ids[[3, 59, 20]]
    found = label_errors(memory, by, ids=chosen, **validation)
    kept = torch.isin(everything.ids, chosen)
    assert torch.equal(found.ids, everything.ids[kept])
    assert torch.allclose(found.scores, everything.scores[kept])
    assert len(label_errors(memory, by, ids=[], **validation).ids) == 0
    with pytest.raises(InputError, match=r"\[4\] are not in the memory"):
        label_errors(memory, by, ids=[5, 4], **validation)


def test_label_errors_checks_its_arguments():
    memory, *_ = filled()
    with pytest.raises(InputError, match="by='loss'"):
        label_errors(memory, "loss")
    with pytest.raises(InputError, match="needs validation rows"):
        label_errors(memory, "harm")
    with pytest.raises(InputError, match="reads no validation rows"):
        label_errors(memory, outputs=torch.zeros(1, 4))
    with pytest.raises(InputError, match="k=0"):
        label_errors(memory, k=0)
    with pytest.raises(InputError, match="one row"):
        label_errors(filled(count=1)[0])


@pytest.fixture
def one_thread():
    """Threads only get into each other's way with batches of 32 rows."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.usefixtures("one_thread")
def test_default_finds_most_of_the_flipped_labels(network):
    """At least half of 5% flipped labels among the 5% ranked first, whether or not the base learnt them by heart."""
    runs = [run(seed, 0.05, *NETWORKS[network]) for seed in (100, 101)]
    means = {by: np.mean([found[by] for found in runs]) for by in RANKINGS}
    assert min(found["self_confidence"] for found in runs) >= 0.8
    assert means["self_confidence"] >= max(means.values()) - 0.05
    assert inspect.signature(label_errors).parameters["by"].default == "self_confidence"
