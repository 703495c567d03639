"""A small causal language model, with the names of Hugging Face's, and its rows computed by loops."""

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

VOCABULARY, WIDTH, PAD = 7, 5, 0
STRIDE = 2**20


@dataclass
class Output:
    """What Hugging Face's models return, as far as we look at it."""

    logits: Tensor
    loss: Tensor | None = None


class Causal(L.LightningModule):
    """The state is the sum of the tokens so far; outputs at a position predict the next token."""

    def __init__(self, lr: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.tokens = nn.Embedding(VOCABULARY, WIDTH)
            self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        embedded = self.tokens(input_ids)
        if attention_mask is not None:
            embedded = embedded * attention_mask[..., None]
        logits = self.lm_head(torch.tanh(embedded.cumsum(dim=1)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return Output(logits, loss)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return self(**batch).loss

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self(**batch).loss, batch_size=len(batch["input_ids"]), sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(**batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(**batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def texts(count: int, seed: int = 0) -> list[list[int]]:
    """Sequences of 2 to 9 tokens, none of which is the padding."""
    draw = np.random.default_rng(seed)
    return [draw.integers(1, VOCABULARY, size=draw.integers(2, 10)).tolist() for _ in range(count)]


class Texts(Dataset):
    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, row: int) -> list[int]:
        return self.sequences[row]


@dataclass
class Collate:
    """Pads sequences as Hugging Face's collators do.

    Attributes:
        side: Where the padding is, "right" or "left".
        names: Which entries a batch has.
        prompt: So many tokens of each sequence have no label.
    """

    side: str = "right"
    names: tuple[str, ...] = ("input_ids", "attention_mask", "labels")
    prompt: int = 0

    def __call__(self, sequences: list[list[int]]) -> dict[str, Tensor]:
        length = max(map(len, sequences))
        labels = [[-100] * min(self.prompt, len(tokens)) + tokens[self.prompt :] for tokens in sequences]
        batch = {
            "input_ids": self._padded(sequences, PAD, length),
            "attention_mask": self._padded([[1] * len(tokens) for tokens in sequences], 0, length),
            "labels": self._padded(labels, -100, length),
        }
        return {name: batch[name] for name in self.names}

    def _padded(self, rows: list[list[int]], filler: int, length: int) -> Tensor:
        padding = [[filler] * (length - len(row)) for row in rows]
        pairs = zip(rows, padding, strict=True)
        return torch.tensor([row + more if self.side == "right" else more + row for row, more in pairs])


def loader(sequences: list[list[int]], batch_size: int, **options: Any) -> DataLoader:
    return DataLoader(Texts(sequences), batch_size=batch_size, collate_fn=Collate(**options))


@dataclass
class Rows:
    """In float64: keys, outputs and targets of the rows, with the sequence and the position of each."""

    keys: np.ndarray
    outputs: np.ndarray
    targets: np.ndarray
    places: list[tuple[int, int]]

    @property
    def ids(self) -> list[int]:
        return [sequence * STRIDE + position for sequence, position in self.places]


def rows_of(model: Causal, sequences: list[list[int]], prompt: int = 0) -> Rows:
    """Every position that has a next token with a label."""
    tokens = model.tokens.weight.detach().double().numpy()
    head = model.lm_head.weight.detach().double().numpy()
    keys, outputs, targets, places = [], [], [], []
    for number, sequence in enumerate(sequences):
        state = np.zeros(WIDTH)
        for position, token in enumerate(sequence):
            state = state + tokens[token]
            following = position + 1
            if following < len(sequence) and following >= prompt:
                keys.append(np.tanh(state))
                outputs.append(head @ keys[-1])
                targets.append(sequence[following])
                places.append((number, position))
    return Rows(np.array(keys), np.array(outputs), np.array(targets), places)
