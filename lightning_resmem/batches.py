"""The inputs and the targets of a batch, and how a batch is run through a model."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torchmetrics import Metric

from lightning_resmem.errors import InputError

TargetsFn = Callable[[Any], Tensor]
IdsFn = Callable[[Any], Tensor]
ForwardFn = Callable[[L.LightningModule, Any], Any]

_TARGET_KEYS = ("labels", "label", "target", "targets", "y")


class BatchReader:
    """Reads targets from a batch and runs the model on it.

    Args:
        targets_fn: `targets_fn(batch)` returns the targets. By default the second of an `(inputs, targets)` pair, or
            the entry `labels`, `label`, `target`, `targets` or `y` of a dict (or an attribute of that name).
        ids_fn: `ids_fn(batch)` returns the rows' ids, unique over the training set, where positions in the dataset are
            not to be used.
        forward_fn: `forward_fn(model, batch)` runs the model. By default `model(inputs)`; the entries of a dict are
            passed by the names of `forward`'s arguments. A model without a `forward` of its own is run through its
            `predict_step`, `validation_step` or `test_step`, with logging switched off.
    """

    def __init__(
        self,
        targets_fn: TargetsFn | None = None,
        forward_fn: ForwardFn | None = None,
        ids_fn: IdsFn | None = None,
    ) -> None:
        for name, function in (("targets_fn", targets_fn), ("forward_fn", forward_fn), ("ids_fn", ids_fn)):
            if function is not None and not callable(function):
                raise InputError(f"{name}={function!r} is not a function of a batch.")
        self._targets_fn, self._forward_fn, self._ids_fn = targets_fn, forward_fn, ids_fn

    def targets(self, batch: Any) -> Tensor:
        """The targets of a batch, in its order.

        Raises:
            InputError: If the batch has none that can be told from its inputs.
        """
        targets = self._targets_fn(batch) if self._targets_fn is not None else _default_targets(batch)
        try:
            return torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"The targets of a batch are a {type(targets).__name__}, not a tensor: give a targets_fn that "
                "returns one."
            ) from None

    def ids(self, batch: Any) -> Tensor | None:
        """The ids of a batch's rows, or None where they are positions in the dataset."""
        return None if self._ids_fn is None else torch.as_tensor(self._ids_fn(batch))

    def returns_outputs(self, model: L.LightningModule) -> bool:
        """Whether `run` returns what the model's `forward` returns."""
        return self._forward_fn is None and _has_forward(model)

    def run(self, model: L.LightningModule, batch: Any) -> Any:
        """Run the model on a batch.

        Raises:
            InputError: If it is unclear how to.
        """
        if self._forward_fn is not None:
            return self._forward_fn(model, batch)
        if _has_forward(model):
            args, kwargs = _inputs(model, batch)
            return model(*args, **kwargs)
        for name in ("predict_step", "validation_step", "test_step"):
            if getattr(type(model), name) is not getattr(L.LightningModule, name):
                step = getattr(model, name)
                return step(*(batch, 0)[: _num_positional(step)])
        raise InputError(
            f"{type(model).__name__} has no forward, predict_step, validation_step or test_step to run a batch "
            "through: give forward_fn=lambda model, batch: model.net(batch[0])."
        )

    @contextmanager
    def quiet(self, model: L.LightningModule) -> Iterator[None]:
        """Switch off what the model's steps do besides computing: `self.log` and the state of its metrics."""
        if self._forward_fn is None and _has_forward(model):
            yield
            return
        metrics = [module for module in model.modules() if isinstance(module, Metric)]
        states = [
            ({name: copy.deepcopy(getattr(metric, name)) for name in metric._defaults}, metric._update_count)
            for metric in metrics
        ]
        # `self.log` raises outside the trainer's loops.
        model.__dict__.update(log=_ignore, log_dict=_ignore)
        try:
            yield
        finally:
            del model.__dict__["log"], model.__dict__["log_dict"]
            for metric, (state, count) in zip(metrics, states, strict=True):
                metric.reset()
                for name, value in state.items():
                    setattr(metric, name, value)
                metric._update_count = count


def borrow_transfer_hooks(module: L.LightningModule, owners: Sequence[DataHooks]) -> None:
    """Let `module` transfer batches as the first of `owners` that overrides a transfer hook does."""
    for hook in ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer"):
        for owner in owners:
            if is_overridden(hook, owner, DataHooks):
                setattr(module, hook, getattr(owner, hook))
                break


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log`."""


def _has_forward(model: L.LightningModule) -> bool:
    return "forward" in model.__dict__ or type(model).forward is not L.LightningModule.forward


def _num_positional(function: Callable[..., Any]) -> int:
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 2
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _default_targets(batch: Any) -> Any:
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return batch[key]
        found = f"a dict with the keys {sorted(map(str, batch))}"
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[1]
        found = f"a {type(batch).__name__} of {len(batch)}"
    else:
        for key in _TARGET_KEYS:
            if hasattr(batch, key):
                return getattr(batch, key)
        found = f"a {type(batch).__name__}"
    raise InputError(
        f"A batch is {found}, so its targets cannot be told: give targets_fn=lambda batch: batch[...]. Understood by "
        f"default are (inputs, targets) pairs and dicts with one of the keys {', '.join(_TARGET_KEYS)}."
    )


def _inputs(model: L.LightningModule, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `forward` for a batch."""
    parameters = inspect.signature(model.forward).parameters
    named = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    required = [name for name, parameter in named.items() if parameter.default is inspect.Parameter.empty]
    if required == ["batch"]:
        return (batch,), {}
    if isinstance(batch, Mapping):
        inputs = {key: value for key, value in batch.items() if key not in _TARGET_KEYS}
        if required and all(name in batch for name in required):
            return (), {name: batch[name] for name in named if name in inputs or name in required}
        if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()) and not required:
            return (), inputs
        if len(required) <= 1 and len(inputs) == 1:
            return tuple(inputs.values()), {}
        if len(required) == 1:
            return (batch,), {}
        if not required and inputs and all(name in named for name in inputs):
            return (), inputs
        raise InputError(
            f"A batch is a dict with the keys {sorted(map(str, batch))}, but {type(model).__name__}.forward wants "
            f"{required}: give forward_fn=lambda model, batch: model(...)."
        )
    if isinstance(batch, (tuple, list)):
        if len(batch) in (1, 2):
            return (batch[0],), {}
        raise InputError(
            f"A batch is a {type(batch).__name__} of {len(batch)}, so the model's inputs cannot be told: give "
            "forward_fn=lambda model, batch: model(batch[0])."
        )
    return (batch,), {}
