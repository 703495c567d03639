"""Find mislabelled training rows of scikit-learn's digits: four rankings, over several seeds.

    python examples/label_errors.py                # half a minute; no download
    python examples/label_errors.py --seeds 20 --flipped 0.1
    python examples/label_errors.py --features FILE --seeds 3     # of those that benchmarks/cifar_features.py reads

Of 1,000 training rows 5% get a wrong label. A network is trained on them, once stopped early and once until it knows
every training label by heart, wrong ones included, and its memory is asked which rows look mislabelled. The table shows
what share of the flipped rows is among as many rows ranked first. Validation labels are right. Of features of another
network a linear head is trained.
"""

import argparse
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_resmem import GridTuner, LocalMemory, ResMemWarning, label_errors

RANKINGS = ("harm", "base_loss", "disagreement", "self_confidence")
# Hidden units and epochs.
NETWORKS = {"stopped early": (16, 20), "interpolating": (64, 100)}
LINEAR = {"linear head": (0, 3)}


class Data(NamedTuple):
    """Rows, some of whose training labels are wrong."""

    inputs: Tensor
    labels: Tensor
    flipped: Tensor  # (N,) bool
    val_inputs: Tensor
    val_labels: Tensor


def digits(generator: np.random.Generator) -> list[Tensor]:
    """1,000 rows to train on and 300 to validate on: inputs and labels of each."""
    data = load_digits()
    order = generator.permutation(len(data.target))[:1300]
    inputs, labels = torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])
    return [inputs[:1000], labels[:1000], inputs[1000:], labels[1000:]]


def features(file: Path) -> list[Tensor]:
    """The same of a file with `{train,val}_{embeddings,labels}`."""
    with np.load(file) as data:
        columns = [data[f"{part}_{name}"] for part in ("train", "val") for name in ("embeddings", "labels")]
    return [torch.from_numpy(column).to(torch.int64 if column.ndim == 1 else torch.float32) for column in columns]


def noisy(file: Path | None, seed: int, share: float) -> Data:
    """Rows to train on, `share` of them with a wrong label, and clean ones to validate on."""
    generator = np.random.default_rng(seed)
    inputs, labels, val_inputs, val_labels = digits(generator) if file is None else features(file)
    flipped = torch.zeros(len(labels), dtype=torch.bool)
    flipped[generator.permutation(len(labels))[: round(len(labels) * share)]] = True
    classes, wrong = int(labels.max()) + 1, labels.clone()
    wrong[flipped] = (labels[flipped] + torch.tensor(generator.integers(1, classes, int(flipped.sum())))) % classes
    return Data(inputs, wrong, flipped, val_inputs, val_labels)


def train(data: Data, hidden: int, epochs: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    """A network with one hidden layer, or none: its body and its head."""
    torch.manual_seed(seed)
    width, classes = data.inputs.shape[1], int(data.labels.max()) + 1
    body = nn.Sequential(nn.Linear(width, hidden), nn.ReLU()) if hidden else nn.Sequential()
    head = nn.Linear(hidden or width, classes)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(body(data.inputs[rows])), data.labels[rows]).backward()
            optimizer.step()
    return body.requires_grad_(False), head.requires_grad_(False)


def run(seed: int, share: float, hidden: int, epochs: int, file: Path | None = None) -> dict[str, float]:
    """The share of flipped rows that each ranking finds among as many rows."""
    data = noisy(file, seed, share)
    body, head = train(data, hidden, epochs, seed)
    embeddings, val_embeddings = body(data.inputs), body(data.val_inputs)
    memory = LocalMemory()
    memory.add(embeddings, head(embeddings), data.labels)
    validation = (val_embeddings, head(val_embeddings), data.val_labels)
    memory.params = GridTuner().tune(memory, *validation).params
    found = {}
    for by in RANKINGS:
        # Harm is what a row does to predictions for validation rows; the others look at the memory alone.
        names = ("embeddings", "outputs", "targets") if by == "harm" else ()
        ranking = label_errors(memory, by, **dict(zip(names, validation, strict=False)))
        found[by] = data.flipped[ranking.ids[: int(data.flipped.sum())]].float().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of networks of each kind (default: 5)")
    parser.add_argument("--flipped", type=float, default=0.05, help="share of wrong labels (default: 0.05)")
    parser.add_argument("--features", type=Path, metavar="FILE", help="embeddings and labels in place of the digits")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or not 0.001 <= arguments.flipped <= 0.5:
        parser.error("--seeds must be at least 1, --flipped between 0.001 and 0.5")
    torch.set_num_threads(1)  # with batches of 32 rows, threads only get into each other's way
    warnings.filterwarnings("ignore", category=ResMemWarning)  # the tuner says where the memory does not help

    table = Table(title=f"Share of {arguments.flipped:.1%} flipped labels found among as many rows ranked first")
    for column in ("network", "seed", *RANKINGS):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, (hidden, epochs) in (LINEAR if arguments.features else NETWORKS).items():
        seeds = track(range(arguments.seeds), description=f"Training ({name})", console=Console(stderr=True))
        runs = [run(seed, arguments.flipped, hidden, epochs, arguments.features) for seed in seeds]
        for seed, found in enumerate(runs):
            table.add_row(name, str(seed), *(f"{found[by]:.2f}" for by in RANKINGS))
        values = np.array([[found[by] for by in RANKINGS] for found in runs])
        table.add_row(name, "mean", *(f"{mean:.3f}" for mean in values.mean(axis=0)), style="bold")
        if len(runs) > 1:
            errors = values.std(axis=0, ddof=1) / len(runs) ** 0.5
            table.add_row(name, "standard error", *(f"{error:.3f}" for error in errors))
        table.add_section()
    Console().print(table)


if __name__ == "__main__":
    main()
