"""The numbers of a ResMem prediction, and the gate that may scale one of them."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.tasks import Multiclass, Multilabel, Task

# Base probabilities stay this far from 0 and 1, so that their logits are finite.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Gate:
    """Scales the strength of each prediction by `2 * sigmoid(bias + distance * far + confidence * sure)`.

    `far` is `log(1 + d / sigma)` for the distance `d` to the nearest neighbour, `sure` the logit of the base's largest
    probability (in multilabel tasks of each label's; 0 in regression). Without effect, as `Gate()` is, the factor is
    1; it lies between 0 and 2.

    Args:
        bias: The same for all rows.
        distance: Below 0, the memory counts less where its nearest row is far away.
        confidence: Below 0, the memory counts less where the base is sure.

    Raises:
        InputError: If a value is not a finite number.

    Examples:
        >>> gate = Gate(distance=-1.0)
        >>> probabilities = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
        >>> gate.factors(Multiclass(), probabilities, distances=torch.tensor([0.0, 3.0]), sigma=1.0)
        tensor([[1.0000],
                [0.4000]])
    """

    bias: float = 0.0
    distance: float = 0.0
    confidence: float = 0.0

    def __post_init__(self) -> None:
        for name in ("bias", "distance", "confidence"):
            value = getattr(self, name)
            try:
                if isinstance(value, str | bytes | bool):
                    raise TypeError
                number = float(value)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                raise InputError(f"{name}={value!r} is not a number: give one, 0 has no effect.") from None
            if not math.isfinite(number):
                raise InputError(f"{name}={value!r} is not finite: give a number, 0 has no effect.")
            object.__setattr__(self, name, number)

    def factors(self, task: Task, base: Tensor, distances: Tensor, sigma: float) -> Tensor:
        """What to multiply `strength` by.

        Args:
            task: Of the memory.
            base: Base predictions, shape `(B, C)`.
            distances: To the nearest neighbour, shape `(B,)`; `inf` where there is none.
            sigma: The kernel width, a distance.

        Returns:
            Shape `(B, 1)`, or `(B, C)` in multilabel tasks; between 0 and 2.
        """
        far, sure = gate_features(task, base, distances, sigma)
        return gate_factors((self.bias, self.distance, self.confidence), far, sure)


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
        combined_temperature: What the logarithm of the combined prediction is divided by, above 0: `q ~ F^(1 / t)`.
            Above 1 it is less sure, with the same argmax. 1, the default, leaves `F` as it is; regression ignores it.

    Raises:
        InputError: If a value is out of its range.

    Examples:
        >>> ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4)
        ResMemParams(k=53, sigma=0.7, softmax_temperature=1.4, strength=1.0, gate=None, combined_temperature=1.0)
    """

    k: int = 50
    sigma: float = 1.0
    softmax_temperature: float = 1.0
    strength: float = 1.0
    gate: Gate | None = None
    combined_temperature: float = 1.0

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
        after = self._number("combined_temperature", "a number above 0")
        if not after > 0:
            raise InputError(f"combined_temperature={after!r}: give a number above 0 (1.0 leaves F as it is).")
        strength = self._number("strength", "a number of at least 0")
        if strength < 0:
            raise InputError(f"strength={strength!r}: give a number of at least 0 (0 switches the memory off).")
        # NumPy scalars and 0-d tensors come from sweeps; plain numbers travel to JSON and print well.
        for name, value in (
            ("k", k),
            ("sigma", sigma),
            ("softmax_temperature", temperature),
            ("strength", strength),
            ("combined_temperature", after),
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


def gate_features(task: Task, base: Tensor, distances: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """What a gate looks at: `far` `(B, 1)` and `sure` `(B, 1)` or `(B, C)`."""
    # A row without neighbours has no residual either: any finite number will do.
    distances = distances.to(base).where(distances.to(base).isfinite(), 0)
    far = torch.log1p(distances / sigma)[:, None]
    if isinstance(task, Multiclass):
        return far, torch.logit(base.amax(dim=1, keepdim=True), eps=_MARGIN)
    if isinstance(task, Multilabel):
        return far, torch.logit(torch.maximum(base, 1 - base), eps=_MARGIN)
    return far, torch.zeros_like(far)


def gate_factors(coefficients: Tensor | tuple[float, float, float], far: Tensor, sure: Tensor) -> Tensor:
    """The factors, for three coefficients and `gate_features`."""
    bias, distance, confidence = coefficients
    return 2 * torch.sigmoid(bias + distance * far + confidence * sure)
