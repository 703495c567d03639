"""A small ResNet and CIFAR-10 or CIFAR-100 for the command line; see configs/cifar10.yaml and configs/cifar100.yaml.

The data are the "binary version" of the data set, unpacked into one directory: its files are read as they are.
"""

from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# Label bytes before the 3,072 bytes of a picture (the last of them counts), files to train on, file to test on.
_FILES = {
    10: (1, [f"data_batch_{number}.bin" for number in range(1, 6)], "test_batch.bin"),
    100: (2, ["train.bin"], "test.bin"),
}


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.around = nn.Identity() if stride == 1 and width == out else nn.Conv2d(width, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


class ResNet(L.LightningModule):
    """The ResNet of 6 n + 2 layers for 32 x 32 pictures."""

    def __init__(self, classes: int = 10, n: int = 1, learning_rate: float = 0.1, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters()
        blocks = [
            Block(16 if i == 0 else (width // 2 if j == 0 else width), width, 2 if i and not j else 1)
            for i, width in enumerate((16, 32, 64))
            for j in range(n)
        ]
        stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        self.body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, object]:
        given = self.hparams
        optimizer = torch.optim.SGD(self.parameters(), given.learning_rate, given.momentum, weight_decay=1e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def augmented(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A batch whose pictures are shifted by up to 4 pixels, and mirrored or not."""
    pictures = []
    for picture, _ in rows:
        left, top = torch.randint(9, (2,)).tolist()
        picture = nn.functional.pad(picture, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        pictures.append(picture.flip(2) if torch.rand(()) < 0.5 else picture)
    return torch.stack(pictures), torch.stack([label for _, label in rows])


class Cifar(L.LightningDataModule):
    """Of the training rows the last tenth is for validation; the memory gets the others as they are, not augmented."""

    def __init__(self, directory: str, classes: int = 10, batch_size: int = 128) -> None:
        super().__init__()
        self.directory, self.classes, self.batch_size = Path(directory), classes, batch_size

    def setup(self, stage: str) -> None:
        labels, train, test = _FILES[self.classes]
        rows = torch.cat([self._read(name, labels)[0] for name in train])
        marks = torch.cat([self._read(name, labels)[1] for name in train])
        kept = len(rows) - len(rows) // 10
        self.train, self.val = TensorDataset(rows[:kept], marks[:kept]), TensorDataset(rows[kept:], marks[kept:])
        self.test = TensorDataset(*self._read(test, labels))

    def _read(self, name: str, labels: int) -> tuple[Tensor, Tensor]:
        rows = np.fromfile(self.directory / name, dtype=np.uint8).reshape(-1, labels + 3072)
        pictures = torch.from_numpy(rows[:, labels:].copy()).reshape(-1, 3, 32, 32).float()
        return pictures / 127.5 - 1, torch.from_numpy(rows[:, labels - 1].astype(np.int64))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True, collate_fn=augmented)

    def memory_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=512)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=512)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=512)
