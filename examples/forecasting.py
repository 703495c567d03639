"""House sales in Texas half a year ahead: what a memory adds, and what it adds if it goes on learning.

    python examples/forecasting.py

Monthly series of plotnine's `txhousing`: from two years of (log) sales and median prices of a city to its next six
months of both; a residual is a trajectory `(horizon x variables)`. Rows of all cities lie beside each other in time, so
a query must not recall a row of another city whose target is yet to come: `times_fn` says when each forecast is asked
for, and when its target is known. `growing` is the same memory with the test windows in it, too: each of them answers
from when its target is known, never before.
"""

import argparse
import math
from collections.abc import Sequence

import lightning.pytorch as L
import torch
from plotnine.data import txhousing
from rich import print
from rich.table import Table
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, default_collate

from examples.series_module import Forecaster, Windows, times
from lightning_resmem import LocalMemory, Regression, ResMemCallback

VARIABLES = ("sales", "median")
PAST, HORIZON = 24, 6
FIRST_VAL, FIRST_TEST = 108, 138  # months from January 2000


def cities() -> Tensor:
    """Log sales and prices of the cities without gaps, less their mean before validation: `(city, month, 2)`."""
    found = []
    for _, rows in txhousing.sort_values("date").groupby("city", observed=True):
        series = torch.log(torch.tensor(rows[list(VARIABLES)].to_numpy(), dtype=torch.float32))
        if torch.isfinite(series).all():
            found.append(series - series[:FIRST_VAL].mean(dim=0))
    return torch.stack(found)


def windows(series: Tensor, first: int, last: int) -> ConcatDataset:
    """Windows of every city whose targets begin in these months."""
    start = max(0, first - PAST)
    return ConcatDataset([Windows(city[start : last + HORIZON - 1], PAST, HORIZON, start) for city in series])


def trained(series: Tensor, seed: int, epochs: int) -> tuple[dict[str, float], Tensor]:
    """The test error of the base, of neighbours and of both, as a root mean squared difference of logs.

    Beside it, by what percentage it is lower with the memory in each year of the test.
    """
    L.seed_everything(seed, verbose=False)
    months = series.shape[1] - HORIZON + 1
    # Targets of one part end before those of the next begin.
    train = windows(series, 0, FIRST_VAL - HORIZON + 1)
    val, test = windows(series, FIRST_VAL, FIRST_TEST - HORIZON + 1), windows(series, FIRST_TEST, months)
    size = len(VARIABLES)
    model = Forecaster(PAST * size, HORIZON * size, hidden=64)
    resmem = ResMemCallback(LocalMemory(Regression()), times_fn=times)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[resmem], accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=512))
    [scores] = trainer.test(model, DataLoader(test, batch_size=512), verbose=False)
    found = {name: math.sqrt(scores[f"test/mse_{name}"]) for name in ("base", "knn", "resmem")}
    years = gain_by_year(model.cpu(), resmem.memory, test)
    return {**found, "growing": math.sqrt(growing(model, resmem.memory, [val, test]))}, years


@torch.no_grad()
def gain_by_year(model: Forecaster, memory: LocalMemory, test: ConcatDataset) -> Tensor:
    """By what percentage the memory lowers the error on forecasts of each year."""
    batch = default_collate(list(test))
    base, _, resmem = memory.at(batch["asked_at"]).predictions(model.body(batch["x"]), model(batch["x"]))
    year = (batch["asked_at"] - batch["asked_at"].min()) // 12
    squares = torch.stack([(told - batch["y"]).square().mean(dim=1) for told in (base, resmem)])
    sums = torch.zeros(2, int(year.max()) + 1).index_add_(1, year, squares)
    return 100 * (1 - (sums[1] / sums[0]).sqrt())


@torch.no_grad()
def growing(model: Forecaster, memory: LocalMemory, parts: Sequence[ConcatDataset]) -> float:
    """The mean squared error on the last part by a memory that takes in all of them."""
    for part in parts:
        batch = default_collate(list(part))
        keys, outputs = model.body(batch["x"]), model(batch["x"])
        memory.add(keys, outputs, batch["y"], times=torch.stack(times(batch), dim=1))
    forecast = memory.at(batch["asked_at"]).predict(keys, outputs)
    return float((forecast - batch["y"]).square().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many networks are trained")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--cities", type=int, default=None, help="the first of them only")
    given = parser.parse_args(arguments)
    if given.seeds < 1:
        parser.error("--seeds has to be at least 1")
    series = cities()[: given.cities]
    table = Table(title=f"RMSE of log {' and log '.join(VARIABLES)}, {len(series)} cities, {HORIZON} months ahead")
    found, by_year = zip(*(trained(series, seed, given.epochs) for seed in range(given.seeds)), strict=True)
    for name in ("seed", *found[0], "gain of resmem", "gain of growing"):
        table.add_column(name, justify="right")
    gains = [[100 * (1 - row[name] / row["base"]) for name in ("resmem", "growing")] for row in found]
    for seed, (row, gain) in enumerate(zip(found, gains, strict=True)):
        table.add_row(str(seed), *(f"{value:.4f}" for value in row.values()), *(f"{value:+.1f}%" for value in gain))
    means = [sum(row[name] for row in found) / len(found) for name in found[0]]
    told = torch.tensor(gains, dtype=torch.float64)
    errors = told.std(dim=0) / len(found) ** 0.5 if len(found) > 1 else torch.full((2,), torch.nan)
    ends = [f"{mean:+.1f} ± {error:.1f}%" for mean, error in zip(told.mean(dim=0), errors, strict=True)]
    table.add_row("mean", *(f"{value:.4f}" for value in means), *ends)
    print(table)
    years = torch.stack(by_year).mean(dim=0)  # seeds share the years, whose luck is most of the error
    error = years.std() / len(years) ** 0.5
    told = ", ".join(f"{year:+.1f}" for year in years)
    print(
        f"Gain of resmem in the years of the test: {told}; mean and standard error {years.mean():+.1f} ± {error:.1f}%"
    )


if __name__ == "__main__":
    main()
