"""Which weights a memory belongs to."""

import base64
import hashlib
import json
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_resmem.errors import StaleMemoryError
from lightning_resmem.model.modes import evaluating

# How many tensors that differ are named.
_NAMED = 5


def fingerprint(model: nn.Module, ignored: Collection[str] = ()) -> str:
    """A hash of the model's parameters and buffers, as they are in evaluation mode.

    It does not depend on the device, on `torch.compile`, on the precision that the same numbers are held in, nor on the
    state of metrics. Tensors inside of other things that `state_dict` holds, such as packed int8 weights, count.

    Args:
        model: Any module.
        ignored: Names of tensors that do not count.

    Returns:
        64 hexadecimal digits.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> fingerprint(layer) == before
        False
    """
    return _hashed(model, ignored)[0]


def describe_weights(model: nn.Module, ignored: Collection[str] = ()) -> dict[str, str]:
    """What a memory's provenance says of the weights: fingerprint, a checksum of each tensor, what was ignored."""
    digest, sums = _hashed(model, ignored)
    packed = base64.b64encode(struct.pack(f">{len(sums)}I", *sums.values())).decode()  # their names are the model's
    described = {"fingerprint": digest, "tensors": packed}
    return {**described, "ignored": json.dumps(sorted(ignored))} if ignored else described


def buffer_sums(model: nn.Module) -> dict[str, int]:
    """Checksums of what `state_dict` holds besides parameters, by name; evaluation may change some: counters, say."""
    parameters = {_known(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: _sum(name, tensor) for name, tensor in _state(model, parameters)}


def number_sums(model: nn.Module, ignored: Collection[str] = ()) -> dict[str, int]:
    """Checksums of the floating-point tensors of the state, by name. Steps may change others: they count in them."""
    return {name: _sum(name, tensor) for name, tensor in _state(model, ignored) if tensor.is_floating_point()}


def check_fingerprint(model: nn.Module, provenance: Mapping[str, str], doing: str) -> None:
    """Raise `StaleMemoryError` if a memory was filled with other weights than the model has."""
    filled_with = provenance.get("fingerprint")
    if filled_with is None:
        return
    found, sums = _hashed(model, json.loads(provenance.get("ignored", "[]")))
    if found != filled_with:
        raise StaleMemoryError(
            f"{doing} with weights {found[:12]}, but the memory was filled with weights {filled_with[:12]}: its "
            f"embeddings and residuals belong to another model.{_differences(sums, provenance.get('tensors'))} Use the "
            "weights that it was filled with (after "
            'fit: the last epoch\'s, or those of ckpt_path="best" with ResMemCallback(weights="best")), or fill it '
            "again: memorize(trainer, model, dataloader)."
        )


def _differences(sums: Mapping[str, int], packed: str | None) -> str:
    if packed is None:  # saved by an earlier release
        return ""
    data = base64.b64decode(packed)
    recorded = struct.unpack(f">{len(data) // 4}I", data)
    if len(recorded) != len(sums):
        return f" This model's state has {len(sums)} tensors, that model's had {len(recorded)}."
    names = [name for (name, found), saved in zip(sums.items(), recorded, strict=True) if found != saved]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f" Different are {', '.join(names[:_NAMED])}{more}." if names else ""


def _hashed(model: nn.Module, ignored: Collection[str]) -> tuple[str, dict[str, int]]:
    """The fingerprint, and a checksum of each tensor by its name."""
    digest, sums = hashlib.sha256(), {}
    with torch.no_grad(), evaluating(model):
        for name, tensor in _state(model, ignored):
            digest.update(_head(name, tensor))
            digest.update(_bytes(tensor))
            sums[name] = _sum(name, tensor)
    return digest.hexdigest(), sums


def _state(model: nn.Module, ignored: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the state, without metrics: plain, on the CPU, and in single precision where that is as exact."""
    modules = model.named_modules(remove_duplicate=False)
    metrics = tuple(f"{name}." for name, module in modules if isinstance(module, Metric))
    for key, value in sorted(model.state_dict().items(), key=lambda item: item[0]):
        if key.startswith(metrics):
            continue
        for name, tensor in _plain(_known(key), value):
            if name not in ignored:
                tensor = tensor.detach().cpu()
                single = tensor.float() if tensor.is_floating_point() else tensor
                yield name, single if tensor.dtype != torch.float64 or torch.equal(single.double(), tensor) else tensor


def _plain(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors whose bytes are their numbers, in something that a state holds."""
    parts: Any
    if isinstance(value, Mapping):
        parts = value
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value))
    elif not isinstance(value, Tensor):
        return
    elif value.is_quantized:
        parts = {"values": value.int_repr(), **_scales(value)}
    elif value.layout != torch.strided:
        sparse = value.to_sparse_coo().coalesce()
        parts = {"indices": sparse.indices(), "values": sparse.values()}
    elif hasattr(value, "__tensor_flatten__"):  # how subclasses say what they consist of
        parts = {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}
    else:
        yield name, value
        return
    for part, held in parts.items():
        yield from _plain(f"{name}.{part}", held)


def _scales(tensor: Tensor) -> dict[str, Tensor]:
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return {"scale": torch.tensor(tensor.q_scale()), "zero_point": torch.tensor(tensor.q_zero_point())}
    return {"scale": tensor.q_per_channel_scales(), "zero_point": tensor.q_per_channel_zero_points()}


def _known(name: str) -> str:
    """A name without torch.compile's wrappers."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _head(name: str, tensor: Tensor) -> bytes:
    return f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().data


def _sum(name: str, tensor: Tensor) -> int:
    return zlib.crc32(_bytes(tensor), zlib.crc32(_head(name, tensor)))
