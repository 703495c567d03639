"""The paper's stylized linear regression: by how much residual memorization helps, measured and predicted.

    python examples/theory.py              # seconds; writes outputs/theory.png
    python examples/theory.py --dimension 3 --norm 0.8 --seeds 20

Inputs are uniform in a ball whose covariance is the identity, `y = <x, w>` with a `w` of norm 1 and no noise. The base
is least squares over all `v` whose norm is at most `L < 1`, a model that is too small; the memory holds its residuals,
and adds that of the nearest training row (arXiv 2302.01576). What is predicted for many rows:

- base: `v` tends to `L w`, so the risk tends to `(1 - L)^2` and no number of rows makes it less;
- 1-NN: the squared distance to the nearest of `n` rows falls as `n^(-2/d)`, and so does the risk (Biau and Devroye,
  Lectures on the Nearest Neighbor Method, 2015);
- ResMem: what is left to the memory is `<x, w - v>`, and `w - v` has norm `1 - L`: `(1 - L)^2` times the risk of 1-NN.

The second table checks a base of which the whole risk is known: ridge regression with Gaussian inputs, noise, and
eigenvalues that fall as a power, beside the deterministic equivalent of Atanasov, Zavatone-Veth and Pehlevan ("Scaling
and renormalization in high-dimensional regression", arXiv 2405.00592, 2024).
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from lightning_resmem import LocalMemory, Regression, ResMemParams

ROWS = (50, 200, 800, 3200, 12800)
PREDICTIONS = ("base", "knn", "resmem")


def root(function, low: float, high: float) -> float:
    """Where an increasing function is 0, by halving on the scale of logarithms; `low` and `high` are above 0."""
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high


def restricted(x: np.ndarray, y: np.ndarray, norm: float) -> np.ndarray:
    """Least squares of `y` `(n,)` on `x` `(n, d)` over all vectors whose norm is at most `norm`, shape `(d,)`."""
    values, vectors = np.linalg.eigh(x.T @ x / len(x))
    moments = vectors.T @ (x.T @ y) / len(x)

    def length(multiplier: float) -> float:
        return float(np.linalg.norm(moments / (values + multiplier)))

    if length(1e-12) <= norm:
        return vectors @ (moments / values)
    return vectors @ (moments / (values + root(lambda multiplier: norm - length(multiplier), 1e-12, 1e12)))


def ball(rows: int, dimension: int, generator: np.random.Generator) -> np.ndarray:
    """Rows uniform in the ball of radius `sqrt(d + 2)`, whose covariance is the identity, shape `(rows, d)`."""
    directions = generator.standard_normal((rows, dimension))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * np.sqrt(dimension + 2) * generator.random((rows, 1)) ** (1 / dimension)


def risks(dimension: int, norm: float, rows: int, seed: int, test_rows: int = 2000) -> list[float]:
    """The test risk of base, 1-NN and ResMem for one draw of the training rows."""
    generator = np.random.default_rng([seed, rows])
    x, test = ball(rows, dimension, generator), ball(test_rows, dimension, generator)
    w = np.eye(dimension)[0]
    v = restricted(x, x @ w, norm)
    memory = LocalMemory(task=Regression(), params=ResMemParams(k=1))
    (keys, outputs, targets), (queries, base, truth) = (
        (torch.from_numpy(part).float() for part in (z, (z @ v)[:, None], (z @ w)[:, None])) for z in (x, test)
    )
    memory.add(keys, outputs, targets)
    return [float((found - truth).square().mean()) for found in memory.predictions(queries, base)]


def ridge_risk(eigenvalues: np.ndarray, weights: np.ndarray, rows: int, ridge: float, noise: float) -> float:
    """The excess risk of ridge regression, in the limit of many rows and many dimensions.

    The ridge `lambda` acts as `kappa`, where `lambda = kappa (1 - df1 / n)`; with `df1 = sum_i l_i / (l_i + kappa)` and
    `gamma = sum_i (l_i / (l_i + kappa))^2 / n` the excess risk is
    `(kappa^2 sum_i l_i w_i^2 / (l_i + kappa)^2 + noise^2 gamma) / (1 - gamma)`.
    """

    def excess(kappa: float) -> float:
        return kappa * (1 - (eigenvalues / (eigenvalues + kappa)).sum() / rows) - ridge

    kappa = root(excess, 1e-12, 1e6)
    gamma = ((eigenvalues / (eigenvalues + kappa)) ** 2).sum() / rows
    bias = kappa**2 * (eigenvalues * weights**2 / (eigenvalues + kappa) ** 2).sum()
    return float((bias + noise**2 * gamma) / (1 - gamma))


def ridge_measured(
    eigenvalues: np.ndarray, weights: np.ndarray, rows: int, ridge: float, noise: float, seed: int
) -> float:
    """The same for one draw of the rows; exact over the test rows, as their covariance is known."""
    generator = np.random.default_rng([seed, rows])
    x = generator.standard_normal((rows, len(eigenvalues))) * np.sqrt(eigenvalues)
    y = x @ weights + noise * generator.standard_normal(rows)
    found = np.linalg.solve(x.T @ x / rows + ridge * np.eye(len(eigenvalues)), x.T @ y / rows)
    return float((eigenvalues * (found - weights) ** 2).sum())


def summary(values: np.ndarray) -> str:
    """Mean and standard error over the seeds."""
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return f"{values.mean():.4f} ± {error:.4f}"


def plot(measured: np.ndarray, dimension: int, norm: float, path: Path) -> None:
    """Risk against rows for the three predictions, with what is predicted beside them."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    means = measured.mean(axis=1)  # (rows, 3)
    errors = measured.std(axis=1, ddof=min(1, measured.shape[1] - 1)) / np.sqrt(measured.shape[1])
    for column, name in enumerate(("base", "1-NN", "ResMem")):
        axes.errorbar(
            ROWS, means[:, column], yerr=errors[:, column], color=f"C{column}", marker="o", capsize=3, label=name
        )
    rate = means[-1, 1] * (np.array(ROWS) / ROWS[-1]) ** (-2 / dimension)
    for column, line in enumerate((np.full(len(ROWS), (1 - norm) ** 2), rate, (1 - norm) ** 2 * rate)):
        axes.plot(ROWS, line, color=f"C{column}", linestyle="--", linewidth=1)
    axes.plot([], [], color="0.5", linestyle="--", linewidth=1, label="predicted")
    axes.set(xscale="log", yscale="log", xlabel="training rows", ylabel="test risk")
    axes.set_title(f"Linear regression, d = {dimension}, base restricted to norm {norm}")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="draws of the training rows (default: 10)")
    parser.add_argument("--dimension", type=int, default=4, help="of the inputs (default: 4)")
    parser.add_argument("--norm", type=float, default=0.6, help="the largest norm of the base's weights (default: 0.6)")
    parser.add_argument("--plot", type=Path, default=Path("outputs/theory.png"), help="where the picture goes")
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or arguments.dimension < 1 or not 0 < arguments.norm < 1:
        parser.error("--seeds and --dimension must be at least 1, and --norm between 0 and 1")

    seeds, dimension, norm = range(arguments.seeds), arguments.dimension, arguments.norm
    measured = np.array([[risks(dimension, norm, rows, seed) for seed in seeds] for rows in ROWS])
    console = Console()
    table = Table("rows", *PREDICTIONS, "resmem / knn", title=f"Test risk, d = {dimension}, norm at most {norm}")
    for rows, values in zip(ROWS, measured, strict=True):
        ratio = values[:, 2] / values[:, 1]
        table.add_row(f"{rows:,}", *map(summary, values.T), summary(ratio))
    table.add_row("predicted", f"{(1 - norm) ** 2:.4f}", f"n^(-2/{dimension})", "", f"{(1 - norm) ** 2:.4f}")
    console.print(table)

    eigenvalues = np.arange(1, 201) ** -1.5
    weights = np.ones(200) / np.sqrt(eigenvalues.sum())
    table = Table("rows", "ridge", "measured", "predicted", title="Excess risk of ridge regression, 200 dimensions")
    for rows in (50, 100, 400):
        for ridge in (1e-3, 1e-2, 1e-1):
            given = eigenvalues, weights, rows, ridge, 0.3
            found = np.array([ridge_measured(*given, seed) for seed in seeds])
            table.add_row(str(rows), f"{ridge:g}", summary(found), f"{ridge_risk(*given):.4f}")
    console.print(table)
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    plot(measured, dimension, norm, arguments.plot)
    console.print(f"Picture: {arguments.plot}")


if __name__ == "__main__":
    main()
