"""The inputs and the targets of a batch, and how a batch is run through a model."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import default_collate
from torchmetrics import Metric

from lightning_resmem.errors import HeadError, InputError, wrong_type
from lightning_resmem.model.calling import calling, calling_forward
from lightning_resmem.model.names import largest_part
from lightning_resmem.model.times import TimesFn
from lightning_resmem.together import together

# They return what torch.as_tensor takes. Did it say so here, the command line would refuse functions that do not.
TargetsFn = Callable[[Any], Any]
IdsFn = Callable[[Any], Any]
ForwardFn = Callable[[L.LightningModule, Any], Any]

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
TARGET_KEYS = ("labels", "label", "target", "targets", "y")


@dataclass(frozen=True)
class BatchReader:
    """What is read of a batch, and of the model that it is run through.

    Users give these as arguments of `ResMemCallback`, `memorize` or `ResMemModule`; `ResMemCallback` says what each of
    them is and what is read without it.
    """

    targets_fn: TargetsFn | None = None
    forward_fn: ForwardFn | None = None
    ids_fn: IdsFn | None = None
    head: str | None = None
    embedding: str | None = None
    times_fn: TimesFn | None = None

    def __post_init__(self) -> None:
        for name in ("targets_fn", "forward_fn", "ids_fn", "times_fn"):
            function = getattr(self, name)
            if function is not None and not callable(function):
                raise InputError(f"{name}={function!r} is not a function of a batch.")

    def targets(self, batch: Any) -> Tensor:
        """The targets of a batch, in its order.

        Raises:
            InputError: If the batch has none that can be told from its inputs.
        """
        if self.targets_fn is not None:
            with calling("targets_fn", batch, "give one that returns targets: lambda batch: batch[1]."):
                targets = self.targets_fn(batch)
        else:
            targets = _default_targets(batch, self.forward_fn is None)
        try:
            return torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError, KeyError):
            raise InputError(
                f"The targets of a batch are a {type(targets).__name__}, not a tensor: give a targets_fn that "
                "returns one."
            ) from None

    @property
    def gives_ids(self) -> bool:
        """Whether ids come from the batches rather than from positions in the dataset."""
        return self.ids_fn is not None

    def ids(self, batch: Any) -> Tensor | None:
        """The ids of a batch's rows, or None where they are positions in the dataset."""
        if self.ids_fn is None:
            return None
        with calling("ids_fn", batch, "give one that returns the rows' ids: lambda batch: batch[2]."):
            ids = self.ids_fn(batch)
        try:
            return torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError, KeyError):
            raise InputError(f"ids_fn returned a {type(ids).__name__} for a batch, expected a tensor of ids.") from None

    def count_rows(self, batch: Any) -> int:
        """The number of rows of a batch, told by its targets."""
        targets = self.targets(batch)
        if not targets.ndim:
            raise InputError(
                "The targets of a batch are a single number, so it is a row rather than a batch of rows: give a "
                "DataLoader with a batch_size."
            )
        return len(targets)

    def collate(self, rows: Any, shapes: Collection[tuple[int, ...]]) -> Any:
        """The batch that a loader would make of a list of rows, `[dataset[0], dataset[1]]`; anything else as it is.

        Args:
            rows: A batch, or a list of rows.
            shapes: Those that the targets of one row may have.
        """
        if not isinstance(rows, list) or not rows or not all(isinstance(row, (tuple, Mapping)) for row in rows):
            return rows
        try:
            is_list = all(tuple(self.targets(row).shape) in shapes for row in rows)
        except Exception:  # whatever a targets_fn says of what is no row
            return rows
        return default_collate(rows) if is_list else rows

    @property
    def forward_name(self) -> str | None:
        """The name of the user's `forward_fn`, if there is one."""
        if self.forward_fn is None:
            return None
        return str(getattr(self.forward_fn, "__qualname__", type(self.forward_fn).__name__))

    @property
    def provenance(self) -> dict[str, str]:
        """That a user's `forward_fn` runs the base, for a memory's provenance."""
        return {} if self.forward_name is None else {"forward_fn": self.forward_name}

    def returns_outputs(self, model: L.LightningModule) -> bool:
        """Whether `run` returns what the model's `forward` returns."""
        return self.forward_fn is None and has_forward(model)

    def run(self, model: L.LightningModule, batch: Any) -> Any:
        """Run the model on a batch.

        Raises:
            InputError: If it is unclear how to.
        """
        if self.forward_fn is not None:
            with calling("forward_fn", batch, "give one that runs the model: lambda model, batch: model(batch[0])."):
                return self.forward_fn(model, batch)
        if has_forward(model):
            args, kwargs = _inputs(model, batch, self.targets_fn is None)
            with calling_forward(type(model).__name__, batch, args, kwargs):
                return model(*args, **kwargs)
        name = _step(model)
        if name is None:
            raise InputError(
                f"{type(model).__name__} has no forward, predict_step, validation_step or test_step to run a batch "
                f"through: give forward_fn=lambda model, batch: model.{largest_part(model)}(batch[0])."
            )
        step = getattr(model, name)
        return step(*(batch, 0, 0)[: _num_positional(step)])

    @contextmanager
    def quiet(self, model: L.LightningModule) -> Iterator[None]:
        """Switch off what the model's steps do besides computing: `self.log` and the state of its metrics."""
        if self.forward_fn is None and has_forward(model):
            yield
            return
        try:
            with together(("quiet", id(model)), lambda: _quiet(model)):
                yield
        except HeadError as error:
            if self.forward_fn is not None or (name := _step(model)) is None:
                raise
            raise HeadError(
                f"{type(model).__name__} has no forward, so a batch was run through its {name}. If that does not run "
                f"the network, give forward_fn=lambda model, batch: model.{largest_part(model)}(batch[0]). {error}"
            ) from error


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """All tensors in a batch: nested tuples, lists, dicts, dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def borrow_transfer_hooks(module: L.LightningModule, owners: Sequence[DataHooks]) -> None:
    """Let `module` transfer batches as the first of `owners` that overrides a transfer hook does."""
    for hook in TRANSFER_HOOKS:
        for owner in owners:
            if is_overridden(hook, owner, DataHooks):
                setattr(module, hook, getattr(owner, hook))
                break


@contextmanager
def _quiet(model: L.LightningModule) -> Iterator[None]:
    metrics = [(module, _state(module)) for module in model.modules() if isinstance(module, Metric)]
    loggers = [module for module in model.modules() if isinstance(module, L.LightningModule)]
    for module in loggers:  # `self.log` raises outside the trainer's loops
        vars(module).update(log=_ignore, log_dict=_ignore)
    try:
        yield
    finally:
        for module in loggers:
            del vars(module)["log"], vars(module)["log_dict"]
        for metric, state in metrics:
            vars(metric).clear()
            vars(metric).update(state)


def _state(metric: Metric) -> dict[str, Any]:
    """All attributes of a metric; those that an update changes in place (a tensor, or a list of them) are copied."""
    state = dict(vars(metric))
    for name in metric._defaults:
        value = state[name]
        state[name] = value.clone() if isinstance(value, Tensor) else list(value)
    return state


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stands in for `self.log`."""


def has_forward(model: L.LightningModule) -> bool:
    """Whether a model has a `forward` of its own."""
    return "forward" in model.__dict__ or type(model).forward is not L.LightningModule.forward


def _step(model: L.LightningModule) -> str | None:
    """The step that a batch is run through where there is no `forward`."""
    names = ("predict_step", "validation_step", "test_step")
    return next((n for n in names if getattr(type(model), n) is not getattr(L.LightningModule, n)), None)


def _num_positional(step: Callable[..., Any]) -> int:
    """How many of batch, batch index and dataloader index a step takes; the last only if it has to be given."""
    parameters = list(inspect.signature(step).parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return 2
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return min(len(positional), max(2, sum(p.default is p.empty for p in positional)))


def named_entries(batch: Any) -> Mapping[str, Any] | None:
    """What a batch holds by name: a dict, a dataclass, or a namedtuple that names its targets."""
    if isinstance(batch, Mapping):
        return batch
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    if isinstance(batch, tuple) and any(key in getattr(batch, "_fields", ()) for key in TARGET_KEYS):
        return dict(zip(batch._fields, batch, strict=True))  # type: ignore[attr-defined]
    return None


def _default_targets(batch: Any, tells_inputs: bool) -> Any:
    """The targets of a batch; `tells_inputs` is for the message: whether its inputs have to be told by default, too."""
    entries = named_entries(batch)
    for key in TARGET_KEYS:
        if entries is not None and key in entries:
            return entries[key]
        if entries is None and hasattr(batch, key):
            return getattr(batch, key)
    found = f"a {type(batch).__name__}"
    if entries is not None:
        found += f" with the keys {sorted(map(str, entries))}"
    elif isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return batch[1]
        found += f" of {len(batch)}"
    way_out = "targets_fn=lambda batch: batch[...]"
    if entries is None and isinstance(batch, (tuple, list)) and len(batch) > 2:
        targets_fn, forward_fn = _functions(1)
        way_out = (
            f"{targets_fn} and {forward_fn}{_PLACES}" if tells_inputs else f"{way_out}, with their place in a batch"
        )
    raise InputError(
        f"A batch is {found}, so its targets cannot be told: give {way_out}. Understood by default are (inputs, "
        f"targets) pairs, dicts with one of the keys {', '.join(TARGET_KEYS)}, and of language models dicts with "
        "input_ids, perhaps alone: the target of each token is then the next one."
    )


_PLACES = ", with the places that they have in your batches"


def _functions(inputs: int) -> tuple[str, str]:
    """A targets_fn and a forward_fn, to be copied, for batches of so many inputs, targets, and perhaps more."""
    given = ", ".join(f"batch[{place}]" for place in range(inputs))
    return f"targets_fn=lambda batch: batch[{inputs}]", f"forward_fn=lambda model, batch: model({given})"


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable[..., Any], is_method: bool) -> tuple[list[str], list[str], bool]:
    """The names that a function (or a method, after `self`) knows, those it requires, and whether it takes any name.

    Asked for every batch, and slow to find out.
    """
    parameters = list(inspect.signature(function).parameters.values())[is_method:]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    required = [p.name for p in named if p.default is p.empty]
    return [p.name for p in named], required, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _inputs(model: L.LightningModule, batch: Any, tells_targets: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `forward` for a batch; `tells_targets` as `tells_inputs` above."""
    function = getattr(model.forward, "__func__", None)
    named, required, takes_any = _parameters(function or model.forward, function is not None)
    if required == ["batch"]:
        return (batch,), {}
    entries = named_entries(batch)
    if entries is not None:
        inputs = {key: value for key, value in entries.items() if key not in TARGET_KEYS}
        by_name = {name: value for name, value in inputs.items() if takes_any or name in named}
        if all(name in entries for name in required) and (by_name or required):
            return (), {**by_name, **{name: entries[name] for name in required}}
        if len(required) <= 1 and len(inputs) == 1:
            return tuple(inputs.values()), {}
        if len(required) == 1:
            return (batch,), {}
        raise InputError(
            f"A batch is a {type(batch).__name__} with the keys {sorted(map(str, entries))}, but "
            f"{type(model).__name__}.forward wants {required or named}: give forward_fn=lambda model, batch: "
            "model(...)."
        )
    if isinstance(batch, (tuple, list)):
        if len(batch) in (1, 2):
            return (batch[0],), {}
        targets_fn, forward_fn = _functions(max(1, min(len(required), len(batch) - 1)))
        targets_fn = f" and {targets_fn}" if tells_targets and len(batch) else ""
        raise InputError(
            f"A batch is a {type(batch).__name__} of {len(batch)}, so the model's inputs cannot be told: give "
            f"{forward_fn}{targets_fn}{_PLACES}."
        )
    return (batch,), {}


def check_batch(batch: Any) -> None:
    """Raise an error for what no loader yields; anything else is between the loader and the base."""
    if batch is None or isinstance(batch, str | bytes | int | float):
        raise wrong_type("batch", batch, "a batch as the loaders yield it, such as next(iter(dataloader))")
