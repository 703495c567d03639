"""Where classes are far from uniform, balanced accuracy stands beside accuracy, and can be the objective."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score

from lightning_resmem import GridTuner, LocalMemory, ResMemWarning
from lightning_resmem.metrics.functional import f1_counts, macro_f1
from lightning_resmem.tasks import TASKS
from tests.tuning.validation import GRID, filled, rows

pytestmark = pytest.mark.filterwarnings("ignore:ResMem tuning")  # seen by the tests of warnings all the same
FALLS = "balanced accuracy, in which every class counts the same, falls while accuracy does not"


def overlapping(counts, seed):
    """Classes that overlap, and outputs as of a base for which each of them counts the same."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    keys = 1.4 * targets[:, None] + torch.randn(len(targets), 1, generator=generator)
    outputs = torch.stack([1.4 * label * keys[:, 0] - (1.4 * label) ** 2 / 2 for label in range(len(counts))], dim=1)
    return keys, outputs, targets


def memory_of(counts):
    memory = LocalMemory()
    memory.add(*overlapping(counts, seed=1))
    return memory


def predicted(memory, params, keys, outputs):
    memory.params = params
    return memory.predict(keys, outputs).argmax(dim=1)


def test_accuracy_at_the_cost_of_a_rare_class_is_told_and_can_be_avoided():
    memory, (keys, outputs, targets) = memory_of([900, 100]), overlapping([900, 100], seed=2)
    with pytest.warns(ResMemWarning, match=FALLS):
        by_accuracy = GridTuner().tune(memory, keys, outputs, targets)
    found = by_accuracy.balanced
    before = balanced_accuracy_score(targets, outputs.argmax(dim=1))
    after = balanced_accuracy_score(targets, predicted(memory, by_accuracy.params, keys, outputs))
    assert (found.base, found.choice) == pytest.approx((before, after))
    assert by_accuracy.gain > 0.1, "the rare class is given up"
    assert after < before - 0.05
    told = f", balanced accuracy {before:.4f} -> {after:.4f} on 1000 validation rows; {FALLS}: "
    assert told in by_accuracy.summary()
    assert 'GridTuner(objective="balanced_accuracy") keeps it' in by_accuracy.summary()

    balanced = GridTuner(objective="balanced_accuracy").tune(memory, keys, outputs, targets)
    after = balanced_accuracy_score(targets, predicted(memory, balanced.params, keys, outputs))
    assert balanced.balanced.choice == pytest.approx(after)
    assert after >= before
    assert balanced.best_objective == pytest.approx(after)
    assert FALLS not in balanced.summary()
    assert ", balanced_accuracy " not in balanced.summary(), "once is enough"


def test_the_objective_is_that_of_scikit_learn_for_every_setting():
    """Also where a class is predicted that no row has."""
    memory, (keys, outputs, targets) = memory_of([60, 30, 10]), overlapping([40, 0, 8], seed=2)
    result = GridTuner(**GRID, objective="balanced_accuracy").tune(memory, keys, outputs, targets)
    assert (outputs.argmax(dim=1) == 1).any()
    for row in result.table:
        params = dataclasses.replace(memory.params, **{name: row[name] for name in ("k", "sigma", "strength")})
        params = dataclasses.replace(params, softmax_temperature=row["softmax_temperature"])
        hits = predicted(memory, params, keys, outputs) == targets
        recalls = [hits[targets == label].double().mean().item() for label in (0, 2)]
        assert row["objective"] == pytest.approx(np.mean(recalls))
    assert result.best_objective == max(row["objective"] for row in result.table)


def test_the_error_is_that_of_the_rows_of_each_class():
    memory, (keys, outputs, targets) = memory_of([900, 100]), overlapping([300, 30], seed=3)
    result = GridTuner(**GRID, objective="nll").tune(memory, keys, outputs, targets)
    after = (predicted(memory, result.params, keys, outputs) == targets).double()
    differences = after - (outputs.argmax(dim=1) == targets).double()
    variances = [differences[targets == label].var() / (targets == label).sum() for label in (0, 1)]
    assert result.balanced.error == pytest.approx(float(sum(variances)) ** 0.5 / 2)
    assert result.balanced.error > 0


@pytest.mark.parametrize(
    ("memorized", "validation", "uneven"),
    [([200, 200], [100, 100], False), ([360, 40], [100, 100], True), ([200, 200], [180, 20], True)],
)
def test_classes_of_the_memory_or_of_the_tuning_rows(memorized, validation, uneven):
    result = GridTuner(**GRID, objective="nll").tune(memory_of(memorized), *overlapping(validation, seed=2))
    assert result.balanced.uneven is uneven
    assert (", balanced accuracy " in result.summary()) is uneven


def test_large_memories_are_looked_at_in_part():
    """Their rows may be in an order that repeats."""
    keys, outputs, targets = overlapping([9000, 9000], seed=1)
    order = torch.arange(18000).view(2, -1).T.flatten()  # 0, 1, 0, 1, ...
    memory = LocalMemory()
    memory.add(keys[order], outputs[order], targets[order])
    result = GridTuner(**GRID).tune(memory, *overlapping([100, 100], seed=2))
    assert not result.balanced.uneven


def test_a_memory_that_is_switched_off_changes_nothing():
    memory, validation = memory_of([900, 100]), overlapping([90, 10], seed=2)
    with pytest.warns(ResMemWarning, match=r"\(1 settings, acc .*, balanced accuracy .* on 100") as caught:
        result = GridTuner(strength=[0.0]).tune(memory, *validation)
    assert result.balanced.base == result.balanced.choice
    assert result.balanced.error == 0
    assert FALLS not in str(caught[0].message)


def test_with_a_gate_it_is_that_of_the_gated_choice():
    memory, (keys, outputs, targets) = memory_of([900, 100]), overlapping([900, 100], seed=2)
    result = GridTuner(**{**GRID, "strength": [0.3]}, objective="nll", gate=True).tune(memory, keys, outputs, targets)
    assert result.params.gate is not None
    after = balanced_accuracy_score(targets, predicted(memory, result.params, keys, outputs))
    assert result.balanced.choice == pytest.approx(after)


def in_halves(part):
    """`gather` of two ranks of which the other has the same rows."""
    return torch.cat([part, part])


def test_ranks_are_added_up():
    memory, validation = memory_of([900, 100]), overlapping([90, 10], seed=2)
    alone = GridTuner(**GRID, objective="nll").tune(memory, *(torch.cat([part, part]) for part in validation))
    both = GridTuner(**GRID, objective="nll").tune(memory, *validation, gather=in_halves)
    assert both.balanced == pytest.approx(alone.balanced)


@pytest.mark.filterwarnings("ignore:.*mostly chance")
def test_regression_has_none():
    assert GridTuner(**GRID).tune(filled("regression"), *rows(25, "regression", seed=2)).balanced is None


def labels_of(counts, seed):
    """The second class as a label of its own, by a base that knows how rare it is, and one that every other row has."""
    keys, outputs, targets = overlapping(counts, seed)
    even = torch.arange(len(keys)) % 2
    outputs = torch.stack([outputs[:, 1] - outputs[:, 0] - 1.2, 4.0 * even - 2], dim=1)
    return keys, outputs, torch.stack([targets, even], dim=1).float()


def test_several_labels_of_which_one_is_rare():
    memory, (keys, outputs, targets) = LocalMemory(TASKS["multilabel"]()), labels_of([900, 100], seed=2)
    memory.add(*labels_of([900, 100], seed=1))
    falls = 'macro F1, in which every class counts the same, falls while accuracy does not: GridTuner(objective="f1")'
    with pytest.warns(ResMemWarning, match=re.escape(falls)):
        result = GridTuner().tune(memory, keys, outputs, targets)
    memory.params = result.params
    said = outputs > 0, memory.predict(keys, outputs) >= 0.5
    before, after = (f1_score(targets, labels, average="macro") for labels in said)
    assert (result.balanced.base, result.balanced.choice) == pytest.approx((before, after))
    assert after < before
    assert f", macro F1 {before:.4f} -> {after:.4f} on 1000 validation rows" in result.summary()
    without = []  # each row in turn: the jackknife
    for row in torch.randperm(1000)[:200].tolist():
        kept = torch.arange(1000) != row
        counts = [f1_counts(labels[kept], targets[kept], 2) for labels in said]
        without.append(macro_f1(counts[1]) - macro_f1(counts[0]) - (after - before))
    assert result.balanced.error == pytest.approx((1000 * torch.stack(without).square().mean()).sqrt().item(), rel=0.3)
    assert falls not in GridTuner(objective="f1").tune(memory, keys, outputs, targets).summary()
    both = GridTuner(**GRID).tune(memory, keys[::2], outputs[::2], targets[::2], gather=in_halves).balanced
    alone = GridTuner(**GRID).tune(memory, *(torch.cat([part[::2]] * 2) for part in (keys, outputs, targets))).balanced
    assert both == pytest.approx(alone)


def test_labels_that_are_not_rare():
    memory = LocalMemory(TASKS["multilabel"]())
    memory.add(*labels_of([500, 500], seed=1))
    result = GridTuner(**GRID).tune(memory, *labels_of([500, 500], seed=2))
    assert not result.balanced.uneven
    assert "F1" not in result.summary()
