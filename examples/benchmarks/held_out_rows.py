"""A base that knows its training rows by heart, and a memory of them, of rows held out from training, or of both.

    python examples/benchmarks/held_out_rows.py --seeds 3

On at most 4,000 rows of six of the sets of real_data.py: 40% train the base, 20% are held out, 15% are for tuning, 25%
for the test. "Trained on both" is a base alone that had the held-out rows to train on as well.
"""

import argparse
import warnings

import numpy as np
import torch
from _harness import report_whole
from real_data import SETS, gains, installed, rows_of, scores_of, split, summary, trained

from lightning_resmem import GridTuner, LocalMemory, Multiclass, Regression, ResMemWarning

KINDS = ("base", "training rows", "held-out rows", "both", "trained on both")
NAMES = ("digits", "MNIST, 5,000 rows", "flights: carrier", "diabetes", "diamonds: price", "Texas houses: price")
ROWS, STEPS, HIDDEN = 4_000, 3_000, 256


def run(x: np.ndarray, y: np.ndarray, seed: int, steps: int) -> tuple[dict[str, tuple[float, float]], float]:
    """Test score and loss by each kind, and the residuals of training rows in percent of those of held-out rows."""
    few = np.random.default_rng(seed).permutation(len(y))[:ROWS]
    ((inputs, targets), tune, test), unit = split(x[few], y[few], seed)
    parts = [(inputs[0::3], targets[0::3]), (inputs[1::3], targets[1::3]), (inputs[2::3], targets[2::3])]
    held_out, train = parts[0], tuple(torch.cat(pair) for pair in zip(*parts[1:], strict=True))
    classes = not targets.is_floating_point()
    task, outputs = (Multiclass(), int(y.max()) + 1) if classes else (Regression(), 1)
    known, unknown, val, asked = rows_of(trained(train, outputs, seed, steps, HIDDEN), [train, held_out, tune, test])
    found = {"base": task.predict(asked.outputs)}
    for kind, memorized in zip(KINDS[1:4], ([known], [unknown], [known, unknown]), strict=True):
        memory = LocalMemory(task)
        for rows in memorized:
            memory.add(*rows)
        memory.params = GridTuner().tune(memory, *val).params
        found[kind] = memory.predictions(asked.keys, asked.outputs).resmem
    (of_both,) = rows_of(trained((inputs, targets), outputs, seed, steps, HIDDEN), [test])
    found["trained on both"] = task.predict(of_both.outputs)
    stored, unseen = (task.residuals(rows.outputs, rows.targets).abs().mean().item() for rows in (known, unknown))
    return scores_of(task, found, asked.targets, unit), 100 * stored / unseen


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=NAMES, metavar="SET", help="others of the sets")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each set (default: 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"to train each for (default: {STEPS})")
    arguments = parser.parse_args(argv)
    lines = []
    warnings.simplefilter("ignore", ResMemWarning)  # that the base fits its rows almost perfectly
    for name, x, y in installed(arguments.only):
        is_error = y.dtype.kind == "f"
        runs, left = zip(*(run(x, y, seed, arguments.steps) for seed in range(arguments.seeds)), strict=True)
        base = summary(np.array([found["base"][0] for found in runs]))
        unit = "% less error" if is_error else "points"
        columns = [f"{summary(gains(kind, list(runs), is_error))} {unit}" for kind in KINDS[1:]]
        lines.append([name, f"{np.mean(left):.0f}%", base, *columns])
        print(*lines[-1], sep=" | ", flush=True)
    header = ["data", "residuals left", *KINDS]
    report_whole(NAMES, "held_out_rows", "Gain over the base on test rows", header, lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
