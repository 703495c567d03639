"""Find the head of a model, capture what goes in and out of it, or replace what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError, InputError


class Captured(NamedTuple):
    """What one call of the head saw: embedding `(B, D)` and output `(B, C)`."""

    embedding: Tensor
    output: Tensor


class HeadTap:
    """A forward hook on the head: *capture* keeps its input and output, *route* replaces its output.

    The hook sits on the head itself, so it works whatever the model's steps call: `self(x)`, `self.net(x)`,
    `self.head(h)`, or a model from another library.

    Args:
        model: The model that holds the head.
        head: Name of the head in `model`, e.g. `"net.fc"`.
        embedding: Name of the module whose output is the key, e.g. `"net.layer4"` (spatial outputs are average-pooled).
            By default the key is the input of the head.

    Raises:
        HeadError: If a name is not a module of the model, or one that cannot be hooked.

    Examples:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> tap = HeadTap(model, head="2")
        >>> with tap.capture():
        ...     _ = model(torch.ones(1, 2))
        ...     tap.take().embedding.shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, head: str, embedding: str | None = None) -> None:
        self.head, self.embedding = head, embedding
        self._head = _submodule(model, "head", head)
        self._source = None if embedding is None else _submodule(model, "embedding", embedding)
        self._fired: list[Captured] = []
        self._pooled: Tensor | None = None

    @classmethod
    def find(
        cls, model: nn.Module, run: Callable[[], Any], embedding: str | None = None, returns_outputs: bool = True
    ) -> HeadTap:
        """Find the head: the last `nn.Linear` that one forward executes, checked against what the model returned.

        Args:
            model: The model to look into.
            run: Runs one batch through the model and returns what the model returned.
            embedding: As for `HeadTap`.
            returns_outputs: Whether `run` returns the model's outputs; without them there is nothing to check against.

        Raises:
            HeadError: If no `nn.Linear` is executed, the model returns none of their outputs, or several of them.
            InputError: If that cannot be told, because all outputs are NaN or infinite.
        """
        executed: list[tuple[str, nn.Module, Tensor]] = []

        def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            return lambda module, _, output: executed.append((name, module, output.detach().clone()))

        with ExitStack() as stack:
            for name, module in _named_modules(model).items():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(record(name)).remove)
            result = run()
        if not executed:
            raise HeadError(
                "No nn.Linear was executed in a forward of the model, so its head cannot be found. Name the module "
                'whose input is the embedding and whose output is the logits: head="net.classifier". '
                "(Modules inside a torch.jit.script or exported model cannot be hooked at all.)"
            )
        if not returns_outputs:
            return cls(model, executed[-1][0], embedding)
        returned = list(_tensors(result))
        matching = {name: module for name, module, output in executed if any(_same(output, r) for r in returned)}
        if len(matching) == 1:
            return cls(model, next(iter(matching)), embedding)
        check_diverged(executed[-1][2])
        if matching:
            raise HeadError(
                f"The head is ambiguous: the model returns the outputs of {_quoted(matching)}. Choose one of them: "
                f"head={next(reversed(matching))!r}."
            )
        names = list(dict.fromkeys(name for name, _, _ in executed))
        raise HeadError(
            f"The model returned the output of none of the nn.Linear modules it executed ({_quoted(names)}), nor their "
            "softmax, log_softmax or sigmoid, so the head is uncertain. Name the module whose output is the logits: "
            f"head={names[-1]!r}."
        )

    @contextmanager
    def capture(self, look: Callable[[Captured], None] | None = None) -> Iterator[None]:
        """Keep what goes in and out of the head, for `take`, or let `look(captured)` have it."""
        with self._hooked(self._keep if look is None else look):
            yield

    @contextmanager
    def route(self, combine: Callable[[Captured], Tensor]) -> Iterator[None]:
        """Let `combine(captured)` replace what the head returns."""
        with self._hooked(combine, last=True):
            yield

    def clear(self) -> None:
        """Forget what was captured: call it before each batch."""
        self._fired.clear()
        self._pooled = None

    def take(self) -> Captured:
        """What the one call of the head since `clear` saw; clears it.

        Raises:
            HeadError: If the head was not called, or more than once.
        """
        if not self._fired:
            raise HeadError(self.silent_message())
        if len(self._fired) > 1:
            raise HeadError(
                f"The head {self.head!r} was called {len(self._fired)} times in one forward, so a row has no single "
                "embedding. Name a module that is called once with head=, or give a forward_fn that runs the model "
                "once on a batch."
            )
        captured = self._fired[0]
        self.clear()
        return captured

    def silent_message(self) -> str:
        """Why the head may not have been called, and the way out."""
        return (
            f"The head {self.head!r} was not called in the forward of a batch. If another module makes the prediction, "
            "name it with head=; if the step does not run the model, give a forward_fn that does; if the model was "
            "compiled to a graph (torch.compile, torch.export), memorize the uncompiled model."
        )

    def _keep(self, captured: Captured) -> None:
        # Copies: the model may go on to change both tensors in place.
        self._fired.append(Captured(*(tensor.clone() for tensor in captured)))

    @contextmanager
    def _hooked(self, handle: Callable[[Captured], Tensor | None], last: bool = False) -> Iterator[None]:
        def on_head(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
            return handle(self._captured(args, kwargs, output))

        def on_source(_module: nn.Module, _args: Any, output: Any) -> None:
            self._pooled = _pooled(self.embedding, output)

        self.clear()
        with ExitStack() as stack:
            if self._source is not None:
                stack.callback(self._source.register_forward_hook(on_source).remove)
            # Who only looks comes first, so that it sees the base's output beside another tap that replaces it.
            hook = self._head.register_forward_hook(on_head, with_kwargs=True, prepend=not last)
            stack.callback(hook.remove)
            stack.callback(self.clear)
            yield

    def _captured(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Captured:
        if self._source is None:
            embedding = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            name = f"The input of the head {self.head!r}"
        else:
            embedding = self._pooled
            name = f"The embedding {self.embedding!r}"
        if embedding is None:
            raise HeadError(
                f"{name} is not a tensor."
                if self._source is None
                else f"{name} was not computed before the head {self.head!r} was called: name a module that runs "
                "earlier in the same forward."
            )
        if embedding.ndim < 2:
            raise InputError(
                f"{name} has shape {tuple(embedding.shape)}, expected (B, D): the batch dimension is missing. Inputs "
                "of the model need one, too: for a single row give x[None], or "
                "torch.utils.data.default_collate([dataset[0]])."
            )
        if embedding.ndim != 2:
            raise HeadError(
                f"{name} has shape {tuple(embedding.shape)}, expected (B, D): one vector for every row. Name a module "
                "with such an output (or a spatial one, which is average-pooled) with embedding=."
            )
        if not isinstance(output, Tensor) or output.ndim != 2:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise HeadError(
                f"The head {self.head!r} returned {shape}, expected a tensor (B, C). Name another module with head=."
            )
        # Copies: the model may go on in place.
        return Captured(embedding.detach().clone(), output.detach().clone())


def check_returned(model: nn.Module, head: str, captured: Captured, returned: Any) -> None:
    """Raise an error if a head that was named by the user is not the last layer, as far as widths can tell.

    Args:
        model: Holds the head.
        head: Its name.
        captured: What it saw of a batch.
        returned: What the model returned for this batch.
    """
    (rows, width), embedding_width = captured.output.shape, captured.embedding.shape[1]
    widths = {t.shape[1] for t in _tensors(returned) if t.ndim == 2 and len(t) == rows and t.is_floating_point()}
    if not widths or width in widths:
        return
    fitting = [n for n, m in _named_modules(model).items() if isinstance(m, nn.Linear) and m.out_features in widths]
    way_out = f"head={fitting[-1]!r}" if fitting else "that module"
    raise HeadError(
        f"head={head!r} makes outputs of width {width} from an embedding of width {embedding_width}, but the model "
        f"returns width {' and '.join(map(str, sorted(widths)))}: the head is the module whose output is the logits. "
        f"Name {way_out}, or none to have it found. If the model changes the width of its logits, give a forward_fn."
    )


def check_diverged(outputs: Tensor) -> None:
    """Raise an error if a network's outputs `(B, ...)` are NaN or infinite in every row."""
    rows = len(outputs) if outputs.ndim else 0
    if rows and not torch.isfinite(outputs.reshape(rows, -1)).all(dim=1).any():
        raise InputError(
            f"The network's outputs are NaN or infinite in all of the {rows} rows that were tried. If their inputs are "
            "finite, the training has diverged: lower the learning rate, clip gradients (gradient_clip_val of the "
            'Trainer), or compute in a higher precision (precision="32-true").'
        )


def _named_modules(model: nn.Module, aliases: bool = False) -> dict[str, nn.Module]:
    """All submodules by the names the user knows: torch.compile's wrappers (`_orig_mod`) are left out.

    With `aliases`, a module that was assigned under several names has all of them.
    """
    names: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=not aliases):
        if hasattr(module, "_orig_mod"):  # a hook on the wrapper would not see a call of what it wraps
            continue
        names[".".join(part for part in name.split(".") if part != "_orig_mod")] = module
    return names


def _submodule(model: nn.Module, argument: str, name: str) -> nn.Module:
    modules = _named_modules(model, aliases=True)
    if not isinstance(name, str) or not name or name not in modules:
        known = [n for n, module in modules.items() if n and isinstance(module, nn.Linear)] or [n for n in modules if n]
        raise HeadError(
            f"{argument}={name!r} is not a module of {type(model).__name__}. Its modules are named as in "
            f"model.named_modules(), for example {_quoted(known[-5:])}."
        )
    if isinstance(modules[name], torch.jit.ScriptModule):
        raise HeadError(
            f"{argument}={name!r} is part of a torch.jit.script or traced module, where no hook can see it. Memorize "
            "the model before it is compiled."
        )
    return modules[name]


def _pooled(name: str | None, output: Any) -> Tensor:
    """The output of the embedding module as one vector a row: `(B, C, H, W)` is averaged over its positions."""
    tensor = next(iter(_tensors(output)), None)
    if tensor is None or tensor.ndim not in (2, 4, 5):
        shape = "no tensor" if tensor is None else f"shape {tuple(tensor.shape)}"
        raise HeadError(
            f"embedding={name!r} returns {shape}, expected (B, D), or a spatial output (B, D, H, W) or "
            "(B, D, T, H, W) to be average-pooled. Name another module."
        )
    # A copy: an in-place activation may follow before the head is called.
    return tensor.clone() if tensor.ndim == 2 else tensor.flatten(2).mean(dim=2)


def _tensors(result: Any) -> Iterator[Tensor]:
    """All tensors in what a model returned: nested tuples, dicts, dataclasses."""
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping):
        for value in result.values():
            yield from _tensors(value)
    elif isinstance(result, (list, tuple)):
        for value in result:
            yield from _tensors(value)
    elif dataclasses.is_dataclass(result) and not isinstance(result, type):
        for field in dataclasses.fields(result):
            yield from _tensors(getattr(result, field.name))


def _same(output: Tensor, returned: Tensor) -> bool:
    """Whether the model returned this output, or its softmax, log_softmax or sigmoid, perhaps squeezed."""
    if output.numel() != returned.numel() or not output.numel() or output.ndim == 0 or not returned.is_floating_point():
        return False
    returned = returned.detach().reshape(output.shape)
    if torch.equal(output, returned):
        return True
    wide, seen = output.double(), returned.double()
    forms = (wide, wide.log_softmax(-1), wide.softmax(-1), wide.sigmoid())
    tolerance = 1e-5 if returned.dtype in (torch.float32, torch.float64) else 2e-2
    return any(torch.allclose(form, seen, rtol=tolerance, atol=tolerance, equal_nan=True) for form in forms)


def _quoted(names: Any) -> str:
    return ", ".join(repr(name) for name in names)
