"""The metrics over batches and ranks: the same as their functional twins on all rows at once."""

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAUROC, MulticlassCalibrationError

from lightning_resmem import Multiclass, Multilabel, Predictions, Regression, ResMemMetrics
from lightning_resmem.metrics import functional
from lightning_resmem.metrics.bins import ReliabilityBins, reliability
from lightning_resmem.tasks import TASKS
from tests import oracle
from tests.ddp_processes import run_ranks
from tests.metrics.rows import AUROCS, CLASSES, ROWS, answers, updated


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
            wanted[f"balanced_acc_{name}"] = balanced_accuracy_score(labels, raw[name].argmax(axis=1))
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
            bins = ReliabilityBins.from_sums(reliability(confident, right))
            wanted[f"ece_{name}"] = bins.calibration_error.item()
    if task.name != "regression":
        wanted["positive_flip_rate"] = functional.positive_flip_rate(predictions.base, predictions.resmem, targets)
        wanted["negative_flip_rate"] = functional.negative_flip_rate(predictions.base, predictions.resmem, targets)
    gains = (task.score(predictions.resmem, targets) - task.score(predictions.base, targets)).numpy()
    gains *= -1 if task.name == "regression" else 1  # less error is a gain
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


def test_f1_is_shown_where_one_of_several_labels_is_rare():
    for share, shown in ((0.02, True), (0.5, False)):
        metrics = ResMemMetrics(Multilabel(), 2)
        targets = (torch.arange(200)[:, None] < torch.tensor([100, 200 * share])).float()
        metrics.update(Predictions(targets, targets, targets), targets, torch.zeros(200))
        metrics.compute()
        assert [metrics.is_shown(f"f1_{name}") for name in ("base", "knn", "resmem")] == [shown] * 3


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


def rows_of(labels, base, resmem):
    """Targets, and certain predictions of these labels."""
    base, resmem = (torch.eye(CLASSES)[list(part)] for part in (base, resmem))
    return Predictions(base, base, resmem), torch.tensor(labels), torch.rand(len(labels))


@pytest.mark.parametrize(("labels", "shown"), [([0] * 40 + [1] * 4, True), ([0, 1] * 20, False)])
def test_balanced_accuracies_are_shown_where_classes_are_far_from_uniform(labels, shown):
    metrics = ResMemMetrics(Multiclass(), CLASSES)
    metrics.update(*rows_of(labels, base=labels, resmem=[0] * len(labels)))
    found = metrics.compute()
    assert (found["balanced_acc_base"].item(), found["balanced_acc_resmem"].item()) == (1.0, 0.5)
    for name in ("base", "knn", "resmem"):
        assert metrics.is_shown(f"balanced_acc_{name}") is shown


def test_an_own_balanced_accuracy_is_kept():
    task = Multiclass()
    metrics = ResMemMetrics(task, CLASSES, {"balanced_acc": MulticlassAUROC(CLASSES)})
    found = updated(metrics, *answers(task)).compute()
    wanted = updated(ResMemMetrics(task, CLASSES, {"mine": MulticlassAUROC(CLASSES)}), *answers(task)).compute()
    for name in ("base", "knn", "resmem"):
        assert found[f"balanced_acc_{name}"] == wanted[f"mine_{name}"]
        assert metrics.is_shown(f"balanced_acc_{name}")


def test_which_scores_are_better_when_they_are_less():
    own = {"error": MulticlassCalibrationError(CLASSES), "auroc": MulticlassAUROC(CLASSES)}
    found = ResMemMetrics(Multiclass(), CLASSES, own).less_is_better
    assert found >= {"nll", "brier", "ece", "error"}
    assert not found & {"acc", "balanced_acc", "f1", "top5", "auroc"}
    assert ResMemMetrics(Multilabel(), CLASSES).less_is_better >= {"nll", "brier", "ece"}
    assert "exact" not in ResMemMetrics(Multilabel(), CLASSES).less_is_better
    found = ResMemMetrics(Regression(), CLASSES, {"error": MeanAbsoluteError()}).less_is_better
    assert found & {"mse", "mae", "r2", "error"} == {"mse", "mae", "error"}


# Of which ranks have parts: sequences, moments, and rows that are independent.
GROUPS = {"multiclass": torch.arange(ROWS) // 5, "multilabel": torch.arange(ROWS) // 3 / 7.0, "regression": None}


def on_rank(rank, kind, split):
    """Count a part of the rows: every second one, or all on rank 0."""
    task = TASKS[kind]()
    rows = slice(rank, None, 2) if split == "halves" else slice(0, None if rank == 0 else 0)
    metrics = ResMemMetrics(task, CLASSES, {"own": AUROCS[kind]} if split == "halves" else None)
    if rank == 0 or split == "halves":
        updated(metrics, *answers(task), rows=rows, groups=GROUPS[kind])
    return metrics.compute(), metrics.neighborhoods.compute(), metrics.resmem.reliability.compute()


@pytest.mark.slow
@pytest.mark.parametrize("kind", TASKS)
def test_two_ranks_are_one(kind, tmp_path):
    """Under a real process group; also with a rank that has no rows."""
    task = TASKS[kind]()
    for split in ("halves", "rank 0"):
        metrics = updated(
            ResMemMetrics(task, CLASSES, {"own": AUROCS[kind]} if split == "halves" else None),
            *answers(task),
            groups=GROUPS[kind],
        )
        for found in run_ranks(on_rank, 2, tmp_path / split, kind, split):
            same(found[0], metrics.compute())
            same(found[1]._asdict(), metrics.neighborhoods.compute()._asdict())
            if kind != "regression":
                same(found[2]._asdict(), metrics.resmem.reliability.compute()._asdict())
