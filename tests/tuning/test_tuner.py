"""The tuner's table is what brute force finds, and its choice is the best of it."""

import warnings

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import TASKS
from lightning_resmem.tuning.tuner import GridTuner
from tests import oracle
from tests.tuning.validation import AXES, GRID, TASK_NAMES, filled, right, rows, scores

# Most tests choose on few rows; the tests of warnings see them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_table_is_what_brute_force_finds(task):
    memory, (embeddings, outputs, targets) = filled(task), rows(25, task, seed=2)
    result = GridTuner(**GRID).tune(memory, embeddings, outputs, targets)
    num_temperatures = 1 if task == "regression" else 2
    assert len(result.table) == 1 + num_temperatures * 2 * 2 * 2
    assert len({tuple(setting.values())[:4] for setting in result.table}) == len(result.table)
    assert result.refined == 0

    keys, key_outputs, key_targets = rows(40, task, seed=1)
    near = np.sort(oracle.neighbors(keys, None, embeddings, 10)[0].mean(axis=1))
    scale = near[(len(near) - 1) // 2]
    assert sorted({setting["sigma"] for setting in result.table[1:]}) == pytest.approx([0.2 * scale, scale], rel=1e-5)

    for setting in result.table:
        params = {name: setting[name] for name in AXES}
        found = oracle.predict(keys, key_outputs, key_targets, embeddings, outputs, task=task, **params)
        score, loss = scores(found.resmem, found.base, targets, task)
        assert setting["score"] == pytest.approx(score.mean(), abs=1e-5)
        assert setting["loss"] == pytest.approx(loss.mean(), abs=1e-4)
        assert setting["objective"] == setting["score"]
        if task == "regression":
            assert "negative_flip_rate" not in setting
        else:
            before, after = (right(found_, targets, task) for found_ in (found.base, found.resmem))
            assert setting["negative_flip_rate"] == pytest.approx((before & ~after).mean())
    assert result.table[0]["strength"] == 0
    assert result.table[0]["softmax_temperature"] == 1
    assert result.base_score == result.table[0]["score"]
    assert result.rows == 25


def best_of(table, task, objective):
    sign = 1 if task == "regression" else -1
    keys = [(round(sign * setting["score"], 9), round(setting["loss"], 9)) for setting in table]
    order = [key if objective == "accuracy" else key[::-1] for key in keys]
    return table[order.index(min(order))]


@pytest.mark.parametrize("objective", ["accuracy", "nll"])
@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_choice_is_the_best_of_the_table(task, objective):
    memory = filled(task)
    before = memory.params
    result = GridTuner(**GRID, objective=objective).tune(memory, *rows(25, task, seed=2))
    best = best_of(result.table, task, objective)
    params = result.params
    assert {name: best[name] for name in AXES} == {name: getattr(params, name) for name in AXES}
    assert best["score"] == result.score
    assert result.objective == objective
    assert result.best_objective == best["loss" if objective == "nll" else "score"]
    assert params.strength > 0  # the outputs are bad enough for the memory to help
    assert (result.score < result.base_score) if task == "regression" else (result.score > result.base_score)
    assert result.score_name == ("mse" if task == "regression" else "acc")
    assert memory.params == before
    assert f"k={params.k}" in result.summary()
    gain = f"({abs(result.score - result.base_score):+.4f} ± {result.gain_error:.4f})"  # also in squared errors
    assert f"{result.base_score:.4f} -> {result.score:.4f} {gain}" in result.summary()
    notes = "".join(f"; {note}" for note in result.notes)  # of several labels, F1 falls here
    assert bool(notes) is (task == "multilabel")
    assert result.summary().endswith(f"on 25 validation rows{notes}")


def test_what_was_tuned_is_what_the_memory_then_predicts():
    memory, (embeddings, outputs, targets) = filled(), rows(25, "multiclass", seed=2)
    result = GridTuner(**GRID).tune(memory, embeddings, outputs, targets)
    memory.params = result.params
    right = memory.predict(embeddings, outputs).argmax(1) == targets
    assert right.float().mean() == pytest.approx(result.score)


def test_nll_and_accuracy_choose_differently():
    memory = filled(count=60)
    validation = rows(40, "multiclass", seed=5)
    by_accuracy = GridTuner(objective="accuracy", refinements=0, noise=0).tune(memory, *validation)
    by_nll = GridTuner(objective="nll", refinements=0, noise=0).tune(memory, *validation)
    loss = {
        objective: best_of(result.table, "multiclass", objective)["loss"]
        for objective, result in (("accuracy", by_accuracy), ("nll", by_nll))
    }
    assert by_nll.params != by_accuracy.params
    assert [row["loss"] for row in by_nll.table] == [row["loss"] for row in by_accuracy.table]
    assert loss["nll"] < loss["accuracy"]
    assert by_nll.score < by_accuracy.score


def shuffled_memory():
    """Training labels that have nothing to do with the rows, a base that is always right on the validation rows."""
    embeddings, _, targets = rows(60, "multiclass", seed=1)
    memory = LocalMemory()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    memory.add(embeddings, 6 * torch.eye(3)[targets], targets[order])
    validation, _, truth = rows(30, "multiclass", seed=2)
    return memory, (validation, 6 * torch.eye(3)[truth], truth)


@pytest.mark.parametrize("objective", ["accuracy", "nll"])
def test_a_memory_that_hurts_is_switched_off_with_a_warning(objective):
    memory, validation = shuffled_memory()
    with pytest.warns(ResMemWarning, match=r"memory does not help .*strength 0, the base alone") as caught:
        result = GridTuner(objective=objective, softmax_temperature=[1.0]).tune(memory, *validation)
    assert len(caught) == 1
    assert result.params.strength == 0
    assert result.score == result.base_score == 1.0
    prediction = memory.task.predict(validation[1])
    memory.params = result.params
    assert torch.equal(memory.predict(validation[0], validation[1]), prediction)


def test_a_memory_that_helps_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResMemWarning)
        GridTuner(**GRID).tune(filled(), *rows(50, "multiclass", seed=2))


@pytest.mark.parametrize("count", [1, 49])
def test_a_choice_on_few_rows_warns(count):
    with pytest.warns(ResMemWarning, match=r"fewer than 50 rows is mostly chance") as caught:
        result = GridTuner(**GRID).tune(filled(), *rows(count, "multiclass", seed=2))
    assert len(caught) == 1
    assert result.rows == count


@pytest.mark.parametrize("task", TASK_NAMES)
def test_the_error_of_the_gain_is_that_of_the_paired_differences(task):
    memory, (embeddings, outputs, targets) = filled(task), rows(60, task, seed=2)
    result = GridTuner(**GRID).tune(memory, embeddings, outputs, targets)
    memory.params = result.params
    after = memory.task.score(memory.predict(embeddings, outputs), targets).double()
    before = memory.task.score(memory.task.predict(outputs), targets).double()
    assert result.gain_error == pytest.approx(float((after - before).std() / 60**0.5), rel=1e-3)
    assert result.gain_error > 0


def test_the_error_of_no_gain_is_0_and_of_a_single_row_unknown():
    with pytest.warns(ResMemWarning):
        assert GridTuner(strength=[0.0]).tune(filled(), *rows(5, "multiclass", seed=2)).gain_error == 0
    memory = LocalMemory()
    memory.add(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([1]))
    with pytest.warns(ResMemWarning):
        result = GridTuner(k=[1], noise=0).tune(memory, np.zeros((1, 2)), [[0.0, 0.0]], [1])
    assert result.gain_error == float("inf")
    assert "(+1.0000 ± inf) on 1 validation row" in result.summary()


def test_arrays_and_lists_are_tuned_on_like_tensors():
    validation = rows(60, "multiclass", seed=2)
    expected = GridTuner(**GRID).tune(filled(), *validation)
    assert GridTuner(**GRID).tune(filled(), *(tensor.numpy() for tensor in validation)) == expected
    assert GridTuner(**GRID).tune(filled(), *(tensor.tolist() for tensor in validation)) == expected


def test_the_base_wins_a_tie():
    """All residuals are 0, so every strength gives the same."""
    memory = LocalMemory(task=TASKS["regression"]())
    targets = torch.arange(5.0)[:, None]
    memory.add(torch.randn(5, 2), targets, targets)
    with pytest.warns(ResMemWarning, match="does not help"):
        result = GridTuner(k=[1, 2]).tune(memory, torch.randn(3, 2), torch.zeros(3, 1), torch.ones(3, 1))
    assert result.params.strength == 0
    assert {setting["score"] for setting in result.table} == {1.0}


def test_ties_in_accuracy_are_broken_by_the_loss():
    memory = LocalMemory()
    memory.add(torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    result = GridTuner(k=[1], sigma=[1.0], softmax_temperature=[1.0], strength=[0.25, 1.0, 0.5], refinements=0).tune(
        memory, torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    )
    assert {setting["score"] for setting in result.table} == {1.0}
    assert result.params.strength == 1.0


def test_of_equal_settings_the_first_is_chosen():
    """With one row in the memory all sigmas and all k are the same."""
    memory = LocalMemory()
    memory.add(torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([1]))
    result = GridTuner(
        k=[7, 2], sigma=[0.4, 0.1], softmax_temperature=[1.0], strength=[1.0], refinements=0, noise=0
    ).tune(memory, torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([1]))
    assert result.params.k == 1  # as many as there are
    assert result.params.sigma == pytest.approx(0.4 * 2**0.5)
    assert [setting["k"] for setting in result.table] == [1, 1, 1]
    assert len({setting["loss"] for setting in result.table}) == 2


def test_k_beyond_the_memory_is_cut():
    result = GridTuner(k=[2, 50, 100], sigma=[1.0], refinements=0).tune(filled(count=6), *rows(5, "multiclass", seed=2))
    assert sorted({setting["k"] for setting in result.table}) == [2, 6]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_one_validation_row(task):
    memory, (embedding, outputs, targets) = filled(task), rows(1, task, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResMemWarning)
        result = GridTuner(**GRID).tune(memory, embedding, outputs, targets)
    assert result.rows == 1
    distances = oracle.neighbors(rows(40, task, seed=1)[0], None, embedding, 10)[0]
    assert result.table[0]["sigma"] == pytest.approx(distances.mean(), rel=1e-5)


def test_validation_rows_that_are_all_in_the_memory():
    """All nearest distances are 0: sigma falls back to plain numbers."""
    memory = LocalMemory()
    memory.add(torch.zeros(4, 2), torch.zeros(4, 2), torch.tensor([0, 1, 1, 1]))
    result = GridTuner(noise=0, k=[4], sigma=[0.3], softmax_temperature=[1.0], strength=[1.0]).tune(
        memory, torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([1, 1])
    )
    assert result.params.sigma == pytest.approx(0.3)
    assert (result.base_score, result.score) == (0.0, 1.0)


def test_the_same_call_gives_the_same_result():
    memory, validation = filled(), rows(25, "multiclass", seed=2)
    assert GridTuner().tune(memory, *validation) == GridTuner().tune(memory, *validation)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_targets_are_checked_like_those_of_the_memory(dtype):
    memory, (embeddings, outputs, targets) = filled(), rows(25, "multiclass", seed=2)
    expected = GridTuner(**GRID).tune(memory, embeddings, outputs, targets)
    assert GridTuner(**GRID).tune(memory, embeddings, outputs, targets.to(dtype)[:, None]) == expected
    with pytest.raises(InputError, match="targets holds 3"):
        GridTuner(**GRID).tune(memory, embeddings, outputs, targets + 3 * (targets == 0))


def test_a_flat_target_of_a_regression():
    memory = LocalMemory(task=TASKS["regression"]())
    memory.add(torch.eye(3), torch.zeros(3, 1), torch.arange(3.0))
    result = GridTuner(k=[1]).tune(memory, torch.eye(3), torch.zeros(3, 1), torch.arange(3.0))
    assert result.base_score == pytest.approx(5 / 3)
    assert result.score == pytest.approx(0, abs=1e-9)


class SomeMissing(LocalMemory):
    """As an approximate index does, it finds nothing for some places."""

    def search(self, queries, k):
        distances, ids = super().search(queries, k)
        return Neighbors(distances.masked_fill(ids % 3 == 0, torch.inf), ids.masked_fill(ids % 3 == 0, -1))


def test_missing_neighbours_count_nothing():
    kept = torch.arange(40) % 3 != 0
    embeddings, outputs, targets = rows(40, "multiclass", seed=1)
    memory, expected = SomeMissing(), LocalMemory()
    memory.add(embeddings, outputs, targets)
    expected.add(embeddings[kept], outputs[kept], targets[kept])
    validation = rows(25, "multiclass", seed=2)
    grid = {**GRID, "k": [40]}
    found, wanted = GridTuner(**grid).tune(memory, *validation), GridTuner(**grid).tune(expected, *validation)
    # The unit of sigma differs: it is measured on what is found among the first ten places.
    scale = found.table[0]["sigma"] / wanted.table[0]["sigma"]
    assert 0.5 < scale <= 1.0
    rescaled = GridTuner(**{**grid, "sigma": [scale * sigma for sigma in GRID["sigma"]]}).tune(expected, *validation)
    assert [s["score"] for s in found.table] == pytest.approx([s["score"] for s in rescaled.table])
    assert [s["loss"] for s in found.table] == pytest.approx([s["loss"] for s in rescaled.table], abs=1e-5)


def test_strength_0_alone_is_the_base():
    with pytest.warns(ResMemWarning, match="does not help"):
        result = GridTuner(strength=[0.0]).tune(filled(), *rows(5, "multiclass", seed=2))
    assert len(result.table) == 1
    assert result.params.strength == 0


def test_params_of_the_memory_do_not_matter():
    validation = rows(25, "multiclass", seed=2)
    other = filled(params=ResMemParams(k=1, sigma=9.0, softmax_temperature=5.0, strength=0.0))
    assert GridTuner(**GRID).tune(other, *validation) == GridTuner(**GRID).tune(filled(), *validation)


def test_on_digits_the_choice_helps_rows_that_it_has_not_seen(digits):
    """A base that is the nearest class mean; the memory holds the training pixels."""
    means = torch.stack([digits.train.inputs[digits.train.targets == label].mean(0) for label in range(10)])

    def outputs(inputs):
        return -torch.cdist(inputs, means)

    memory = LocalMemory()
    memory.add(digits.train.inputs, outputs(digits.train.inputs), digits.train.targets)
    result = GridTuner().tune(memory, digits.val.inputs, outputs(digits.val.inputs), digits.val.targets)
    memory.params = result.params
    logits = outputs(digits.test.inputs)
    base = (logits.argmax(1) == digits.test.targets).float().mean()
    combined = (memory.predict(digits.test.inputs, logits).argmax(1) == digits.test.targets).float().mean()
    assert base < 0.92
    assert combined > 0.97
