"""ResMem for a causal language model of Hugging Face: fine-tune on a text, memorize, test, generate.

    python examples/hf_causal_lm.py --text shakespeare.txt                     # a tiny GPT-2 from scratch: no download
    python examples/hf_causal_lm.py --text shakespeare.txt --model ./gpt2      # a folder with weights and tokenizer

The labels are the `input_ids` themselves: that outputs belong to the token after them is found out, and logged.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lightning_resmem import ResMemCallback

Encode, Decode = Callable[[str], list[int]], Callable[[Sequence[int]], str]


class CausalLM(L.LightningModule):
    """Any causal model, trained by the loss that it computes itself."""

    def __init__(self, model: PreTrainedModel, learning_rate: float) -> None:
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


def read(folder: Path | None) -> tuple[PreTrainedModel, Encode, Decode]:
    """The model and what makes tokens of text and back: from a folder, or a tiny GPT-2 of bytes."""
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer.encode, tokenizer.decode
    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=256)
    return GPT2LMHeadModel(config), lambda text: list(text.encode()), lambda ids: bytes(ids).decode(errors="replace")


def loaders(tokens: Tensor, context: int, batch_size: int) -> list[DataLoader]:
    """Eight tenths of a text to train on, one to tune on, one to test on, each in blocks."""
    tenth = len(tokens) // 10
    parts = tokens[: 10 * tenth].split([8 * tenth, tenth, tenth])
    rows = [[{"input_ids": b, "labels": b} for b in part.split(context) if len(b) == context] for part in parts]
    return [DataLoader(blocks, batch_size, shuffle=place == 0) for place, blocks in enumerate(rows)]


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune, memorize, test, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a folder of Hugging Face's; by default a tiny GPT-2 from scratch")
    parser.add_argument("--tokens", type=int, default=200_000, help="of the text that are used, at most")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args(argv)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    L.seed_everything(0, verbose=False)

    network, encode, decode = read(given.model)
    tokens = torch.tensor(encode(given.text.read_text(encoding="utf-8"))[: given.tokens])
    train, val, test = loaders(tokens, given.context, batch_size=16)
    resmem = ResMemCallback()
    trainer = L.Trainer(
        max_epochs=given.epochs,
        callbacks=[resmem],  # all that ResMem needs
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    model = CausalLM(network, given.learning_rate)
    trainer.fit(model, train, val)
    trainer.test(model, test)  # its loss is that of base and memory; beside it those of base, knn, knn_lm and resmem

    start = tokens[None, : given.context // 2].to(network.device)
    with resmem.module.combined():  # the model itself answers with the memory
        written = network.generate(
            start,
            attention_mask=torch.ones_like(start),
            do_sample=True,
            top_k=0,  # from all tokens
            max_length=given.context,
            pad_token_id=0,  # of one text nothing is padded
        )
    Console().print(decode(written[0].tolist()), markup=False)


if __name__ == "__main__":
    main()
