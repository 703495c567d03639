"""Base, knn, kNN-LM and ResMem on a text over several seeds, and the family that holds the last two.

    python examples/benchmarks/language.py --text shakespeare.txt
    python examples/benchmarks/language.py --text shakespeare.txt --unseen
    python examples/benchmarks/language.py --text shakespeare.txt --vocabulary 2000 --epochs 8

The family is `(1 - a + b) p + a * labels - b * near`, with the neighbours' labels and base predictions: `b = a` is
ResMem, `b = 0` kNN-LM. Its `a` and `b` are chosen on the validation rows by loss, beside the other params that the
tuner has found for either. The rows of the test are looked at once.
"""

import argparse
import itertools
import logging
import math
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as L
import torch
from _harness import report
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_resmem import GridTuner, ResidualMemory, ResMemParams
from lightning_resmem.functional import negative_log_likelihood
from lightning_resmem.memory.answers import Neighbors
from lightning_resmem.memory.knn_lm import knn_lm_params

sys.path.insert(0, str(Path(__file__).parents[1]))
from language_model import PREDICTIONS, default_text, measure, train
from text_module import GPT, Blocks, Text

# Candidates for `a`, and for `b` as a share of it; tokens that are combined at once.
SIZES, SHARES, BLOCK = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0), (0.0, 0.25, 0.5, 0.75, 1.0, 1.25), 512
TUNER = GridTuner(k=(10, 50, 200), softmax_temperature=(1.0, 1.4, 2.0), strength=(0.25, 0.5, 0.75, 1.0))
FAMILY = {"b = 0": (0.0,), "b = a": (1.0,), "b free": SHARES}
BASE, PEER = PREDICTIONS.index("base"), PREDICTIONS.index("knn_lm")


class Unseen(Text):
    """With a memory of as many other tokens as the base is trained on: those that follow the test."""

    def memory_dataloader(self) -> DataLoader:
        return DataLoader(Blocks(self.unused[: len(self.train.tokens)], self.context), batch_size=self.batch_size)


class Parts(NamedTuple):
    """What the predictions of `n` tokens are made of."""

    base: Tensor  # (n, C)
    labels: Tensor  # (n, C)
    near: Tensor  # (n, C)
    targets: Tensor  # (n,)

    def combined(self, a: float, share: float) -> Tensor:
        b = share * a
        return (1 - a + b) * self.base + a * self.labels - b * self.near

    def losses(self, a: float, share: float) -> Tensor:
        return negative_log_likelihood(self.combined(a, share), self.base, self.targets)

    def hits(self, a: float, share: float) -> Tensor:
        return (self.combined(a, share).argmax(dim=1) == self.targets).float()


class Member(NamedTuple):
    """One of the family, and how the memory is read for it."""

    loss: float  # of the validation rows
    a: float
    share: float  # of it: b
    params: ResMemParams

    def __str__(self) -> str:
        return f"a {self.a:g}, b {self.a * self.share:g}, {self.params}"


@torch.no_grad()
def parts(
    model: GPT, memory: ResidualMemory, params: ResMemParams, batches: Iterable[tuple[Tensor, Tensor]]
) -> Iterator[Parts]:
    """Of a text, a few tokens at a time."""
    own, memory.params = memory.params, params
    for inputs, targets in batches:
        keys = model.embed(inputs).flatten(0, 1)
        every, found = model.head(keys), memory.search(keys, params.k)
        for rows in torch.arange(len(keys)).split(BLOCK):
            base = memory.task.predict(every[rows], params.softmax_temperature)
            sums = memory.sums(Neighbors(*(part[rows] for part in found)))
            yield Parts(base, sums.labels, sums.labels - sums.whole_residual(base), targets.flatten()[rows])
    memory.params = own


def members(model: GPT, memory: ResidualMemory, data: Text) -> Iterator[Member]:
    """All that there are to choose from."""
    settings = list(itertools.product(SIZES, SHARES))
    for params in {replace(found, combined_temperature=1.0) for found in (knn_lm_params(memory), memory.params)}:
        sums = torch.zeros(len(settings), dtype=torch.float64)
        for found in parts(model, memory, params, data.val_dataloader()):
            sums += torch.stack([found.losses(*setting).double().sum() for setting in settings])
        means = sums / (len(data.val) * data.context)
        yield from (Member(loss, *setting, params) for loss, setting in zip(means.tolist(), settings, strict=True))


def family(model: GPT, memory: ResidualMemory, data: Text) -> tuple[list[Member], Tensor, Tensor]:
    """What was chosen of each kind, and its loss and accuracy of each block of the test, both `(blocks, kinds)`."""
    tried = list(members(model, memory, data))
    chosen = [min((m for m in tried if m.share in shares), key=lambda m: m.loss) for shares in FAMILY.values()]
    losses, hits = [], []
    for member in chosen:
        found = list(parts(model, memory, member.params, data.test_dataloader()))
        losses.append(torch.cat([part.losses(member.a, member.share) for part in found]))
        hits.append(torch.cat([part.hits(member.a, member.share) for part in found]))
    return chosen, *(torch.stack(rows).view(len(chosen), -1, data.context).mean(dim=2).T for rows in (losses, hits))


def summary(values: Tensor, digits: int) -> str:
    """Mean of `(seeds, blocks)` with its standard error: over seeds or over blocks, whichever is larger."""
    means = values.mean(dim=1), values.mean(dim=0)
    errors = [float(part.std()) / math.sqrt(len(part)) for part in means if len(part) > 1]
    return f"{float(values.mean()):.{digits}f} ± {max(errors, default=math.nan):.{digits}f}"


def lines(losses: Tensor, hits: Tensor) -> list[list[str]]:
    """From losses and accuracies, `(seeds, blocks, contestants)`: each, and how much better than base and peer."""
    found = []
    for place, name in enumerate((*PREDICTIONS, *FAMILY)):
        line = [name]
        for values, sign, digits in ((losses, -1, 4), (hits, 1, 2)):
            own = values[..., place]
            line.append(f"{float(own.mean()):.{digits}f}")
            line += [
                "" if place == other else summary(sign * (own - values[..., other]), digits) for other in (BASE, PEER)
            ]
        found.append(line)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file; by default docstrings")
    parser.add_argument("--vocabulary", type=int, default=256, help="256 for bytes, more for byte pairs")
    parser.add_argument("--unseen", action="store_true", help="memorize tokens that the base is not trained on")
    parser.add_argument("--tokens", type=int, default=40_000, help="of the text that are used, at most")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    text = given.text or default_text(8 * given.tokens)
    data = (Unseen if given.unseen else Text)(
        text, given.vocabulary, batch_size=16, most=given.tokens
    )  # few tokens: many steps
    data.setup()
    losses, hits = [], []
    for seed in range(given.seeds):
        L.seed_everything(seed, verbose=False)
        model, combined = train(data, given.epochs, given.width, TUNER)
        of_package, (chosen, *of_family) = measure(model, combined, data), family(model, combined.memory, data)
        for kept, ours, theirs in zip((losses, hits), of_package, of_family, strict=True):
            kept.append(torch.cat([ours, theirs], dim=1))
        for kind, member in zip(FAMILY, chosen, strict=True):
            print(f"seed {seed}, {kind}: {member}", flush=True)
    kind = "bytes" if given.vocabulary == 256 else f"{given.vocabulary:,} byte pairs"
    title = f"{kind}: {len(data.train.tokens):,} tokens, {given.seeds} seeds; gains ± a standard error"
    header = [kind, "NLL", "below the base", "below kNN-LM", "accuracy, %", "above the base", "above kNN-LM"]
    if given.unseen:
        title += ", a memory of others"
    report(
        f"language_{given.vocabulary}{'_unseen' if given.unseen else ''}",
        title,
        header,
        lines(torch.stack(losses), 100 * torch.stack(hits)),
    )


if __name__ == "__main__":
    main()
