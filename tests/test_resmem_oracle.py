"""The whole memory against the oracle: rows in, predictions out."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_resmem import LocalMemory, Multiclass, Multilabel, Regression, ResMemParams, Task
from tests import oracle
from tests.conftest import Digits

TASKS = [Multiclass(), Multilabel(), Regression()]
every_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)

PARAMS = [
    ResMemParams(k=1, sigma=1.0),
    ResMemParams(k=5, sigma=0.2, softmax_temperature=0.5),
    ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4, strength=0.6),
    ResMemParams(k=20, sigma=1e6, strength=5.0),
    ResMemParams(k=1000, sigma=3.0),  # more than the memory has
    ResMemParams(k=8, sigma=0.5, strength=0.0),
]
some_params = pytest.mark.parametrize("params", PARAMS, ids=str)


def some_targets(task: Task, rows: int, num_outputs: int) -> Tensor:
    if isinstance(task, Multiclass):
        return torch.randint(0, num_outputs, (rows,))
    if isinstance(task, Multilabel):
        return torch.randint(0, 2, (rows, num_outputs)).float()
    return torch.randn(rows, num_outputs) * 3


def filled(task: Task, params: ResMemParams, keys: Tensor, outputs: Tensor, targets: Tensor, **kwargs) -> LocalMemory:
    memory = LocalMemory(task, params)
    memory.add(keys, outputs, targets, **kwargs)
    memory.build()
    return memory


def expected(
    memory: LocalMemory, rows: tuple[Tensor, ...], queries: Tensor, query_outputs: Tensor, ids: Tensor | None = None
) -> oracle.Predictions:
    settings = dataclasses.asdict(memory.params)
    assert settings.pop("gate") is None  # see test_gate.py
    return oracle.predict(*rows, queries, query_outputs, **settings, task=memory.task.name, ids=ids)


def check(
    memory: LocalMemory, rows: tuple[Tensor, ...], queries: Tensor, query_outputs: Tensor, ids: Tensor | None = None
) -> None:
    """Base, knn and resmem within 1e-5 of the oracle (relative to the values that are summed, in regression)."""
    actual = memory.predictions(queries, query_outputs)
    wanted = expected(memory, rows, queries, query_outputs, ids)
    scale = 1 + memory.params.strength * (np.abs(wanted.base).max() if memory.task.name == "regression" else 0)
    for name in wanted._fields:
        part = getattr(actual, name)
        assert part.dtype == torch.float32
        np.testing.assert_allclose(part, getattr(wanted, name), rtol=0, atol=1e-5 * scale, err_msg=name)
    # One search for all three gives what each of them gives alone.
    assert torch.equal(memory.predict(queries, query_outputs), actual.resmem)
    assert torch.equal(memory.knn(queries), actual.knn)
    combined = actual.base + memory.params.strength * memory(queries)
    torch.testing.assert_close(combined, actual.resmem, rtol=0, atol=1e-5 * scale)


@every_task
@some_params
@pytest.mark.parametrize("num_outputs", [1, 7])
def test_random_rows(task, params, num_outputs):
    rows = torch.randn(300, 16), torch.randn(300, num_outputs) * 3, some_targets(task, 300, num_outputs)
    check(filled(task, params, *rows), rows, torch.randn(40, 16), torch.randn(40, num_outputs) * 3)


@every_task
@some_params
def test_digits_pixels_with_random_outputs(task, params, digits: Digits):
    keys, classes = digits.train.inputs[:600], digits.train.targets[:600]
    one_hot = torch.nn.functional.one_hot(classes, 10).float()
    targets = {"multiclass": classes, "multilabel": one_hot, "regression": one_hot * 5 - 1}[task.name]
    rows = keys, torch.randn(600, 10) * 2, targets
    check(filled(task, params, *rows), rows, digits.test.inputs[:60], torch.randn(60, 10) * 2)


@every_task
def test_equally_near_rows_are_taken_by_lowest_id(task):
    # A grid of small whole numbers: most distances are shared by several rows, and float32 holds them exactly.
    keys = torch.randint(0, 3, (400, 3)).float()
    rows = keys, torch.randn(400, 4), some_targets(task, 400, 4)
    ids = torch.randperm(1000)[:400]
    for k in (1, 2, 9):
        memory = filled(task, ResMemParams(k=k, sigma=0.5), *rows, ids=ids)
        queries = torch.randint(0, 3, (50, 3)).float()
        distances, found = oracle.neighbors(keys, ids, queries, k)
        assert torch.equal(memory.search(queries, k).ids, torch.tensor(found))
        np.testing.assert_allclose(memory.search(queries, k).distances, distances, rtol=1e-6)
        check(memory, rows, queries, torch.randn(50, 4), ids)


@every_task
@pytest.mark.parametrize("sigma", [1e-45, 1e-12])
def test_sigma_towards_0_is_the_nearest_row_alone(task, sigma):
    rows = torch.randn(200, 8), torch.randn(200, 5), some_targets(task, 200, 5)
    queries, query_outputs = torch.randn(30, 8), torch.randn(30, 5)
    narrow = filled(task, ResMemParams(k=50, sigma=sigma), *rows)
    nearest = filled(task, ResMemParams(k=1, sigma=1.0), *rows)
    torch.testing.assert_close(narrow.predict(queries, query_outputs), nearest.predict(queries, query_outputs))
    check(narrow, rows, queries, query_outputs)


# -- explicit memorization (section 3 of the paper)


@pytest.mark.parametrize(("k", "sigma"), [(1, 1.0), (1, 1e6), (50, 1e-6), (50, 1e-45), (2000, 1e-6)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0, 1e30])
def test_training_labels_are_reproduced_whatever_the_base_says(digits: Digits, k, sigma, scale):
    keys, targets = digits.train
    assert len(keys.unique(dim=0)) == len(keys), "two rows with one key could not both be right"
    outputs = torch.randn(len(keys), 10) * scale
    memory = filled(Multiclass(), ResMemParams(k=k, sigma=sigma, softmax_temperature=0.7), keys, outputs, targets)

    combined = memory.predict(keys, outputs)

    assert (combined.argmax(dim=1) == targets).all()
    torch.testing.assert_close(combined, torch.nn.functional.one_hot(targets, 10).float(), rtol=0, atol=1e-5)
    assert (memory.task.to_outputs(combined, memory.task.predict(outputs, 0.7)).argmax(dim=1) == targets).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_still_reproduce_the_training_labels(digits: Digits, dtype):
    keys, targets = digits.train
    outputs = (torch.randn(len(keys), 10) * 5).to(dtype)
    memory = filled(Multiclass(), ResMemParams(k=1, sigma=1.0), keys, outputs, targets)
    assert (memory.predict(keys, outputs).argmax(dim=1) == targets).all()


@pytest.mark.parametrize("task", TASKS[1:], ids=lambda task: task.name)
@pytest.mark.parametrize(("k", "sigma"), [(1, 1.0), (50, 1e-6)])
def test_training_targets_of_the_other_tasks_are_reproduced(digits: Digits, task, k, sigma):
    keys = digits.train.inputs
    targets, outputs = some_targets(task, len(keys), 4), torch.randn(len(keys), 4) * 3
    memory = filled(task, ResMemParams(k=k, sigma=sigma), keys, outputs, targets)
    torch.testing.assert_close(memory.predict(keys, outputs), targets, rtol=0, atol=1e-5)


def test_keys_with_large_norms_and_tiny_distances_are_still_told_apart():
    # |z|^2 - 2 q.z has lost all digits here: 1e6 in float32 squared is exact to about 1e5.
    keys = 1000 + torch.arange(500)[:, None] * 2.0**-12 * torch.tensor([[1.0, -1.0, 1.0]])
    targets, outputs = torch.randint(0, 5, (500,)), torch.randn(500, 5)
    memory = filled(Multiclass(), ResMemParams(k=3, sigma=1e-6), keys, outputs, targets)
    assert (memory.predict(keys, outputs).argmax(dim=1) == targets).all()
    check(memory, (keys, outputs, targets), keys[:50], outputs[:50])


# -- what must not matter


@every_task
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_order_in_which_chunks_arrive_does_not_matter(task, chunk):
    keys, outputs, targets = torch.randn(250, 8), torch.randn(250, 4), some_targets(task, 250, 4)
    keys[100:120] = keys[:20]  # ties between rows that arrive at different times
    queries, query_outputs = torch.cat([torch.randn(20, 8), keys[:20]]), torch.randn(40, 4)
    params = ResMemParams(k=9, sigma=0.8)
    ordered = filled(task, params, keys, outputs, targets).predictions(queries, query_outputs)

    shuffled = LocalMemory(task, params)
    order = torch.randperm(250)
    for part in order.split(chunk):
        shuffled.add(keys[part], outputs[part], targets[part], ids=part)

    for one, other in zip(shuffled.predictions(queries, query_outputs), ordered, strict=True):
        assert torch.equal(one, other), "not the same bits"


@every_task
def test_rows_added_after_a_build_count_as_if_they_had_been_there(task):
    keys, outputs, targets = torch.randn(90, 8), torch.randn(90, 4), some_targets(task, 90, 4)
    queries, query_outputs = torch.randn(20, 8), torch.randn(20, 4)
    params = ResMemParams(k=9, sigma=0.8)
    memory = filled(task, params, keys[60:], outputs[60:], targets[60:], ids=torch.arange(60, 90))
    before = memory.predict(queries, query_outputs)
    memory.add(keys[:60], outputs[:60], targets[:60], ids=torch.arange(60))
    after = memory.predict(queries, query_outputs)
    assert not torch.equal(before, after)
    assert torch.equal(after, filled(task, params, keys, outputs, targets).predict(queries, query_outputs))


@every_task
def test_params_changed_after_the_build_are_followed(task):
    rows = torch.randn(120, 8), torch.randn(120, 4) * 2, some_targets(task, 120, 4)
    queries, query_outputs = torch.randn(20, 8), torch.randn(20, 4) * 2
    memory = filled(task, PARAMS[0], *rows)
    for params in [*PARAMS, *reversed(PARAMS)]:
        memory.params = params
        check(memory, rows, queries, query_outputs)
    # One number at a time: each one is read.
    memory.params = start = ResMemParams(k=9, sigma=0.8, softmax_temperature=1.0, strength=1.0)
    first = memory.predict(queries, query_outputs)
    for change in ({"k": 3}, {"sigma": 0.1}, {"softmax_temperature": 2.0}, {"strength": 0.5}):
        memory.params = dataclasses.replace(start, **change)
        check(memory, rows, queries, query_outputs)
        unread = "softmax_temperature" in change and not task.uses_softmax_temperature
        assert torch.equal(memory.predict(queries, query_outputs), first) == unread, change


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_and_outputs_of_other_dtypes(dtype):
    """A network in another precision gives rounded numbers; from these on, nothing may be lost."""
    keys, outputs = torch.randn(200, 8).to(dtype), torch.randn(200, 4).to(dtype)
    queries, query_outputs = (torch.randn(30, 8).to(dtype), torch.randn(30, 4).to(dtype))
    targets = torch.randint(0, 4, (200,))
    memory = filled(Multiclass(), ResMemParams(k=9, sigma=0.8), keys.float(), outputs.float(), targets)
    wanted = expected(
        memory, (keys.double(), outputs.double(), targets), queries.double(), query_outputs.double()
    ).resmem
    np.testing.assert_allclose(memory.predict(queries, query_outputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_outputs_stored_in_half_precision_cost_their_rounding_only(dtype):
    keys, outputs, targets = torch.randn(200, 8), torch.randn(200, 4).to(dtype), torch.randint(0, 4, (200,))
    queries, query_outputs = torch.randn(30, 8), torch.randn(30, 4)
    memory = filled(Multiclass(), ResMemParams(k=9, sigma=0.8), keys, outputs, targets)
    wanted = expected(memory, (keys, outputs.double(), targets), queries, query_outputs)
    half_a_step = torch.finfo(dtype).eps / 2  # of residuals, which lie within -1 and 1
    np.testing.assert_allclose(memory.predict(queries, query_outputs), wanted.resmem, rtol=0, atol=half_a_step)
    np.testing.assert_allclose(memory.knn(queries), wanted.knn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_the_memory_does_not_round_it(dtype):
    # The route runs inside the trainer's precision context.
    rows = torch.randn(3000, 64) + 3, torch.randn(3000, 4), torch.randint(0, 4, (3000,))
    queries, query_outputs = torch.randn(30, 64) + 3, torch.randn(30, 4)
    memory = filled(Multiclass(), ResMemParams(k=50, sigma=0.8), *rows)
    plain = memory.predictions(queries, query_outputs)
    with torch.autocast("cpu", dtype=dtype):
        inside = memory.predictions(queries, query_outputs)
        built_inside = filled(Multiclass(), memory.params, *rows).predictions(queries, query_outputs)
    for other in (inside, built_inside):
        for one, two in zip(plain, other, strict=True):
            assert two.dtype == torch.float32
            assert torch.equal(one, two)
