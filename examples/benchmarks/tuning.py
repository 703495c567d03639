"""Tuning on 5,000 validation rows: seconds beyond the search, against a search per setting, and what it is worth.

One thread. Fails if tuning is too slow or, with features, if its choices are worse on test data than they should be.
"""

import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from _harness import features_file, report, use_threads
from torch import Tensor

from lightning_resmem import GridTuner, LocalMemory, ResMemParams, ResMemWarning, TuningResult

MOST_SECONDS, LEAST_RATIO = 5.0, 100.0
# Test accuracy in percent: the base's, and what the default tuner has to reach at least.
BASE, LEAST = 79.45, 80.3
BOUND = 0.005


class Rows(NamedTuple):
    """Embeddings, logits and labels."""

    embeddings: Tensor
    logits: Tensor
    labels: Tensor


def load() -> dict[str, Rows]:
    """Training, validation and test rows: features, or random data of their size."""
    file = features_file()
    if file is not None:
        with np.load(file) as data:
            return {
                part: Rows(
                    *(torch.from_numpy(data[f"{part}_{name}"]).float() for name in ("embeddings", "logits")),
                    torch.from_numpy(data[f"{part}_labels"]).long(),
                )
                for part in ("train", "val", "test")
            }
    print("No features file (give a path, or set RESMEM_FEATURES): random data of the same size instead.")
    generator = torch.Generator().manual_seed(0)
    return {part: random_rows(count, 10, generator) for part, count in (("train", 45_000), ("val", 5_000))}


def random_rows(count: int, classes: int, generator: torch.Generator) -> Rows:
    """Rows of width 64 without any structure."""
    embeddings = torch.randn(count, 64, generator=generator).relu()
    logits = 2 * torch.randn(count, classes, generator=generator)
    return Rows(embeddings, logits, torch.randint(0, classes, (count,), generator=generator))


def filled(rows: Rows) -> LocalMemory:
    memory = LocalMemory(params=ResMemParams())
    memory.add(*rows)
    memory.build()
    return memory


def timed(run: Callable[[], object], rounds: int = 3) -> float:
    """Seconds of the core in the fastest round: other work on the machine only ever adds."""
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def speed(name: str, train: Rows, val: Rows) -> tuple[list[str], float, float]:
    """A line of the table, seconds beyond the search, and how much longer a search per setting takes."""
    memory, tuner = filled(train), GridTuner()
    result = tuner.tune(memory, *val)
    searching = timed(lambda: memory.search(val.embeddings, max(tuner.k)))
    tuning = timed(lambda: tuner.tune(memory, *val))
    every = len(result.table) // 8  # of all kinds; all of them would take half an hour
    sample = [{name: row[name] for name in ("k", "sigma", "softmax_temperature", "strength")} for row in result.table]

    def one_by_one() -> None:
        for setting in sample[every // 2 :: every]:
            memory.params = ResMemParams(**setting)
            memory.predict(val.embeddings, val.logits)

    count = len(sample[every // 2 :: every])
    slow = timed(one_by_one, rounds=1) / count * len(result.table)
    line = [
        name,
        str(len(result.table)),
        f"{searching:.2f}",
        f"{tuning - searching:.2f}",
        f"{slow:,.0f}",
        f"{slow / tuning:,.0f}x",
    ]
    return line, tuning - searching, slow / tuning


def quality(name: str, result: TuningResult, memory: LocalMemory, test: Rows) -> tuple[list[str], float]:
    """A line of the table, and the test accuracy in percent."""
    memory.params = result.params
    right = memory.predict(test.embeddings, test.logits).argmax(dim=1) == test.labels
    base = test.logits.argmax(dim=1) == test.labels
    accuracy, lost = 100 * right.float().mean().item(), 100 * (base & ~right).float().mean().item()
    params = result.params
    choice = f"k={params.k}, sigma={params.sigma:.3f}, T={params.softmax_temperature:g}, strength={params.strength:g}"
    gain = 100 * (result.score - result.base_score)
    return [name, choice, f"{gain:+.2f}", f"{accuracy:.2f}", f"{accuracy - BASE:+.2f}", f"{lost:.2f}"], accuracy


def few_rows(memory: LocalMemory, val: Rows, test: Rows, draws: int = 40) -> list[list[str]]:
    """Lines of a table: test accuracy, and its standard error, over draws of 200 validation rows."""
    lines = []
    for name, tuner in (("GridTuner()", GridTuner()), ("GridTuner(noise=0)", GridTuner(noise=0))):
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(draws):
            rows = torch.randperm(len(val.labels), generator=generator)[:200]
            memory.params = tuner.tune(memory, *(column[rows] for column in val)).params
            right = memory.predict(test.embeddings, test.logits).argmax(dim=1) == test.labels
            found.append(100 * right.double().mean().item())
        lines.append([name, f"{np.mean(found):.2f} ± {np.std(found, ddof=1) / draws**0.5:.2f}"])
    return lines


def main() -> int:
    use_threads(1)
    warnings.simplefilter("ignore", ResMemWarning)
    rows = load()
    generator = torch.Generator().manual_seed(0)
    hundred = random_rows(45_000, 100, generator), random_rows(5_000, 100, generator)
    lines, seconds, ratios = zip(
        speed("10 classes", rows["train"], rows["val"]), speed("100 classes, random", *hundred), strict=True
    )
    header = ["rows", "settings", "one search, s", "beyond it, s", "a search per setting, s", "ratio"]
    report("tuning_speed", "Tuning on 5,000 rows with 45,000 in the memory, one thread", header, list(lines))
    failed = seconds[0] > MOST_SECONDS or ratios[0] < LEAST_RATIO
    if "test" not in rows:
        return int(failed)

    memory, val, test = filled(rows["train"]), rows["val"], rows["test"]
    default = GridTuner().tune(memory, *val)
    bounded = GridTuner(max_negative_flip_rate=BOUND).tune(memory, *val)
    shuffled = filled(rows["train"]._replace(labels=torch.randint(0, 10, (45_000,), generator=generator)))
    off = GridTuner().tune(shuffled, *val)
    results = [
        ("GridTuner()", default),
        ('GridTuner(objective="nll")', GridTuner(objective="nll").tune(memory, *val)),
        ("GridTuner(noise=0)", GridTuner(noise=0).tune(memory, *val)),
        (f"GridTuner(max_negative_flip_rate={BOUND})", bounded),
        ("GridTuner(gate=True)", GridTuner(gate=True).tune(memory, *val)),
        ("leave-one-out, no validation rows", GridTuner().tune_leave_one_out(memory)),
    ]
    lines, accuracies = zip(*(quality(name, result, memory, test) for name, result in results), strict=True)
    lines = [*lines, quality("GridTuner(), random labels in the memory", off, shuffled, test)[0]]
    header = ["tuner", "choice", "tuning gain, %", "test, %", "test gain, %", "test answers lost, %"]
    report("tuning", f"Test accuracy, base {BASE} %", header, lines)
    lines = few_rows(filled(rows["train"]), val, test)
    report("tuning_few_rows", "Tuned on 200 rows, 40 draws", ["tuner", "test accuracy, %"], lines)
    lost = next(row["negative_flip_rate"] for row in bounded.table if _is_choice(row, bounded.params))
    failed |= accuracies[0] < LEAST or lost > BOUND or accuracies[3] <= BASE or off.params.strength > 0
    return int(failed)


def _is_choice(row: dict[str, float], params: ResMemParams) -> bool:
    names = ("k", "sigma", "softmax_temperature", "strength")
    return all(row[name] == getattr(params, name) for name in names)


if __name__ == "__main__":
    sys.exit(main())
