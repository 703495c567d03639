"""A small ResNet and CIFAR-10 or CIFAR-100; see examples/cifar.py, configs/cifar10.yaml and configs/cifar100.yaml.

The data are the "python version" of the data set, its archive unpacked: the directory is `cifar-10-batches-py` or
`cifar-100-python`. The files are pickles, which can run code when they are read. Here they cannot: nothing is admitted
but the four names that arrays and strings are made of.
"""

import hashlib
import io
import pickle  # noqa: TID251 -- the format of the data set; see Plain
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

# The key of the labels, and the MD5 sums of the files to train on and of the one to test on.
_FILES = {
    10: (
        b"labels",
        {
            "data_batch_1": "c99cafc152244af753f735de768cd75f",
            "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
            "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
            "data_batch_4": "634d18415352ddfa80567beed471001a",
            "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        },
        {"test_batch": "40351d587109b95175f43aff81a1287e"},
    ),
    100: (
        b"fine_labels",
        {"train": "16019d7e3df5f24257cddd939b257f8d"},
        {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
    ),
}


# What an array's pickle calls; where NumPy keeps it depends on the version.
_RECONSTRUCT = np.empty(0).__reduce__()[0]


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"A string of a data set in {encoding!r}, not in latin1.")
    return text.encode("latin1")


class Plain(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and arrays, and refuses whatever else a pickle asks for."""

    _ADMITTED = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encoded,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"A file of CIFAR does not need {module}.{name}: this is not the data set.")
        return self._ADMITTED[module, name]


def read(file: Path, labels: bytes, checksum: str) -> tuple[Tensor, Tensor]:
    """The images of a file, `(N, 3, 32, 32)` uint8, and their labels `(N,)`; warns if it is not the official one."""
    content = file.read_bytes()
    if (found := hashlib.md5(content, usedforsecurity=False).hexdigest()) != checksum:
        warnings.warn(f"{file} is not the official file: MD5 {found}, expected {checksum}.", stacklevel=2)
    rows = Plain(io.BytesIO(content), encoding="bytes").load()
    return torch.from_numpy(rows[b"data"]).reshape(-1, 3, 32, 32), torch.tensor(rows[labels])


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


class Images(TensorDataset):
    """Images and labels on one device, of which a loader takes a batch at once."""

    def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
        return self[torch.tensor(rows, device=self.tensors[0].device)]


def plain(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Bytes as numbers between -1 and 1."""
    return batch[0].float() / 127.5 - 1, batch[1]


def augmented(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The same, every image shifted by up to 4 pixels, and mirrored or not: on the device they are on."""
    images, labels = plain(batch)
    count, device = len(images), images.device
    top, left = torch.randint(9, (2, count, 1), device=device)
    rows, columns = (start + torch.arange(32, device=device) for start in (top, left))  # (N, 32)
    columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns.flip(1), columns)
    padded = nn.functional.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    places = torch.arange(count, device=device)[:, None, None]
    return padded[places, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2), labels


class Cifar(L.LightningDataModule):
    """A tenth of the training rows is for validation; the memory gets the others as they are, not augmented.

    Args:
        directory: That of the "python version", unpacked.
        classes: 10 or 100.
        batch_size: Of the loader to train on.
        train_rows: Use so many of the training rows, validation rows among them; all by default.
    """

    def __init__(self, directory: str, classes: int = 10, batch_size: int = 128, train_rows: int | None = None) -> None:
        super().__init__()
        self.directory, self.classes, self.batch_size = Path(directory), classes, batch_size
        self.train_rows = train_rows

    def setup(self, stage: str) -> None:
        key, train, test = _FILES[self.classes]
        images, labels = map(
            torch.cat, zip(*(read(self.directory / name, key, train[name]) for name in train), strict=True)
        )
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: self.train_rows]
        kept = order.split([len(order) - len(order) // 10, len(order) // 10])
        (name,) = test
        parts = [*((images[rows], labels[rows]) for rows in kept), read(self.directory / name, key, test[name])]
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.train, self.val, self.test = (Images(*(tensor.to(device) for tensor in part)) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=augmented)

    def memory_dataloader(self) -> DataLoader:
        return DataLoader(self.train, 512, collate_fn=plain)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, 512, collate_fn=plain)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, 512, collate_fn=plain)
