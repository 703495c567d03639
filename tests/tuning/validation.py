"""Rows to tune on, a memory of others, and what a prediction is worth by the letter."""

import numpy as np
import torch

from lightning_resmem import LocalMemory
from lightning_resmem.tasks import TASKS
from tests import oracle

TASK_NAMES = tuple(TASKS)
GRID = {
    "k": [3, 12],
    "sigma": [0.2, 1.0],
    "softmax_temperature": [0.8, 2.0],
    "strength": [0.5, 1.0],
    "refinements": 0,
    "noise": 0,
    "calibrate": False,
}
AXES = ("k", "sigma", "softmax_temperature", "strength")


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


def right(prediction, targets, task):
    targets = np.asarray(targets)
    if task == "multilabel":
        return (prediction >= 0.5) == (targets >= 0.5)
    return prediction.argmax(axis=1) == targets
