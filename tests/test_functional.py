"""The maths against the float64 oracle, and the promises that the docstrings make."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_resmem import functional
from lightning_resmem.functional import (
    combine,
    log_predictions,
    negative_log_likelihood,
    neighbor_weights,
    probabilities,
    proper_probabilities,
    residuals,
    weighted_labels,
    weighted_residual,
)
from tests import oracle

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from(DTYPES)
class_counts = st.sampled_from([1, 2, 3, 10, 1000])
neighbor_counts = st.sampled_from([1, 2, 5, 53])
sigmas = st.sampled_from([1e-45, 1e-38, 1e-6, 0.01, 1.0, 37.5, 1e6, 1e300])
temperatures = st.sampled_from([1e-300, 1e-45, 1e-3, 0.5, 1.0, 1.7, 1e3, 1e300])


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def float64(tensor: Tensor) -> np.ndarray:
    """The very numbers that a tensor of any dtype holds."""
    return tensor.double().numpy()


def close(actual: Tensor, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Every entry is within the tolerance; float64 has to be much nearer."""
    tolerance = tolerance * 1e-6 if actual.dtype == torch.float64 else tolerance
    np.testing.assert_allclose(float64(actual), expected, rtol=0, atol=tolerance)


def some_logits(rng: np.random.Generator, rows: int, classes: int, dtype: torch.dtype) -> Tensor:
    """Logits of very different sizes from row to row, up to nearly the largest number of the dtype."""
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    scale = rng.choice([0.0, 0.1, 1.0, 30.0, 1e4, largest / 2], size=(rows, 1))
    return torch.tensor(rng.uniform(-1, 1, size=(rows, classes)) * scale).to(dtype)


def some_neighbors(
    rng: np.random.Generator, queries: int, k: int, rows: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Distances, ascending, with ties and missing places (some queries have none at all), and their positions."""
    distances = np.sort(rng.choice([0.0, 1e-3, 0.5, 1.0, 1.5, *rng.uniform(0, 9, 8)], size=(queries, k)), axis=1)
    found = rng.choice([0, 1, k // 2, k, k, k], size=(queries, 1)).clip(0, k if rows else 0)
    missing = np.arange(k) >= found
    positions = rng.integers(0, max(rows, 1), size=(queries, k))
    return (
        torch.tensor(np.where(missing, np.inf, distances)).to(dtype),
        torch.tensor(np.where(missing, -1, positions)),
    )


# -- probabilities and residuals


@given(seeds, dtypes, class_counts, st.integers(0, 7), temperatures)
def test_residuals_are_label_minus_probability(seed, dtype, classes, rows, temperature):
    rng = np.random.default_rng(seed)
    outputs = some_logits(rng, rows, classes, dtype)
    targets = torch.tensor(rng.integers(0, classes, size=rows))

    probability = probabilities(outputs, temperature)
    residual = residuals(outputs, targets, temperature)

    assert probability.dtype == residual.dtype == wide(dtype)
    # Below the smallest normal number of the dtype, a temperature is that number.
    temperature = max(temperature, torch.finfo(wide(dtype)).tiny)
    with np.errstate(over="ignore"):
        below = float64(outputs) - float64(outputs).max(axis=1, keepdims=True)
        expected = oracle.softmax(below, temperature) if rows else np.zeros((0, classes))
    close(probability, expected)
    close(residual, np.eye(classes)[targets] - expected)
    close(residual.sum(dim=1), np.zeros(rows))


def test_residuals_equal_the_oracle_by_its_own_softmax():
    outputs, targets = torch.randn(50, 10) * 3, torch.randint(0, 10, (50,))
    close(residuals(outputs, targets, 1.7), oracle.residuals(outputs, targets, softmax_temperature=1.7))


def test_residuals_leave_their_inputs_alone():
    outputs, targets = torch.randn(5, 3), torch.tensor([0, 1, 2, 1, 0])
    before = outputs.clone(), targets.clone()
    residuals(outputs, targets, 2.0)
    assert torch.equal(outputs, before[0])
    assert torch.equal(targets, before[1])


# -- weights


@given(seeds, dtypes, neighbor_counts, st.integers(0, 9), sigmas)
def test_neighbor_weights(seed, dtype, k, queries, sigma):
    distances, positions = some_neighbors(np.random.default_rng(seed), queries, k, rows=20, dtype=dtype)

    weights = neighbor_weights(distances, sigma)

    assert weights.dtype == wide(dtype)
    close(weights, oracle.weights(float64(distances), sigma), tolerance=1e-6)
    assert (weights[positions < 0] == 0).all()
    close(weights.sum(dim=1), np.asarray((positions >= 0).any(dim=1), np.float64), tolerance=1e-6)


@pytest.mark.parametrize("sigma", [1e-45, 1e-310, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sigma_towards_0_is_the_nearest_neighbor_shared_among_equals(dtype, sigma):
    distances = torch.tensor([[0.0, 0.0, 1.0], [2.0, 3.0, torch.inf], [0.5, 0.5, 0.5]], dtype=dtype)
    weights = neighbor_weights(distances, sigma)
    close(weights, np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]), tolerance=1e-6)


def test_far_neighbors_still_weigh_1_in_sum():
    # exp(-1000) is 0 in float32: without subtracting the nearest distance this is 0 / 0.
    close(neighbor_weights(torch.tensor([[1000.0, 1001.0]]), 1.0), oracle.weights([[0.0, 1.0]], 1.0))


def test_weights_of_no_neighbors_at_all():
    assert neighbor_weights(torch.empty(3, 0), 1.0).shape == (3, 0)
    assert neighbor_weights(torch.full((2, 4), torch.inf), 1.0).tolist() == [[0.0] * 4] * 2


def test_neighbor_weights_leave_their_input_alone():
    distances = torch.tensor([[1.0, 2.0, torch.inf]])
    neighbor_weights(distances, 0.5)
    assert distances.tolist() == [[1.0, 2.0, float("inf")]]


# -- weighted sums


@given(seeds, dtypes, dtypes, class_counts, neighbor_counts, st.integers(0, 9), st.integers(0, 40))
def test_weighted_residual(seed, dtype, weight_dtype, classes, k, queries, rows):
    rng = np.random.default_rng(seed)
    distances, positions = some_neighbors(rng, queries, k, rows)
    weights = neighbor_weights(distances, 0.7).to(weight_dtype)
    values = torch.tensor(rng.uniform(-1, 1, size=(rows, classes))).to(dtype)

    sums = weighted_residual(positions, weights, values)

    assert sums.shape == (queries, classes)
    assert sums.dtype == wide(dtype)
    # Weights are rounded to float32 where the table is not float64.
    close(sums, oracle.weighted_sum(positions, float64(weights.to(wide(dtype))), float64(values)), tolerance=1e-6)


@given(seeds, dtypes, class_counts, neighbor_counts, st.integers(0, 9), st.integers(0, 40))
def test_weighted_labels(seed, dtype, classes, k, queries, rows):
    rng = np.random.default_rng(seed)
    distances, positions = some_neighbors(rng, queries, k, rows)
    weights = neighbor_weights(distances, 0.7).to(dtype)
    targets = torch.tensor(rng.integers(0, classes, size=rows))

    sums = weighted_labels(positions, weights, targets, classes)

    assert sums.shape == (queries, classes)
    assert sums.dtype == wide(dtype)
    close(sums, oracle.label_average(positions, float64(weights), targets, classes), tolerance=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1.0])
def test_weights_of_missing_neighbors_are_not_read(dtype, garbage):
    positions = torch.tensor([[1, -1], [-1, -1]])
    weights = torch.tensor([[1.0, garbage], [garbage, garbage]])
    table = torch.tensor([[7.0, 7.0], [0.25, 0.75]], dtype=dtype)
    assert weighted_residual(positions, weights, table).tolist() == [[0.25, 0.75], [0.0, 0.0]]
    assert weighted_labels(positions, weights, torch.tensor([0, 1]), 2).tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert weights[0].isnan().sum() == np.isnan(garbage), "the caller's weights were overwritten"


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_tables_are_summed_in_float32(dtype):
    # Half-precision sums get stuck: 0.5 + 1/4096 is 0.5 in float16, and much earlier in bfloat16.
    k = 4096
    values, weights = torch.ones(k, 3, dtype=dtype), torch.full((2, k), 1 / k)
    stuck = torch.zeros((), dtype=dtype)
    for _ in range(k):
        stuck += torch.tensor(1 / k, dtype=dtype)
    assert stuck < 0.9, "this data could not tell the difference"

    close(weighted_residual(torch.arange(k).expand(2, k), weights, values), np.ones((2, 3)), tolerance=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_not_rounded_to_the_table(dtype):
    weights = torch.tensor([[0.3, 0.7]])
    sums = weighted_residual(torch.tensor([[0, 1]]), weights, torch.tensor([[1.0], [0.0]], dtype=dtype))
    close(sums.float(), np.array([[0.3]]), tolerance=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_keep_their_precision_under_autocast_and_reduced_matmul_precision(dtype):
    positions, weights = torch.randint(0, 50, (20, 30)), torch.rand(20, 30)
    values = torch.randn(50, 7).to(dtype)
    expected = oracle.weighted_sum(positions, float64(weights), float64(values))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = weighted_residual(positions, weights, values)
    finally:
        torch.set_float32_matmul_precision(before)
    assert sums.dtype == torch.float32
    close(sums, expected)


@pytest.mark.parametrize("gather_bytes", [1, 4 * 9 * 6 * 2, 2**30])
@pytest.mark.parametrize("dtype", HALVES)
def test_blocks_of_queries_do_not_change_the_sum(monkeypatch, dtype, gather_bytes):
    monkeypatch.setattr(functional, "_GATHER_BYTES", gather_bytes)  # 1, 2 and all queries at once
    positions, weights = torch.randint(-1, 30, (7, 9)), torch.rand(7, 9)
    values = torch.randn(30, 6).to(dtype)
    sums = weighted_residual(positions, weights, values)
    close(sums, oracle.weighted_sum(positions, float64(weights), float64(values)))


# -- the combined prediction


@given(seeds, dtypes, dtypes, class_counts, st.integers(0, 7), st.sampled_from([0.0, 0.25, 1.0, 5.0]))
def test_combine(seed, base_dtype, residual_dtype, classes, rows, strength):
    rng = np.random.default_rng(seed)
    base = torch.tensor(rng.uniform(size=(rows, classes))).to(base_dtype)
    residual = torch.tensor(rng.uniform(-1, 1, size=(rows, classes))).to(residual_dtype)
    before = base.clone()

    combined = combine(base, residual, strength)

    assert combined.dtype in (torch.float32, torch.float64)
    close(combined.float(), float64(base) + strength * float64(residual))
    assert torch.equal(base, before)


@given(
    seeds, st.sampled_from([torch.float32, torch.float64]), class_counts, neighbor_counts, sigmas, temperatures, dtypes
)
def test_the_whole_formula_is_the_oracle_within_1e_5(seed, dtype, classes, k, sigma, temperature, table_dtype):
    rng = np.random.default_rng(seed)
    queries, rows = 6, 30
    temperature = max(temperature, 0.01)
    distances, positions = some_neighbors(rng, queries, k, rows, dtype)
    outputs = torch.tensor(rng.normal(size=(rows, classes)) * 5).to(table_dtype).to(dtype)
    query_outputs = torch.tensor(rng.normal(size=(queries, classes)) * 5).to(dtype)
    targets = torch.tensor(rng.integers(0, classes, size=rows))

    weights = neighbor_weights(distances, sigma)
    residual = weighted_residual(positions, weights, residuals(outputs, targets, temperature))
    combined = combine(probabilities(query_outputs, temperature), residual)

    expected = oracle.softmax(query_outputs, temperature) + oracle.weighted_sum(
        positions,
        oracle.weights(float64(distances), sigma),
        oracle.residuals(outputs, targets, softmax_temperature=temperature),
    )
    close(combined, expected)
    close(combined.sum(dim=1), np.ones(queries))


# -- log-probabilities for the user's own loss and metrics


def combined_predictions(
    rng: np.random.Generator, rows: int, classes: int, strength: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Base probabilities (some rows saturated) and F as a memory of 50 rows with 8 neighbours gives them."""
    scale = torch.tensor(rng.choice([0.0, 1.0, 8.0, 500.0], size=(rows, 1)))
    base = probabilities((torch.tensor(rng.normal(size=(rows, classes))) * scale).to(dtype))
    stored = torch.tensor(rng.normal(size=(50, classes)) * 4).to(dtype)
    table = residuals(stored, torch.tensor(rng.integers(0, classes, size=50)))
    weights = torch.tensor(rng.dirichlet(np.ones(8), size=rows)).to(dtype)
    return base, combine(
        base, weighted_residual(torch.tensor(rng.integers(0, 50, (rows, 8))), weights, table), strength
    )


def check_log_predictions(combined: Tensor, base: Tensor) -> None:
    logs = log_predictions(combined, base)
    assert logs.isfinite().all()
    assert (logs <= 0).all()
    close(logs.double().exp().sum(dim=1).to(logs.dtype), np.ones(len(logs)))
    winner = combined.argmax(dim=1)
    assert torch.equal(logs.argmax(dim=1), winner)
    # The largest one is alone, so that argmax cannot depend on how a library breaks ties.
    others = logs.scatter(1, winner[:, None], -torch.inf).amax(dim=1)
    assert (logs.amax(dim=1) > others).all()


@given(
    seeds,
    st.sampled_from([torch.float32, torch.float64]),
    class_counts,
    st.sampled_from([0.0, 0.3, 1.0, 5.0]),
)
def test_log_predictions_are_a_distribution_with_the_argmax_of_f(seed, dtype, classes, strength):
    base, combined = combined_predictions(np.random.default_rng(seed), 7, classes, strength, dtype)
    check_log_predictions(combined, base)
    proper = proper_probabilities(combined, base)
    np.testing.assert_allclose(proper, log_predictions(combined, base).exp(), rtol=1e-4, atol=1e-6)
    assert torch.equal(proper.argmax(dim=1), combined.argmax(dim=1))
    assert proper.min() >= 0
    assert proper.max() <= 1
    logs, expected = log_predictions(combined, base), oracle.log_predictions(float64(combined), float64(base))
    # Where the base gives less than the smallest normal number, the oracle goes down to -inf and we stop before.
    stopped = expected < np.log(torch.finfo(dtype).tiny)
    close(logs[torch.tensor(~stopped)], expected[~stopped], tolerance=2e-5)
    assert (logs[torch.tensor(stopped)] < -80).all()


@pytest.mark.parametrize("strength", [1.0, 5.0])
@pytest.mark.parametrize("classes", [8192, 32000])
def test_log_predictions_of_a_large_vocabulary(classes, strength):
    base, combined = combined_predictions(np.random.default_rng(1), 40, classes, strength, torch.float32)
    check_log_predictions(combined, base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 10, 1000, 32000])
def test_log_predictions_keep_an_argmax_that_is_one_rounding_step_ahead(classes, dtype):
    rows = torch.arange(200)
    first, second = torch.rand(len(rows), classes).argsort(dim=1)[:, :2].sort(dim=1).values.T
    top = torch.linspace(1.05, 1.4, len(rows), dtype=dtype) / classes if classes > 2 else torch.full((len(rows),), 0.5)
    combined = ((1 - 2 * top) / max(classes - 2, 1))[:, None].repeat(1, classes).to(dtype)
    combined[rows, first] = top.to(dtype)
    combined[rows, second] = torch.nextafter(top.to(dtype), torch.ones((), dtype=dtype))
    assert torch.equal(combined.argmax(dim=1), second)
    plain = combined.log() - combined.sum(dim=1, keepdim=True).log()
    if classes >= 10:
        assert (plain.argmax(dim=1) == first).any(), "this data could not tell the difference"

    check_log_predictions(combined, base=torch.full_like(combined, 1 / classes))


def test_log_predictions_of_exact_ties_take_the_first_like_argmax():
    combined = torch.tensor([[0.4, 0.2, 0.4], [0.5, 0.5, 0.0], [0.2, 0.6, 0.6]])
    check_log_predictions(combined, torch.full((3, 3), 1 / 3))


def test_log_predictions_keep_a_fraction_of_the_base_probability():
    combined = torch.tensor([[1.5, -0.4, -0.1], [0.9, 0.1, 0.0]])
    base = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    raised = np.array([[1.5, 0.05, 0.03], [0.9, 0.1, 0.08]])
    close(log_predictions(combined, base).exp(), raised / raised.sum(axis=1, keepdims=True))
    raised = np.array([[1.5, 0.25, 0.15], [0.9, 0.1, 0.4]])
    close(log_predictions(combined, base, floor=0.5).exp(), raised / raised.sum(axis=1, keepdims=True))


def test_log_predictions_never_raise_a_loser_to_the_top():
    # The base is sure of class 1, the memory knows it is one of many others: 0.1 * p would beat every F.
    classes = 1000
    combined = torch.full((1, classes), 1 / (classes - 1))
    combined[0, 1] = 0.0
    combined[0, 7] += 1e-4
    base = torch.zeros(1, classes)
    base[0, 1] = 1.0
    check_log_predictions(combined, base)
    assert log_predictions(combined, base).argmax() == 7


def test_log_predictions_of_one_class_are_0():
    assert log_predictions(torch.ones(3, 1), torch.ones(3, 1)).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("dtype", HALVES)
def test_log_predictions_of_half_precision_are_computed_in_float32(dtype):
    base = torch.rand(20, 10).to(dtype)
    combined = (base + 0.5 * torch.randn(20, 10)).to(dtype)
    combined[:, 0] += 1 - combined.sum(dim=1)
    logs = log_predictions(combined, base)
    assert logs.dtype == torch.float32
    positive = combined.amax(dim=1) > 0
    close(logs[positive], oracle.log_predictions(float64(combined), float64(base))[positive.numpy()])


def test_softmax_and_cross_entropy_of_log_predictions_are_what_they_say():
    base, combined = combined_predictions(np.random.default_rng(3), 30, 10, 1.0, torch.float32)
    targets = torch.randint(0, 10, (30,))
    logs = log_predictions(combined, base)
    close(logs.softmax(dim=1), np.exp(float64(logs)))
    nll = torch.nn.functional.cross_entropy(logs, targets, reduction="none")
    close(nll, -float64(logs)[np.arange(30), targets])


@given(seeds, st.sampled_from([torch.float32, torch.float64]), class_counts, st.sampled_from([0.0, 1.0, 5.0]))
def test_negative_log_likelihood_is_minus_the_log_prediction_of_the_target(seed, dtype, classes, strength):
    rng = np.random.default_rng(seed)
    base, combined = combined_predictions(rng, 7, classes, strength, dtype)
    targets = torch.tensor(rng.integers(0, classes, size=7))
    nll = negative_log_likelihood(combined, base, targets)
    assert nll.shape == (7,)
    np.testing.assert_allclose(nll, -log_predictions(combined, base)[torch.arange(7), targets], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ascending_is_a_stable_sort(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    distances = torch.randint(0, 5, (50, 33), generator=generator).to(dtype) / 3
    distances[:, 4], distances[7] = torch.inf, torch.inf
    distances[9, :5] = torch.tensor([1e-45, 0.0, 3e38, 1e-38, 1e-45], dtype=dtype)
    for unsorted in (distances, distances.t(), distances[:0], distances[:, :0]):
        values, columns = functional.ascending(unsorted)
        expected, order = unsorted.sort(dim=1, stable=True)
        assert torch.equal(values, expected)
        assert torch.equal(columns, order)
