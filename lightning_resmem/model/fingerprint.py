"""Which weights a memory belongs to."""

import hashlib

import torch
from torch import nn
from torchmetrics import Metric

from lightning_resmem.errors import StaleMemoryError


def fingerprint(model: nn.Module) -> str:
    """A hash of the model's parameters and buffers.

    It does not depend on the device, on `torch.compile`, on the precision that the same numbers are held in, nor on the
    state of metrics.

    Args:
        model: Any module.

    Returns:
        64 hexadecimal digits.

    Examples:
        >>> layer = nn.Linear(2, 2)
        >>> before = fingerprint(layer)
        >>> _ = layer.weight.data.add_(1.0)
        >>> fingerprint(layer) == before
        False
    """
    modules = model.named_modules(remove_duplicate=False)
    metrics = tuple(f"{name}." for name, module in modules if isinstance(module, Metric))
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor) or name.startswith(metrics):
            continue
        tensor = tensor.detach().cpu()
        single = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.dtype != torch.float64 or torch.equal(single.double(), tensor):
            tensor = single
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.resolve_conj().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_fingerprint(model: nn.Module, provenance: dict[str, str], doing: str) -> None:
    """Raise `StaleMemoryError` if a memory was filled with other weights than the model has."""
    filled_with = provenance.get("fingerprint")
    if filled_with is None:
        return
    found = fingerprint(model)
    if found != filled_with:
        raise StaleMemoryError(
            f"{doing} with weights {found[:12]}, but the memory was filled with weights {filled_with[:12]}: its "
            "embeddings and residuals belong to another model. Use the weights that it was filled with (after "
            'fit: the last epoch\'s, or those of ckpt_path="best" with ResMemCallback(weights="best")), or fill it '
            "again: memorize(trainer, model, dataloader)."
        )
