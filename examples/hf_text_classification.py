"""ResMem for a text classifier of Hugging Face: which package is a docstring from?

    python examples/hf_text_classification.py                              # a tiny BERT from scratch: no download
    python examples/hf_text_classification.py --model ./distilbert         # a folder with weights and tokenizer

A text is a row: its key is what the classifier's last layer is given. Then the training texts behind an answer.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torchmetrics
from language_model import docstrings
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from lightning_resmem import ResMemCallback

PACKAGES = (L, np, torch, torchmetrics)


class Classifier(L.LightningModule):
    """Any model for sequence classification, trained by the loss that it computes itself."""

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def forward(self, **batch: Tensor) -> Any:
        return self.model(**batch)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self(**batch).loss

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        self.log("val_loss", self(**batch).loss)

    def test_step(self, batch: dict[str, Tensor]) -> None:
        self.log("test_loss", self(**batch).loss)  # of base and memory

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def read(folder: Path | None) -> tuple[nn.Module, Callable[[str], list[int]]]:
    """The model and what makes tokens of text: from a folder, or a tiny BERT of bytes, 0 being the padding."""
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PACKAGES))
        return model, lambda text: tokenizer.encode(text, truncation=True, max_length=128)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=257, max_position_embeddings=128, num_labels=len(PACKAGES), **sizes)
    return BertForSequenceClassification(config), lambda text: [byte + 1 for byte in text.encode()[:128]]


def collate(rows: list[tuple[list[int], int]]) -> dict[str, Tensor]:
    """Texts of different lengths as a batch."""
    tokens, labels = zip(*rows, strict=True)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in tokens], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in tokens], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor(labels)}


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, memorize, test, explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder of Hugging Face's; by default a tiny BERT from scratch")
    parser.add_argument("--texts", type=int, default=1000, help="of each package, at most")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    L.seed_everything(0, verbose=False)

    network, encode = read(given.model)
    drawn = [islice(docstrings(package), given.texts) for package in PACKAGES]
    rows = [(text, label) for label, texts in enumerate(drawn) for text in texts]
    texts = [rows[place] for place in torch.randperm(len(rows)).tolist()]
    encoded, tenth = [(encode(text), label) for text, label in texts], len(texts) // 10
    train, val, test = encoded[: -2 * tenth], encoded[-2 * tenth : -tenth], encoded[-tenth:]
    resmem = ResMemCallback()
    trainer = L.Trainer(
        max_epochs=given.epochs,
        callbacks=[resmem],  # all that ResMem needs
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = Classifier(network, given.learning_rate)
    trainer.fit(
        model,
        DataLoader(train, 32, shuffle=True, collate_fn=collate),
        DataLoader(val, 32, collate_fn=collate),
    )
    trainer.test(model, DataLoader(test, 32, collate_fn=collate))

    console, text = Console(), texts[-1][0]
    console.print(f"\nBehind the answer to {text[:60]!r}:", markup=False)
    for place in resmem.module.explain(collate(test[-1:]), top=3).neighbors.ids[0].tolist():
        near, label = texts[place]
        console.print(f"{PACKAGES[label].__name__}: {near[:60]!r}", markup=False)


if __name__ == "__main__":
    main()
