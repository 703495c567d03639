"""What sparse values cost, and how far they can be off."""

import numpy as np
import pytest
import torch

from lightning_resmem import InputError, LocalMemory, Multiclass, Multilabel, ResMemParams, functional
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.sparse import SparseConfig, SparseValues
from tests import oracle
from tests.made import Made


def _values(outputs: torch.Tensor, targets: torch.Tensor, top_m: int) -> SparseValues:
    values = SparseConfig(top_m).build(Multiclass(), outputs.shape[1])
    values.replace(values.stored(outputs, targets))
    return values


def _one_by_one(values: SparseValues, softmax_temperature: float, base: torch.Tensor | None = None) -> np.ndarray:
    """Each row's own residual, `(N, C)`, for queries whose base predictions are even unless they are given."""
    rows = torch.arange(len(values))[:, None]
    known, tail = values.residual_sum(rows, torch.ones(len(values), 1), softmax_temperature)
    base = torch.full_like(known, 1 / known.shape[1]) if base is None else base
    return functional.whole_residual(known, tail, base).double().numpy()


def _queries(outputs: torch.Tensor) -> list[torch.Tensor]:
    """Base predictions of queries that are unlike rows with these outputs in every way, each `(N, C)`."""
    own = torch.softmax(outputs, dim=1)
    order = outputs.argsort(dim=1)
    largest, smallest = (torch.zeros_like(own).scatter_(1, order[:, [place]], 1.0) for place in (-1, 0))
    return [own, torch.full_like(own, 1 / own.shape[1]), largest, smallest, torch.softmax(torch.randn_like(own), dim=1)]


@pytest.mark.parametrize("softmax_temperature", [0.5, 1.0, 1.4, 5.0])
@pytest.mark.parametrize("scale", [0.1, 2.0, 10.0])
def test_off_by_at_most_the_bound(softmax_temperature: float, scale: float) -> None:
    outputs, targets = scale * torch.randn(200, 50), torch.randint(50, (200,))
    values = _values(outputs, targets, 8)
    exact = oracle.residuals(outputs.numpy(), targets.numpy(), softmax_temperature=softmax_temperature)
    bound = values.error_bound(softmax_temperature).numpy()
    for base in _queries(outputs):
        variation = np.abs(_one_by_one(values, softmax_temperature, base) - exact).sum(axis=1) / 2
        assert (variation <= bound + 1e-6).all()
    if softmax_temperature == 1:
        top = np.sort(oracle.softmax(outputs.numpy()), axis=1)[:, -8:].sum(axis=1)
        np.testing.assert_allclose(bound, 1 - top, atol=4e-3)  # the tail mass and what rounding adds


def test_bound_holds_for_the_hardest_tails() -> None:
    # All of the tail in one class just below the smallest kept one, and all of it even.
    peaked = torch.full((1, 50), -30.0)
    peaked[0, :9] = 0.0
    even = torch.zeros(1, 50)
    outputs, targets = torch.cat([peaked, even]), torch.tensor([0, 1])
    values = _values(outputs, targets, 8)
    for softmax_temperature in (0.3, 1.0, 3.0):
        exact = oracle.residuals(outputs.numpy(), targets.numpy(), softmax_temperature=softmax_temperature)
        bound = values.error_bound(softmax_temperature).numpy()
        for base in _queries(outputs):
            variation = np.abs(_one_by_one(values, softmax_temperature, base) - exact).sum(axis=1) / 2
            assert (variation <= bound + 1e-6).all()
        others = torch.ones(2, 50).scatter_(1, values.tensors()["classes"].long(), 0.0) / 42
        variation = np.abs(_one_by_one(values, softmax_temperature, others) - exact).sum(axis=1) / 2
        assert variation[1] < 1e-3  # a tail of the query's shape is what it was


@pytest.mark.parametrize("softmax_temperature", [0.7, 1.0, 2.0])
@pytest.mark.parametrize("top_m", [1, 4, 30])
def test_the_tail_has_the_shape_of_the_querys_own_prediction(top_m: int, softmax_temperature: float) -> None:
    classes, numbers = 30, {"k": 7, "sigma": 0.8, "softmax_temperature": softmax_temperature, "strength": 0.6}
    keys, outputs, targets = torch.randn(80, 4), torch.randn(80, classes), torch.randint(classes, (80,))
    queries, query_outputs = torch.randn(20, 4), 2 * torch.randn(20, classes)
    memory = LocalMemory(params=ResMemParams(**numbers), values=SparseConfig(top_m))
    memory.add(keys, outputs, targets)
    wanted = oracle.predict_with_cut_outputs(keys, outputs, targets, queries, query_outputs, top_m=top_m, **numbers)
    np.testing.assert_allclose(memory.predict(queries, query_outputs).numpy(), wanted, atol=1e-3)
    dense = oracle.predict(keys, outputs, targets, queries, query_outputs, **numbers).resmem
    neighbors = memory.search(queries, 7)
    weights = oracle.weights(neighbors.distances, 0.8)
    bounds = memory.fetch(torch.arange(80)).error_bound(softmax_temperature).numpy()
    bound = 0.6 * (weights * bounds[neighbors.ids.numpy()]).sum(axis=1)
    assert (np.abs(wanted - dense).sum(axis=1) / 2 <= bound + 1e-6).all()


def test_residuals_without_the_querys_outputs_are_refused_where_something_was_cut() -> None:
    memory = LocalMemory(params=ResMemParams(k=2), values=SparseConfig(2))
    memory.add(torch.eye(3), torch.randn(3, 4), torch.tensor([0, 1, 3]))
    with pytest.raises(InputError, match=r"outputs is missing.*sparse values"):
        memory(torch.eye(3))
    outputs = torch.randn(3, 4)
    combined = torch.softmax(outputs, dim=1) + memory(torch.eye(3), outputs)
    torch.testing.assert_close(combined, memory.predict(torch.eye(3), outputs))
    assert memory.knn(torch.eye(3)).shape == (3, 4)
    whole = LocalMemory(params=ResMemParams(k=2), values=SparseConfig(4))
    whole.add(torch.eye(3), torch.randn(3, 4), torch.tensor([0, 1, 3]))
    assert whole(torch.eye(3)).shape == (3, 4)


def test_more_classes_than_16_bits_can_number() -> None:
    outputs, targets = torch.zeros(3, 40_000), torch.tensor([5, 32_768, 39_999])
    outputs[torch.arange(3), torch.tensor([32_767, 32_768, 39_998])] = 20.0
    exact = -oracle.softmax(outputs.numpy())
    exact[np.arange(3), targets.numpy()] += 1
    np.testing.assert_allclose(_one_by_one(_values(outputs, targets, 2), 1.0), exact, atol=1e-4)


def test_residuals_sum_to_zero() -> None:
    values = _values(torch.randn(100, 30), torch.randint(30, (100,)), 4)
    assert np.abs(_one_by_one(values, 2.0).sum(axis=1)).max() < 1e-5


def test_extreme_logits_stay_finite() -> None:
    outputs = torch.tensor([[3e38, 0.0, -3e38, 1.0], [1e5, 0.0, -1e5, 1.0]])
    for softmax_temperature in (0.1, 1.0, 100.0):
        values = _values(outputs, torch.tensor([0, 1]), 2)
        assert np.isfinite(_one_by_one(values, softmax_temperature)).all()
        assert torch.isfinite(values.error_bound(softmax_temperature)).all()


def test_label_outside_the_kept_classes() -> None:
    outputs = torch.tensor([[5.0, 0.0, 0.0, -3.0]])
    residual = _one_by_one(_values(outputs, torch.tensor([3]), 1), 1.0)[0]
    exact = oracle.residuals(outputs.numpy(), np.array([3]))[0]
    assert residual.argmax() == 3
    assert np.abs(residual - exact).sum() / 2 < 0.014


def test_a_million_rows_of_32000_classes_take_less_than_150_megabytes() -> None:
    values = _values(torch.randn(50, 32_000), torch.randint(32_000, (50,)), 16)
    assert values.nbytes() / 50 * 1e6 <= 150e6
    assert SparseConfig(16).bytes_per_row(32_000) + 8 == values.nbytes() / 50  # and a target


def test_sum_builds_nothing_larger_than_result_and_pairs() -> None:
    queries, k, classes = 256, 50, 32_000
    values = _values(torch.randn(100, classes), torch.randint(classes, (100,)), 16)
    positions, weights = torch.randint(100, (queries, k)), torch.rand(queries, k)
    with Made() as made:
        values.residual_sum(positions, weights, 1.4)
    assert made.elements[-1] <= max(queries * classes, queries * k * 16 * 2)


def test_auto_is_sparse_for_many_classes_only() -> None:
    for task, classes, expected in ((Multiclass(), 1024, "dense"), (Multiclass(), 1025, "sparse")):
        memory = LocalMemory(task)
        memory.add(torch.randn(3, 2), torch.randn(3, classes), torch.tensor([0, 1, 2]))
        assert memory.stats()["values"] == expected
    memory = LocalMemory(Multilabel())
    memory.add(torch.randn(3, 2), torch.randn(3, 2000), torch.ones(3, 2000))
    assert memory.stats()["values"] == "dense"


def test_refusals() -> None:
    with pytest.raises(InputError, match=r"top_m=0"):
        SparseConfig(0)
    with pytest.raises(InputError, match=r"Multiclass\(\), not Multilabel\(\)"):
        LocalMemory(Multilabel(), values="sparse")
    with pytest.raises(InputError, match=r"dtype=torch.int64"):
        DenseConfig(torch.int64)
    memory = LocalMemory(values=DenseConfig(torch.float16), params=ResMemParams())
    with pytest.raises(InputError, match=r"at most 65504.*rows 1"):
        memory.add(torch.randn(2, 2), torch.tensor([[0.0, 1.0], [1e5, 0.0]]), torch.tensor([0, 1]))
    assert len(memory) == 0
