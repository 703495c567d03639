"""A filled memory, the rows behind it, and the error of a prediction by the letter."""

import numpy as np
import torch

from lightning_resmem import LocalMemory, ResMemParams
from lightning_resmem.tasks import TASKS
from tests.models import num_outputs, rows

PARAMS = ResMemParams(k=7, sigma=0.8, softmax_temperature=1.3, strength=0.6)
TASK_NAMES = sorted(TASKS)


def part(task, count, seed):
    inputs, targets = rows(count, seed, task)
    outputs = torch.randn(count, num_outputs(task), generator=torch.Generator().manual_seed(seed + 1))
    return inputs, outputs, targets


def filled(task="multiclass", count=60, params=PARAMS):
    """A memory with ids that are not positions, and what it was filled with."""
    row, ids = part(task, count, seed=1), torch.arange(count) * 3 + 5
    memory = LocalMemory(task=TASKS[task](), params=params)
    memory.add(*row, ids)
    return memory, *row, ids


def error(prediction, target, task):
    if task == "multiclass":
        return 1 - prediction[int(target)]
    difference = prediction - np.asarray(target, np.float64)
    return (difference**2 if task == "regression" else abs(difference)).mean()
