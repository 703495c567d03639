"""A few rows of the training set, shown before training to whoever will see such rows."""

import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torchmetrics import MetricCollection

from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.memory.answers import Predictions
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.metrics.side_by_side import ResMemMetrics
from lightning_resmem.tuning.tuner import Tuner


def try_rows(
    memory: ResidualMemory,
    tuner: Tuner | None,
    metrics: MetricCollection | None,
    rows: Chunk,
    widths: Sequence[int],
    all_rows: int | None,
) -> None:
    """Give a few rows to the index, the tuner and the user's metrics, for what these refuse.

    Args:
        memory: That will have such rows.
        tuner: That will choose its params.
        metrics: Users' own.
        rows: Usable ones.
        widths: Of the keys that stand side by side in a row.
        all_rows: How many the memory will have, if that is known.
    """
    task, outputs = memory.task, rows.outputs.cpu()
    targets = task.check_targets(rows.targets.cpu(), outputs.shape[1], rows.ids)
    for width in widths:
        memory.rehearse(all_rows, width)
    # Users' metrics may draw random numbers, and warn of classes that two rows lack.
    with isolate_rng(include_cuda=False), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if tuner is not None:
            tuner.rehearse(task, outputs, targets)
        if metrics is not None:
            seen = Predictions(*[task.predict(outputs)] * 3), targets, torch.zeros(len(outputs))
            ResMemMetrics(task, outputs.shape[1], metrics).cpu().update(*seen)
