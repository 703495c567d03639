"""The three tasks against the oracle, and every refusal of targets that do not fit."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_resmem import InputError, Multiclass, Multilabel, Regression, Task
from lightning_resmem.tasks import TASKS, check_finite
from tests import oracle

NAN, INF = float("nan"), float("inf")
ALL = [Multiclass(), Multilabel(), Regression()]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]

every_task = pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
seeds = st.integers(0, 2**32 - 1)


def some_targets(task: Task, rng: np.random.Generator, rows: int, outputs: int) -> Tensor:
    if isinstance(task, Multiclass):
        return torch.tensor(rng.integers(0, outputs, size=rows))
    if isinstance(task, Multilabel):
        return torch.tensor(rng.integers(0, 2, size=(rows, outputs)))
    return torch.tensor(rng.normal(size=(rows, outputs)) * 10)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def refusal(task: Task, targets: Tensor, num_outputs: int, ids: Tensor | None = None) -> str:
    with pytest.raises(InputError) as caught:
        task.check_targets(targets, num_outputs, ids)
    message = str(caught.value)
    assert message.startswith("targets ")
    return message


# -- predictions and residuals


@every_task
@given(
    seeds,
    st.sampled_from(FLOATS),
    st.sampled_from([1, 2, 10]),
    st.integers(0, 7),
    st.sampled_from([1e-3, 0.5, 1.0, 40.0]),
)
def test_predictions_and_residuals_are_the_oracles(task, seed, dtype, num_outputs, rows, temperature):
    rng = np.random.default_rng(seed)
    outputs = torch.tensor(rng.normal(size=(rows, num_outputs)) * rng.choice([0.1, 3.0, 1e4])).to(dtype)
    targets = task.check_targets(some_targets(task, rng, rows, num_outputs), num_outputs)

    base = task.predict(outputs, temperature)
    residual = task.residuals(outputs, targets, temperature)

    assert base.shape == residual.shape == (rows, num_outputs)
    assert base.dtype == wide(dtype)
    assert residual.dtype == wide(dtype) or targets.dtype == torch.float64
    if not rows:
        return
    values = outputs.double().numpy()
    np.testing.assert_allclose(base, oracle.base_prediction(values, task.name, temperature), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        residual, oracle.residuals(values, targets, task.name, temperature), rtol=1e-6, atol=1e-5
    )


@every_task
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_huge_outputs_do_not_become_nan(task, dtype):
    most = min(torch.finfo(dtype).max, 3e38)
    outputs = torch.tensor([[most, -most], [-most, most], [most, most], [-most, -most]]).to(dtype)
    targets = torch.tensor([1, 1, 0, 0])
    targets = targets if isinstance(task, Multiclass) else torch.nn.functional.one_hot(targets, 2).float()
    for temperature in (1e-45, 0.1, 1.0, 10.0):
        assert task.predict(outputs, temperature).isfinite().all()
        assert task.residuals(outputs, targets, temperature).isfinite().all()


def test_regression_has_no_temperature():
    outputs, targets = torch.randn(5, 2), torch.randn(5, 2)
    assert not Regression.uses_softmax_temperature
    assert torch.equal(Regression().predict(outputs, 7.0), outputs)
    assert torch.equal(Regression().residuals(outputs, targets, 7.0), targets - outputs)


@every_task
def test_inputs_are_left_alone(task):
    outputs = torch.randn(6, 3)
    targets = task.check_targets(some_targets(task, np.random.default_rng(0), 6, 3), 3)
    before = outputs.clone(), targets.clone()
    base = task.predict(outputs, 2.0)
    task.residuals(outputs, targets, 2.0)
    task.loss(base, base, targets)
    task.to_outputs(base, base)
    task.score(base, targets)
    assert torch.equal(outputs, before[0])
    assert torch.equal(targets, before[1])
    assert torch.equal(base, task.predict(outputs, 2.0))


@every_task
@given(seeds, st.sampled_from([1, 2, 10]), st.sampled_from([1, 5, 53]))
def test_label_average(task, seed, num_outputs, k):
    rng = np.random.default_rng(seed)
    targets = task.check_targets(some_targets(task, rng, 20, num_outputs), num_outputs)
    positions = torch.tensor(rng.integers(-1, 20, size=(6, k)))
    weights = torch.tensor(rng.dirichlet(np.ones(k), size=6), dtype=torch.float32)
    average = task.label_average(positions, weights, targets, num_outputs)
    expected = oracle.label_average(positions, weights, targets, num_outputs, task.name)
    np.testing.assert_allclose(average, expected, rtol=1e-6, atol=1e-5)


# -- what the route returns


def test_multiclass_outputs_have_the_argmax_of_f():
    combined = torch.tensor([[1.2, -0.2, 0.0], [0.4, 0.4, 0.2], [0.1, 0.3, 0.6]])
    base = torch.tensor([[0.1, 0.8, 0.1], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]])
    outputs = Multiclass().to_outputs(combined, base)
    assert outputs.argmax(dim=1).tolist() == [0, 0, 2]
    np.testing.assert_allclose(outputs, oracle.log_predictions(combined, base), atol=1e-6)
    # The user's step sees the same through softmax and through cross_entropy.
    np.testing.assert_allclose(outputs.softmax(dim=1), outputs.exp(), atol=1e-6)


def test_multilabel_outputs_are_clamped_logits():
    combined = torch.tensor([[-0.3, 0.0, 1e-5, 0.25, 0.5, 1.0, 1.7]])
    outputs = Multilabel().to_outputs(combined, combined)
    margin = np.log(1e-4 / (1 - 1e-4))
    expected = [[margin, margin, margin, np.log(1 / 3), 0.0, -margin, -margin]]
    np.testing.assert_allclose(outputs, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(outputs.sigmoid(), combined.clamp(1e-4, 1 - 1e-4), atol=1e-6)


def test_regression_outputs_are_the_prediction():
    combined = torch.randn(4, 2)
    assert torch.equal(Regression().to_outputs(combined, torch.zeros(4, 2)), combined)


# -- loss and score


def test_multiclass_loss_and_score():
    rng = np.random.default_rng(0)
    base = oracle.softmax(rng.normal(size=(50, 4)))
    combined = base + oracle.residuals(rng.normal(size=(50, 4)), rng.integers(0, 4, 50))
    targets = rng.integers(0, 4, 50)
    arguments = torch.tensor(combined).float(), torch.tensor(base).float(), torch.tensor(targets)

    loss, score = Multiclass().loss(*arguments), Multiclass().score(arguments[0], arguments[2])

    np.testing.assert_allclose(loss, -oracle.log_predictions(combined, base)[np.arange(50), targets], atol=1e-5)
    seen = torch.nn.functional.cross_entropy(Multiclass().to_outputs(*arguments[:2]), arguments[2], reduction="none")
    np.testing.assert_allclose(loss, seen, atol=1e-5)
    np.testing.assert_array_equal(score, combined.argmax(axis=1) == targets)


def test_multilabel_loss_and_score():
    combined = torch.tensor([[1.5, 0.25, 0.5], [-0.5, 0.75, 0.4]])
    targets = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
    clamped = combined.double().numpy().clip(1e-4, 1 - 1e-4)
    truth = targets.double().numpy()
    expected = -(truth * np.log(clamped) + (1 - truth) * np.log(1 - clamped)).mean(axis=1)
    np.testing.assert_allclose(Multilabel().loss(combined, combined, targets), expected, rtol=1e-4)
    # 0.5 counts as "yes", in predictions and in targets.
    np.testing.assert_allclose(Multilabel().score(combined, targets), [1 / 3, 2 / 3], rtol=1e-6)


def test_regression_loss_and_score_are_the_squared_error():
    prediction, targets = torch.randn(9, 3), torch.randn(9, 3)
    expected = ((prediction - targets) ** 2).double().mean(dim=1)
    np.testing.assert_allclose(Regression().loss(prediction, prediction, targets), expected, rtol=1e-6)
    np.testing.assert_allclose(Regression().score(prediction, targets), expected, rtol=1e-6)


@every_task
def test_loss_and_score_are_per_row(task):
    rng = np.random.default_rng(1)
    base = task.predict(torch.randn(8, 3))
    targets = task.check_targets(some_targets(task, rng, 8, 3), 3)
    loss, score = task.loss(base, base, targets), task.score(base, targets)
    assert loss.shape == score.shape == (8,)


@every_task
def test_better_predictions_have_better_loss_and_score(task):
    targets = task.check_targets(some_targets(task, np.random.default_rng(2), 40, 3), 3)
    truth = torch.tensor(oracle.labels(targets, 3, task.name)).float()
    base = task.predict(torch.randn(40, 3))
    better = 0.1 * base + 0.9 * truth
    assert task.loss(better, base, targets).mean() < task.loss(base, base, targets).mean()
    gain = task.score(better, targets).mean() - task.score(base, targets).mean()
    assert (gain > 0) == task.higher_is_better


def test_names():
    assert {name: type(task) for name, task in zip(TASKS, ALL, strict=True)} == TASKS
    assert [task.name for task in ALL] == list(oracle.TASKS)
    assert [task.score_name for task in ALL] == ["acc", "acc", "mse"]


# -- check_targets: Multiclass


@pytest.mark.parametrize("dtype", INTEGERS)
def test_multiclass_takes_integers_and_stores_int64(dtype):
    targets = Multiclass().check_targets(torch.tensor([0, 2, 1], dtype=dtype), 3)
    assert targets.dtype == torch.int64
    assert targets.tolist() == [0, 2, 1]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.bool, torch.complex64])
def test_multiclass_refuses_other_dtypes(dtype):
    message = refusal(Multiclass(), torch.zeros(3).to(dtype), 3)
    assert f"dtype {dtype}" in message
    assert "targets.long()" in message


def test_multiclass_takes_a_column():
    assert Multiclass().check_targets(torch.tensor([[2], [0]]), 3).tolist() == [2, 0]
    assert Multiclass().check_targets(torch.empty(0, dtype=torch.int64), 3).shape == (0,)


@pytest.mark.parametrize("shape", [(), (4, 2), (4, 1, 1), (2, 2, 2)])
def test_multiclass_refuses_other_shapes(shape):
    message = refusal(Multiclass(), torch.zeros(shape, dtype=torch.int64), 3)
    assert f"shape {shape}" in message
    assert "argmax(1)" in message
    assert "Multilabel()" in message


@pytest.mark.parametrize("bad", [-1, 3, -100, 2**40])
def test_multiclass_names_the_rows_with_labels_out_of_range(bad):
    targets = torch.tensor([0, bad, 2, 1, bad])
    message = refusal(Multiclass(), targets, 3)
    assert f"holds {bad} in rows 1, 4, outside [0, 3)" in message
    assert "memory_dataloader" in message
    assert f"holds {bad} in rows 11, 41," in refusal(Multiclass(), targets, 3, ids=torch.tensor([1, 11, 21, 31, 41]))


def test_only_the_first_five_rows_are_listed():
    ids = torch.arange(100, 112)
    assert "rows 100, 101, 102, 103, 104 and 7 more" in refusal(Multiclass(), torch.full((12,), 9), 3, ids)
    assert re.search(r"rows 0, 1, 2, 3, 4\b(?! and)", refusal(Multiclass(), torch.full((5,), 9), 3))


@pytest.mark.parametrize("targets", [torch.tensor([0, 1]), torch.tensor([[0.0], [1.0]]), torch.tensor([-1, 1])])
def test_multiclass_of_one_output_names_the_other_tasks(targets):
    message = refusal(Multiclass(), targets, 1)
    assert "0..0" not in message
    assert "LocalMemory(task=Multilabel())" in message
    assert "Regression()" in message


@pytest.mark.parametrize("targets", [torch.zeros(2), torch.zeros(2, 3, dtype=torch.int64)])
def test_other_tasks_are_named_for_the_memory_and_the_callback(targets):
    message = refusal(Multiclass(), targets, 3)
    assert re.search(r"LocalMemory\(task=(\w+)\(\)\).*ResMemCallback\(memory=LocalMemory\(task=\1\(\)\)\)", message)


# -- check_targets: Multilabel


def test_multilabel_takes_a_flat_vector_for_one_output_only():
    assert Multilabel().check_targets(torch.tensor([1, 0]), 1).tolist() == [[1.0], [0.0]]
    assert "shape (2,), expected (N, 2)" in refusal(Multilabel(), torch.tensor([1, 0]), 2)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, torch.bool])
def test_multilabel_takes_any_dtype_and_stores_float32(dtype):
    targets = Multilabel().check_targets(torch.tensor([[1, 0], [0, 0]]).to(dtype), 2)
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[1, 0], [0, 0]]


def test_multilabel_takes_soft_labels():
    targets = torch.tensor([[0.25, 1.0], [0.0, 0.5]])
    assert torch.equal(Multilabel().check_targets(targets, 2), targets)


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (4, 3, 1)])
def test_multilabel_refuses_other_shapes(shape):
    message = refusal(Multilabel(), torch.zeros(shape), 3)
    assert f"shape {shape}" in message
    assert "(N, 3)" in message


@pytest.mark.parametrize("bad", [-0.1, 1.5, 2.0, NAN, INF, -INF])
def test_multilabel_names_the_rows_with_values_outside_0_and_1(bad):
    targets = torch.zeros(4, 3)
    targets[1, 2] = targets[3, 0] = bad
    assert "outside [0, 1] in rows 1, 3 " in refusal(Multilabel(), targets, 3)
    assert "in rows 71, 5 " in refusal(Multilabel(), targets, 3, ids=torch.tensor([9, 71, 6, 5]))


# -- check_targets: Regression


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_regression_takes_any_number_and_stores_float32_or_float64(dtype):
    targets = Regression().check_targets(torch.tensor([[1, 5], [3, 4]]).to(dtype), 2)
    assert targets.dtype == wide(dtype)
    assert targets.tolist() == [[1, 5], [3, 4]]


def test_regression_takes_a_flat_vector_for_one_output_only():
    assert Regression().check_targets(torch.tensor([1.0, 2.0]), 1).tolist() == [[1.0], [2.0]]
    assert "shape (2,), expected (N, 2)" in refusal(Regression(), torch.tensor([1.0, 2.0]), 2)


@pytest.mark.parametrize("shape", [(), (4, 2), (4, 3, 1)])
def test_regression_refuses_other_shapes(shape):
    message = refusal(Regression(), torch.zeros(shape), 3)
    assert f"shape {shape}" in message
    assert "(N, 3)" in message


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", FLOATS)
def test_regression_names_the_rows_with_nan_or_infinite_targets(dtype, bad):
    targets = torch.zeros(4, 2, dtype=dtype)
    targets[0, 1] = targets[2, 0] = bad
    assert "NaN or infinite entries in rows 0, 2." in refusal(Regression(), targets, 2)
    assert "in rows 8, 6." in refusal(Regression(), targets, 2, ids=torch.tensor([8, 7, 6, 5]))


# -- check_finite


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 2)])
def test_check_finite_names_the_rows(dtype, shape):
    tensor = torch.zeros(shape, dtype=dtype)
    check_finite("outputs", tensor)
    tensor[1], tensor[4] = INF, -INF  # their sum is NaN, not infinite
    with pytest.raises(InputError, match=r"^outputs has NaN or infinite entries in rows 1, 4\."):
        check_finite("outputs", tensor)
    with pytest.raises(InputError, match=r"in rows 21, 24\."):
        check_finite("outputs", tensor, ids=torch.arange(20, 26))


@pytest.mark.parametrize("dtype", FLOATS)
def test_check_finite_accepts_finite_numbers_whose_sum_overflows(dtype):
    check_finite("outputs", torch.full((10, 3), torch.finfo(dtype).max, dtype=dtype))


def test_check_finite_accepts_no_rows():
    check_finite("outputs", torch.empty(0, 3))


@pytest.mark.parametrize("targets", [torch.zeros(3), torch.zeros(3, 1)])
def test_a_mean_and_a_variance_are_two_heads(targets):
    assert "make it two: self.mean = nn.Linear(...) and self.variance" in refusal(Regression(), targets, 2)
    assert "variance" not in refusal(Regression(), targets, 3)


def test_labels_that_a_loss_ignores():
    targets = torch.tensor([0, -100, 255, 2])
    assert Multiclass().ignored(targets, 3, {-100, 2}).tolist() == [False, True, False, False]  # 2 is a class
    assert Multiclass().ignored(targets[:, None], 3, {-100, 255}).tolist() == [False, True, True, False]
    assert Multiclass().ignored(targets.float(), 3, {-100}) is None
    assert Multilabel().ignored(targets, 3, {-100}) is None
    assert Regression().ignored(targets, 3, {-100}) is None  # a number like others
