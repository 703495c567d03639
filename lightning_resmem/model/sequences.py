"""Rows of sequences: which positions of a head's `(B, T, C)` outputs are rows, and what their targets are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.model.batches import TARGET_KEYS, BatchReader, named_entries
from lightning_resmem.model.ignored import IGNORE_INDEX, ignored_labels
from lightning_resmem.tasks import Task

_INPUTS = "input_ids"
# Batches that are looked at for padding: each look waits for the GPU.
_LOOKS = 3


class RowTargets(NamedTuple):
    """The targets of a batch.

    Attributes:
        targets: Of each row, shape `(B, ...)`; of sequences, of each position, shape `(B, T, ...)`.
        kept: Of sequences, which positions are rows, a mask `(B, T)`: no padding, and a label that counts.
        positions: Of sequences, counted from the first that is no padding, shape `(B, T)`.
    """

    targets: Tensor
    kept: Tensor | None = None
    positions: Tensor | None = None


class RowReader:
    """Reads the targets of a batch for what the head returned, `(B, C)` or `(B, T, C)`.

    Labels that are the model's own inputs are those of the next position, as in Hugging Face's causal models: the
    output at position `t` belongs to the label at `t + 1`. That is found out with the first labels, and stays so.

    Args:
        reader: Reads batches. With a `targets_fn` nothing is shifted.
        model: Whose losses ignore labels.
        task: Of the memory.
        provenance: Of the memory, if it is filled: says what was found out then.
    """

    def __init__(
        self, reader: BatchReader, model: nn.Module, task: Task, provenance: Mapping[str, str] | None = None
    ) -> None:
        self._reader, self._task, self._ignored = reader, task, ignored_labels(model)
        configs = (getattr(module, "config", None) for module in model.modules())
        self._has_encoder = any(getattr(config, "is_encoder_decoder", False) for config in configs)
        self._padding = None if self._has_encoder else _Padding(model)  # what an encoder reads is no position of ours
        found = None if reader.targets_fn is not None else (provenance or {}).get("shift")
        self._shifts: bool | None = None if found is None else found == "1"

    def targets(self, batch: Any, shape: tuple[int, ...]) -> RowTargets:
        """The targets of a batch.

        Args:
            batch: As the model got it.
            shape: Of what the head returned for it: `(B, C)`, or `(B, T, C)`.

        Raises:
            InputError: If there are none, or not one for each position.
        """
        if len(shape) == 2:
            return RowTargets(self._reader.targets(batch))
        labels = self._only_inputs(batch)
        targets = self._reader.targets(batch).detach() if labels is None else labels
        _check_shape(targets, shape)
        mask = self._mask(batch, targets)
        if mask is None and self._padding is not None:
            self._padding.look(_inputs(batch), targets, self._ignored, shape[2])
        kept = torch.ones(shape[:2], dtype=torch.bool, device=targets.device) if mask is None else mask
        if self._reader.targets_fn is None and self._is_shifted(batch, targets, mask):
            # The one place of the shift: the last position has no next one, and padding is nobody's next.
            targets = _next(targets if mask is None else targets.masked_fill(~mask, IGNORE_INDEX))
        ignored = self._task.ignored(targets.flatten(0, 1), shape[2], self._ignored)
        if ignored is not None:
            kept = kept & ~ignored.reshape(shape[:2])
        positions = torch.arange(shape[1], device=targets.device).expand(shape[:2])
        if mask is not None and shape[1]:
            positions = positions - mask.long().argmax(dim=1, keepdim=True)
        return RowTargets(targets, kept, positions)

    def count_rows(self, batch: Any) -> int:
        """The number of rows, or sequences, of a batch, told by its targets."""
        inputs = self._only_inputs(batch)
        return self._reader.count_rows(batch) if inputs is None else len(inputs)

    def describe(self) -> dict[str, str]:
        """What was found out, for a memory's provenance."""
        return {} if self._shifts is None else {"shift": str(int(self._shifts))}

    def _only_inputs(self, batch: Any) -> Tensor | None:
        """The inputs of a batch that holds no labels: each position's label is the next input."""
        entries = named_entries(batch)
        if self._reader.targets_fn is not None or self._shifts is False or entries is None:
            return None
        return None if any(key in entries for key in TARGET_KEYS) else _inputs(batch)

    def _mask(self, batch: Any, targets: Tensor) -> Tensor | None:
        """Which positions are no padding, `(B, T)`; None where the batch does not say."""
        entries = named_entries(batch) or {}
        name = "decoder_attention_mask" if self._has_encoder else "attention_mask"
        mask = entries.get(name)
        if not isinstance(mask, Tensor) or mask.shape != targets.shape[:2]:
            return None
        return mask.to(targets.device) != 0

    def _is_shifted(self, batch: Any, targets: Tensor, mask: Tensor | None) -> bool:
        """Whether the labels are the model's inputs, at each position that counts; if so, once and for all."""
        inputs = _inputs(batch)
        if inputs is None or inputs.shape != targets.shape or inputs.is_floating_point() or targets.is_floating_point():
            return False
        counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        for label in self._ignored:  # one by one: a tensor of them would have to be sent to a GPU
            counts = counts & (targets.long() != label)
        # One look at both, as a GPU is waited for.
        any_counts, are_inputs = torch.stack([counts.any(), ((targets == inputs) | ~counts).all()]).tolist()
        if not any_counts:
            return self._shifts is True
        if self._shifts is None:
            self._shifts = are_inputs
        if self._shifts and not are_inputs:
            raise InputError(
                "The labels of a batch are not its inputs, as those of the batches before were, so it cannot be told "
                "whether the output at a position belongs to the label there or to the next: give a targets_fn that "
                "returns the targets (B, T) of the outputs' own positions, with -100 where there is none."
            )
        return self._shifts


def merged(descriptions: Iterable[object]) -> dict[str, str]:
    """What all ranks found out.

    Args:
        descriptions: From `RowReader.describe` of each rank.

    Raises:
        InputError: If they found different things.
    """
    found = [rank for rank in descriptions if isinstance(rank, dict) and rank]
    if any(rank != found[0] for rank in found):
        raise InputError(
            "On some ranks the labels are the inputs of the model, on others not, so it cannot be told whether outputs "
            "belong to the next label: give a targets_fn that returns the targets (B, T) of the outputs' positions."
        )
    return found[0] if found else {}


def _next(targets: Tensor) -> Tensor:
    """The target of the next position, at each position; of the last one an ignored label."""
    moved = torch.full_like(targets, IGNORE_INDEX)
    moved[:, :-1] = targets[:, 1:]
    return moved


class _Padding:
    """Warns of padding on the left that no mask tells of, if one of the first batches shows it."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
        self._pads, ends = (_tokens(modules, name) for name in ("pad_token_id", "eos_token_id"))
        self._pads -= ends  # texts that are packed may begin with the ends of empty ones
        self._looks = _LOOKS

    def look(self, inputs: Tensor | None, targets: Tensor, ignored: Iterable[int], width: int) -> None:
        """Look at a batch.

        Args:
            inputs: Of the model, `(B, T)` if they are tokens.
            targets: Of each position, shape `(B, T, ...)`.
            ignored: Labels that losses ignore.
            width: Of what the head returns.
        """
        if not self._looks or inputs is None or inputs.ndim != 2 or inputs.is_floating_point():
            return
        if inputs.shape[1] < 2 or not len(inputs):
            return
        self._looks -= 1
        # Two of them: the first token of a text may be the padding's, too.
        found = [
            ((inputs[:, :2] == token).all(dim=1) & (inputs != token).any(dim=1)).any()
            for token in self._pads | self._pads_of_embeddings(int(inputs.max()), width)
        ]
        if targets.shape == inputs.shape:
            found.append(_is_padded(inputs, torch.stack([targets == label for label in ignored]).any(dim=0)))
        if found and bool(torch.stack(found).any()):
            self._looks = 0
            warnings.warn(
                "Sequences of a batch begin with padding, and it has no attention_mask: positions, and with them the "
                "ids of rows, are counted from the padding on, and the model computes with it, so both depend on how "
                "long the other sequences of a batch are. Let the collate_fn return attention_mask, or pad on the "
                "right.",
                category=ResMemWarning,
                stacklevel=2,
            )

    def _pads_of_embeddings(self, largest: int, width: int) -> set[int]:
        """The padding of the embedding that reads the tokens, if all agree that may be it: one as wide as the head."""
        reading = [embedding for embedding in self._embeddings if embedding.num_embeddings > largest]
        reading = [embedding for embedding in reading if embedding.num_embeddings == width] or reading
        found = {embedding.padding_idx for embedding in reading}
        return {token for token in found if token is not None and len(found) == 1}


def _tokens(modules: Iterable[nn.Module], name: str) -> set[int]:
    """The tokens that configurations of modules have under a name: one, or several."""
    known = [getattr(getattr(module, "config", None), name, None) for module in modules]
    several = [token for tokens in known if isinstance(tokens, (list, tuple)) for token in tokens]
    return {token for token in (*known, *several) if isinstance(token, int)}


def _is_padded(inputs: Tensor, ignored: Tensor) -> Tensor:
    """Whether sequences `(B, T)` begin with different numbers of one token whose label is ignored; a scalar."""
    length, whole = inputs.shape[1], ignored.all(dim=1)  # what is padding alone has no side
    lengths = (ignored & (inputs == inputs[:, :1])).long().cumprod(dim=1).sum(dim=1)
    all_ignored = ignored.long().cumprod(dim=1).sum(dim=1)
    longest, shortest = lengths.masked_fill(whole, 0), lengths.masked_fill(whole, length)
    first = inputs[longest.argmax(), 0]
    alike = (whole | ((lengths == all_ignored) & ((lengths == 0) | (inputs[:, 0] == first)))).all()
    return alike & (longest.max() > 1) & (shortest.min() < longest.max())


def _inputs(batch: Any) -> Tensor | None:
    """What the model reads, where it has a name, or a pair's place, that says so."""
    entries = named_entries(batch)
    if entries is not None:
        inputs = entries.get(_INPUTS)
    else:
        inputs = batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else None
    return inputs if isinstance(inputs, Tensor) else None


def _check_shape(targets: Tensor, shape: tuple[int, ...]) -> None:
    size, length, _ = shape
    if targets.shape[:2] == shape[:2]:
        return
    found = f"The head returned outputs of shape {tuple(shape)} for targets of shape {tuple(targets.shape)}: "
    if targets.shape[:2] == (length, size):
        raise InputError(
            f"{found}their first two axes are swapped, and rows of sequences are read as (B, T). Give the head "
            "(B, T, D), as nn.Transformer(batch_first=True) and nn.LSTM(batch_first=True) do, or a targets_fn and a "
            "loader with (B, T)."
        )
    raise InputError(
        f"{found}a sequence has one target for each of its positions, (B, T), as long as its outputs. Give a "
        "targets_fn that returns those, with -100 where a position has none. If one prediction is made for a whole "
        "sequence, name the module that makes it, (B, C), with head=."
    )
