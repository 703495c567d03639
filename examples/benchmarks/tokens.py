"""A memory of tokens: 4,000,000 rows, the pass over a bare forward, scoring at a large vocabulary, and samples of rows.

`--text FILE` is that of the last part; without it a text is drawn. Every case of the first three runs in a process of
its own, so that its peak is its own.
"""

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as L
import torch
from _harness import report, seconds
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_resmem import GridTuner, LocalMemory, Multiclass, ResMemParams, SparseConfig, memorize
from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.row_limit import RowLimit
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.sequences import RowTargets

ROWS, CHUNK, WIDTH, CLASSES, TOP = 4_000_000, 100_000, 128, 32_000, 16
BATCH, LENGTH, VOCABULARY = 8, 1024, 50_257
GIB = 2**30
PARAMS = ResMemParams(k=50, sigma=2.0)


def peak(reset: bool = False) -> int:
    """Bytes in use at most (Linux), since they were last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def tokens(rows: int, width: int, classes: int) -> LocalMemory:
    """Random rows, as they are stored: to draw so many logits would take hours."""
    memory = LocalMemory(params=PARAMS, values=SparseConfig(TOP), key_dtype=torch.float16)
    memory.reserve(rows)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        stored = {
            "keys": torch.randn(count, width).half(),
            "ids": torch.arange(start, start + count),
            "targets": torch.randint(classes, (count,)),
            "classes": torch.randint(classes, (count, TOP)).to(torch.int16 if classes <= 2**15 else torch.int32),
            "log_probabilities": torch.full((count, TOP), -4.0, dtype=torch.float16),
            "log_tail": torch.full((count,), -0.4),
        }
        memory.add_stored(stored, classes)
    memory.build()
    memory.provenance["stride"] = str(2**20)
    return memory


def four_million() -> list[list[str]]:
    before = peak(reset=True)
    memory = tokens(ROWS, WIDTH, CLASSES)
    filled, queries, logits = peak() - before, torch.randn(LENGTH, WIDTH), torch.randn(LENGTH, CLASSES)
    memory.predict(queries[:8], logits[:8])
    before_answer = peak(reset=True) - before
    started = time.perf_counter()
    memory.predict(queries, logits)
    taken = time.perf_counter() - started
    return [
        [
            f"{ROWS:,} tokens, D = {WIDTH}, V = {CLASSES:,}, m = {TOP}, float16 keys: held",
            f"{memory.stats()['bytes'] / GIB:.2f} GiB",
        ],
        ["peak of filling it", f"{filled / GIB:.2f} GiB"],
        [f"answer to {LENGTH:,} tokens", f"{taken:.1f} s, {(peak() - before) / GIB:.2f} GiB at its peak"],
        ["of which were there before", f"{before_answer / GIB:.2f} GiB"],
    ]


class Texts(Dataset):
    """Random texts of one length."""

    def __init__(self, count: int, length: int, vocabulary: int) -> None:
        self.tokens = torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row], "labels": self.tokens[row]}


class Causal(L.LightningModule):
    """Two transformer layers."""

    def __init__(self, vocabulary: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(width, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.layers(self.embed(input_ids), mask=mask, is_causal=True))


def the_pass() -> list[list[str]]:
    """Of 8,192 tokens with sparse values, over the same forward alone."""
    model, loader = Causal(CLASSES).eval(), DataLoader(Texts(32, 256, CLASSES), batch_size=4)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")

    def forward() -> None:
        with torch.no_grad():
            for batch in loader:
                model(batch["input_ids"])

    def fill() -> None:
        memorize(trainer, model, loader, memory=LocalMemory(params=PARAMS), tuner=None)

    taken, count = seconds({"forward": forward, "pass": fill}, rounds=2), 32 * 256
    each = {name: value / count * 1e6 for name, value in taken.items()}
    ratio = taken["pass"] / taken["forward"]
    return [
        [f"bare forward of two layers, D = {WIDTH}, V = {CLASSES:,}", f"{each['forward']:.0f} µs a token"],
        ["memory pass (with its rehearsal)", f"{each['pass']:.0f} µs a token, {ratio:.2f} times"],
    ]


def scoring() -> list[list[str]]:
    memory, (batch, length) = tokens(50_000, WIDTH, VOCABULARY), (BATCH, LENGTH)
    embeddings, logits = torch.randn(batch, length, WIDTH), torch.empty(batch, length, VOCABULARY).normal_()
    positions = torch.arange(length).expand(batch, length)
    read = RowTargets(
        torch.randint(VOCABULARY, (batch, length)), torch.ones(batch, length, dtype=torch.bool), positions
    )
    before = peak(reset=True)
    started = time.perf_counter()
    found = Found.of(memory, embeddings, logits)
    routed = found.combined(memory)
    combined, taken = peak() - before - routed.nbytes, time.perf_counter() - started
    del routed
    before = peak(reset=True)
    board = Scoreboard(memory, "test", [[]])
    board.update_tokens(found, read)
    board.finish()
    return [
        [
            f"{batch} x {length:,} x {VOCABULARY:,}: logits, and what is returned in their place, each",
            f"{logits.nbytes / GIB:.2f} GiB",
        ],
        ["combining: beside these two", f"{combined / GIB:.2f} GiB, {taken:.0f} s"],
        ["scoring base, knn and resmem: beside the logits", f"{(peak() - before) / GIB:.2f} GiB"],
    ]


class Rows(NamedTuple):
    """Positions of a text: `n` of them."""

    keys: Tensor
    logits: Tensor
    targets: Tensor


class Window(nn.Module):
    """The next character from the last 12."""

    def __init__(self, vocabulary: int, context: int = 12) -> None:
        super().__init__()
        self.context, self.embed = context, nn.Embedding(vocabulary, 16)
        self.body = nn.Sequential(nn.Linear(16 * context, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh())
        self.head = nn.Linear(64, vocabulary)

    def rows(self, text: Tensor) -> Rows:
        windows, keys = text[:-1].unfold(0, self.context, 1), []
        for part in windows.split(8192):
            keys.append(self.body(self.embed(part).flatten(1)))
        found = torch.cat(keys)
        return Rows(found, self.head(found), text[self.context :])


def drawn_text(length: int) -> str:
    """Words, the next of which depends on the last."""
    generator = torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(26, (4,), generator=generator)) for _ in range(500)]
    following, place, text = torch.randint(500, (500, 3), generator=generator), 0, []
    for choice in torch.randint(3, (length // 5,), generator=generator).tolist():
        place = int(following[place, choice])
        text.append(words[place])
    return " ".join(text)


def samples(text: str, train: int = 80_000, queries: int = 4_000, steps: int = 1_000) -> list[list[str]]:
    """What smaller memories of a text cost, in NLL of a character on rows that nobody has seen."""
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(c) for c in text[: train + 3 * queries]])
    torch.manual_seed(0)
    model = Window(len(characters))
    optimizer, fitted = torch.optim.AdamW(model.parameters(), lr=3e-3), ids[:train]
    for _ in range(steps):
        starts = torch.randint(train - model.context - 1, (512,))
        batch = fitted[starts[:, None] + torch.arange(model.context + 1)]
        loss = F.cross_entropy(model.head(model.body(model.embed(batch[:, :-1]).flatten(1))), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        memorized, val, test = (
            model.rows(part) for part in (fitted, ids[train : train + queries], ids[train + queries :])
        )
    rows = []
    chunk = Chunk(*memorized, torch.arange(len(memorized.targets)))
    tuner = GridTuner(
        k=(10, 50, 200), sigma=(0.1, 0.2, 0.4), strength=(0.25, 0.5, 1.0), softmax_temperature=(1.0,), objective="nll"
    )
    cases: list[tuple[int, str, torch.dtype]] = [
        (len(chunk.ids), "uniform", dtype) for dtype in (torch.float32, torch.float16)
    ]
    cases += [(len(chunk.ids) // part, keep, torch.float32) for part in (2, 4, 16) for keep in ("uniform", "residual")]
    for count, keep, dtype in cases:
        chosen = RowLimit(count, keep).places(Multiclass(), chunk).argsort()[:count]  # type: ignore[arg-type]
        memory = LocalMemory(params=PARAMS, key_dtype=dtype)
        memory.add(*chunk.rows(chosen))
        memory.build()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            memory.params = tuner.tune(memory, *val).params
        found = memory.predictions(test.keys, test.logits)
        base = F.cross_entropy(test.logits, test.targets, reduction="none")
        after = Multiclass().loss(found.resmem, found.base, test.targets)
        gain = base - after
        rows.append(
            [
                f"{count:,} of {len(chunk.ids):,} rows, {keep}, {str(dtype).removeprefix('torch.')} keys",
                f"{after.mean():.4f} (gain {gain.mean():.4f} ± {gain.std() / len(gain) ** 0.5:.4f}, "
                f"strength {memory.params.strength:g}, k {memory.params.k})",
            ]
        )
    return rows


def alone(case: Callable[[], list[list[str]]]) -> list[list[str]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(case)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", choices=["memory", "pass", "scoring", "samples"])
    given = parser.parse_args()
    cases = {"memory": four_million, "pass": the_pass, "scoring": scoring}
    rows = [row for name, case in cases.items() if given.only in (None, name) for row in alone(case)]
    if rows:
        report("tokens", "A memory of tokens", ["what", "measured"], rows)
    if given.only in (None, "samples"):
        text = drawn_text(300_000) if given.text is None else given.text.read_text()
        report("token_samples", "Samples of the rows", ["memory", "NLL of a character"], samples(text))


if __name__ == "__main__":
    main()
