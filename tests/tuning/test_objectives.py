"""Objectives by name and by metric: what they are given, and which are refused."""

import pytest
import torch
from torchmetrics import Accuracy, CalibrationError, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC, MulticlassF1Score, MulticlassRecall

from lightning_resmem import GridTuner, LocalMemory
from lightning_resmem.errors import InputError
from lightning_resmem.tasks import Multiclass, Multilabel, Regression
from lightning_resmem.tuning.objectives import MetricObjective, make_objective
from tests.tuning.test_tuner import GRID, filled, rows

pytestmark = pytest.mark.filterwarnings("ignore:.*mostly chance")
SMALL = {**GRID, "k": [3], "sigma": [0.2], "softmax_temperature": [1.0], "strength": [0.5, 1.0]}


class Undirected(Metric):
    def update(self, predictions, targets): ...

    def compute(self):
        return torch.zeros(())


def test_a_metric_is_computed_for_every_setting_from_what_the_memory_predicts():
    memory, (embeddings, outputs, targets) = filled(), rows(25, "multiclass", seed=2)
    metric = MulticlassF1Score(3, average="macro")
    result = GridTuner(**GRID, objective=metric).tune(memory, embeddings, outputs, targets)
    assert result.objective == "MulticlassF1Score"
    for setting in result.table:
        params = {name: setting[name] for name in ("k", "sigma", "softmax_temperature", "strength")}
        memory.params = memory.params.__class__(**params)
        expected = metric(memory.predict(embeddings, outputs).argmax(1), targets)
        metric.reset()
        assert setting["objective"] == pytest.approx(float(expected), abs=1e-6)
    assert result.best_objective == max(setting["objective"] for setting in result.table)
    assert GridTuner(**GRID, objective="f1").tune(memory, embeddings, outputs, targets).table == result.table


def test_a_metric_that_is_better_when_lower_is_minimised():
    memory, validation = filled(), rows(40, "multiclass", seed=2)
    result = GridTuner(**GRID, objective=CalibrationError("multiclass", num_classes=3)).tune(memory, *validation)
    assert result.best_objective == min(setting["objective"] for setting in result.table)
    assert result.best_objective < result.base_objective


def test_multilabel_and_regression_metrics():
    result = GridTuner(**GRID, objective="f1").tune(filled("multilabel"), *rows(25, "multilabel", seed=2))
    assert result.best_objective > result.base_objective
    result = GridTuner(**SMALL, objective=MeanSquaredError(num_outputs=1)).tune(
        filled("regression"), *rows(25, "regression", seed=2)
    )
    for setting in result.table:
        assert setting["objective"] == pytest.approx(setting["score"], rel=1e-5)
    by_name = GridTuner(**SMALL, objective="mse").tune(filled("regression"), *rows(25, "regression", seed=2))
    assert by_name.params == result.params


def test_a_single_output_reaches_a_metric_as_one_column():
    memory = LocalMemory(task=Multilabel())
    targets = torch.arange(60) % 2
    memory.add(torch.randn(60, 2) + 3 * targets[:, None], torch.randn(60, 1), targets)
    result = GridTuner(**SMALL, objective=BinaryAUROC()).tune(
        memory, torch.randn(60, 2) + 3 * targets[:, None], torch.randn(60, 1), targets
    )
    assert result.best_objective > 0.8


def test_the_given_metric_is_left_alone():
    metric = MulticlassF1Score(3)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    before = metric.compute()
    GridTuner(**SMALL, objective=metric).tune(filled(), *rows(25, "multiclass", seed=2))
    metric._computed = None  # what it cached
    assert metric.compute() == before
    assert metric.sync_on_compute


@pytest.mark.parametrize("objective", [Undirected(), MetricCollection([Accuracy("multiclass", num_classes=3)]), sum])
def test_objectives_that_give_no_direction(objective):
    with pytest.raises(InputError, match=r"(?s)objective=.*(higher_is_better = True or False|torchmetrics Metric)"):
        GridTuner(objective=objective)


def test_a_metric_with_a_value_for_each_class_is_refused():
    with pytest.raises(InputError, match=r"values of shape \(3,\), a tuner needs one number.*average"):
        GridTuner(**SMALL, objective=MulticlassRecall(3, average="none")).tune(
            filled(), *rows(25, "multiclass", seed=2)
        )


@pytest.mark.parametrize(
    ("objective", "task"),
    [
        ("f1", Regression()),
        ("mse", Multiclass()),
        ("mse", Multilabel()),
        ("balanced_accuracy", Multilabel()),
        ("balanced_accuracy", Regression()),
    ],
)
def test_names_that_are_not_for_a_task_are_refused_before_training(objective, task):
    with pytest.raises(InputError, match=f"objective='{objective}' is not for task={type(task).__name__}"):
        GridTuner(objective=objective).check(task)


def test_what_fits_a_task_is_listed():
    with pytest.raises(InputError, match=r'for task=Multilabel.*: give "accuracy", "nll" or "f1"'):
        GridTuner(objective="balanced_accuracy").check(Multilabel())
    with pytest.raises(InputError, match='give "accuracy", "balanced_accuracy", "nll" or "f1"'):
        GridTuner(objective="mse").check(Multiclass())


def test_names_of_the_tasks_own_scores_need_no_metric():
    assert make_objective("accuracy", Multiclass(), 3) is None
    assert make_objective("mse", Regression(), 3) is None
    assert isinstance(make_objective("f1", Multilabel(), 3), MetricObjective)


def test_a_metric_for_another_number_of_classes_is_named() -> None:
    with pytest.raises(InputError, match=r"objective=MulticlassAUROC\(\) does not take predictions of shape \(25, 3\)"):
        GridTuner(**SMALL, objective=MulticlassAUROC(7)).tune(filled(), *rows(25, "multiclass", seed=2))


def test_a_rehearsal_of_few_rows_raises_what_tuning_would() -> None:
    _, outputs, targets = rows(2, "multiclass", seed=2)
    for objective, message in (
        (MulticlassAUROC(7), r"objective=MulticlassAUROC\(\) does not take predictions of shape \(2, 3\)"),
        (MeanSquaredError(), r"does not take .* targets of shape \(2,\)"),
        (MulticlassRecall(3, average="none"), r"values of shape \(3,\), a tuner needs one number"),
    ):
        with pytest.raises(InputError, match=message):
            GridTuner(objective=objective).rehearse(Multiclass(), outputs, targets)
    for fitting in ("accuracy", "balanced_accuracy", "nll", "f1", MulticlassRecall(3)):
        GridTuner(objective=fitting).rehearse(Multiclass(), outputs, targets)
