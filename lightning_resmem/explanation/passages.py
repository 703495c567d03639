"""The text around rows that are positions of sequences."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_resmem.explanation.pictures import entries, row_of
from lightning_resmem.memory.token_ids import STRIDE

Passages = Callable[[int], str | None]
# Tokens that are shown of a sequence.
_BEFORE, _AFTER = 16, 4


def passages(dataset: Any, decode: Callable[[list[int]], str]) -> Passages:
    """How to get the text around a row of a memory of tokens: up to its position, `▸`, and how it goes on.

    For `Explanation.tables(text=...)` and `write_report(..., text=...)`.

    Args:
        dataset: That was memorized: `dataset[i]` is a sequence of tokens, alone, as the entry `input_ids`, or first
            in a tuple; padding on its left has an `attention_mask`.
        decode: Of a tokenizer, or any function of a list of tokens that returns text.

    Returns:
        A function of a row's id, such as `memory.ids[0]`. It returns None where a row of the dataset holds no tokens.

    Raises:
        InputError: When it is called, if the dataset has no such sequence.

    Examples:
        >>> text = passages([[7, 4, 11, 11, 14]], lambda tokens: "".join(chr(97 + token) for token in tokens))
        >>> text(1)  # in sequence 0; the next one's ids begin with 1,048,576
        'he▸llo'
    """

    def around(id: int) -> str | None:
        sequence, position = divmod(int(id), STRIDE)
        row = row_of(dataset, sequence)
        tokens = _tokens(row)
        if tokens is None:
            return None
        mask = row.get("attention_mask") if isinstance(row, Mapping) else None
        start = 0 if mask is None else int(torch.as_tensor(mask).ne(0).long().argmax())
        end = start + position + 1
        before, after = tokens[max(0, end - _BEFORE) : end], tokens[end : end + _AFTER]
        return f"{decode(before.tolist())}▸{decode(after.tolist())}"

    return around


def _tokens(row: Any) -> Tensor | None:
    """The tokens of a sequence `(T,)`."""
    if isinstance(row, Mapping):
        found = row.get("input_ids")
    elif isinstance(row, list) and row and isinstance(row[0], int):
        found = row
    else:
        found = next(iter(entries(row)), None)
    if found is None or isinstance(found, str):
        return None
    tokens = torch.as_tensor(found)
    return None if tokens.ndim != 1 or tokens.is_floating_point() else tokens
