"""Places of a model whose keys may be better than the head's input, found by a look at one forward."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import lightning.pytorch as L
from torch import Tensor, nn

from lightning_resmem.errors import HeadError, ResMemWarning
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.names import named_modules
from lightning_resmem.model.places import AUTO, HEAD, input_of, joined, output_of

# How many places there are beside the head's input, and how wide their keys may be: all are kept until one is chosen.
MOST_PLACES, MOST_WIDTH = 3, 2048
# A layer that makes states so much wider is the first of a feed-forward block.
_WIDENS = 2


class _Given(NamedTuple):
    """What a module with weights was given, and the width of what it made of that."""

    module: str
    states: Tensor
    made: int


def find_tap(model: L.LightningModule, reader: BatchReader, run: Callable[[], Any]) -> HeadTap:
    """A tap on the head that a reader names, or on the one that is found; of `embedding="auto"` on all candidates.

    Args:
        model: The model.
        reader: Names head and embedding.
        run: Runs one batch through the model and returns what the model returned.

    Raises:
        HeadError: As `HeadTap` and `HeadTap.find`.
    """
    embedding = None if reader.embedding == AUTO else reader.embedding
    if reader.head is not None:
        tap = HeadTap(model, reader.head, embedding)
    else:
        tap = HeadTap.find(model, run, embedding, returns_outputs=reader.returns_outputs(model))
    if reader.embedding != AUTO:
        return tap
    places = candidates(model, tap.head, run)
    return HeadTap(model, tap.head, joined([HEAD, *places])) if places else tap


def candidates(model: nn.Module, head: str, run: Callable[[], Any]) -> list[str]:
    """The natural places for keys beside the head's input, the latest last; there may be none.

    Of tokens that is the input of the last feed-forward block. Else it is what the last blocks are given, the outputs
    of those before: of the states that one part of the model hands to another, those between its outermost parts, and
    as many between inner ones as fill up the number. What the network itself is given is none of them.

    Args:
        model: The model.
        head: Name of its head.
        run: Runs one batch through the model.
    """
    given = _given(model, head, run)
    into_head = next((step.states for step in given if step.module == head), None)
    if into_head is None:
        return []
    first, modules = given[0].states, named_modules(model)
    between = [
        step
        for step in given
        if step.module != head and not _same(step.states, first) and not _same(step.states, into_head)
    ]
    if into_head.ndim == 3:
        leaves = [step for step in between if not any(modules[step.module].children())]
        wide = [step for step in leaves if step.made >= _WIDENS * step.states.shape[-1]]
        found = [step.module for step in wide if step.states.shape[:2] == into_head.shape[:2]][-1:]
    else:
        found = _outermost([step for step in between if _fits(step.states, into_head)])
    return [place for module in found if _has_key(model, head, place := f"{module}:input", run)]


def _given(model: nn.Module, head: str, run: Callable[[], Any]) -> list[_Given]:
    """What each module with a matrix of weights was given before the head was called, if it was called once."""
    thread, calls = threading.get_ident(), list[_Given]()

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *_: Any) -> None:
            if threading.get_ident() == thread and (states := input_of(module, args, kwargs)) is not None:
                calls.append(_Given(name, states.detach(), 0))

        return hook

    def finish(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            made = output_of(output)
            if threading.get_ident() == thread and made is not None and made.ndim:
                widths[name] = made.shape[-1]

        return hook

    widths: dict[str, int] = {}
    with ExitStack() as stack:
        for name, module in named_modules(model).items():
            if any(weight.ndim > 1 for weight in module.parameters()):
                stack.callback(module.register_forward_pre_hook(record(name), with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(finish(name)).remove)
        run()
    end = next((place for place, step in enumerate(calls) if step.module == head), len(calls) - 1)
    names = [step.module for step in calls]
    once = [step for step in calls[: end + 1] if names.count(step.module) == 1]
    return [step._replace(made=widths.get(step.module, 0)) for step in once]


def _outermost(steps: Sequence[_Given]) -> list[str]:
    """The last states, by the outermost modules that are given them: inner ones only as far as others are few."""
    distinct: list[_Given] = []
    for step in steps:  # an outer module is called before those in it
        if not any(_same(step.states, other.states) for other in distinct):
            distinct.append(step)
    pool: list[_Given] = []
    for depth in sorted({step.module.count(".") for step in distinct}):
        pool = [step for step in distinct if step.module.count(".") <= depth]
        if len(pool) >= MOST_PLACES:
            break
    return [step.module for step in pool[-MOST_PLACES:]]


def _fits(states: Tensor, into_head: Tensor) -> bool:
    """Whether there is a vector for each row: a matrix, or feature maps."""
    return states.ndim in (2, 4, 5) and len(states) == len(into_head)


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, both of which are still there, are the same part of memory, of whatever shape."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _has_key(model: nn.Module, head: str, place: str, run: Callable[[], Any]) -> bool:
    """Whether a tap finds one key for each row there, and a narrow one."""
    try:
        tap = HeadTap(model, head, place)
        with warnings.catch_warnings(), tap.capture():
            warnings.simplefilter("error", ResMemWarning)  # channels that nothing tells
            run()
            return tap.take().embedding.shape[-1] <= MOST_WIDTH
    except (HeadError, ResMemWarning):
        return False
