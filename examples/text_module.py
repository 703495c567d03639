"""A language model of bytes for the command line; see configs/language_model.yaml.

A row is a context and the byte that follows it, as in kNN-LM: its key is the embedding of the context.
"""

from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class ByteModel(L.LightningModule):
    """The next byte from the last `context` ones, by a transformer that answers at the last position."""

    def __init__(self, context: int = 64, width: int = 128, layers: int = 2, learning_rate: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(torch.zeros(context, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.bytes(x) + self.places)[:, -1])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_nll", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_nll", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class Contexts(Dataset[tuple[Tensor, Tensor]]):
    """Every context of a text and the byte that follows."""

    def __init__(self, text: bytes, context: int) -> None:
        self.text, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), context

    def __len__(self) -> int:
        return len(self.text) - self.context

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        end = range(len(self))[index] + self.context
        return self.text[end - self.context : end], self.text[end]


class Text(L.LightningDataModule):
    """The bytes of a file in their order: eight tenths to train on, one to tune on, one to test on."""

    def __init__(self, file: str, context: int = 64, batch_size: int = 256) -> None:
        super().__init__()
        self.file, self.context, self.batch_size = Path(file), context, batch_size

    def setup(self, stage: str) -> None:
        text = self.file.read_bytes()
        first, second = len(text) * 8 // 10, len(text) * 9 // 10
        parts = (text[:first], text[first:second], text[second:])
        self.train, self.val, self.test = (Contexts(part, self.context) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)
