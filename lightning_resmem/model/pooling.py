"""One vector a row of what goes into a module or comes out of it: feature maps are averaged over their positions."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from lightning_resmem.errors import HeadError, InputError, ResMemWarning
from lightning_resmem.model.places import Place, input_of, output_of

Channels = Literal["first", "last"]
_Ran = list[tuple[tuple[int, ...], Channels]]  # shapes of outputs, and where their channels are

_log = logging.getLogger("lightning_resmem")

_CHANNELS_FIRST = (
    *(_ConvNd, _NormBase, nn.GroupNorm),
    *(_AvgPoolNd, _MaxPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
)
_CHANNELS_LAST = (
    *(nn.Linear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention),
    *(nn.TransformerEncoderLayer, nn.TransformerDecoderLayer),
)
_NORMS = (nn.LayerNorm, nn.RMSNorm)


class Pooling:
    """Averages the feature maps at one place, whose channels are the first or the last axis after the rows.

    Which of them is told by the layers that ran before, whose outputs have the same shape: those of convolutions and
    batch norms have their channels first, those of `nn.Linear` and `nn.LayerNorm` last. It is found out once. What
    sequences have is `(B, T, D)`, or `(B, D, T)` where the module or the head has its channels first: their length
    tells, and where they are as long as wide, the layers do.

    Args:
        model: The model.
        place: The module whose output, or input, is averaged.
        head: Its width, where it has one, decides where no such layer does.
        channels: Where the channels are, if that is known.
    """

    def __init__(self, model: nn.Module, place: Place, head: nn.Module, channels: str | None = None) -> None:
        self._model, self._place, self._module, self._head = model, place, place.find(model), head
        self._said = f"embedding={str(place)!r} {place.verb}"
        self.channels: Channels | None = None if channels is None else "last" if channels == "last" else "first"

    @contextmanager
    def watching(self, take: Callable[[Tensor], None]) -> Iterator[None]:
        """Give `take` one vector a row, `(B, D)`, or what is for `by_position`, when this thread calls the module."""
        thread, ran = threading.get_ident(), _Ran()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                take(self._pooled(input_of(module, args, kwargs), ran))

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                take(self._pooled(output_of(output), ran))

        def on_layer(layer: nn.Module, _args: Any, output: Any) -> None:
            made = output_of(output)
            if threading.get_ident() != thread or self.channels is not None or made is None:
                return
            if where := _channels(layer, made.shape):
                ran.append((tuple(made.shape), where))

        with ExitStack() as stack:
            for layer in self._model.modules() if self.channels is None else ():
                if isinstance(layer, (*_CHANNELS_FIRST, *_CHANNELS_LAST, *_NORMS)):
                    stack.callback(layer.register_forward_hook(on_layer).remove)
            if self._place.side == "input":
                hook = self._module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                hook = self._module.register_forward_hook(after)
            stack.callback(hook.remove)
            yield

    def _pooled(self, tensor: Tensor | None, ran: _Ran) -> Tensor:
        if tensor is None or tensor.ndim not in (2, 3, 4, 5):
            raise self.unfit(tensor)
        if tensor.ndim < 4:
            if tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2] and self._may_be_first(tensor.shape):
                self.channels = self.channels or self._found(tuple(tensor.shape), ran)
            ran.clear()
            return tensor.clone()  # an in-place activation may follow before the head is called
        if self.channels is None:
            self.channels = self._found(tuple(tensor.shape), ran)
            first, last = (2, tensor.ndim - 1) if self.channels == "first" else (1, tensor.ndim - 2)
            _log.info(
                "embedding=%r of shape %s has its channels %s: averaged over the axes %s.",
                str(self._place),
                tuple(tensor.shape),
                self.channels,
                ", ".join(map(str, range(first, last + 1))),
            )
        ran.clear()
        return tensor.flatten(2).mean(dim=2) if self.channels == "first" else tensor.flatten(1, -2).mean(dim=1)

    def by_position(self, keys: Tensor, length: int) -> Tensor:
        """Keys `(B, T, D)` of what was given to `take`, for sequences of which the head made `length` outputs."""
        if keys.shape[1] != keys.shape[2] and length in keys.shape[1:] and self._may_be_first(keys.shape):
            self.channels = "last" if keys.shape[1] == length else "first"
        return keys.transpose(1, 2) if self.channels == "first" else keys

    def _may_be_first(self, shape: tuple[int, ...]) -> bool:
        return "first" in (_channels(self._module, shape), _channels(self._head, shape))

    def unfit(self, tensor: Tensor | None) -> HeadError:
        """The error of a key that is not one vector a row."""
        none = "no tensor of floats" if self._place.side == "input" else "no tensor"
        shape = none if tensor is None else f"shape {tuple(tensor.shape)}"
        tokens = " Do it there" if tensor is None else " Of tokens (B, T, D), choose or average in the model"
        return HeadError(
            f"{self._said} {shape}, expected (B, D), or a feature map of 4 or 5 dimensions to be averaged over its "
            f"positions. Name another module.{tokens}: pass tokens.mean(dim=1) through an nn.Identity() of its own, "
            "and name that."
        )

    def _found(self, shape: tuple[int, ...], ran: _Ran) -> Channels:
        if own := _channels(self._module, shape):
            return own
        told: list[Channels] = [where for seen, where in ran if seen == shape]
        if len(shape) == 3:
            told.append("first")  # as the head reads it: where a layer has them last, something has swapped them
        if told and (shape[1] != shape[-1] or len(set(told)) == 1):
            return told[-1]
        width = getattr(self._head, "in_features", None)
        if width is not None and (shape[1] == width) != (shape[-1] == width):
            return "first" if shape[1] == width else "last"
        way_out = (
            "Average it in the model instead, pass the result through an nn.Identity() of its own, and name that with "
            "embedding=."
        )
        if len(shape) == 3:
            way_out = (
                "Name the layer that makes it, such as an nn.LSTM, nn.LayerNorm or nn.Conv1d, or begin with a batch of "
                f"sequences that are not as long as it is wide, {shape[1]}."
            )
        if told:
            raise HeadError(
                f"{self._said} shape {shape}, and it cannot be told whether its channels are the "
                f"first or the last axis after the rows. {way_out}"
            )
        warnings.warn(
            f"{self._said} shape {shape}, and no layer tells where its channels are: they are "
            f"taken to be the first axis after the rows. If they are not: {way_out[0].lower()}{way_out[1:]}",
            ResMemWarning,
            stacklevel=2,
        )
        return "first"


def _channels(layer: nn.Module, shape: tuple[int, ...]) -> Channels | None:
    """Where the output `shape` of a layer has its channels, if the kind of layer tells."""
    if isinstance(layer, _CHANNELS_FIRST):
        return "first"
    if isinstance(layer, _CHANNELS_LAST):
        return "last"
    if not isinstance(layer, _NORMS) or len(layer.normalized_shape) != 1 or len(shape) < 2:
        return None
    # Vision libraries derive from LayerNorm what normalizes the first axis.
    fits_first, fits_last = (width == layer.normalized_shape[0] for width in (shape[1], shape[-1]))
    if fits_first and not fits_last:
        return "first"
    return "last" if fits_last and (not fits_first or type(layer) in (nn.LayerNorm, nn.RMSNorm)) else None


def check_vectors(name: str, embedding: Tensor) -> None:
    """Raise an error if what has this name is not one vector a row, or a position."""
    if embedding.ndim < 2:
        raise InputError(
            f"{name} has shape {tuple(embedding.shape)}, expected (B, D): the batch dimension is missing. Inputs "
            "of the model need one, too: for a single row give x[None], or "
            "torch.utils.data.default_collate([dataset[0]])."
        )
    if embedding.ndim > 3:
        raise HeadError(
            f"{name} has shape {tuple(embedding.shape)}, expected (B, D), or of sequences (B, T, D): one vector "
            "for every row. Name a module with such an output (or a feature map, which is averaged) with "
            "embedding=."
        )
