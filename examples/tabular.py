"""Tables: an MLP and boosted trees, before and after ResMem, against neighbours alone and scikit-learn's k-NN.

    python examples/tabular.py                      # minutes
    python examples/tabular.py --rows 2000 --seeds 2

The rows are plotnine's `diamonds`: their price, in standard deviations of its logarithm, and their cut. Any regressor
or classifier can be a base: `Wrapped` makes its predictions the outputs of a head, and the inputs are the keys. Trees
are fitted without Lightning; `memorize` does the rest.
"""

import argparse
import logging
import tempfile
import warnings

import lightning.pytorch as L
import numpy as np
import torch
from plotnine.data import diamonds
from rich.console import Console
from rich.table import Table
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_resmem import LocalMemory, Multiclass, Regression, memorize

Part = tuple[Tensor, Tensor]
NUMBERS, GRADES = ["carat", "depth", "table", "x", "y", "z"], ["color", "clarity"]
GRID = {"n_neighbors": (1, 5, 10, 20, 50), "weights": ("uniform", "distance")}


class Steps(L.LightningModule):
    """What bases of both kinds have in common."""

    is_regression: bool

    def loss(self, batch: Part) -> Tensor:
        of = nn.functional.mse_loss if self.is_regression else nn.functional.cross_entropy
        return of(self(batch[0]), batch[1])

    def test_step(self, batch: Part) -> None:
        self.log("test_loss", self.loss(batch))


class MLP(Steps):
    """Two hidden layers."""

    def __init__(self, inputs: int, outputs: int, is_regression: bool) -> None:
        super().__init__()
        self.is_regression = is_regression
        self.body = nn.Sequential(nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Part) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


class Head(nn.Module):
    """Its input is the key, its output what an estimator of scikit-learn says: a prediction, or logarithms."""

    def __init__(self, estimator: HistGradientBoostingClassifier | HistGradientBoostingRegressor) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, x: Tensor) -> Tensor:
        rows = x.cpu().numpy()
        if isinstance(self.estimator, HistGradientBoostingRegressor):
            found = self.estimator.predict(rows)[:, None]
        else:
            found = np.log(self.estimator.predict_proba(rows).clip(1e-9))
        return torch.from_numpy(found).to(x)


class Wrapped(Steps):
    """Boosted trees as a base: fitted elsewhere, so it has nothing to train."""

    def __init__(self, estimator: HistGradientBoostingClassifier | HistGradientBoostingRegressor) -> None:
        super().__init__()
        self.head = Head(estimator)
        self.is_regression = isinstance(estimator, HistGradientBoostingRegressor)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def split(target: str, rows: int, seed: int) -> list[Part]:
    """60% to train on, 20% to tune on, 20% to test on, drawn anew for each seed."""
    frame = diamonds.sample(min(rows, len(diamonds)), random_state=seed)
    marks = [frame[name].cat.codes.to_numpy()[:, None] for name in (*GRADES, *(["cut"] if target == "price" else []))]
    numbers = [*NUMBERS, *(["price"] if target == "cut" else [])]
    x = np.concatenate([frame[numbers].to_numpy(), *marks], axis=1).astype(np.float32)
    y = np.log(frame["price"].to_numpy(dtype=np.float32))[:, None]
    first, second = len(x) * 6 // 10, len(x) * 8 // 10
    x = (x - x[:first].mean(axis=0)) / x[:first].std(axis=0)
    y = (y - y[:first].mean()) / y[:first].std() if target == "price" else frame["cut"].cat.codes.to_numpy(dtype=int)
    return [
        (torch.from_numpy(x[part]), torch.from_numpy(y[part])) for part in np.split(np.arange(len(x)), [first, second])
    ]


def neighbors(parts: list[Part]) -> float:
    """The best of scikit-learn's k-NN on validation rows: its score on test rows."""
    is_regression = parts[0][1].is_floating_point()
    kind = KNeighborsRegressor if is_regression else KNeighborsClassifier
    (x, y), *others = [(x.numpy(), y.numpy()) for x, y in parts]
    tried = [kind(n_neighbors=k, weights=weights).fit(x, y) for k in GRID["n_neighbors"] for weights in GRID["weights"]]

    def score(model: KNeighborsRegressor | KNeighborsClassifier, part: tuple[np.ndarray, np.ndarray]) -> float:
        found = model.predict(part[0])
        return float(((found - part[1]) ** 2).mean()) if is_regression else float((found == part[1]).mean())

    best = (min if is_regression else max)(tried, key=lambda model: score(model, others[0]))
    return score(best, others[1])


def run(kind: str, parts: list[Part], epochs: int, seed: int) -> list[float]:
    """Test scores of base, knn and resmem."""
    L.seed_everything(seed, verbose=False)
    (x, y), *_ = parts
    is_regression = y.is_floating_point()
    train, val, test = (DataLoader(TensorDataset(*part), 128 if part is parts[0] else 1024) for part in parts)
    with tempfile.TemporaryDirectory() as directory:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=directory,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        if kind == "MLP":
            base: Steps = MLP(x.shape[1], 1 if is_regression else int(y.max()) + 1, is_regression)
            trainer.fit(base, DataLoader(train.dataset, 128, shuffle=True))
        else:
            trees = HistGradientBoostingRegressor if is_regression else HistGradientBoostingClassifier
            base = Wrapped(trees(random_state=seed).fit(x.numpy(), y.numpy().ravel()))
        head = None if kind == "MLP" else "head"
        memory = LocalMemory(Regression() if is_regression else Multiclass())
        resmem = memorize(trainer, base, train, val, memory=memory, head=head)
        [scores] = trainer.test(resmem, test, verbose=False)
    name = "mse" if is_regression else "acc"
    return [scores[f"test/{name}_{part}"] for part in ("base", "knn", "resmem")]


def told(values: np.ndarray) -> str:
    """Mean and standard error over the seeds."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{values.mean():.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_000, help="of the 53,940 (default: 12,000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10, help="of the MLP")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.epochs < 1 or arguments.rows < 100:
        parser.error("--seeds and --epochs must be at least 1, and --rows at least 100")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    columns = ("target", "base is", "base", "knn", "resmem", "gain", "k-NN")
    table = Table(
        *columns, title=f"Diamonds, {arguments.rows:,} rows: RMSE, % of a deviation (price); accuracy, % (cut)"
    )
    for target in ("price", "cut"):
        parts = [split(target, arguments.rows, seed) for seed in range(arguments.seeds)]
        plain = np.array([neighbors(part) for part in parts])
        for kind in ("MLP", "trees"):
            found = np.array([run(kind, part, arguments.epochs, seed) for seed, part in enumerate(parts)])
            found = np.column_stack([found, plain])
            found = 100 * (np.sqrt(found) if target == "price" else found)
            gain = 100 * (1 - found[:, 2] / found[:, 0]) if target == "price" else found[:, 2] - found[:, 0]
            base, knn, resmem, other = map(told, found.T)
            table.add_row(target, kind, base, knn, resmem, told(gain) + (" %" if target == "price" else ""), other)
    Console().print(table)


if __name__ == "__main__":
    main()
