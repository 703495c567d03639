"""The metrics over batches and ranks: the same as their functional twins on all rows at once."""

import copy

import numpy as np
import pytest
import torch
from torchmetrics import MeanAbsoluteError, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassAUROC, MultilabelAUROC

from lightning_resmem import InputError, Multiclass, Multilabel, Predictions, Regression, ResMemMetrics
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.side_by_side import NeighborhoodAccuracy, Reliability
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.ddp_processes import run_ranks

ROWS, CLASSES = 60, 7


def answers(task, rows=ROWS, outputs=CLASSES, softmax_temperature=1.0):
    """Outputs, the three predictions, targets and distances of rows, as a memory gives them."""
    generator = torch.Generator().manual_seed(0)
    given = 2 * torch.randn(rows, outputs, generator=generator)
    labels = torch.randint(0, outputs, (rows,), generator=generator)
    if task.name == "regression":
        targets = given + torch.randn(rows, outputs, generator=generator)
        knn = targets + torch.randn(rows, outputs, generator=generator) / 2
    else:
        targets = labels if task.name == "multiclass" else torch.randint(0, 2, (rows, outputs), generator=generator)
        knn = torch.rand(rows, outputs, generator=generator).softmax(dim=1)
    base = task.predict(given, softmax_temperature)
    residual = (knn - base) * torch.rand(rows, 1, generator=generator) * 1.5  # beyond [0, 1]
    distances = torch.rand(rows, generator=generator)
    return given, Predictions(base, knn, base + residual), targets, distances


def updated(metrics, given, predictions, targets, distances, rows=slice(None)):
    part = Predictions(*(prediction[rows] for prediction in predictions))
    metrics.update(part, targets[rows], distances[rows], given[rows])
    return metrics


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("softmax_temperature", [1.0, 2.0])
def test_everything_against_numpy(task, softmax_temperature):
    task = TASKS[task]()
    given, predictions, targets, distances = answers(task, softmax_temperature=softmax_temperature)
    found = updated(ResMemMetrics(task, CLASSES), given, predictions, targets, distances).compute()
    raw = {name: prediction.double().numpy() for name, prediction in predictions._asdict().items()}
    labels = targets.numpy()
    proper = {"base": oracle.base_prediction(given.numpy(), task.name)}  # as it is without a memory
    wanted = {}
    for name in ("knn", "resmem"):
        proper[name] = raw[name]
        if task.name == "multiclass":
            proper[name] = np.exp(oracle.log_predictions(raw[name], raw["base"]))
        if task.name == "multilabel":
            proper[name] = raw[name].clip(1e-4, 1 - 1e-4)
    for name, p in proper.items():
        if task.name == "regression":
            wanted[f"mse_{name}"] = ((raw[name] - labels) ** 2).mean()
            wanted[f"mae_{name}"] = np.abs(raw[name] - labels).mean()
            ss = ((raw[name] - labels) ** 2).sum(axis=0) / ((labels - labels.mean(axis=0)) ** 2).sum(axis=0)
            wanted[f"r2_{name}"] = (1 - ss).mean()
        elif task.name == "multiclass":
            wanted[f"acc_{name}"] = (raw[name].argmax(axis=1) == labels).mean()
            wanted[f"nll_{name}"] = -np.log(p[np.arange(ROWS), labels]).mean()
            wanted[f"brier_{name}"] = ((p - np.eye(CLASSES)[labels]) ** 2).sum(axis=1).mean()
            wanted[f"top5_{name}"] = ((p > p[np.arange(ROWS), labels][:, None]).sum(axis=1) < 5).mean()
        else:
            wanted[f"acc_{name}"] = ((raw[name] >= 0.5) == labels).mean()
            wanted[f"nll_{name}"] = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
            wanted[f"brier_{name}"] = ((p - labels) ** 2).mean()
            wanted[f"exact_{name}"] = ((raw[name] >= 0.5) == labels).all(axis=1).mean()
        if task.name != "regression":
            p = torch.from_numpy(p)
            counts = functional.f1_counts(p, targets, CLASSES)
            wanted[f"f1_{name}"] = functional.macro_f1(counts).item()
            confident, right = (p.flatten(), targets.flatten())
            if task.name == "multiclass":
                confident, right = p.amax(dim=1), p.argmax(dim=1) == targets
            bins = functional.ReliabilityBins.from_sums(functional.reliability(confident, right))
            wanted[f"ece_{name}"] = bins.calibration_error.item()
    if task.name != "regression":
        wanted["positive_flip_rate"] = functional.positive_flip_rate(predictions.base, predictions.resmem, targets)
        wanted["negative_flip_rate"] = functional.negative_flip_rate(predictions.base, predictions.resmem, targets)
    gains = (task.score(predictions.resmem, targets) - task.score(predictions.base, targets)).numpy()
    wanted |= {"gain": gains.mean(), "gain_error": gains.std(ddof=1) / np.sqrt(ROWS)}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].item() == pytest.approx(float(value), rel=1e-4, abs=1e-6), name


def test_the_base_is_reported_as_it_is_without_a_memory():
    task = Multiclass()
    given, predictions, targets, distances = answers(task, softmax_temperature=3.0)
    scores = updated(ResMemMetrics(task, CLASSES), given, predictions, targets, distances).compute()
    alone = torch.nn.functional.cross_entropy(given, targets).item()
    assert scores["nll_base"].item() == pytest.approx(alone, rel=1e-5)
    metrics = ResMemMetrics(task, CLASSES)
    metrics.update(predictions, targets, distances)
    assert metrics.compute()["nll_base"].item() != pytest.approx(alone, rel=1e-2)
    # What the model's own loss sees is what is reported.
    routed = task.to_outputs(predictions.resmem, predictions.base)
    loss = torch.nn.functional.cross_entropy(routed, targets).item()
    assert scores["nll_resmem"].item() == pytest.approx(loss, rel=1e-5)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [1, 16, 59])
def test_batches_of_any_size(task, size):
    task = TASKS[task]()
    rows = answers(task)
    whole, parts = updated(ResMemMetrics(task, CLASSES), *rows), ResMemMetrics(task, CLASSES)
    for start in range(0, ROWS, size):
        updated(parts, *rows, rows=slice(start, start + size))
    same(parts.compute(), whole.compute())
    for found, wanted in zip(parts.neighborhoods.compute(), whole.neighborhoods.compute(), strict=True):
        torch.testing.assert_close(found, wanted, equal_nan=True)
    parts.reset()
    same(updated(parts, *rows).compute(), whole.compute())


def test_a_single_row():
    task = Multiclass()
    found = updated(ResMemMetrics(task, CLASSES), *answers(task, rows=1)).compute()
    assert found["gain_error"].item() == np.inf
    assert all(value.isfinite() for name, value in found.items() if name != "gain_error")


def test_few_classes_have_no_top_5():
    assert not any(
        "top" in name for name in updated(ResMemMetrics(Multiclass(), 4), *answers(Multiclass(), 9, 4)).compute()
    )


def test_copies_share_nothing():
    task = Multiclass()
    metrics = updated(ResMemMetrics(task, CLASSES, MulticlassAUROC(CLASSES)), *answers(task))
    other = copy.deepcopy(metrics)
    before = metrics.compute()
    updated(other, *answers(task, rows=5))
    same(metrics.compute(), before)


AUROCS = {
    "multiclass": MulticlassAUROC(CLASSES),
    "multilabel": MultilabelAUROC(CLASSES),
    "regression": MeanAbsoluteError(),
}


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


@pytest.mark.parametrize("kind", [NeighborhoodAccuracy, Reliability])
@pytest.mark.parametrize("num_bins", [0, -1, 2.5, "10"])
def test_numbers_of_bins_are_checked(kind, num_bins):
    with pytest.raises(InputError, match="num_bins="):
        kind(num_bins)


def test_what_is_shown_at_a_glance():
    shown = {}
    for task in (Multiclass(), Multilabel(), Regression()):
        metrics = updated(ResMemMetrics(task, CLASSES), *answers(task))
        shown[task.name] = [name for name in metrics.compute() if metrics.is_shown(name)]
    three = ["acc_base", "acc_knn", "acc_resmem"]
    flips = ["positive_flip_rate", "negative_flip_rate"]
    assert sorted(shown["multiclass"]) == sorted([*three, "nll_base", "nll_resmem", "ece_base", "ece_resmem", *flips])
    assert sorted(shown["multilabel"]) == sorted(shown["multiclass"])
    assert sorted(shown["regression"]) == ["mse_base", "mse_knn", "mse_resmem", "r2_base", "r2_resmem"]


def on_rank(rank, kind, split):
    """Count a part of the rows: every second one, or all on rank 0."""
    task = TASKS[kind]()
    rows = slice(rank, None, 2) if split == "halves" else slice(0, None if rank == 0 else 0)
    metrics = ResMemMetrics(task, CLASSES, {"own": AUROCS[kind]} if split == "halves" else None)
    if rank == 0 or split == "halves":
        updated(metrics, *answers(task), rows=rows)
    return metrics.compute(), metrics.neighborhoods.compute(), metrics.resmem.reliability.compute()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_two_ranks_are_one(kind, tmp_path):
    """Under a real process group; also with a rank that has no rows."""
    task = TASKS[kind]()
    for split in ("halves", "rank 0"):
        metrics = updated(
            ResMemMetrics(task, CLASSES, {"own": AUROCS[kind]} if split == "halves" else None), *answers(task)
        )
        for found in run_ranks(on_rank, 2, tmp_path / split, kind, split):
            same(found[0], metrics.compute())
            same(found[1]._asdict(), metrics.neighborhoods.compute()._asdict())
            if kind != "regression":
                same(found[2]._asdict(), metrics.resmem.reliability.compute()._asdict())
