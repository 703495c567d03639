"""What a model returned, compared with what its head returned: nothing that changes values may come between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError, InputError
from lightning_resmem.model.names import named_modules

WAY_OUT = (
    "Residuals are of what the head returns, and that is what ResMem replaces, so what follows it may only be softmax, "
    "log_softmax or sigmoid, and of regression nothing. Make the rest a part of the head, self.head = "
    'nn.Sequential(self.fc, Rescale()) with head="head", or do it outside of the model: standardise targets in the '
    "dataset."
)


class DivergedError(InputError):
    """A network's outputs are NaN or infinite, so nothing can be told by them; by those of other rows perhaps."""


def tensors(result: Any) -> Iterator[Tensor]:
    """All tensors in what a model returned: nested tuples, dicts, dataclasses."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from tensors(value)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            yield from tensors(getattr(result, field.name))


def same(output: Tensor, returned: Tensor, compare_numbers: bool = False) -> bool:
    """Whether the model returned this output, or its softmax, log_softmax or sigmoid, perhaps squeezed or swapped.

    With `compare_numbers` these are something else.
    """
    if output.numel() != returned.numel() or not output.numel() or output.ndim == 0 or not returned.is_floating_point():
        return False
    seen = returned.detach()
    return _alike(output, seen.reshape(output.shape), compare_numbers) or swapped(output, seen, compare_numbers)


def swapped(output: Tensor, returned: Tensor, compare_numbers: bool = False) -> bool:
    """Whether a model returned an output of sequences `(B, T, C)` as `(B, C, T)`, which `F.cross_entropy` takes."""
    if output.ndim != 3 or returned.shape != output.transpose(1, 2).shape:
        return False
    if returned.shape == output.shape and _alike(output, returned, compare_numbers):
        return False
    return _alike(output, returned.transpose(1, 2), compare_numbers)


def _alike(output: Tensor, returned: Tensor, compare_numbers: bool) -> bool:
    if torch.equal(output, returned):
        return True
    wide = output.double()
    forms = (wide,) if compare_numbers else (wide, wide.log_softmax(-1), wide.softmax(-1), wide.sigmoid())
    return any(_close(form, returned, output.dtype) for form in forms)


def _close(form: Tensor, returned: Tensor, dtype: torch.dtype) -> bool:
    """Whether a model returned these numbers, computed from outputs in a dtype."""
    tolerance = 1e-5 if {dtype, returned.dtype} <= {torch.float32, torch.float64} else 2e-2
    return torch.allclose(form, returned.double(), rtol=tolerance, atol=tolerance, equal_nan=True)


def check_returned(
    model: nn.Module,
    head: str,
    embedding: Tensor,
    output: Tensor,
    returned: Any,
    compare_widths: bool = True,
    compare_numbers: bool = False,
) -> None:
    """Raise an error if what a model returned for a batch is not what its head returned.

    What has no number for each of the head's tells nothing: labels, the largest probability, the embedding, a loss.

    Args:
        model: Holds the head.
        head: Its name.
        embedding: What went into it, or the embedding that was named, shape `(B, D)` or `(B, T, D)`.
        output: What came out of it, shape `(B, C)` or `(B, T, C)`.
        returned: What the model returned for this batch.
        compare_widths: Whether a matrix of another width than the head's cannot be right either.
        compare_numbers: Whether they are numbers, as in regression, of which softmax and so on are others.
    """
    found = [t for t in tensors(returned) if t.is_floating_point() and t.ndim and len(t) == len(output)]
    found = [tensor.detach().to(output.device) for tensor in found]  # parts of a model may be on other devices
    if any(same(output, tensor, compare_numbers) for tensor in found):
        return
    found = [tensor for tensor in found if not _equal(tensor, embedding)]
    for tensor in found:
        if tensor.numel() == output.numel() and not torch.equal(tensor, tensor.round()):  # labels may be float, too
            raise HeadError(
                f"The model returns other values than its head {head!r} does: {_relation(output, tensor)}. {WAY_OUT} "
                "(If another module makes the prediction, name that one with head=; if the steps use other values than "
                "these, give a forward_fn that returns them.)"
            )
    widths = {tensor.shape[-1] for tensor in found if tensor.ndim == output.ndim}
    width = output.shape[-1]
    if not compare_widths or not widths or width in widths:
        return
    fitting = [n for n, m in named_modules(model).items() if isinstance(m, nn.Linear) and m.out_features in widths]
    way_out = f"head={fitting[-1]!r}" if fitting else "that module"
    raise HeadError(
        f"head={head!r} makes outputs of width {width} from an embedding of width {embedding.shape[-1]}, but the model "
        f"returns width {' and '.join(map(str, sorted(widths)))}: the head is the module whose output is the logits. "
        f"Name {way_out}, or none to have it found. If the model changes the width of its logits, give a forward_fn."
    )


def way_out(outputs: Mapping[str, Tensor], returned: Any) -> str:
    """For a message: how to name the head of a model that returned none of these outputs of its linear modules."""
    found = [tensor for tensor in tensors(returned) if tensor.is_floating_point() and tensor.ndim]
    names = list(outputs)[::-1]
    pairs = [
        (name, _relation(outputs[name], tensor))
        for name in names
        for tensor in found
        if tensor.numel() == outputs[name].numel() and outputs[name].ndim in (2, 3)
    ]
    name = f"Name the module whose output is the logits: head={names[0]!r}."
    for alike, follows in pairs:
        if follows != _SOMETHING_ELSE:
            return f"{name} What it returned is that of {alike!r}, but {follows}. {WAY_OUT}"
    if pairs:
        return f"{name} If what it returned is made of that of {pairs[0][0]!r}, {_SOMETHING_ELSE}. {WAY_OUT}"
    if not any(tensor.ndim in (2, 3) for tensor in found):  # labels, or a loss
        return name
    return (
        "None of these makes as many numbers as it returned. Name the module whose output is the logits with head=; "
        "what no module makes, such as a product with a parameter, has to be made by one: self.head = MyHead(...) with "
        'head="head".'
    )


def check_diverged(outputs: Tensor) -> None:
    """Raise an error if a network's outputs `(B, C)` or `(B, T, C)` are NaN or infinite in every row.

    Raises:
        DivergedError: If they are.
    """
    outputs = outputs.flatten(0, -2) if outputs.ndim > 1 else outputs
    rows = len(outputs) if outputs.ndim else 0
    if rows and not torch.isfinite(outputs.reshape(rows, -1)).all(dim=1).any():
        raise DivergedError(
            f"The network's outputs are NaN or infinite in all of the {rows} rows that were tried. If their inputs are "
            "finite, the training has diverged: lower the learning rate, clip gradients (gradient_clip_val of the "
            'Trainer), or compute in a higher precision (precision="32-true").'
        )


_SWAPPED = (
    "with its first two axes swapped: the head reads (T, B, D), and rows of sequences are read as (B, T). Swap the "
    "axes before the head, as batch_first=True does"
)
_SOMETHING_ELSE = "something follows the head that changes them"


def _relation(output: Tensor, returned: Tensor) -> str:
    """How values follow from the head's `(B, C)` or `(B, T, C)`, where that is simple."""
    if output.ndim == 3 and _equal(output.detach().transpose(0, 1), returned.detach()):
        return _SWAPPED
    wide, seen = output.detach().double(), returned.detach().double().reshape(output.shape)
    close = 1e-4 * float(seen.abs().max()) + 1e-12
    if wide.numel() > 2:
        line = torch.stack([wide.flatten(), torch.ones_like(wide.flatten())], dim=1)
        slope, shift = torch.linalg.lstsq(line.cpu(), seen.flatten()[:, None].cpu()).solution[:, 0].tolist()
        if slope and float((slope * wide + shift - seen).abs().max()) < close:
            shifted = f" plus {shift:.4g}" if abs(shift) > close else ""
            return f"multiplied by {slope:.4g}{shifted}"
    for name in ("sigmoid", "softplus", "exp", "relu", "tanh"):
        form = torch.nn.functional.softplus(wide) if name == "softplus" else getattr(torch, name)(wide)
        if _close(form, seen, output.dtype):
            return f"{name} follows the head"
    added = seen - wide
    if len(added) > 1 and float((added - added[0]).abs().max()) < close:
        return "with a constant added to each of its outputs (such as class priors, or a mean)"
    return _SOMETHING_ELSE


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor.shape == other.shape and torch.equal(tensor.to(other), other)
