"""The four numbers of a ResMem prediction, and the gate that may scale one of them."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.gate import Gate
from lightning_resmem.tasks import Task


@dataclass(frozen=True)
class ResMemParams:
    """How the memory is read: `F(x) = softmax(f(x) / softmax_temperature) + strength * sum_i w_i(x) r_i`.

    The weights `w_i(x)` are proportional to `exp(-||z(x) - z_i||_2 / sigma)` over the `k` nearest keys and sum to 1
    (https://arxiv.org/abs/2302.01576, section 3; `strength = 1` is the paper).

    Args:
        k: How many neighbours are read, at least 1. More than the memory has rows works, with fewer neighbours.
        sigma: The kernel width, a Euclidean distance in the space of the embeddings, above 0. Towards 0 only the
            nearest neighbour counts. kNN-LM calls this number "temperature".
        softmax_temperature: What the logits are divided by before the softmax, above 0. Regression ignores it.
        strength: The factor of the weighted residual, at least 0. With 0 the prediction is the base model's.
        gate: Scales `strength` for each row by the distance of its nearest neighbour and the base's confidence; None,
            the default, leaves it as it is. `GridTuner(gate=True)` fits one. A mapping, as JSON has it, is made a Gate.

    Raises:
        InputError: If a value is out of its range.

    Example:
        >>> ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4)
        ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4, strength=1.0, gate=None)
    """

    k: int = 50
    sigma: float = 1.0
    softmax_temperature: float = 1.0
    strength: float = 1.0
    gate: Gate | None = None

    def __post_init__(self) -> None:
        k = checked_k(self.k)
        sigma = self._number("sigma", "a distance above 0")
        if not sigma > 0:
            raise InputError(
                f"sigma={sigma!r} is not a kernel width: give a distance above 0 (small means: nearest only)."
            )
        temperature = self._number("softmax_temperature", "a number above 0")
        if not temperature > 0:
            raise InputError(
                f"softmax_temperature={temperature!r}: give a number above 0 (1.0 leaves the logits alone)."
            )
        strength = self._number("strength", "a number of at least 0")
        if strength < 0:
            raise InputError(f"strength={strength!r}: give a number of at least 0 (0 switches the memory off).")
        # NumPy scalars and 0-d tensors come from sweeps; plain numbers travel to JSON and print well.
        for name, value in (
            ("k", k),
            ("sigma", sigma),
            ("softmax_temperature", temperature),
            ("strength", strength),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "gate", _checked_gate(self.gate))

    def strengths(self, task: Task, base: Tensor, distances: Tensor) -> float | Tensor:
        """The factor of each row's weighted residual: `strength`, scaled by the gate if there is one.

        Args:
            task: Of the memory.
            base: Base predictions, shape `(B, C)`.
            distances: To the nearest neighbour, shape `(B,)`.

        Returns:
            `strength` itself, or with a gate a tensor that broadcasts to `(B, C)`.
        """
        if self.gate is None:
            return self.strength
        return self.strength * self.gate.factors(task, base, distances, self.sigma)

    def _number(self, name: str, expected: str) -> float:
        value = getattr(self, name)
        try:
            if _is_text_or_bool(value):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a complex tensor
            raise InputError(f"{name}={value!r} is not a number: give {expected}.") from None
        if not math.isfinite(number):
            raise InputError(f"{name}={value!r} is not finite: give {expected}.")
        return number


def checked_k(k: object, name: str = "k") -> int:
    """A number of neighbours, or of something else, as a plain int; raises an error unless it is at least 1."""
    try:
        count = 0 if _is_text_or_bool(k) else operator.index(k)  # type: ignore[arg-type]
    except TypeError:
        count = 0
    if count < 1:
        what = " is not a number of neighbours" if name == "k" else ""
        raise InputError(f"{name}={k!r}{what}: give a whole number of at least 1.")
    return count


def _checked_gate(gate: object) -> Gate | None:
    if isinstance(gate, Mapping):
        try:
            return Gate(**gate)
        except TypeError as error:
            raise InputError(f"gate={gate!r}: {error}. Give bias, distance and confidence.") from None
    if gate is not None and not isinstance(gate, Gate):
        raise InputError(f"gate={gate!r} is not a Gate: give Gate(bias=..., distance=..., confidence=...) or None.")
    return gate


def _is_text_or_bool(value: object) -> bool:
    """Whether `float()` or `operator.index()` would take this, though it is no number."""
    return isinstance(value, str | bytes | bool) or str(getattr(value, "dtype", "")).endswith("bool")
