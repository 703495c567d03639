"""Rows that metrics are tried on: predictions, and targets that they know something about."""

import torch
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAUROC, MultilabelAUROC

from lightning_resmem import Predictions

ROWS, CLASSES = 60, 7
AUROCS = {
    "multiclass": MulticlassAUROC(CLASSES),
    "multilabel": MultilabelAUROC(CLASSES),
    "regression": MeanAbsoluteError(),
}


def multiclass(rows, classes, seed=0):
    """Probabilities `(rows, classes)` and targets that they know something about."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator)
    targets = (2 * logits + torch.randn(rows, classes, generator=generator)).argmax(dim=1)
    return (3 * logits).softmax(dim=1), targets


def multilabel(rows, labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, labels, generator=generator)
    targets = ((logits + torch.randn(rows, labels, generator=generator)) > 0).float()
    return torch.sigmoid(2 * logits), targets


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


def updated(metrics, given, predictions, targets, distances, rows=slice(None), groups=None):
    part = Predictions(*(prediction[rows] for prediction in predictions))
    of_rows = None if groups is None else groups[rows]
    metrics.update(part, targets[rows], distances[rows], given[rows], groups=of_rows)
    return metrics
