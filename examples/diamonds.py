"""What diamonds cost: a network before and after ResMem, and its neighbours alone, over several seeds.

    python examples/diamonds.py            # what `make demo` runs: five networks, about a minute; no download
    python examples/diamonds.py --seeds 10 --hidden 128

The data are the 53,940 diamonds that the package plotnine ships: 40,000 to train on, 4,000 to tune on, 9,940 to test
on. Each seed draws them anew and trains an MLP under a Lightning Trainer with one callback added. The callback
memorizes the training residuals and tunes itself on the validation split; the test split is looked at once, at the end.

Why it helps here: prices jump, at whole carats for one, where the network is smooth, and much the same diamond is in
the training rows many times. `examples/digits.py` is a case where it hardly helps.
"""

import argparse
import csv
import importlib.util
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
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import LocalMemory, Regression, ResMemCallback

PREDICTIONS = ("base", "knn", "resmem")
NUMBERS = ("carat", "depth", "table", "x", "y", "z")
GRADES = ("cut", "color", "clarity")
TRAIN, VAL = 40_000, 4_000
THE_TWO_LINES = """\
    resmem = ResMemCallback(memory=LocalMemory(task=Regression()))
    trainer = L.Trainer(callbacks=[resmem])"""


class Prices(L.LightningModule):
    """An MLP with two hidden layers, trained by squared error. It knows nothing of ResMem."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.Adam(self.parameters(), lr=5e-3)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Rows(TensorDataset):
    """Tensors that a loader takes a batch of at once: cheaper than row by row, and no other batches."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self[rows]


def loader(rows: Rows, batch_size: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(rows, batch_size, shuffle=shuffle, collate_fn=tuple)


def diamonds() -> tuple[Tensor, Tensor]:
    """Of every diamond six numbers and a column for each grade it may have, `(53940, 26)`; thousands of dollars."""
    package = importlib.util.find_spec("plotnine")  # found, not imported: only its file is needed
    if package is None or package.origin is None:
        raise SystemExit("The data are in a package that is not installed: pip install --no-deps plotnine")
    with open(Path(package.origin).parent / "data" / "diamonds.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [torch.tensor([[float(row[name]) for name in NUMBERS] for row in rows])]
    for name in GRADES:
        places = {grade: place for place, grade in enumerate(sorted({row[name] for row in rows}))}
        marks = torch.tensor([places[row[name]] for row in rows])
        columns.append(nn.functional.one_hot(marks, len(places)).float())
    return torch.cat(columns, dim=1), torch.tensor([[float(row["price"]) / 1000] for row in rows])


def split(inputs: Tensor, prices: Tensor, seed: int, rows: int | None = None) -> tuple[list[Rows], float]:
    """The diamonds in a random order, standardised by the training rows, in three parts; and the unit of a price."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:rows]
    sizes = [len(order) * TRAIN // len(inputs), len(order) * VAL // len(inputs)]
    parts = order.split([*sizes, len(order) - sum(sizes)])
    mean, std = inputs[parts[0]].mean(dim=0), inputs[parts[0]].std(dim=0).clamp_min(1e-3)
    middle, unit = prices[parts[0]].mean(), prices[parts[0]].std()
    inputs = ((inputs - mean) / std).clamp(-6, 6)  # a handful of diamonds is as large as a fist, by mistake
    return [Rows(inputs[part], (prices[part] - middle) / unit) for part in parts], float(1000 * unit)


def run(data: tuple[Tensor, Tensor], seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train one network; its error on the test split with and without memory, in dollars."""
    L.seed_everything(seed, verbose=False)
    (train, val, test), unit = split(*data, seed, arguments.rows)
    resmem = ResMemCallback(memory=LocalMemory(task=Regression()))
    with tempfile.TemporaryDirectory() as directory:
        trainer = L.Trainer(
            max_epochs=arguments.epochs,
            callbacks=[resmem],  # all that ResMem needs
            default_root_dir=directory,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        model = Prices(data[0].shape[1], arguments.hidden)
        trainer.fit(model, loader(train, 256, shuffle=True), loader(val, 1000))
        (scores,) = trainer.test(model, loader(test, 1000), verbose=False)
    return {name: unit * scores[f"test/mse_{name}"] ** 0.5 for name in PREDICTIONS}


def standard_error(values: np.ndarray) -> float:
    """Of the mean over the seeds."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def report(scores: dict[str, np.ndarray]) -> Table:
    """Mean and standard error over the seeds, and by how much less than base and neighbours ResMem is wrong."""
    table = Table(
        "seed", *PREDICTIONS, "below base", "below knn", title="Root mean squared error on test diamonds, dollars"
    )
    gains = [100 * (1 - scores["resmem"] / scores[name]) for name in ("base", "knn")]
    for seed, row in enumerate(zip(*(scores[name] for name in PREDICTIONS), *gains, strict=True)):
        table.add_row(str(seed), *(f"{value:.1f}" for value in row[:3]), *(f"{value:.1f}%" for value in row[3:]))
    table.add_section()
    for title, summary in (("mean", np.mean), ("std. error", standard_error)):
        errors = [f"{summary(scores[name]):.1f}" for name in PREDICTIONS]
        table.add_row(title, *errors, *(f"{summary(gain):.1f}%" for gain in gains))
    return table


def plot(scores: dict[str, np.ndarray], path: Path) -> None:
    """One line per seed from base to ResMem, and the means; the two lines that did it below."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.6), layout="constrained")
    values = np.stack([scores[name] for name in PREDICTIONS])  # (3, seeds)
    axes.plot(PREDICTIONS, values, color="0.75", marker="o", markersize=3)
    errors = [standard_error(row) for row in values]
    axes.errorbar(PREDICTIONS, values.mean(axis=1), yerr=errors, color="C0", marker="o", capsize=4, linewidth=2)
    axes.set_ylabel("root mean squared error [dollars]")
    axes.set_title(f"Prices of diamonds, {values.shape[1]} networks")
    axes.set_xlabel(THE_TWO_LINES.replace("    ", ""), family="monospace", fontsize=8, labelpad=10)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of networks (default: 5)")
    parser.add_argument("--hidden", type=int, default=64, help="units of each hidden layer (default: 64)")
    parser.add_argument("--epochs", type=int, default=10, help="training epochs (default: 10)")
    parser.add_argument("--rows", type=int, help="use so many diamonds (default: all)")
    parser.add_argument("--plot", type=Path, default=Path("outputs/diamonds.png"), help="where the picture goes")
    arguments = parser.parse_args(argv)
    if min(arguments.seeds, arguments.hidden, arguments.epochs) < 1:
        parser.error("--seeds, --hidden and --epochs must be at least 1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")

    console = Console()
    console.print(
        "Prices of diamonds by a network (base), by its neighbours alone (knn), and by both: two lines do it,\n"
    )
    console.print(f"{THE_TWO_LINES}\n", highlight=False, markup=False)
    data = diamonds()
    seeds = track(range(arguments.seeds), description="Training", console=Console(stderr=True))
    runs = [run(data, seed, arguments) for seed in seeds]
    scores = {name: np.array([run[name] for run in runs]) for name in PREDICTIONS}
    console.print(report(scores))
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(scores, arguments.plot)
    console.print(f"Picture: {arguments.plot}")


if __name__ == "__main__":
    main()
