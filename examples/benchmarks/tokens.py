"""A memory of tokens: 4,000,000 rows, the pass over a bare forward, what combining holds, and samples of the rows.

    python examples/benchmarks/tokens.py --text shakespeare.txt
    python examples/benchmarks/tokens.py --only pass --share 0.1

`--text` is for the samples; without it a text is drawn. Every other case runs in a process of its own, so that its peak
is its own (Linux).
"""

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from _harness import report, seconds
from million_rows import peak, start_peak
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_resmem import GridTuner, LocalMemory, Multiclass, ResMemModule, ResMemParams, SparseConfig, memorize
from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.row_limit import RowLimit
from lightning_resmem.memory.token_ids import STRIDE
from lightning_resmem.metrics.found import Found
from lightning_resmem.metrics.scoreboard import Scoreboard
from lightning_resmem.model.sequences import RowTargets

WIDTH, TOP, CHUNK = 128, 16, 100_000
GIB, PARAMS = 2**30, ResMemParams(k=50, sigma=2.0)

Lines = list[list[str]]


def part(share: float, whole: int, least: int) -> int:
    return max(least, int(share * whole))


def tokens(rows: int, classes: int) -> LocalMemory:
    """Random rows, as they are stored: to draw so many logits would take hours."""
    memory = LocalMemory(params=PARAMS, values=SparseConfig(TOP), key_dtype=torch.float16)
    memory.reserve(rows)
    for start in range(0, rows, CHUNK):
        count = min(CHUNK, rows - start)
        stored = {
            "keys": torch.randn(count, WIDTH).half(),
            "ids": torch.arange(start, start + count),
            "targets": torch.randint(classes, (count,)),
            "classes": torch.randint(classes, (count, TOP)).to(torch.int16 if classes <= 2**15 else torch.int32),
            "log_probabilities": torch.full((count, TOP), -4.0, dtype=torch.float16),
            "log_tail": torch.full((count,), -0.4),
        }
        memory.add_stored(stored, classes)
    memory.build()
    memory.provenance["stride"] = str(STRIDE)
    return memory


def four_million(share: float) -> Lines:
    rows, classes, count = part(share, 4_000_000, 1000), part(share, 32_000, 1100), part(share, 1024, 8)
    before = start_peak()
    memory = tokens(rows, classes)
    filled = peak() - before
    queries, logits = torch.randn(count, WIDTH), torch.randn(count, classes)
    memory.predict(queries[:8], logits[:8])
    start_peak()
    started = time.process_time()
    memory.predict(queries, logits)
    taken = time.process_time() - started
    return [
        [
            f"{rows:,} tokens, D = {WIDTH}, V = {classes:,}, m = {TOP}, float16 keys: held",
            f"{memory.stats()['bytes'] / 1e9:.2f} GB",
        ],
        ["at the peak of filling it, of the process", f"{filled / 1e9:.2f} GB"],
        [
            f"to answer {count:,} tokens",
            f"{taken:.0f} s of one core, {(peak() - before) / 1e9:.2f} GB of the process at the peak",
        ],
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

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, vocabulary)

    def forward(self, input_ids: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.layers(self.embed(input_ids), mask=mask, is_causal=True))


def the_pass(share: float) -> Lines:
    """Of 8,192 tokens with sparse values, over the same forward alone."""
    classes, length = part(share, 32_000, 1100), part(share, 256, 4)
    texts = Texts(32, length, classes)
    model, loader = Causal(classes).eval(), DataLoader(texts, batch_size=4)
    trainer = L.Trainer(logger=False, enable_progress_bar=False, enable_checkpointing=False, accelerator="cpu")

    def forward() -> None:
        with torch.no_grad():
            for batch in loader:
                model(batch["input_ids"])

    def fill() -> None:
        memorize(trainer, model, loader, memory=LocalMemory(params=PARAMS), tuner=None)

    taken, count = seconds({"forward": forward, "pass": fill}, rounds=2), len(texts) * length
    each = {name: value / count * 1e6 for name, value in taken.items()}
    return [
        [f"bare forward of two layers, D = {WIDTH}, V = {classes:,}", f"{each['forward']:.0f} µs a token"],
        [
            f"memory pass over {count:,} tokens, with its rehearsal and building",
            f"{each['pass']:.0f} µs a token, {each['pass'] / each['forward']:.2f} times",
        ],
    ]


class Head(L.LightningModule):
    """What a language model ends with."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


@torch.no_grad()
def combining(share: float) -> Lines:
    classes, batch, length = part(share, 50_257, 1100), 8, part(share, 1024, 4)
    memory, embeddings = tokens(part(share, 50_000, 1000), classes), torch.randn(batch, length, WIDTH)
    base = Head(classes).eval()
    logits = base(embeddings)
    before = start_peak()
    found = Found.of(memory, embeddings, logits)
    routed = found.combined(memory)
    held = peak() - before - routed.nbytes
    del routed
    before = start_peak()
    board = Scoreboard(memory, "test", [[]])
    targets, kept = torch.randint(classes, (batch, length)), torch.ones(batch, length, dtype=torch.bool)
    board.update_tokens(found, RowTargets(targets, kept, torch.arange(length).expand(batch, length)))
    board.finish()
    scored, size = peak() - before, logits.nbytes
    del found, logits
    before = start_peak()
    base(embeddings)
    bare = peak() - before
    combined = ResMemModule(base, memory, head="head")
    start_peak()
    with combined.combined():
        base(embeddings)
    generating = peak() - before - bare
    return [
        [f"{batch} x {length:,} tokens, V = {classes:,}: the base's logits", f"{size / GIB:.2f} GiB"],
        ["combining, beside these and what is returned in their place", f"{held / GIB:.2f} GiB"],
        ["scoring base, knn and resmem, beside the logits", f"{scored / GIB:.2f} GiB"],
        ["the base within `combined()`, more than alone", f"{generating / GIB:.2f} GiB"],
    ]


class Window(nn.Module):
    """The next character from the last 12."""

    def __init__(self, vocabulary: int, context: int = 12) -> None:
        super().__init__()
        self.context, self.embed = context, nn.Embedding(vocabulary, 16)
        self.body = nn.Sequential(nn.Linear(16 * context, 128), nn.GELU(), nn.Linear(128, 64), nn.Tanh())
        self.head = nn.Linear(64, vocabulary)

    @torch.no_grad()
    def rows(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, logits and targets of a text `(n,)`."""
        windows = text[:-1].unfold(0, self.context, 1).split(8192)
        keys = torch.cat([self.body(self.embed(window).flatten(1)) for window in windows])
        return keys, self.head(keys), text[self.context :]


def drawn_text(length: int) -> str:
    """Words, the next of which depends on the last."""
    generator = torch.Generator().manual_seed(0)
    words = ["".join(chr(97 + int(c)) for c in torch.randint(26, (4,), generator=generator)) for _ in range(500)]
    following, place, text = torch.randint(500, (500, 3), generator=generator), 0, []
    for choice in torch.randint(3, (length // 5,), generator=generator).tolist():
        place = int(following[place, choice])
        text.append(words[place])
    return " ".join(text)


def fitted(text: Tensor, vocabulary: int, steps: int) -> Window:
    torch.manual_seed(0)
    model = Window(vocabulary)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(text) - model.context - 1, (512,))
        batch = text[starts[:, None] + torch.arange(model.context + 1)]
        loss = F.cross_entropy(model.head(model.body(model.embed(batch[:, :-1]).flatten(1))), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def samples(text: str, share: float) -> Lines:
    """What smaller memories of a text give, on characters that nobody has seen."""
    characters = sorted(set(text))
    train, queries = part(share, 100_000, 400), part(share, 5_000, 200)
    ids = torch.tensor([characters.index(c) for c in text[: train + 2 * queries]])
    model = fitted(ids[:train], len(characters), part(share, 2000, 20))
    memorized, val, test = (model.rows(rows) for rows in ids.split([train, queries, queries]))
    chunk = Chunk(*memorized, torch.arange(len(memorized[2])), torch.zeros(len(memorized[2]), 0))
    tuner = GridTuner(k=(10, 50, 200), softmax_temperature=(1.0,), objective="nll")
    cases = [(1, "uniform", torch.float32), (1, "uniform", torch.float16)]
    cases += [(most, keep, torch.float16) for most in (2, 4, 16) for keep in ("uniform", "residual")]
    lines = []
    for divisor, keep, dtype in cases:
        count = len(chunk.ids) // divisor
        chosen = RowLimit(count, keep).places(Multiclass(), chunk).argsort()[:count]
        memory = LocalMemory(params=PARAMS, key_dtype=dtype)
        memory.add(*(column[chosen] for column in chunk[:4]))
        memory.build()
        memory.params = tuner.tune(memory, *val).params
        kind = f"{count:,}, {'all' if divisor == 1 else keep}, {str(dtype).removeprefix('torch.')} keys"
        lines.append([kind, *scores(memory, *test), f"{memory.params.strength:g}", str(memory.params.k)])
    return lines


def scores(memory: LocalMemory, keys: Tensor, logits: Tensor, targets: Tensor) -> list[str]:
    """NLL and accuracy of resmem, each with its gain over the base and that one's standard error."""
    found, base = memory.predictions(keys, logits), logits.softmax(dim=1)
    loss, right = Multiclass().loss(found.resmem, found.base, targets), found.resmem.argmax(dim=1) == targets
    gain = Multiclass().loss(base, base, targets) - loss
    won = 100 * (right.double() - (base.argmax(dim=1) == targets).double())
    errors = [float(values.std()) / len(targets) ** 0.5 for values in (gain, won)]
    return [
        f"{float(loss.mean()):.4f} ({float(gain.mean()):+.4f} ± {errors[0]:.4f})",
        f"{100 * float(right.double().mean()):.2f} ({float(won.mean()):+.2f} ± {errors[1]:.2f})",
    ]


def alone(case: Callable[[float], Lines], share: float) -> Lines:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(case, (share,))


def main(argv: Sequence[str] | None = None) -> None:
    cases = {"memory": four_million, "pass": the_pass, "combining": combining}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", choices=[*cases, "samples"], help="one of the cases")
    parser.add_argument("--share", type=float, default=1.0, help="of the full sizes, for a look (default: 1)")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # that a memory is better off: the table says so
    lines = [line for name, case in cases.items() if given.only in (None, name) for line in alone(case, given.share)]
    if lines:
        report("tokens", "A memory of tokens", ["what", "measured"], lines)
    if given.only in (None, "samples"):
        text = drawn_text(300_000) if given.text is None else given.text.read_text(encoding="utf-8")
        header = ["rows kept", "NLL (gain over the base)", "accuracy, % (gain)", "strength", "k"]
        report("token_samples", "Samples of the rows of a text", header, samples(text, given.share))


if __name__ == "__main__":
    main()
