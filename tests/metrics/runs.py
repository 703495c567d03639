"""A run to be scored: a memory, its answers to batches, and the dataloader that they come from."""

import torch
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from lightning_resmem import LocalMemory, Neighbors, Predictions
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.tasks import TASKS
from tests.models import trainer

CLASSES = 3


def memory_of(task="multiclass"):
    memory = LocalMemory(TASKS[task]())
    targets = torch.zeros(2, dtype=torch.int64) if task == "multiclass" else torch.zeros(2, CLASSES)
    memory.add(torch.eye(2), torch.zeros(2, CLASSES), targets)
    memory.build()
    return memory


def answer(base, knn, resmem, near=2):
    """Certain predictions of these labels; the neighbours of row i are `10 * i` and `10 * i + 1`, ..."""
    base, knn, resmem = (torch.eye(CLASSES)[list(labels)] for labels in (base, knn, resmem))
    ids = 10 * torch.arange(len(base))[:, None] + torch.arange(near)
    return Answer(10 * base, Predictions(base, knn, resmem), Neighbors(ids / 4, ids))


def loader_of(rows, ranks=1, rank=0, **options):
    data = TensorDataset(torch.arange(rows))
    sampler = None if ranks == 1 else DistributedSampler(data, ranks, rank, shuffle=options.pop("shuffled", False))
    return DataLoader(data, batch_size=2, sampler=sampler, **options)


def evaluate(board, root):
    board.finish()
    return board.evaluate(Ranks(trainer(root)))
