"""ResMem on scikit-learn's handwritten digits: a small network before and after, over several seeds.

    python examples/digits.py                      # about a minute; no download
    python examples/digits.py --seeds 10 --hidden 8

Each seed trains an MLP under a Lightning Trainer with one callback added. The callback memorizes the training residuals
and tunes itself on the validation split; the test split is looked at once, at the end.
"""

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as L
import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import ResMemCallback

PREDICTIONS = ("base", "knn", "resmem")


class MLP(L.LightningModule):
    """A classifier with one hidden layer. It knows nothing of ResMem."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("test_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def split(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """The 1,797 digits in a random order: 1,000 to train on, 300 to tune on, 497 to test on."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    inputs = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    targets = torch.tensor(data.target[order])
    parts = zip(inputs.split([1000, 300, 497]), targets.split([1000, 300, 497]), strict=True)
    train, val, test = (TensorDataset(x, y) for x, y in parts)
    return train, val, test


def run(seed: int, hidden: int, epochs: int) -> dict[str, float]:
    """Train one network; its test accuracy with and without memory."""
    L.seed_everything(seed, verbose=False)
    train, val, test = split(seed)
    with tempfile.TemporaryDirectory() as directory:
        trainer = L.Trainer(
            max_epochs=epochs,
            callbacks=[ResMemCallback()],  # all that ResMem needs
            default_root_dir=directory,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = MLP(hidden)
        trainer.fit(model, DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=300))
        (scores,) = trainer.test(model, DataLoader(test, batch_size=497), verbose=False)
    return {name: scores[f"test/acc_{name}"] for name in PREDICTIONS}


def report(scores: dict[str, np.ndarray], hidden: int) -> Table:
    """Mean and standard error over the seeds, and the gain of ResMem over the base."""
    table = Table(title=f"Digits, MLP with {hidden} hidden units: test accuracy")
    table.add_column("seed", justify="right")
    for name in (*PREDICTIONS, "gain"):
        table.add_column(name, justify="right")
    columns = [*(scores[name] for name in PREDICTIONS), scores["resmem"] - scores["base"]]
    for seed, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(seed), *(f"{value:.4f}" for value in row[:-1]), f"{row[-1]:+.4f}")
    table.add_section()
    table.add_row("mean", *(f"{column.mean():.4f}" for column in columns[:-1]), f"{columns[-1].mean():+.4f}")
    table.add_row("std. error", *(f"{standard_error(column):.4f}" for column in columns))
    return table


def standard_error(values: np.ndarray) -> float:
    """Of the mean over the seeds."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def plot(scores: dict[str, np.ndarray], hidden: int, path: Path) -> None:
    """One line per seed from base to ResMem, and the means."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    values = np.stack([scores[name] for name in PREDICTIONS])  # (3, seeds)
    axes.plot(PREDICTIONS, values, color="0.75", marker="o", markersize=3)
    errors = [standard_error(row) for row in values]
    axes.errorbar(PREDICTIONS, values.mean(axis=1), yerr=errors, color="C0", marker="o", capsize=4, linewidth=2)
    axes.set_ylabel("test accuracy")
    axes.set_title(f"Digits, MLP with {hidden} hidden units, {values.shape[1]} seeds")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of networks (default: 5)")
    parser.add_argument("--hidden", type=int, default=16, help="hidden units (default: 16)")
    parser.add_argument("--epochs", type=int, default=20, help="training epochs (default: 20)")
    parser.add_argument("--plot", type=Path, default=Path("outputs/digits.png"), help="where the picture goes")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.hidden < 1 or arguments.epochs < 1:
        parser.error("--seeds, --hidden and --epochs must be at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    console = Console()
    seeds = track(range(arguments.seeds), description="Training", console=Console(stderr=True))
    runs = [run(seed, arguments.hidden, arguments.epochs) for seed in seeds]
    scores = {name: np.array([run[name] for run in runs]) for name in PREDICTIONS}
    console.print(report(scores, arguments.hidden))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(scores, arguments.hidden, arguments.plot)
    console.print(f"Picture: {arguments.plot}")


if __name__ == "__main__":
    main()
