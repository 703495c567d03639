"""Whether a model keeps its weights while a run is answered."""

import zlib

import torch
from torch import Tensor, nn

from lightning_resmem.model.fingerprint import check_fingerprint


class Watched:
    """The weights of a model whose fingerprint was checked just now, to be looked at again during the run.

    Counters do not matter: of the state that a step may change only parameters and floating-point buffers are watched.

    Args:
        model: On its device.
        provenance: Of the memory that answers.
        doing: What is going on, for the message: "trainer.test runs".
    """

    def __init__(self, model: nn.Module, provenance: dict[str, str], doing: str) -> None:
        self._model, self._provenance, self._doing = model, provenance, doing
        self._sums = _sums(model)
        self._answered = False

    def check_first(self) -> None:
        """Check at the first answer: hooks of the model and of other callbacks run after the start of a run.

        Raises:
            StaleMemoryError: If the weights have changed.
        """
        if not self._answered:
            self._answered = True
            self.check(f"{self._doing}, since a hook or the step has changed them,")

    def check(self, doing: str | None = None) -> None:
        """Check at the end, before anything is reported.

        Raises:
            StaleMemoryError: If the weights have changed.
        """
        if _sums(self._model) != self._sums:
            doing = doing or f"{self._doing}, since something has changed them during the run,"
            check_fingerprint(self._model, self._provenance, doing)


def _sums(model: nn.Module) -> dict[str, int]:
    state = model.state_dict().items()
    return {name: _sum(value) for name, value in state if isinstance(value, Tensor) and value.is_floating_point()}


def _sum(tensor: Tensor) -> int:
    plain = tensor.detach().resolve_conj().cpu().contiguous().view(-1)
    return zlib.crc32(plain.view(torch.uint8).numpy().data)
