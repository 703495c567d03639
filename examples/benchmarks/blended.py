"""The keys of two layers in one memory, `F = p + s ((1 - a) R1 + a R2)`, beside `embedding="auto"`, which keeps one.

    python examples/benchmarks/blended.py --seeds 3

On the data and networks of real_data.py, and on two small convolutional networks, whose second place is the output of
the block before, averaged over its positions. Each place has the `k` and `sigma` that a tuner chose for it alone; the
share `a` (1/4, 1/2 or 3/4), the strength `s` and the temperatures are chosen on the same validation rows. "If evident"
keeps both places where that is better there by more than the standard error of the rows' differences, as "auto" does
with the better one alone. Test rows are looked at once. The package has no such memory: this is why.
"""

import argparse
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from _harness import report_whole
from real_data import (
    SETS,
    STEPS,
    Rows,
    fitted,
    gains,
    installed,
    measured,
    rows_of,
    scores_of,
    split,
    summary,
    trained,
)
from torch import Tensor, nn

from lightning_resmem import GridTuner, LocalMemory, Multiclass, Regression, ResMemParams, ResMemWarning
from lightning_resmem.functional import combine

KINDS = ("base", "auto", "blended", "blended, if evident")
SHARES, STRENGTHS = (0.25, 0.5, 0.75), (0.25, 0.5, 0.75, 1.0, 1.5)
PICTURES = {"digits": 8, "MNIST, 5,000 rows": 28}


class Tried(NamedTuple):
    """What a setting predicts for test rows, and how good it is on each validation row: the larger the better."""

    test: Tensor
    aim: Tensor
    gain: Tensor


class Place:
    """A memory of the keys of one layer, and the queries there.

    Attributes:
        alone: The params that a tuner chose.
        beside: Those to use beside another place, where it may help even if alone it is switched off.
    """

    def __init__(self, task: Multiclass | Regression, parts: list[Rows]) -> None:
        train, val, test = parts
        self._memory, self._queries = LocalMemory(task), (val.keys, test.keys)
        self._memory.add(*train)
        self.alone = self.beside = GridTuner(calibrate=False).tune(self._memory, *val).params
        if not self.alone.strength:
            self.beside = GridTuner(calibrate=False, noise=0).tune(self._memory, *val).params

    def sums(self, params: ResMemParams) -> list[Tensor]:
        """The weighted residuals `(B, C)` of validation and of test rows."""
        self._memory.params = params
        return [self._memory(queries) for queries in self._queries]


class Contest:
    """Tries settings on the validation rows of one network, and predicts its test rows with them."""

    def __init__(self, task: Multiclass | Regression, val: Rows, test: Rows) -> None:
        self.task, self.val, self.test = task, val, test

    def result(self, sums: list[Tensor], strength: float, temperature: float) -> Tried:
        """With the weighted residuals of validation and test rows; tempered by what is best on the former."""
        bases = [self.task.predict(part.outputs, temperature) for part in (self.val, self.test)]
        val, test = (combine(base, residual, strength) for base, residual in zip(bases, sums, strict=True))
        after = torch.logspace(-0.5, 0.5, 21).tolist() if isinstance(self.task, Multiclass) and strength else [1.0]
        losses = [self._on_val(self.task.tempered(val, bases[0], t), bases[0])[1].mean() for t in after]
        best = after[int(torch.stack(losses).argmin())]
        score, loss = self._on_val(self.task.tempered(val, bases[0], best), bases[0])
        return Tried(self.task.tempered(test, bases[1], best), score if self.task.higher_is_better else -score, -loss)

    def _on_val(self, found: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        return measured(self.task, found, base, self.val.targets)


def error(differences: Tensor) -> float:
    """The standard error of their mean, a little above that of equal ones."""
    return float(differences.std() / len(differences) ** 0.5) + 1e-9


def best(tried: list[Tried]) -> Tried:
    """Of those within one error of the highest score the one with the lowest loss."""
    top = max(tried, key=lambda one: float(one.aim.mean()))
    near = [one for one in tried if (top.aim - one.aim).mean() <= error(top.aim - one.aim)]
    return max(near, key=lambda one: float(one.gain.mean()))


def is_evident(one: Tried, other: Tried) -> bool:
    """Whether one is better in the score, or in the loss while the score is no worse."""
    better, gain = one.aim - other.aim, one.gain - other.gain
    return bool(better.mean() > error(better) or (better.mean() >= -1e-9 and gain.mean() > error(gain)))


def layers(train: tuple[Tensor, Tensor], outputs: int, seed: int, steps: int) -> list[nn.Module]:
    """An MLP, and what gives its earlier keys."""
    model = trained(train, outputs, seed, steps)
    return [model, model[0][:2]]


def convolutions(train: tuple[Tensor, Tensor], outputs: int, seed: int, steps: int) -> list[nn.Module]:
    """Two convolutions and a head, and what gives the earlier keys."""
    torch.manual_seed(seed)
    side, pooled = round(train[0].shape[1] ** 0.5), [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    first = [nn.Unflatten(1, (1, side, side)), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    body = nn.Sequential(*first, nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), *pooled)
    model = fitted(nn.Sequential(body, nn.Linear(32, outputs)), train, steps)
    return [model, nn.Sequential(*first, *pooled)]


def run(
    network: Callable[..., list[nn.Module]], x: np.ndarray, y: np.ndarray, seed: int, steps: int = STEPS
) -> tuple[dict[str, tuple[float, float]], bool]:
    """Test score, in percent or units of the target, and loss by each kind; and whether both places were kept."""
    parts, unit = split(x, y, seed)
    classes = not parts[0][1].is_floating_point()
    task = Multiclass() if classes else Regression()
    model, early = network(parts[0], int(y.max()) + 1 if classes else 1, seed, steps)
    late = rows_of(model, parts)
    with torch.no_grad():
        earlier = [Rows(early(inputs), *rows[1:]) for rows, (inputs, _) in zip(late, parts, strict=True)]
        places, contest = [Place(task, late), Place(task, earlier)], Contest(task, *late[1:])
        alone = [
            contest.result(place.sums(place.alone), place.alone.strength, place.alone.softmax_temperature)
            for place in places
        ]
        tried = []
        for t in sorted({place.beside.softmax_temperature for place in places}):
            sums = [place.sums(replace(place.beside, softmax_temperature=t)) for place in places]
            for share, strength in itertools.product(SHARES, STRENGTHS):
                mixed = [torch.lerp(one, other, share) for one, other in zip(*sums, strict=True)]
                tried.append(contest.result(mixed, strength, t))
    auto, blended = alone[is_evident(alone[1], alone[0])], best(tried)
    kept, base = is_evident(blended, auto), task.predict(late[2].outputs)
    found = dict(zip(KINDS, (base, auto.test, blended.test, (blended if kept else auto).test), strict=True))
    return scores_of(task, found, late[2].targets, unit), kept


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help="some of the sets")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each set (default: 3)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"to train each for (default: {STEPS})")
    arguments = parser.parse_args(argv)
    lines = []
    warnings.simplefilter("ignore", ResMemWarning)  # that a memory is better off: the table says so
    contests = [
        (f"{name}{suffix}", network, x, y)
        for name, x, y in installed(arguments.only)
        for suffix, network in (("", layers), (", convolutions", convolutions))
        if network is layers or name in PICTURES
    ]
    for name, network, x, y in contests:
        is_error = y.dtype.kind == "f"
        runs, kept = zip(*(run(network, x, y, seed, arguments.steps) for seed in range(arguments.seeds)), strict=True)
        gain = {kind: gains(kind, list(runs), is_error) for kind in KINDS}
        loss = {kind: 1000 * np.array([found[kind][1] for found in runs]) for kind in KINDS}
        lines.append(
            [
                name,
                summary(np.array([found["base"][0] for found in runs])),
                *(f"{summary(gain[kind])} {'% less error' if is_error else 'points'}" for kind in KINDS[1:]),
                summary(gain["blended"] - gain["auto"]),
                summary(loss["blended"] - loss["auto"], 1),
                f"{sum(kept)} of {len(kept)}",
            ]
        )
        print(*lines[-1], sep=" | ", flush=True)
    header = ["data", "base", 'embedding="auto"', *KINDS[2:], "blended beyond auto", "in loss x 1,000", "was evident"]
    report_whole(SETS, "blended", "Gain over the base on test rows", header, lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
