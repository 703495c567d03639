"""What the metrics add to `trainer.test`: the same run with and without them, in turns.

The least CPU seconds of several runs on one thread are compared, so that other work on the machine counts as little as
it can. Beside it, what a run spends in the hooks that score: more exact, but without making the metrics (some 5 ms).
"""

import logging
import statistics
import time
import warnings

import lightning.pytorch as L
import torch
from _harness import features, report, use_threads
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import LocalMemory, ResMemCallback, ResMemParams

ROUNDS = 5


class Net(L.LightningModule):
    """A body in front of a head, and a loss, as any classifier has them."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self.head(self.body(batch[0])), batch[1]))


class Timed(ResMemCallback):
    """Adds up the CPU seconds of the hooks that score."""

    scoring = 0.0

    def on_test_batch_end(self, *args: object, **kwargs: object) -> None:
        start = time.process_time()
        super().on_test_batch_end(*args, **kwargs)
        self.scoring += time.process_time() - start

    def on_test_epoch_end(self, *args: object, **kwargs: object) -> None:
        start = time.process_time()
        super().on_test_epoch_end(*args, **kwargs)
        self.scoring += time.process_time() - start


class WithoutMetrics(ResMemCallback):
    """Combines predictions, and that is all."""

    def on_test_batch_end(self, *args: object, **kwargs: object) -> None:
        pass

    def on_test_epoch_end(self, *args: object, **kwargs: object) -> None:
        pass


def convolutions(*widths: int) -> nn.Module:
    """Each as wide as given, the first and the last of stride 2."""
    layers: list[nn.Module] = []
    for place, (before, width) in enumerate(zip((3, *widths), widths, strict=False)):
        layers += [nn.Conv2d(before, width, 3, 2 if place in (0, len(widths) - 1) else 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_seconds(callback: ResMemCallback, model: Net, loader: DataLoader) -> float:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(callbacks=[callback], **quiet)
    start = time.process_time()
    trainer.test(model, loader, verbose=False)
    return time.process_time() - start


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    use_threads(1)
    keys, queries, source = features()
    generator = torch.Generator().manual_seed(0)
    small, images = convolutions(32, 64), torch.randn(5_000, 3, 32, 32, generator=generator)
    larger = convolutions(64, 64, 128, 64)
    cases = [
        ("nothing but a head", nn.Identity(), queries.repeat(5, 1), 10, 128),
        ("nothing but a head", nn.Identity(), queries.repeat(5, 1), 10, 32),
        ("two convolutions", small, images, 10, 128),
        ("nothing but a head", nn.Identity(), queries.repeat(5, 1), 1000, 128),
        ("four convolutions", larger, images, 1000, 128),
    ]
    table = []
    for name, body, inputs, classes, batch_size in cases:
        model = Net(body, keys.shape[1], classes)
        memory = LocalMemory(params=ResMemParams(k=53, sigma=0.7))
        targets = torch.randint(classes, (len(keys),), generator=generator)
        memory.add(keys, torch.randn(len(keys), classes, generator=generator), targets)
        loader = DataLoader(TensorDataset(inputs, targets[: len(inputs)]), batch_size=batch_size)
        timed = Timed(memory, head="head")
        callbacks = [WithoutMetrics(memory, head="head"), timed]
        shares, times = [], []
        for _ in range(ROUNDS):
            timed.scoring = 0.0
            times.append([test_seconds(callback, model, loader) for callback in callbacks])
            shares.append(timed.scoring / (times[-1][1] - timed.scoring))
        without, with_metrics = (min(column) for column in zip(*times, strict=True))
        added = [f"{with_metrics / without - 1:+.1%}", f"{statistics.median(shares):+.1%}"]
        row = [name, f"{classes:,}", str(batch_size), f"{without:.2f}", f"{with_metrics:.2f}", *added]
        print(*row, flush=True)
        table.append(row)
    header = ["model", "classes", "batch", "without [s]", "with metrics [s]", "added", "in the hooks"]
    report("metrics_overhead", f"trainer.test, 5,000 rows, memory of 45,000 x 64 ({source}), one thread", header, table)


if __name__ == "__main__":
    main()
