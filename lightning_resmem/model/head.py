"""Find the head of a model, capture what goes in and out of it, or replace what comes out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_resmem.errors import HeadError
from lightning_resmem.model.names import named_modules, quoted, submodule
from lightning_resmem.model.places import HEAD, Place, parted, same_positions
from lightning_resmem.model.pooling import Pooling, check_vectors
from lightning_resmem.model.returned import check_diverged, same, tensors, way_out
from lightning_resmem.model.tail import by_module, maker, to_be_named


class Captured(NamedTuple):
    """What one call of the head saw: embedding `(B, D)` and output `(B, C)`, of sequences `(B, T, D)`, `(B, T, C)`."""

    embedding: Tensor
    output: Tensor

    @property
    def rows(self) -> Captured:
        """Each position of sequences as a row, `(B * T, D)` and `(B * T, C)`."""
        return Captured(self.embedding.flatten(0, -2), self.output.flatten(0, -2))


# By head and thread: those who replace what it returns.
_routes: dict[tuple[int, int], list[object]] = {}


class _Seen:
    """What the hooks of one thread have seen since the last `clear`."""

    def __init__(self) -> None:
        self.calls: list[Captured] = []
        # Of other places than the head's input, with how often each came since the head did, for each who has hooks.
        self.keys: dict[object, list[tuple[Tensor | None, int]]] = {}


class HeadTap:
    """A forward hook on the head: *capture* keeps its input and output, *route* replaces its output.

    The hook sits on the head itself, so it works whatever the model's steps call: `self(x)`, `self.net(x)`,
    `self.head(h)`, or a model from another library. Threads may use a tap, and the model, at the same time: each
    captures its own calls.

    Args:
        model: The model that holds the head.
        head: Name of the head in `model`, e.g. `"net.fc"`.
        embedding: Name of the module whose output is the key, e.g. `"net.layer4"`, or whose input, `"net.mlp:input"`
            (see `Place`; feature maps are averaged over their positions, see `Pooling`). By default the key is the
            input of the head. Of several, from `places.joined`, the keys stand side by side.
        channels: Where the feature maps of `embedding` have their channels, as `describe` tells, if that is known.

    Attributes:
        names: Of the places of the keys, none for the head's input alone.
        widths: Of the keys that stand side by side, once the head was called.

    Raises:
        HeadError: If a name is not a module of the model, or one that cannot be hooked.

    Examples:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> tap = HeadTap(model, head="2")
        >>> with tap.capture():
        ...     _ = model(torch.ones(1, 2))
        ...     tap.take().embedding.shape
        torch.Size([1, 3])
    """

    def __init__(self, model: nn.Module, head: str, embedding: str | None = None, channels: str | None = None) -> None:
        self.head, self.embedding = head, embedding
        self._head = submodule(model, "head", head)
        self.names = parted(embedding)
        known = [None] * len(self.names) if channels is None else parted(channels)
        self._poolings = [
            Pooling(model, self._place(name), self._head, channel)
            for name, channel in zip(self.names, known, strict=True)
        ]
        self.widths: tuple[int, ...] = ()
        self._swaps = isinstance(self._head, nn.Conv1d)  # its sequences are (B, D, T) and (B, C, T)
        self._seen: dict[int, _Seen] = {}  # by each thread: its hooks look at its own calls only

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
        executed: list[tuple[str, Tensor]] = []
        thread = threading.get_ident()

        def record(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                if threading.get_ident() == thread:
                    executed.append((name, output.detach().clone()))

            return hook

        with ExitStack() as stack:
            for name, module in named_modules(model).items():
                if isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(record(name)).remove)
            result = run()
        if not executed:
            raise HeadError(
                "No nn.Linear was executed in a forward of the model, so its head cannot be found. "
                f"{to_be_named(model, maker(model, run))} "
                "(Modules inside a torch.jit.script or exported model cannot be hooked at all.)"
            )
        returned, (last, last_output) = list(tensors(result)), executed[-1]
        matching = {name: output for name, output in executed if any(same(output, r) for r in returned)}
        if not returns_outputs:
            # What a step or a forward_fn returns may be anything; where it is an output, it tells heads apart.
            alike = [name for name, output in matching.items() if output.shape == last_output.shape]
            return cls(model, alike[0] if len(alike) == 1 else last, embedding)
        if len(matching) == 1:
            return cls(model, next(iter(matching)), embedding)
        check_diverged(last_output)
        if matching:
            # Auxiliary outputs, or a variance, are returned after the prediction.
            first = next(name for r in returned for name, output in matching.items() if same(output, r))
            raise HeadError(
                f"The head is ambiguous: the model returns the outputs of {quoted(matching)}. Choose the one that "
                f"makes the prediction, such as the first that is returned: head={first!r}."
            )
        outputs = dict(executed)
        told = by_module(maker(model, run), last) or way_out(outputs, result)
        raise HeadError(
            f"The model returned the output of none of the nn.Linear modules it executed ({quoted(outputs)}), nor "
            f"their softmax, log_softmax or sigmoid, so the head is uncertain. {told}"
        )

    def describe(self) -> dict[str, str]:
        """The names of head and embedding, and how that is averaged, for a memory's provenance."""
        names = {"head": self.head}
        if self.embedding is not None:
            names["embedding"] = self.embedding
            channels = [pooling.channels for pooling in self._poolings]
            if channels[0] is not None and len(channels) == 1:
                names["channels"] = channels[0]
            elif any(channels):
                names["channels"] = json.dumps(channels)
        return names

    @property
    def sides(self) -> dict[str, int]:
        """The widths of keys that stand side by side, by their names, once the head was called."""
        return dict(zip(self.names, self.widths, strict=False))

    def only(self, model: nn.Module, place: int) -> HeadTap:
        """A tap on the same head, for one of the places."""
        name = self.names[place]
        return HeadTap(model, self.head, None if name == HEAD else name, self._poolings[place].channels)

    def _place(self, name: str) -> Place:
        return Place(self.head, "input") if name == HEAD and len(self.names) > 1 else Place.parse(name)

    @contextmanager
    def capture(self, look: Callable[[Captured], None] | None = None) -> Iterator[None]:
        """Keep what goes in and out of the head, for `take`, or let `look(captured)` have it.

        The model may go on to change both tensors in place: `look` has to copy what it keeps, as `combine` of a route.
        """
        with self._hooked(self._keep if look is None else look):
            yield

    @contextmanager
    def route(self, combine: Callable[[Captured], Tensor]) -> Iterator[None]:
        """Let `combine(captured)` replace what the head returns; of routes in one another the innermost does."""
        key, mine = (id(self._head), threading.get_ident()), object()
        routes = _routes.setdefault(key, [])

        def innermost(captured: Captured) -> Tensor | None:
            return combine(captured) if routes[-1] is mine else None

        routes.append(mine)
        try:
            with self._hooked(innermost, last=True):
                yield
        finally:
            routes.remove(mine)
            if not routes:
                del _routes[key]

    def clear(self) -> None:
        """Forget what was captured: call it before each batch."""
        self._seen.pop(threading.get_ident(), None)

    def take(self) -> Captured:
        """What the one call of the head since `clear` saw; clears it.

        Raises:
            HeadError: If the head, or the module of the embedding, was not called, or more than once.
        """
        calls = self._own.calls
        self.check_calls(len(calls))
        captured = calls[0]
        self.clear()
        return captured

    def check_calls(self, calls: int) -> None:
        """Raise `HeadError` unless there was one call of the head."""
        if not calls:
            raise HeadError(self.silent_message())
        if calls > 1:
            raise HeadError(
                f"The head {self.head!r} was called {calls} times in one forward, so a row has no single "
                "embedding. Name a module that is called once with head=, or give a forward_fn that runs the model "
                "once on a batch."
            )

    def silent_message(self) -> str:
        """Why the head may not have been called, and the way out."""
        return (
            f"The head {self.head!r} was not called in the forward of a batch. If another module makes the prediction, "
            "name it with head=; if the step does not run the model, give a forward_fn that does; if the model was "
            "compiled to a graph (torch.compile, torch.export), memorize the uncompiled model."
        )

    @property
    def _own(self) -> _Seen:
        return self._seen.setdefault(threading.get_ident(), _Seen())

    def _keep(self, captured: Captured) -> None:
        # Copies: the model may go on to change both tensors in place.
        self._own.calls.append(Captured(*(tensor.clone() for tensor in captured)))

    @contextmanager
    def _hooked(self, handle: Callable[[Captured], Tensor | None], last: bool = False) -> Iterator[None]:
        thread, mine = threading.get_ident(), object()

        # Another thread may see the hook before, or after, torch knows that it takes keyword arguments.
        def on_head(_module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            taken = self._own.keys.get(mine, nothing)
            self._own.keys[mine] = [(seen, 0) for seen, _ in taken]
            for name, (_, calls) in zip(self.names, taken, strict=True):
                if calls > 1 and not last:  # a call that has failed leaves its key behind where others follow
                    raise HeadError(
                        f"The module of embedding={name!r} was called {calls} times before the head was, so a "
                        "row has no single key. Name one that is called once in a forward."
                    )
            answer = handle(self._captured([seen for seen, _ in taken], args, *rest))
            # Contiguous, as the head's own is: the model may go on with a view.
            return answer if answer is None or not self._swaps else answer.transpose(1, 2).contiguous()

        def take(place: int) -> Callable[[Tensor], None]:
            def taking(key: Tensor) -> None:
                taken = self._own.keys.setdefault(mine, list(nothing))
                taken[place] = key, taken[place][1] + 1

            return taking

        nothing: list[tuple[Tensor | None, int]] = [(None, 0)] * len(self.names)
        self.clear()
        with ExitStack() as stack:
            for place, pooling in enumerate(self._poolings):
                stack.enter_context(pooling.watching(take(place)))
            # Who only looks comes first, so that it sees the base's output beside another tap that replaces it.
            hook = self._head.register_forward_hook(on_head, with_kwargs=True, prepend=not last)
            stack.callback(hook.remove)
            stack.callback(self.clear)
            yield

    def _captured(
        self, keys: Sequence[Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Captured:
        inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if self._swaps:
            output, inputs = (
                part.transpose(1, 2) if isinstance(part, Tensor) and part.ndim == 3 else part
                for part in (output, inputs)
            )
        if not self._poolings:
            named = [(f"The input of the head {self.head!r}", inputs)]
        else:
            named = [(f"The embedding {name!r}", key) for name, key in zip(self.names, keys, strict=True)]
        for name, key in named:
            self._check_key(name, key)
        if not isinstance(output, Tensor) or output.ndim not in (2, 3):
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise HeadError(
                f"The head {self.head!r} returned {shape}, expected a tensor (B, C), or of sequences (B, T, C), of "
                "an nn.Conv1d (B, C, T). Name another module with head=."
            )
        parts = []
        for place, (name, embedding) in enumerate(named):
            assert embedding is not None
            if self._poolings and embedding.ndim == 3:
                embedding = self._of_tokens(place, embedding, output, inputs)
            if embedding.shape[:-1] != output.shape[:-1] and max(embedding.ndim, output.ndim) > 2:
                raise HeadError(
                    f"{name} has shape {tuple(embedding.shape)} and what the head returned {tuple(output.shape)}: of "
                    "sequences there is one embedding for each output, (B, T, D) and (B, T, C). Name other modules "
                    "with embedding= and head=."
                )
            parts.append(embedding.detach())
        self.widths = tuple(part.shape[-1] for part in parts)
        return Captured(parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), output.detach())

    def _check_key(self, name: str, embedding: Tensor | None) -> None:
        """Raise an error for what is no key, or was not seen."""
        if embedding is None:
            raise HeadError(
                f"{name} was not computed before the head {self.head!r} was called: name a module that runs earlier "
                "in the same forward."
                if self._poolings
                else f"{name} is not a tensor."
            )
        check_vectors(name, embedding)

    def _of_tokens(self, place: int, keys: Tensor, output: Tensor, inputs: Tensor | None) -> Tensor:
        """Keys of tokens `(B, T, D)`, for those positions that the head has an output for."""
        if output.ndim == 2:
            raise self._poolings[place].unfit(keys)
        keys = self._poolings[place].by_position(keys, output.shape[1])
        if self._swaps or inputs is None or inputs.ndim != 3 or output.shape[1] >= keys.shape[1]:
            return keys
        asked = same_positions(keys, inputs)
        if asked is None:
            raise HeadError(
                f"The embedding {self.names[place]!r} has shape {tuple(keys.shape)}, and the head {self.head!r} was "
                f"asked for {output.shape[1]} of the {keys.shape[1]} positions: it cannot be told for which, as its "
                "input is no slice of them. Ask for all (logits_to_keep=0 in transformers), or for the last ones."
            )
        return asked
