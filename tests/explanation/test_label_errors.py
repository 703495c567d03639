"""Label errors against the float64 oracle, and on digits with flipped labels."""

import inspect

import numpy as np
import pytest
import torch

from examples.label_errors import LINEAR, NETWORKS, RANKINGS, run
from lightning_resmem import InputError, LocalMemory, ResMemParams, label_errors, usefulness
from lightning_resmem.explanation.label_errors import other_neighbors
from tests import oracle
from tests.explanation.filled import TASK_NAMES, error, filled, part


@pytest.mark.parametrize("k", [1, 4, 59, 80])
def test_other_neighbors_are_those_of_the_memory_without_the_row(k, monkeypatch):
    monkeypatch.setattr("lightning_resmem.explanation.label_errors._ROWS", 7)
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


def test_flipped_labels_of_features_are_found(tmp_path):
    arrays = {}
    for name, count in (("train", 300), ("val", 90)):
        labels = np.arange(count) % 3
        noise = np.random.default_rng(count).normal(0, 0.2, (count, 4))
        arrays |= {f"{name}_labels": labels, f"{name}_embeddings": (np.eye(4)[labels] + noise).astype(np.float16)}
    np.savez(tmp_path / "features.npz", **arrays)
    found = run(0, 0.05, *LINEAR["linear head"], tmp_path / "features.npz")
    assert list(found) == list(RANKINGS)
    assert found["self_confidence"] > 0.9
