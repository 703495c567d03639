"""Whether a memory still belongs to a model, asked before every answer."""

import json
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_resmem.errors import StaleMemoryError
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.model.fingerprint import check_fingerprint


class _Seen(NamedTuple):
    """What decides whether weights and rows are still those that were compared."""

    fillings: int
    fingerprint: str | None
    tensors: list[tuple["weakref.ref[Tensor]", int, int]]

    def is_same(self, other: "_Seen") -> bool:
        return (
            self[:2] == other[:2]
            and len(self.tensors) == len(other.tensors)
            # By identity: tensors compare entry by entry.
            and all(a[0]() is b[0]() and a[1:] == b[1:] for a, b in zip(self.tensors, other.tensors, strict=True))
        )


class WeightsWatch:
    """Compares the weights of a model with those that a memory was filled with, as often as they may have changed.

    They may have when a parameter or a buffer is another tensor, lies elsewhere, or was written to by torch's counters
    (which do not see changes through `.data`), and when the rows of the memory were replaced by others.

    Args:
        model: That the memory is to answer for.
        memory: Filled.
        buffers: Whether buffers are looked at, too.
    """

    def __init__(self, model: nn.Module, memory: ResidualMemory, buffers: bool = True) -> None:
        self._model, self._memory, self._buffers = model, memory, buffers
        self._fillings = memory.fillings
        self._seen: _Seen | None = None

    def note(self) -> None:
        """Take weights and rows as they are now for compared."""
        self._seen = self._look()

    def check(self, doing: str, surely: bool = False) -> None:
        """Raise `StaleMemoryError` if the memory was filled with other weights.

        Args:
            doing: What is about to happen, for the message.
            surely: Compare the weights in any case.
        """
        seen, before = self._look(), self._seen
        if not surely and before is not None and seen.is_same(before):
            return
        if seen.fingerprint is None and seen.fillings != self._fillings:
            raise StaleMemoryError(
                f"{doing} with a memory that was cleared since it was made with it, and does not say with which "
                "weights it was filled again: make another, ResMemModule(base, memory), if they are those of the base."
            )
        check_fingerprint(self._model, self._memory.provenance, doing)
        self._seen = seen

    def _look(self) -> _Seen:
        provenance = self._memory.provenance
        tensors = [(weakref.ref(tensor), *_place(tensor)) for tensor in self._tensors(provenance.get("ignored"))]
        return _Seen(self._memory.fillings, provenance.get("fingerprint"), tensors)

    def _tensors(self, ignored: str | None) -> Iterator[Tensor]:
        """What the fingerprint depends on, as far as torch counts its changes."""
        yield from self._model.parameters()
        without = set(json.loads(ignored)) if ignored else set()
        for prefix, module in self._model.named_modules() if self._buffers else ():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    path = ".".join(part for part in (*prefix.split("."), name) if part not in ("", "_orig_mod"))
                    if path not in without:
                        yield buffer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy has tensors of its own


def _place(tensor: Tensor) -> tuple[int, int]:
    """Torch's count of changes, and where the numbers lie, as far as that can be told."""
    version = 0 if tensor.is_inference() else tensor._version
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return version, tensor.data_ptr() if plain else 0
