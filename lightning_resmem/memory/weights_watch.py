"""Whether a memory still belongs to a model: asked before every answer, and through a run of a trainer."""

import json
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_resmem.errors import StaleMemoryError
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.model.fingerprint import check_fingerprint, number_sums


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

    Before an answer: they may have when a parameter or a buffer is another tensor, lies elsewhere, or was written to by
    torch's counters, and when the rows of the memory were replaced by others. That costs next to nothing, and does not
    see changes through `.data`. So in a run of a trainer the numbers themselves are looked at, too, at its first answer
    and at its end: hooks of the model, other callbacks and the steps may have changed them.

    Args:
        model: That the memory is to answer for.
        memory: Filled.
        buffers: Whether buffers are looked at before an answer, too.
    """

    def __init__(self, model: nn.Module, memory: ResidualMemory, buffers: bool = True) -> None:
        self._model, self._memory, self._buffers = model, memory, buffers
        self._fillings = memory.fillings
        self._seen: _Seen | None = None
        self._run, self._sums = "", dict[str, int]()  # of the current run
        self._answered = False

    def check(self, doing: str, surely: bool = False) -> None:
        """Before an answer: raise `StaleMemoryError` if the memory was filled with other weights.

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

    def start_run(self, doing: str) -> None:
        """A run starts, with weights that were compared just now.

        Args:
            doing: What is going on, for the messages: "trainer.test runs".
        """
        self._seen = self._look()
        self._run, self._sums, self._answered = doing, self._numbers(), False

    def check_first(self) -> None:
        """Before an answer of the run, which may be its first: as `check`, by the numbers."""
        if not self._answered:
            self._answered = True
            self._check_numbers("a hook or the step has changed them,")

    def check_end(self) -> None:
        """At the end of the run, before anything is reported: as `check`, by the numbers."""
        self._check_numbers("something has changed them during the run,")

    def _check_numbers(self, why: str) -> None:
        if self._numbers() != self._sums:
            check_fingerprint(self._model, self._memory.provenance, f"{self._run}, since {why}")

    def _numbers(self) -> dict[str, int]:
        return number_sums(self._model, _ignored(self._memory))

    def _look(self) -> _Seen:
        tensors = [(weakref.ref(tensor), *_place(tensor)) for tensor in self._tensors()]
        return _Seen(self._memory.fillings, self._memory.provenance.get("fingerprint"), tensors)

    def _tensors(self) -> Iterator[Tensor]:
        """What the fingerprint depends on, as far as torch counts its changes."""
        yield from self._model.parameters()
        without = _ignored(self._memory)
        for prefix, module in self._model.named_modules() if self._buffers else ():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    path = ".".join(part for part in (*prefix.split("."), name) if part not in ("", "_orig_mod"))
                    if path not in without:
                        yield buffer

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": None}  # a copy has tensors of its own


def _ignored(memory: ResidualMemory) -> set[str]:
    """Names of the tensors that do not count."""
    return set(json.loads(memory.provenance.get("ignored", "[]")))


def _place(tensor: Tensor) -> tuple[int, int]:
    """Torch's count of changes, and where the numbers lie, as far as that can be told."""
    version = 0 if tensor.is_inference() else tensor._version
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_meta
    return version, tensor.data_ptr() if plain else 0
