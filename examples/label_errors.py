"""Find mislabelled training rows of scikit-learn's digits: four rankings, over several seeds.

    python examples/label_errors.py                # half a minute; no download
    python examples/label_errors.py --seeds 20 --flipped 0.1

Of 1,000 training rows 5% get a wrong label. A network is trained on them, once stopped early and once until it knows
every training label by heart, wrong ones included, and its memory is asked which rows look mislabelled. The table shows
what share of the flipped rows is among as many rows ranked first. Validation labels are right.
"""

import argparse
import warnings
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


class Data(NamedTuple):
    """Digits, some of whose training labels are wrong."""

    inputs: Tensor
    labels: Tensor
    flipped: Tensor  # (1000,) bool
    val_inputs: Tensor
    val_labels: Tensor


def noisy_digits(seed: int, share: float) -> Data:
    """1,000 rows to train on, `share` of them with a wrong label, and 300 clean ones to validate on."""
    generator, data = np.random.default_rng(seed), load_digits()
    order = generator.permutation(len(data.target))[:1300]
    inputs, labels = torch.tensor(data.data[order] / 16, dtype=torch.float32), torch.tensor(data.target[order])
    flipped = torch.zeros(1000, dtype=torch.bool)
    flipped[generator.permutation(1000)[: round(1000 * share)]] = True
    noisy = labels[:1000].clone()
    noisy[flipped] = (noisy[flipped] + torch.tensor(generator.integers(1, 10, int(flipped.sum())))) % 10
    return Data(inputs[:1000], noisy, flipped, inputs[1000:], labels[1000:])


def train(data: Data, hidden: int, epochs: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    """A network with one hidden layer: its body and its head."""
    torch.manual_seed(seed)
    body, head = nn.Sequential(nn.Linear(64, hidden), nn.ReLU()), nn.Linear(hidden, 10)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
    for _ in range(epochs):
        for rows in torch.randperm(len(data.labels)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(body(data.inputs[rows])), data.labels[rows]).backward()
            optimizer.step()
    return body.requires_grad_(False), head.requires_grad_(False)


def run(seed: int, share: float, hidden: int, epochs: int) -> dict[str, float]:
    """The share of flipped rows that each ranking finds among as many rows."""
    data = noisy_digits(seed, share)
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
    arguments = parser.parse_args()
    if arguments.seeds < 1 or not 0.001 <= arguments.flipped <= 0.5:
        parser.error("--seeds must be at least 1, --flipped between 0.001 and 0.5")
    torch.set_num_threads(1)  # with batches of 32 rows, threads only get into each other's way
    warnings.filterwarnings("ignore", category=ResMemWarning)  # the tuner says where the memory does not help

    table = Table(title=f"Share of {arguments.flipped:.1%} flipped labels found among as many rows ranked first")
    for column in ("network", "seed", *RANKINGS):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, (hidden, epochs) in NETWORKS.items():
        seeds = track(range(arguments.seeds), description=f"Training ({name})", console=Console(stderr=True))
        runs = [run(seed, arguments.flipped, hidden, epochs) for seed in seeds]
        for seed, found in enumerate(runs):
            table.add_row(name, str(seed), *(f"{found[by]:.2f}" for by in RANKINGS))
        means = {by: np.mean([found[by] for found in runs]) for by in RANKINGS}
        table.add_row(name, "mean", *(f"{means[by]:.3f}" for by in RANKINGS), style="bold", end_section=True)
    Console().print(table)


if __name__ == "__main__":
    main()
