"""What the memory pass costs: `memorize` against a bare forward loop over the same loader, in the same process.

    python examples/benchmarks/memory_pass.py            # about three minutes
    python examples/benchmarks/memory_pass.py --share 0.1    # a tenth of the rows

`memorize` is timed as a whole, without tuning: the trainer's set-up, the pass, building the memory and hashing the
weights.
"""

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import lightning.pytorch as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_resmem import memorize


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Classifier(L.LightningModule):
    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def resnet8() -> Classifier:
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return Classifier(nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64)


def mlp() -> Classifier:
    return Classifier(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()), 64)


def tensors(shape: tuple[int, ...]) -> TensorDataset:
    return TensorDataset(torch.randn(shape), torch.randint(10, shape[:1]))


class RowByRow(Dataset):
    """As a dataset of a user's own is read: one look-up per row."""

    def __init__(self, rows: Dataset) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self.rows[index]


def bare_loop(model: nn.Module, loader: DataLoader) -> None:
    model.eval()
    with torch.no_grad():
        for x, _ in loader:
            model(x)


def with_memory(model: L.LightningModule, loader: DataLoader) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    memorize(trainer, model, loader, tuner=None)


def seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the rows to read (default: 1)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turns; the median counts (default: 3)")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    if arguments.repeats < 1 or not 0.001 <= arguments.share <= 1:
        parser.error("--repeats must be at least 1, --share between 0.001 and 1")

    images, vectors = (round(20_000 * arguments.share), 3, 32, 32), (round(200_000 * arguments.share), 64)
    cases = [
        ("ResNet-8, images", resnet8(), tensors(images)),
        ("MLP, TensorDataset", mlp(), tensors(vectors)),
        ("MLP, a dataset read row by row", mlp(), RowByRow(tensors(vectors))),
    ]
    table = Table(title=f"Memory pass, batch 128, median of {arguments.repeats}, {torch.get_num_threads()} threads")
    for column in ("model, data", "rows", "bare loop [s]", "memorize [s]", "ratio"):
        table.add_column(column, justify="left" if column == "model, data" else "right")
    for name, model, dataset in cases:
        loader = DataLoader(dataset, batch_size=128)
        times = [
            (seconds(partial(bare_loop, model, loader)), seconds(partial(with_memory, model, loader)))
            for _ in range(arguments.repeats)
        ]
        bare, memory = (statistics.median(column) for column in zip(*times, strict=True))
        table.add_row(name, f"{len(dataset):,}", f"{bare:.2f}", f"{memory:.2f}", f"{memory / bare:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
