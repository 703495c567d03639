"""Forecasts of a series from its recent past, for the command line; see configs/forecasting.yaml."""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Forecaster(L.LightningModule):
    """The next `horizon` values from the last `past`, by a network of one hidden layer."""

    def __init__(self, past: int = 48, horizon: int = 12, hidden: int = 64, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(past, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, horizon)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch["x"]), batch["y"])

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_mse", nn.functional.mse_loss(self(batch["x"]), batch["y"]))

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("test_mse", nn.functional.mse_loss(self(batch["x"]), batch["y"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.learning_rate)


def times(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """When forecasts are asked for, and when it is known what they should have been."""
    return batch["asked_at"], batch["known_at"]


class Windows(Dataset):
    """Windows of a series `(T,)` or `(T, variables)`, the first of which is at time `start`; targets are flat."""

    def __init__(self, series: Tensor, past: int, horizon: int, start: int = 0) -> None:
        windows = series.unfold(0, past + horizon, 1)
        self.x, self.y = windows[..., :past].flatten(1), windows[..., past:].flatten(1)
        self.asked_at = torch.arange(len(windows)) + start + past - 1
        self.horizon = horizon

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        asked_at = self.asked_at[row]
        return {"x": self.x[row], "y": self.y[row], "asked_at": asked_at, "known_at": asked_at + self.horizon}


def made_up(hours: int = 3000) -> np.ndarray:
    """A load with a daily and a weekly rhythm and a little noise, by the hour."""
    time = np.arange(hours)
    day, week = np.sin(2 * np.pi * time / 24), np.where(time // 24 % 7 < 5, 1.0, 0.4)
    return day * week + 0.1 * np.random.default_rng(0).standard_normal(hours)


class Series(L.LightningDataModule):
    """Windows of a series in the order of time: seven tenths to train on, one to tune on, two to test on.

    Windows of one part share no value with those of another, and each knows its time: see `times`.
    """

    def __init__(self, file: str | None = None, past: int = 48, horizon: int = 12, batch_size: int = 64) -> None:
        super().__init__()
        self.file, self.past, self.horizon, self.batch_size = file, past, horizon, batch_size

    def setup(self, stage: str) -> None:
        values = made_up() if self.file is None else np.loadtxt(Path(self.file), dtype=np.float64, ndmin=1)
        first, second = len(values) * 7 // 10, len(values) * 8 // 10
        mean, scale = values[:first].mean(), values[:first].std()
        series = torch.tensor((values - mean) / scale, dtype=torch.float32)
        sizes = self.past, self.horizon
        self.train = Windows(series[:first], *sizes)
        self.val, self.test = Windows(series[first:second], *sizes, first), Windows(series[second:], *sizes, second)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=512)
