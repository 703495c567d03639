"""explain: neighbours and contributions against the float64 oracle; tables."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils.data import default_collate

from lightning_resmem import InputError, LocalMemory, ResMemParams, SparseConfig, explain, memorize
from lightning_resmem.params import Gate
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.models import ZOO, data_for, make, memory_for, num_outputs, rows, trainer

PARAMS = ResMemParams(k=7, sigma=0.8, softmax_temperature=1.3, strength=0.6)
NUMBERS = {name: getattr(PARAMS, name) for name in ("k", "sigma", "softmax_temperature", "strength")}
TASK_NAMES = sorted(TASKS)


def filled(task="multiclass", count=60, params=PARAMS, **options):
    """A memory with ids that are not positions, and what it was filled with."""
    keys, targets = rows(count, seed=1, task=task)
    outputs = torch.randn(count, num_outputs(task), generator=torch.Generator().manual_seed(2))
    ids = torch.arange(count) * 3 + 5
    memory = LocalMemory(task=TASKS[task](), params=params, **options)
    memory.add(keys, outputs, targets, ids)
    return memory, (keys, outputs, targets, ids)


def queries(task="multiclass", count=9):
    found, targets = rows(count, seed=3, task=task)
    return found, torch.randn(count, num_outputs(task), generator=torch.Generator().manual_seed(4)), targets


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("top", [1, 3, 7, 20])
def test_contributions_are_those_of_the_oracle(task, top):
    memory, (keys, outputs, targets, ids) = filled(task)
    embeddings, query_outputs, query_targets = queries(task)
    found = explain(memory, embeddings, query_outputs, top, query_targets)
    shown = min(top, PARAMS.k)

    distances, positions = oracle.neighbors(keys, None, embeddings, PARAMS.k)
    weights = oracle.weights(distances, PARAMS.sigma)
    residuals = oracle.residuals(outputs, targets, task, PARAMS.softmax_temperature)
    wanted = PARAMS.strength * weights[:, :, None] * residuals[positions]
    np.testing.assert_array_equal(found.neighbors.ids, ids.numpy()[positions][:, :shown])
    np.testing.assert_allclose(found.neighbors.distances, distances[:, :shown], rtol=1e-5)
    np.testing.assert_allclose(found.weights, weights[:, :shown], rtol=1e-4)
    np.testing.assert_allclose(found.contributions, wanted[:, :shown], atol=1e-6)
    np.testing.assert_allclose(found.rest, wanted[:, shown:].sum(axis=1), atol=2e-6)
    np.testing.assert_array_equal(found.labels, targets.numpy()[positions][:, :shown])
    np.testing.assert_array_equal(found.targets, query_targets)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_contributions_add_up_to_the_change(task):
    memory, (keys, outputs, targets, _) = filled(task)
    embeddings, query_outputs, _ = queries(task)
    found = explain(memory, embeddings, query_outputs, top=2)
    wanted = oracle.predict(keys, outputs, targets, embeddings, query_outputs, task=task, **NUMBERS)
    total = found.predictions.base + found.contributions.sum(dim=1) + found.rest
    np.testing.assert_allclose(total, wanted.resmem, atol=2e-6)
    for query in range(len(embeddings)):
        of_query = [row for row in found.rows if row["query"] == query]
        for name, output in found.watched.items():
            change = sum(row["change" if name == "output" else f"change_{name}"] for row in of_query)
            output = output[query]
            assert change == pytest.approx(wanted.resmem[query, output] - wanted.base[query, output], abs=2e-6)
        assert sum(row["weight"] for row in of_query) == pytest.approx(1, abs=1e-6)


def test_it_is_shown_in_a_line():
    found = explain(filled()[0], *queries()[:2], top=3)
    assert (
        repr(found) == "Explanation(task='multiclass', 9 queries, 3 neighbours listed: see rows, or print it with rich)"
    )


def test_rows_of_classes():
    memory, (_, _, targets, ids) = filled()
    embeddings, outputs, query_targets = queries()
    found = explain(memory, embeddings, outputs, 3, query_targets)
    assert len(found.rows) == len(found) * 4
    first, *_, others = found.rows[:4]
    assert set(first) == {
        *("query", "target", "base", "resmem", "id", "distance", "weight", "label", "change_base", "change_resmem")
    }
    assert first["target"] == int(query_targets[0])
    assert first["base"] == int(outputs[0].argmax())
    assert first["label"] == int(targets[ids == first["id"]])
    assert others["id"] is None
    assert others["distance"] is None


def test_rows_of_values_speak_of_the_output_that_changes_most():
    memory, _ = filled("regression")
    embeddings, outputs, targets = queries("regression")
    found = explain(memory, embeddings, outputs, 3, targets)
    change = (found.predictions.resmem - found.predictions.base).abs()
    for row in found.rows:
        assert row["output"] == int(change[row["query"]].argmax())
        assert row["base"] == pytest.approx(float(outputs[row["query"], row["output"]]))
        assert row["target"] == pytest.approx(float(targets[row["query"], row["output"]]))


def test_unknown_targets_are_left_out():
    memory, _ = filled()
    found = explain(memory, *queries()[:2])
    assert found.targets is None
    assert {row["target"] for row in found.rows} == {None}
    assert "target" not in found.title(0)


def test_fewer_rows_than_neighbours():
    memory, (keys, outputs, targets, _) = filled(count=3)
    embeddings, query_outputs, _ = queries()
    found = explain(memory, embeddings, query_outputs, top=5)
    assert found.weights.shape == (9, 3)
    wanted = oracle.predict(keys, outputs, targets, embeddings, query_outputs, **NUMBERS).resmem
    np.testing.assert_allclose(found.predictions.base + found.contributions.sum(1), wanted, atol=1e-6)


def test_places_that_an_index_leaves_empty():
    # One list of four is looked at, and it holds fewer rows than k.
    memory, _ = filled(count=200, params=ResMemParams(k=150), index="IVF4,Flat")
    found = explain(memory, *queries()[:2], top=150)
    missing = found.neighbors.ids < 0
    assert missing.any()
    assert (found.labels[missing] == -1).all()
    assert not found.contributions[missing].any()
    total = found.predictions.base + found.contributions.sum(dim=1) + found.rest
    torch.testing.assert_close(total, found.predictions.resmem)
    assert None not in [row["distance"] for row in found.rows if row["id"] is not None]


@pytest.mark.parametrize("task", TASK_NAMES)
def test_no_queries_have_no_explanations(task):
    memory, _ = filled(task)
    found = explain(memory, *(part[:0] for part in queries(task)[:2]))
    assert (len(found), found.rows) == (0, [])
    assert found.contributions.shape == (0, 5, num_outputs(task))


def test_sparse_values():
    memory, (keys, outputs, targets, _) = filled(values=SparseConfig(top_m=4))
    embeddings, query_outputs, _ = queries()
    found = explain(memory, embeddings, query_outputs, top=7)
    wanted = oracle.predict(keys, outputs, targets, embeddings, query_outputs, **NUMBERS).resmem
    np.testing.assert_allclose(found.predictions.base + found.contributions.sum(1), wanted, atol=1e-3)


@pytest.mark.parametrize("task", TASK_NAMES)
def test_gate(task):
    memory, _ = filled(task, params=dataclasses.replace(PARAMS, gate=Gate(bias=0.3, distance=-1, confidence=-0.5)))
    found = explain(memory, *queries(task)[:2], top=7)
    plain, _ = filled(task)
    without = explain(plain, *queries(task)[:2], top=7)
    assert not torch.allclose(found.contributions, without.contributions)
    torch.testing.assert_close(found.predictions.base + found.contributions.sum(dim=1), found.predictions.resmem)


def test_strength_0_changes_nothing():
    memory, _ = filled(params=ResMemParams(k=3, strength=0))
    found = explain(memory, *queries()[:2])
    assert not found.contributions.any()
    assert found.weights.sum(dim=1).allclose(torch.ones(9))


@pytest.mark.parametrize("top", [0, -1, 2.5, True])
def test_top_is_checked(top):
    with pytest.raises(InputError, match="top="):
        explain(filled()[0], *queries()[:2], top=top)


def test_targets_are_checked():
    memory, _ = filled()
    embeddings, outputs, targets = queries()
    with pytest.raises(InputError, match="targets has 5 rows"):
        explain(memory, embeddings, outputs, targets=targets[:5])
    with pytest.raises(InputError, match="outside"):
        explain(memory, embeddings, outputs, targets=targets + 99)


@pytest.mark.parametrize("kind", ZOO, ids=lambda kind: kind.__name__)
def test_module_explains_a_batch(kind, tmp_path):
    data = data_for(kind)
    resmem = memorize(trainer(tmp_path), make(kind), data, memory=memory_for(kind))
    batch = next(iter(data.test_dataloader()))
    found, predicted = resmem.explain(batch, top=2), resmem.predictions(batch)
    torch.testing.assert_close(found.predictions.base + found.contributions.sum(1) + found.rest, predicted.resmem)
    assert found.weights.shape == (16, 2)
    assert np.array_equal(found.targets, data.test[1][:16])


def test_module_explains_a_batch_without_targets(tmp_path):
    kind = ZOO[0]
    resmem = memorize(trainer(tmp_path), make(kind), data_for(kind), memory=memory_for(kind))
    found = resmem.explain(data_for(kind).test[0][:4])
    assert len(found) == 4
    assert found.targets is None


def test_a_single_row_is_told_from_a_batch(tmp_path):
    kind = ZOO[0]
    data = data_for(kind)
    resmem = memorize(trainer(tmp_path), make(kind), data, memory=memory_for(kind))
    row = data.test_dataloader().dataset[0]
    for batch in (row, (row[0], int(row[1]))):
        with pytest.raises(
            InputError, match=r"one number for its target \(shapes: \(4,\)\).*batch dimension is missing"
        ):
            resmem.explain(batch)
    for ask in (resmem.explain, resmem.predictions):
        with pytest.raises(InputError, match="batch dimension is missing") as caught:
            ask(row[0])
        assert "Tensor of shape (4,)" in caught.value.__notes__[0]
    assert len(resmem.explain(default_collate([row]))) == 1


def shown(*tables):
    """What a terminal shows, with the line breaks that rich puts into titles taken out."""
    console = Console(width=100)
    with console.capture() as capture:
        console.print(*tables)
    return re.sub(r"\s+", " ", capture.get())


@pytest.mark.parametrize("task", TASK_NAMES)
def test_table(task):
    memory, _ = filled(task)
    embeddings, outputs, targets = queries(task, 2)
    found = explain(memory, embeddings, outputs, 3, targets)
    printed = shown(found)
    assert found.title(0) in printed
    assert found.title(1) in printed
    for row in found.rows:
        assert row["id"] is None or str(row["id"]) in printed
    assert printed.count("others") == printed.count("F(x)") == 2


@pytest.mark.parametrize("task", TASK_NAMES)
def test_neighbors_add_to_f_and_titles_tell_probabilities(task):
    """Also with temperatures: those of the base without a memory and of what the model's own loss is given."""
    memory, (keys, outputs, targets, _) = filled(task)
    memory.params = dataclasses.replace(PARAMS, combined_temperature=1.6)
    embeddings, query_outputs, _ = queries(task)
    found = explain(memory, embeddings, query_outputs, top=2)
    wanted = oracle.predict(keys, outputs, targets, embeddings, query_outputs, task=task, **NUMBERS)
    np.testing.assert_allclose(found.predictions.resmem, wanted.resmem, atol=2e-6)
    np.testing.assert_allclose(found.predictions.base, wanted.base, atol=2e-6)
    total = found.predictions.base + found.contributions.sum(dim=1) + found.rest
    np.testing.assert_allclose(total, wanted.resmem, atol=2e-6)
    weights = oracle.weights(oracle.neighbors(keys, None, embeddings, PARAMS.k)[0], PARAMS.sigma)
    residuals = oracle.residuals(outputs, targets, task, PARAMS.softmax_temperature)
    positions = oracle.neighbors(keys, None, embeddings, PARAMS.k)[1]
    others = PARAMS.strength * (weights[:, 2:, None] * residuals[positions[:, 2:]]).sum(axis=1)
    np.testing.assert_allclose(found.rest, others, atol=2e-6)
    base, resmem = found.probabilities
    np.testing.assert_allclose(base, oracle.base_prediction(query_outputs, task), atol=2e-6)
    torch.testing.assert_close(resmem, memory.predict(embeddings, query_outputs))
    if task == "multiclass":
        said = found.watched["resmem"][0]
        assert f"resmem {int(said)} ({float(resmem[0, said]):.2f})" in found.title(0)
        assert f"{float(wanted.resmem[0, said]):.4f}" in shown(found.tables()[0])


def test_class_names():
    names = ["ape", "bee", "cat", "dog"]
    memory, _ = filled()
    embeddings, outputs, targets = queries("multiclass", 1)
    found = explain(memory, embeddings, outputs, 3, targets)
    row = found.rows[0]
    title = found.title(0, names)
    assert f"base {names[row['base']]} (" in title
    assert title.endswith(f"target {names[row['target']]}")
    assert names[row["label"]] in shown(*found.tables(names))


@pytest.mark.parametrize("name", ["[/b]", "[red]x", ":dog:", "\\[x]"])
def test_class_names_are_no_markup(name):
    memory, _ = filled()
    embeddings, outputs, targets = queries("multiclass", 1)
    printed = shown(*explain(memory, embeddings, outputs, 3, targets).tables([name] * 4))
    assert f"base {name} (" in printed
    assert f"target {name}" in printed
    assert printed.count(f" {name} ") >= 3 + 2, "of three neighbours, and in the title"
