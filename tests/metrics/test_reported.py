"""The user's own metrics beside ours: given in any way, for all three predictions, and refused by name."""

import pytest
import torch
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC

from lightning_resmem import InputError, Multiclass, Predictions, ResMemMetrics
from lightning_resmem.tasks import TASKS
from tests.metrics.rows import AUROCS, CLASSES, ROWS, answers, updated


@pytest.mark.parametrize("task", TASKS)
def test_own_metrics_are_reported_for_all_three(task):
    task, own = TASKS[task](), AUROCS[task]
    given, predictions, targets, distances = answers(task)
    found = updated(ResMemMetrics(task, CLASSES, {"own": own}), given, predictions, targets, distances).compute()
    wanted = {"base": task.predict(given)}
    for name in ("knn", "resmem"):
        wanted[name] = task.probabilities(getattr(predictions, name), predictions.base)
    for name, prediction in wanted.items():
        own.reset()
        assert found[f"own_{name}"].item() == pytest.approx(own(prediction, targets).item())
    own.reset()


def test_the_ways_to_give_own_metrics():
    rows = answers(Multiclass())
    used = MulticlassAccuracy(CLASSES, average="micro")
    used.update(torch.zeros(100, dtype=torch.int64), torch.ones(100, dtype=torch.int64))
    for given, name in (
        (used, "MulticlassAccuracy"),
        ([used], "MulticlassAccuracy"),
        ({"a": used}, "a"),
        (MetricCollection({"b": used}), "b"),
        (MetricCollection([used], prefix="my_", postfix="_own"), "my_MulticlassAccuracy_own"),
        ({"c": MetricCollection([used])}, "c_MulticlassAccuracy"),
    ):
        metrics = updated(ResMemMetrics(Multiclass(), CLASSES, given), *rows)
        found = metrics.compute()
        for prediction in Predictions._fields:
            assert found[f"{name}_{prediction}"].item() == pytest.approx(found[f"acc_{prediction}"].item())
            assert metrics.is_shown(f"{name}_{prediction}")
    assert used.update_count == 1
    assert used.compute() == 0.0, "copies are updated, without the rows seen before"


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_own_metrics_of_one_output(task):
    task = TASKS[task]()
    own = {"multilabel": BinaryAUROC(), "regression": MeanAbsoluteError()}[task.name]
    given, predictions, targets, distances = answers(task, outputs=1)
    found = updated(ResMemMetrics(task, 1, {"own": own}), given, predictions, targets[:, 0], distances).compute()
    assert found["own_base"].item() == pytest.approx(own(task.predict(given)[:, 0], targets[:, 0]).item())


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("auroc", "metrics='auroc'"),
        ([torch.nn.Linear(1, 1)], "metrics=.*Linear"),
        ({"a": 1}, "metrics={'a': 1}"),
        ({"": MulticlassAccuracy(CLASSES)}, "metrics={'': .*module name can't be empty"),
        ([MeanAbsoluteError(), MeanAbsoluteError()], "two metrics both named MeanAbsoluteError"),
        ({"acc": MulticlassAccuracy(CLASSES)}, "the name 'acc', which is reported anyway"),
        ({"nll": MulticlassAccuracy(CLASSES)}, "the name 'nll'"),
    ],
)
def test_what_is_no_metric_is_refused(metrics, message):
    with pytest.raises(InputError, match=message):
        ResMemMetrics(Multiclass(), CLASSES, metrics)


def test_an_own_metric_that_does_not_fit():
    with pytest.raises(ValueError, match=r".") as raised:
        updated(ResMemMetrics(Multiclass(), CLASSES, {"mine": MulticlassAUROC(3)}), *answers(Multiclass()))
    assert any("(mine)" in note and f"({ROWS}, {CLASSES})" in note for note in raised.value.__notes__)


def test_an_own_metric_that_has_no_result_for_what_it_took():
    metrics = updated(ResMemMetrics(Multiclass(), CLASSES, {"mine": BinaryAUROC()}), *answers(Multiclass()))
    with pytest.raises(IndexError) as raised:
        metrics.compute()
    assert any("(mine) has no result" in note for note in raised.value.__notes__)
