"""A small GPT and its text, for the command line (configs/language_model.yaml) and for examples/language_model.py."""

from collections.abc import Callable, Sequence
from pathlib import Path

import lightning.pytorch as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class Block(nn.Module):
    """Causal attention, then an MLP, each added to what came in."""

    def __init__(self, width: int, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.attention, self.mix = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.attention(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)  # (B, heads, T, width)
        x = x + self.dropout(self.mix(seen.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(L.LightningModule):
    """The next token at every position, from those before: `(B, T)` to logits `(B, T, vocabulary)`."""

    def __init__(
        self,
        vocabulary: int = 256,
        context: int = 64,
        width: int = 128,
        layers: int = 2,
        dropout: float = 0.0,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.Sequential(*(Block(width, dropout=dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def embed(self, x: Tensor) -> Tensor:
        """What the head makes logits of, `(B, T, width)`: the keys of the memory."""
        return self.norm(self.blocks(self.tokens(x) + self.places[: x.shape[1]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("val_nll", self.loss(batch))

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("test_nll", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.learning_rate)


class Blocks(Dataset[tuple[Tensor, Tensor]]):
    """A text as blocks of tokens `(T,)`, and of each token the one that follows."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.tokens = tokens
        self.inputs, self.targets = tokens[:-1].split(context), tokens[1:].split(context)

    def __len__(self) -> int:
        return len(self.inputs) - (len(self.inputs[-1]) < len(self.inputs[0]))  # without what is left at the end

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Text(L.LightningDataModule):
    """A file's tokens in their order: the last tenths (at most 20,000 tokens each) to tune on and to test on.

    Tokens are bytes, or with a `vocabulary` of more than 256 byte pairs (BPE) that are learned from the text.
    """

    def __init__(
        self, file: str | Path, vocabulary: int = 256, context: int = 64, batch_size: int = 64, most: int = 440_000
    ) -> None:
        super().__init__()
        self.file, self.vocabulary, self.context = Path(file), vocabulary, context
        self.batch_size, self.most = batch_size, most

    def setup(self, stage: str | None = None) -> None:
        text = self.file.read_text(encoding="utf-8", errors="replace")
        encode, self.decode = codec(text, self.vocabulary)
        tokens = torch.tensor(encode(text))
        tokens, self.unused = tokens[: self.most], tokens[self.most :]
        held_out = min(len(tokens) // 10, 20_000)
        parts = tokens.split([len(tokens) - 2 * held_out, held_out, held_out])
        self.train, self.val, self.test = (Blocks(part, self.context) for part in parts)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=self.batch_size)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.test, batch_size=self.batch_size)


def codec(text: str, vocabulary: int) -> tuple[Callable[[str], list[int]], Callable[[Sequence[int]], str]]:
    """What makes tokens of text, and text of tokens."""
    if vocabulary == 256:
        return lambda text: list(text.encode()), lambda tokens: bytes(tokens).decode(errors="replace")
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocabulary, show_progress=False)
    return lambda text: tokenizer.encode(text).ids, lambda tokens: tokenizer.decode(list(tokens))
