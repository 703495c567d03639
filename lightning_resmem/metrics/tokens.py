"""Metrics of tokens: perplexity, and bits for each byte or character of the text."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import as_tensor
from lightning_resmem.metrics.functional import negative_log_likelihoods
from lightning_resmem.metrics.sums import Sums

PERPLEXITY = "perplexity"


class BitsPerByte(Sums):
    """The bits that a byte of the text costs: the negative log-likelihood of all tokens over the bytes they stand for.

    It compares models with different tokens. Given the characters of each token, it is the bits per character. For
    `ResMemCallback(metrics={"bits_per_byte": BitsPerByte(lengths)})`, and for use by itself.

    Args:
        lengths: How many bytes, or characters, each token of the vocabulary stands for, shape `(C,)`.

    Raises:
        InputError: If these are no lengths.

    Examples:
        >>> metric = BitsPerByte([1, 2])
        >>> metric.update(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([0, 1]))
        >>> round(metric.compute().item(), 4)  # 2 + 1 bits for 1 + 2 bytes
        1.0
    """

    higher_is_better = False
    lengths: Tensor

    def __init__(self, lengths: Sequence[float] | Tensor) -> None:
        super().__init__(2)
        lengths = as_tensor("lengths", lengths).double()
        if lengths.ndim != 1 or not len(lengths) or not torch.isfinite(lengths).all() or bool((lengths < 0).any()):
            raise InputError(
                f"lengths of shape {tuple(lengths.shape)}: give the bytes of each token, (C,), numbers of at least 0."
            )
        self.register_buffer("lengths", lengths, persistent=False)

    @classmethod
    def of(cls, decode: Callable[[list[int]], str], vocabulary: int, encoding: str = "utf-8") -> "BitsPerByte":
        """With the bytes that each token adds to a text, as far as decoding tells.

        That is what it is decoded to after itself, for tokenizers that leave out a space at the start. A token that is
        a part of a character counts as one byte: right for single bytes, too few for a part of several. Special tokens
        count as the text that they are decoded to. Give `lengths` where that matters.

        Args:
            decode: Of a tokenizer, or any function of a list of tokens that returns text.
            vocabulary: `C`.
            encoding: Of the text.
        """

        def length(*tokens: int) -> int:
            return len(decode(list(tokens)).replace("\ufffd", "?").encode(encoding))

        return cls([length(token, token) - length(token) for token in range(vocabulary)])

    def update(self, probabilities: Tensor, targets: Tensor) -> None:
        """Add tokens: probabilities `(B, C)`, and the true ones `(B,)`."""
        if probabilities.shape[1] != len(self.lengths):
            raise InputError(
                f"lengths has {len(self.lengths)} entries, and there are {probabilities.shape[1]} tokens: give the "
                "bytes of each."
            )
        bits = negative_log_likelihoods(probabilities, targets).sum(dtype=torch.float64) / math.log(2)
        self.add(torch.stack([bits, self.lengths[targets].sum()]))

    def compute(self) -> Tensor:
        """Bits per byte, scalar; NaN without tokens."""
        return self.sums[0] / self.sums[1]


def perplexities(scores: Mapping[str, float]) -> dict[str, float]:
    """`exp` of the negative log-likelihoods, by name, for tokens; empty where there are none."""
    return {
        name.replace("nll", PERPLEXITY, 1): math.exp(min(loss, 700.0))
        for name, loss in scores.items()
        if name.startswith("nll_")
    }
