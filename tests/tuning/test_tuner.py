"""The tuner's table is what brute force finds, and its choice is the best of it, on any number of ranks."""

import threading
import warnings

import numpy as np
import pytest
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.errors import EmptyMemoryError, InputError, ResMemWarning
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.params import ResMemParams
from lightning_resmem.tasks import TASKS
from lightning_resmem.tuning.tuner import GridTuner
from tests import oracle

# Most tests choose on few rows; the tests of warnings see them all the same.
pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")

TASK_NAMES = tuple(TASKS)
GRID = {
    "k": [3, 12],
    "sigma": [0.2, 1.0],
    "softmax_temperature": [0.8, 2.0],
    "strength": [0.5, 1.0],
    "refinements": 0,
    "noise": 0,
}
AXES = ("k", "sigma", "softmax_temperature", "strength")


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny sums: on a busy machine each would wait for the other threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(count, task, seed):
    """Embeddings, outputs and targets; the outputs are right about half of the time."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(count, 4, generator=generator)
    centers = torch.randn(4, 3, generator=torch.Generator().manual_seed(99))
    truth = (embeddings.abs() @ centers) * 2
    outputs = truth + 2 * torch.randn(count, 3, generator=generator)
    if task == "regression":
        outputs = outputs + 5  # what a neighbour can tell
    targets = {"multiclass": truth.argmax(1), "multilabel": (truth > 0).float(), "regression": truth}[task]
    return embeddings, outputs, targets


def filled(task="multiclass", count=40, params=None):
    memory = LocalMemory(task=TASKS[task](), params=params)
    memory.add(*rows(count, task, seed=1))
    memory.build()
    return memory


def scores(combined, base, targets, task):
    """Score and loss of each row, by the letter."""
    targets = np.asarray(targets)
    if task == "regression":
        errors = ((combined - targets) ** 2).mean(axis=1)
        return errors, errors
    if task == "multilabel":
        clamped = combined.clip(1e-4, 1 - 1e-4)
        losses = -(targets * np.log(clamped) + (1 - targets) * np.log(1 - clamped)).mean(axis=1)
        return ((combined >= 0.5) == (targets >= 0.5)).mean(axis=1), losses
    logs = oracle.log_predictions(combined, base)
    return combined.argmax(axis=1) == targets, -logs[np.arange(len(targets)), targets]


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


def right(prediction, targets, task):
    targets = np.asarray(targets)
    if task == "multilabel":
        return (prediction >= 0.5) == (targets >= 0.5)
    return prediction.argmax(axis=1) == targets


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
    gain = f"({result.score - result.base_score:+.4f} ± {result.gain_error:.4f})"
    assert f"{result.base_score:.4f} -> {result.score:.4f} {gain}" in result.summary()
    assert result.summary().endswith("on 25 validation rows")


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


# -- bad input


@pytest.mark.parametrize("name", AXES)
@pytest.mark.parametrize("value", [[], (), 3, "1", None, np.array([1.0]), {1: 1}])
def test_candidates_have_to_be_a_list(name, value):
    with pytest.raises(InputError, match=f"{name}=.*give a list of candidates, at least one"):
        GridTuner(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("k", 0),
        ("k", 2.5),
        ("k", True),
        ("sigma", 0.0),
        ("sigma", -1.0),
        ("sigma", float("nan")),
        ("softmax_temperature", 0),
        ("softmax_temperature", float("inf")),
        ("strength", -0.1),
        ("strength", "1"),
    ],
)
def test_candidates_have_to_be_in_range(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}"):
        GridTuner(**{name: [1, value]})


@pytest.mark.parametrize("objective", ["acc", "loss", None, 1])
def test_objective_has_to_be_known(objective):
    with pytest.raises(InputError, match=f"objective={objective!r}.*give .*torchmetrics Metric"):
        GridTuner(objective=objective)


def test_no_validation_rows():
    embeddings, outputs, targets = rows(0, "multiclass", seed=2)
    with pytest.raises(InputError, match="at least one validation row"):
        GridTuner().tune(filled(), embeddings, outputs, targets)


def test_an_empty_memory():
    with pytest.raises(EmptyMemoryError):
        GridTuner().tune(LocalMemory(), *rows(3, "multiclass", seed=2))


@pytest.mark.parametrize("which", [0, 1])
def test_numbers_that_are_not_finite(which):
    validation = list(rows(5, "multiclass", seed=2))
    validation[which][3, 1] = torch.nan
    with pytest.raises(InputError, match=r"NaN or infinite entries in rows 3"):
        GridTuner().tune(filled(), *validation)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embeddings": None}, "embeddings of type NoneType cannot be made a tensor"),
        ({"outputs": "many"}, "outputs of type str cannot be made a tensor"),
        ({"targets": None}, "targets of type NoneType"),
        ({"outputs": torch.zeros(3)}, "outputs has shape"),
        ({"targets": torch.zeros(2).long()}, "embeddings, outputs and targets have shapes.*must be the same"),
        ({"embeddings": torch.zeros(5, 3)}, r"embeddings has shape \(5, 3\), the memory's keys have width 4"),
        ({"ids": torch.arange(4)}, r"ids has shape \(4,\), expected \(5,\)"),
        ({"outputs": torch.zeros(5, 4)}, "outputs has 4 columns, the memory was filled with 3"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    validation = dict(zip(("embeddings", "outputs", "targets"), rows(5, "multiclass", seed=2), strict=True))
    with pytest.raises(InputError, match=message):
        GridTuner().tune(filled(), **{**validation, **arguments})


def test_strength_0_alone_is_the_base():
    with pytest.warns(ResMemWarning, match="does not help"):
        result = GridTuner(strength=[0.0]).tune(filled(), *rows(5, "multiclass", seed=2))
    assert len(result.table) == 1
    assert result.params.strength == 0


# -- several ranks


class Together:
    """Threads that stand for ranks: `gather` waits for all of them, as a collective does."""

    def __init__(self, size):
        self.slots, self.barrier = [None] * size, threading.Barrier(size, timeout=30)

    def gather(self, rank):
        def concatenate(tensor):
            self.slots[rank] = tensor
            self.barrier.wait()
            gathered = torch.cat(self.slots)
            self.barrier.wait()
            return gathered

        return concatenate


def tuned_on_ranks(tuner, memory, parts):
    together, results = Together(len(parts)), [None] * len(parts)

    def work(rank):
        try:
            results[rank] = tuner.tune(memory, *parts[rank], gather=together.gather(rank))
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, InputError):  # which all of them raise, and some may still be leaving the barrier
                together.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("sizes", [(13, 12), (1, 20, 4), (10, 0, 15), (0, 25)], ids=str)
@pytest.mark.parametrize("task", TASK_NAMES)
def test_ranks_choose_what_one_process_chooses(task, sizes):
    memory, validation = filled(task), rows(25, task, seed=2)
    parts = list(zip(*(tensor.split(sizes) for tensor in validation), strict=True))
    for objective in ("accuracy", "nll"):
        tuner = GridTuner(**GRID, objective=objective)
        alone = tuner.tune(memory, *validation)
        found = tuned_on_ranks(tuner, memory, parts)
        assert all(result == found[0] for result in found), found
        params = found[0].params
        assert (params.k, params.softmax_temperature, params.strength) == (
            alone.params.k,
            alone.params.softmax_temperature,
            alone.params.strength,
        )
        assert params.sigma == pytest.approx(alone.params.sigma, rel=1e-6)
        assert found[0].rows == 25
        assert found[0].gain_error == pytest.approx(alone.gain_error, rel=1e-4, abs=1e-6)
        for setting, expected in zip(found[0].table, alone.table, strict=True):
            assert setting == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_no_validation_rows_on_any_rank():
    empty = rows(0, "multiclass", seed=2)
    assert all(isinstance(result, InputError) for result in tuned_on_ranks(GridTuner(), filled(), [empty, empty]))


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


# -- beyond the grid


def test_the_grid_is_refined_around_its_best_setting():
    memory, validation = filled(count=200), rows(100, "multiclass", seed=2)
    grid = {**GRID, "k": [3, 12, 48], "noise": 0, "sigma": [0.3]}
    coarse = GridTuner(**grid).tune(memory, *validation)
    fine = GridTuner(**{**grid, "refinements": 1}).tune(memory, *validation)
    assert fine.table[: len(coarse.table)] == coarse.table
    assert fine.refined == len(fine.table) - len(coarse.table) > 8
    assert fine.score >= coarse.score
    assert f"{fine.refined} of them around the best of the grid" in fine.summary()
    for setting in fine.table[len(coarse.table) :]:
        assert setting["sigma"] == coarse.params.sigma, "what has one candidate is fixed"
        for name in ("k", "softmax_temperature", "strength"):
            assert 0.5 <= setting[name] / getattr(coarse.params, name) <= 2
    again = GridTuner(**{**grid, "refinements": 3}).tune(memory, *validation)
    assert again.table[: len(fine.table)] == fine.table
    assert again.refined > fine.refined


def test_refinement_stays_within_what_was_searched():
    result = GridTuner(k=[2, 50, 100]).tune(filled(count=6), *rows(60, "multiclass", seed=2))
    assert {setting["k"] for setting in result.table} <= {2, 3, 6}


@pytest.mark.parametrize(("task", "bound"), [("multiclass", 0.02), ("multilabel", 0.005)])
def test_the_bound_on_lost_answers_is_kept(task, bound):
    memory, (embeddings, outputs, targets) = filled(task, count=300), rows(200, task, seed=2)
    free = GridTuner(noise=0).tune(memory, embeddings, outputs, targets)
    bounded = GridTuner(noise=0, max_negative_flip_rate=bound).tune(memory, embeddings, outputs, targets)

    def lost(params):
        memory.params = params
        base = right(memory.task.predict(outputs).numpy(), targets, task)
        return float((base & ~right(memory.predict(embeddings, outputs).numpy(), targets, task)).mean())

    assert lost(free.params) > bound >= lost(bounded.params)
    assert free.score > bounded.score > bounded.base_score
    allowed = [row["score"] for row in bounded.table if row["negative_flip_rate"] <= bound]
    assert bounded.score == max(allowed)


def test_a_bound_that_no_setting_keeps_switches_the_memory_off():
    memory, validation = filled(count=300), rows(200, "multiclass", seed=2)
    with pytest.warns(
        ResMemWarning, match=r"no setting helps within max_negative_flip_rate=0 \(without that bound the"
    ):
        result = GridTuner(**{**GRID, "strength": [1.5]}, max_negative_flip_rate=0).tune(memory, *validation)
    assert result.params.strength == 0
    assert (result.score, result.best_objective) == (result.base_score, result.base_objective)


def test_a_gain_that_is_luck_switches_the_memory_off():
    """Random labels: of a thousand settings some gain, on most draws."""
    lucky = 0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        embeddings, outputs, _ = rows(300, "multiclass", seed=1)
        memory = LocalMemory()
        memory.add(embeddings, outputs, torch.randint(0, 3, (300,), generator=generator))
        validation = rows(300, "multiclass", seed=10 + seed)
        with pytest.warns(ResMemWarning, match="does not help"):
            result = GridTuner().tune(memory, *validation)
        assert result.params.strength == 0
        best = max(row["score"] for row in result.table)
        assert ("is within the noise" in result.summary()) <= (best > result.base_score)
        lucky += GridTuner(noise=0, refinements=0).tune(memory, *validation).params.strength > 0
    assert lucky, "without regard to noise the memory would stay on"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_negative_flip_rate", -0.1),
        ("max_negative_flip_rate", 1.1),
        ("max_negative_flip_rate", "0.1"),
        ("refinements", -1),
        ("refinements", 1.5),
        ("refinements", True),
        ("noise", -1),
        ("noise", float("nan")),
        ("noise", None),
        ("gate", 1),
    ],
)
def test_options_have_to_be_in_range(name, value):
    with pytest.raises(InputError, match=f"{name}={value!r}: give"):
        GridTuner(**{name: value})


def test_a_regression_has_no_flips():
    with pytest.raises(InputError, match=r"max_negative_flip_rate=0.1 is not for task=Regression"):
        GridTuner(max_negative_flip_rate=0.1).check(TASKS["regression"]())


# -- leave-one-out


@pytest.mark.parametrize("task", TASK_NAMES)
def test_leave_one_out_is_a_memory_without_the_row(task):
    memory = filled(task, count=40)
    embeddings, outputs, targets = rows(40, task, seed=1)
    result = GridTuner(**GRID).tune_leave_one_out(memory)
    assert result.leave_one_out
    assert result.rows == 40
    assert "on 40 rows of the memory, each left out of it" in result.summary()
    for setting in result.table:
        params = {name: setting[name] for name in AXES}
        found = []
        for row in range(40):
            others = torch.arange(40) != row
            query = embeddings[row : row + 1], outputs[row : row + 1]
            combined = oracle.predict(embeddings[others], outputs[others], targets[others], *query, task=task, **params)
            found.append(scores(combined.resmem, combined.base, targets[row : row + 1], task)[0])
        assert setting["score"] == pytest.approx(np.mean(found), abs=1e-5)


def test_leave_one_out_draws_rows_and_does_so_again():
    memory = filled(count=100)
    result = GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=1)
    assert result.rows == 60
    assert GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=1) == result
    assert GridTuner(**GRID).tune_leave_one_out(memory, rows=60, seed=2) != result


def test_a_row_that_does_not_find_itself_loses_its_farthest_neighbour():
    """Of many equal rows the search may return others."""
    memory = LocalMemory()
    memory.add(torch.zeros(60, 2), torch.zeros(60, 2), torch.arange(60) % 2)
    result = GridTuner(k=[1, 2], refinements=0).tune_leave_one_out(memory)
    assert {setting["k"] for setting in result.table} == {1, 2}


def test_leave_one_out_takes_two_rows():
    memory = LocalMemory()
    memory.add(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(InputError, match="has 1 rows: leaving one out takes at least two"):
        GridTuner().tune_leave_one_out(memory)
    with pytest.raises(InputError, match="rows=0"):
        GridTuner().tune_leave_one_out(filled(), rows=0)


@pytest.mark.parametrize("objective", ["accuracy", "f1"])
@pytest.mark.parametrize("gate", [False, True])
def test_ranks_leave_out_the_same_rows_and_agree_with_one_process(objective, gate):
    memory, tuner = filled(count=90), GridTuner(**{**GRID, "noise": 1}, objective=objective, gate=gate)
    alone = tuner.tune_leave_one_out(memory, rows=70)
    together, found = Together(3), [None] * 3

    def work(rank):
        found[rank] = tuner.tune_leave_one_out(memory, 70, 0, together.gather(rank), rank, 3)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == found[2]
    assert found[0].params == alone.params
    assert found[0].score == pytest.approx(alone.score)
    for setting, expected in zip(found[0].table, alone.table, strict=True):
        assert setting == pytest.approx(expected, rel=1e-5, abs=1e-6)
