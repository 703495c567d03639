"""ResMem on text: a small GPT before and after, beside kNN-LM, and the passages behind what it writes.

    python examples/language_model.py                                           # the docstrings of PyTorch: no download
    python examples/language_model.py --text shakespeare.txt --vocabulary 2000  # byte pairs; needs `tokenizers`

A Lightning Trainer trains the GPT with one callback added. Every position of the training text becomes a row of the
memory, which is tuned on the text that follows; what comes after that is looked at once, at the end.
"""

import argparse
import ast
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Literal

import lightning.pytorch as L
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from text_module import GPT, Text
from torch import Tensor

from lightning_resmem import ResMemCallback, ResMemModule, Tuner
from lightning_resmem.functional import negative_log_likelihood
from lightning_resmem.memory.knn_lm import knn_lm_params, predict_knn_lm

PREDICTIONS = ("base", "knn", "knn_lm", "resmem")


def docstrings(package: ModuleType) -> Iterator[str]:
    """Those of an installed package, file by file."""
    for path in sorted(Path(package.__file__).parent.rglob("*.py")):
        yield from docstrings_in(path)


def docstrings_in(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield text


def default_text(most: int) -> Path:
    """A file with the docstrings of PyTorch and Lightning, as many as make so many characters."""
    path, texts = Path("outputs/docstrings.txt"), chain(docstrings(torch), docstrings(L))
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < most and (text := next(texts, None)):
            file.write(f"{text}\n\n")
    return path


def train(data: Text, epochs: int, width: int, tuner: Tuner | Literal["auto"] = "auto") -> tuple[GPT, ResMemModule]:
    """The GPT, and with its memory."""
    resmem = ResMemCallback(tuner=tuner)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=[resmem],  # all that ResMem needs
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = GPT(data.vocabulary, data.context, width, dropout=0.1, learning_rate=2e-3)
    trainer.fit(model, data)
    return model.eval(), resmem.module


@torch.no_grad()
def measure(model: GPT, combined: ResMemModule, data: Text) -> tuple[Tensor, Tensor]:
    """Loss in nats and accuracy of the test tokens, of each block: both `(blocks, 4)`, as in PREDICTIONS."""
    memory, losses, hits = combined.memory, [], []
    peer = knn_lm_params(memory)
    for inputs, targets in data.test_dataloader():
        embeddings, labels = model.embed(inputs).flatten(0, 1), targets.flatten()
        outputs = model.head(embeddings)
        (scaled, knn, resmem), neighbors = memory.predictions_and_neighbors(embeddings, outputs)
        base, knn_lm = outputs.softmax(dim=1), predict_knn_lm(memory, peer, outputs, neighbors)
        of_each = [(base, base), (knn, scaled), (knn_lm, base), (resmem, scaled)]
        losses += [torch.stack([negative_log_likelihood(*pair, labels) for pair in of_each]).view(4, *targets.shape)]
        hits += [torch.stack([pair[0].argmax(dim=1) == labels for pair in of_each]).view(4, *targets.shape)]
    return torch.cat(losses, dim=1).mean(dim=2).T, torch.cat(hits, dim=1).float().mean(dim=2).T


def report(losses: Tensor, hits: Tensor, bytes_per_token: float) -> Table:
    """Means over the blocks, and the difference to the base with its standard error."""
    table = Table(title=f"{len(losses)} blocks of test tokens; gains ± a standard error over blocks", box=SIMPLE)
    for name in ("", "NLL", "gain", "accuracy", "gain", "perplexity", "bits/byte"):
        table.add_column(name, justify="right")
    for column, name in enumerate(PREDICTIONS):
        loss = float(losses[:, column].mean())
        table.add_row(
            name,
            *(f"{loss:.4f}", gain(-losses, column)),
            *(f"{float(hits[:, column].mean()):.4f}", gain(hits, column)),
            *(f"{math.exp(loss):.2f}", f"{loss / math.log(2) / bytes_per_token:.4f}"),
        )
    return table


def gain(values: Tensor, column: int) -> str:
    """Of a column over the first one, block by block."""
    differences = values[:, column] - values[:, 0]
    error = float(differences.std()) / math.sqrt(len(differences))
    return f"{float(differences.mean()):+.4f} ± {error:.4f}" if column else ""


@torch.no_grad()
def write(combined: ResMemModule, start: Tensor, count: int) -> Tensor:
    """So many tokens more than `start` `(T,)`, each drawn from the combined prediction."""
    tokens = start
    for _ in range(count):
        logits = combined(tokens[None, -len(start) :])[0, -1]  # log-probabilities: what the head returns, with memory
        tokens = torch.cat([tokens, logits.softmax(dim=0).multinomial(1)])
    return tokens


@torch.no_grad()
def behind(model: GPT, combined: ResMemModule, tokens: Tensor, data: Text, top: int = 3) -> Iterator[str]:
    """The training passages whose next tokens the memory looks at, the nearest first."""
    memory = combined.memory
    found = memory.search(model.embed(tokens[None, -data.context :])[0, -1:], top)
    for distance, sequence, position in zip(found.distances[0], *memory.locate(found.ids[0]), strict=True):
        inputs, targets = data.train[int(sequence)]
        passage, following = data.decode(inputs[: position + 1].tolist()), data.decode([int(targets[position])])
        yield f"{passage[-50:]!r} -> {following!r} (distance {distance:.2f})"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, write, explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; by default docstrings")
    parser.add_argument("--vocabulary", type=int, default=256, help="256 for bytes, more for byte pairs")
    parser.add_argument("--tokens", type=int, default=440_000, help="of the text that are used, at most")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--write", type=int, default=200, help="how many tokens")
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    L.seed_everything(0, verbose=False)

    data = Text(given.text or default_text(4 * given.tokens), given.vocabulary, most=given.tokens)
    data.setup()
    model, combined = train(data, given.epochs, given.width)
    console = Console()
    test = data.test.tokens
    console.print(report(*measure(model, combined, data), len(data.decode(test.tolist()).encode()) / len(test)))
    written = write(combined.cpu(), test[: data.context], given.write)
    console.print(
        f"\nWritten from base and memory:\n{data.decode(written.tolist())}\n\nBehind its next token:", markup=False
    )
    for passage in behind(model.cpu(), combined, written, data):
        console.print(passage, markup=False)


if __name__ == "__main__":
    main()
