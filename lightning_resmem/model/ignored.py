"""The labels that a model's loss ignores."""

from torch import nn

# What PyTorch's losses ignore by default.
IGNORE_INDEX = -100


def ignored_labels(model: nn.Module) -> frozenset[int]:
    """What the losses that a model holds as modules ignore, and -100."""
    losses = (module for module in model.modules() if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)))
    return frozenset({IGNORE_INDEX, *(loss.ignore_index for loss in losses)})
