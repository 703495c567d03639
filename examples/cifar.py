"""Vision as in the paper: CIFAR ResNets before and after ResMem, over seeds and sizes of the training set.

    python examples/cifar.py --data cifar-100-python --depth 8                           # with a GPU: minutes a network
    python examples/cifar.py --data cifar-100-python --depth 8 --sizes 12500 25000 50000 --seeds 5
    python examples/cifar.py --data cifar-10-batches-py --sizes 5000 --epochs 5 --seeds 2     # minutes of two CPU cores

`--data` is the "python version" of CIFAR-10 or CIFAR-100, unpacked (examples/cifar_module.py). A tenth of every
training set tunes; the test images are looked at once for each network.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import matplotlib as mpl
import numpy as np
from cifar_module import Cifar, ResNet
from rich.console import Console
from rich.table import Table

from lightning_resmem import ResMemCallback

PREDICTIONS = ("base", "knn", "resmem")


def run(arguments: argparse.Namespace, size: int, seed: int) -> list[float]:
    """Train one network; its test accuracy in percent, of base, knn and resmem."""
    L.seed_everything(seed, verbose=False)
    data = Cifar(str(arguments.data), arguments.classes, train_rows=size)
    model = ResNet(arguments.classes, n=(arguments.depth - 2) // 6)
    with tempfile.TemporaryDirectory() as directory:
        trainer = L.Trainer(
            max_epochs=arguments.epochs,
            callbacks=[ResMemCallback()],  # the datamodule's memory_dataloader gives it images as they are
            default_root_dir=directory,
            accelerator=arguments.accelerator,
            devices=1,
            precision=arguments.precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=data)
        (scores,) = trainer.test(model, datamodule=data, verbose=False)
    return [100 * scores[f"test/acc_{name}"] for name in PREDICTIONS]


def standard_error(values: np.ndarray) -> float:
    """Of the mean over the seeds."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def plot(scores: np.ndarray, sizes: list[int], title: str, path: Path) -> None:
    """Test accuracy against the size of the training set; `scores` is `(sizes, seeds, 3)`."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for column, name in enumerate(PREDICTIONS):
        errors = [standard_error(values) for values in scores[:, :, column]]
        axes.errorbar(sizes, scores[:, :, column].mean(axis=1), yerr=errors, marker="o", capsize=3, label=name)
    axes.set(xlabel="training images", ylabel="test accuracy, %", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the directory of the python version")
    parser.add_argument("--depth", type=int, default=8, choices=(8, 14, 20, 32, 44, 56), help="layers (default: 8)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000], help="training images (default: all 50,000)")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each size (default: 3)")
    parser.add_argument("--epochs", type=int, default=40, help="training epochs (default: 40)")
    parser.add_argument("--accelerator", default="auto", help="as of a Trainer (default: auto)")
    parser.add_argument("--precision", default="32-true", help="as of a Trainer (default: 32-true)")
    parser.add_argument("--plot", type=Path, default=Path("outputs/cifar.png"), help="where the picture goes")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.epochs < 1 or min(arguments.sizes) < 10:
        parser.error("--seeds and --epochs must be at least 1, and --sizes at least 10")
    arguments.classes = 100 if (arguments.data / "train").exists() else 10
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    title = f"CIFAR-{arguments.classes}, ResNet-{arguments.depth}, {arguments.epochs} epochs"
    console, table, scores = Console(), Table("images", *PREDICTIONS, "gain", title=f"{title}: test accuracy, %"), []
    for size in arguments.sizes:
        runs = []
        for seed in range(arguments.seeds):
            runs.append(run(arguments, size, seed))
            told = ", ".join(f"{name} {score:.2f}" for name, score in zip(PREDICTIONS, runs[-1], strict=True))
            console.print(f"{size:,} images, network {seed + 1} of {arguments.seeds}: {told}")
        found = np.array(runs)  # (seeds, 3)
        columns = [*found.T, found[:, 2] - found[:, 0]]
        table.add_row(f"{size:,}", *(f"{column.mean():.2f} ± {standard_error(column):.2f}" for column in columns))
        scores.append(found)
    console.print(table)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(np.stack(scores), arguments.sizes, title, arguments.plot)
    console.print(f"Picture: {arguments.plot}")


if __name__ == "__main__":
    main()
