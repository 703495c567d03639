"""The text around rows that are positions of sequences."""

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.explanation.pictures import entries, row_of
from lightning_resmem.memory.token_ids import STRIDE

Passages = Callable[[int], str | None]
# Tokens that are shown of a sequence.
_BEFORE, _AFTER = 16, 4


def passages(dataset: Any, decode: Callable[[list[int]], str]) -> Passages:
    """How to get the text around a row of a memory of tokens: up to its position, `▸`, and how it goes on.

    For `Explanation.tables(text=...)` and `write_report(..., text=...)`.

    Args:
        dataset: That was memorized: `dataset[i]` is a sequence of tokens, alone, as the entry `input_ids`, or either
            of these first in a tuple; padding on its left has an `attention_mask`.
        decode: Of a tokenizer, or any function of a list of tokens that returns text.

    Returns:
        A function of a row's id, such as `memory.ids[0]`. It returns None where a row of the dataset holds no tokens.

    Raises:
        InputError: When it is called, if the dataset has no such sequence, or if `decode` returns no text.

    Examples:
        >>> text = passages([[7, 4, 11, 11, 14]], lambda tokens: "".join(chr(97 + token) for token in tokens))
        >>> text(1)  # in sequence 0; the next one's ids begin with 1,048,576
        'he▸llo'
    """

    def around(id: int) -> str | None:
        sequence, position = divmod(int(id), STRIDE)
        tokens = _tokens(row_of(dataset, sequence))
        if tokens is None:
            return None
        end = position + 1
        before, after = tokens[max(0, end - _BEFORE) : end], tokens[end : end + _AFTER]
        return "▸".join(_text(decode(part.tolist())) for part in (before, after))

    return around


def _tokens(row: Any) -> Tensor | None:
    """The tokens of a sequence `(T,)`, from the first that is no padding to the last."""
    if not isinstance(row, Mapping) and _as_tokens(row) is None:
        row = next(iter(entries(row)), None)
    if not isinstance(row, Mapping):
        return _as_tokens(row)
    tokens, mask = _as_tokens(row.get("input_ids")), row.get("attention_mask")
    if tokens is None or mask is None:
        return tokens
    kept = torch.as_tensor(mask).flatten().nonzero()
    return tokens[int(kept[0]) : int(kept[-1]) + 1] if len(kept) else tokens[:0]


def _as_tokens(found: Any) -> Tensor | None:
    """Whole numbers `(T,)`; None for anything else."""
    if isinstance(found, list):
        found = np.asarray(found) if all(isinstance(token, Integral) for token in found) else None
    if isinstance(found, np.ndarray):
        found = torch.from_numpy(found.astype(np.int64)) if found.dtype.kind in "biu" else None
    return found if isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point() else None


def _text(found: Any) -> str:
    if not isinstance(found, str):
        raise InputError(f"decode returned a {type(found).__name__} for a list of tokens, expected text.")
    return found
