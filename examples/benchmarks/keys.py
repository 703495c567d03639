"""ResMem by the head's input, by the layer before, and by `embedding="auto"`, on the data and networks of real_data.py.

    python examples/benchmarks/keys.py --seeds 3

The choice is made on the validation rows that the params are tuned on; test rows are looked at once.
"""

import argparse
import warnings
from collections import Counter

import numpy as np
import torch
from _harness import report_whole
from real_data import SETS, STEPS, gains, installed, rows_of, scores_of, split, summary, trained

from lightning_resmem import GridTuner, LocalMemory, Multiclass, Regression, ResMemWarning
from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.tuning.keys import choose_key

KINDS = ("base", "head", "before", "auto")


def run(x: np.ndarray, y: np.ndarray, seed: int, steps: int = STEPS) -> tuple[dict[str, tuple[float, ...]], str]:
    """The test score by each kind of keys, in percent or units of the target, and what was chosen."""
    parts, unit = split(x, y, seed)
    classes = not parts[0][1].is_floating_point()
    model = trained(parts[0], int(y.max()) + 1 if classes else 1, seed, steps)
    train, val, test = rows_of(model, parts)
    with torch.no_grad():
        early = [model[0][:2](inputs) for inputs, _ in parts]
    task = Multiclass() if classes else Regression()
    widths = {"head": train.keys.shape[1], "before": early[0].shape[1]}
    memory = LocalMemory(task)
    memory.add(torch.cat([train.keys, early[0]], dim=1), *train[1:])
    wide = torch.cat([val.keys, early[1]], dim=1)
    rows = Chunk(wide, *val[1:], torch.arange(len(wide)), torch.zeros(len(wide), 0))
    found = {"base": task.predict(test.outputs)}
    queries = {"head": test.keys, "before": early[2]}
    for kind in widths:
        alone, column = LocalMemory(task), 0 if kind == "head" else 1
        alone.add((train.keys, early[0])[column], *train[1:])
        alone.params = GridTuner().tune(alone, (val.keys, early[1])[column], *val[1:]).params
        found[kind] = alone.predictions(queries[kind], test.outputs).resmem
    result = choose_key(memory, GridTuner(), widths, rows, lambda part: part)
    chosen = next(key.embedding for key in result.keys if key.chosen)
    found["auto"] = found[chosen]
    return scores_of(task, found, test.targets, unit), chosen


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help="some of the sets")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each set (default: 3)")
    arguments = parser.parse_args(argv)
    lines = []
    warnings.simplefilter("ignore", ResMemWarning)  # that a memory is better off: the table says so
    for name, x, y in installed(arguments.only):
        is_error = y.dtype.kind == "f"
        runs, choices = zip(*(run(x, y, seed) for seed in range(arguments.seeds)), strict=True)
        unit = "% less error" if is_error else "points"
        base = summary(np.array([found["base"][0] for found in runs]))
        columns = [f"{summary(gains(kind, list(runs), is_error))} {unit}" for kind in KINDS[1:]]
        lines.append([name, base, *columns, f"{Counter(choices)['before']} of {len(choices)}"])
        print(*lines[-1], sep=" | ", flush=True)
    header = ["data", "base", "head's input", "layer before", 'embedding="auto"', "chose the layer before"]
    report_whole(SETS, "keys", "Gain over the base on test rows", header, lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
