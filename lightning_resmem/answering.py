"""A base whose head is looked at, or replaced by the combined prediction: the calls that a ResMemModule makes."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
from torch import Tensor

from lightning_resmem.errors import InputError
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.weights_watch import WeightsWatch
from lightning_resmem.metrics.answer import Answer
from lightning_resmem.model.batches import BatchReader, has_forward
from lightning_resmem.model.head import Captured, HeadTap
from lightning_resmem.model.modes import evaluation_mode
from lightning_resmem.model.names import likely_head
from lightning_resmem.model.returned import swapped


class Answering:
    """Runs a base in evaluation mode, after a look at its weights.

    Args:
        base: The model.
        memory: Filled with its residuals.
        watch: Of both.
        reader: Runs batches; names the head, if it is known.
        channels: Where feature maps of the embedding have their channels, if that is known.
    """

    def __init__(
        self,
        base: L.LightningModule,
        memory: ResidualMemory,
        watch: WeightsWatch,
        reader: BatchReader,
        channels: str | None,
    ) -> None:
        self._base, self._memory, self._watch, self._reader = base, memory, watch, reader
        self._tap = None if reader.head is None else HeadTap(base, reader.head, reader.embedding, channels)

    def describe(self) -> dict[str, str]:
        """The names of head and embedding, as far as they are known, for a memory's provenance."""
        return {} if self._tap is None else self._tap.describe()

    def find_again(self) -> None:
        """The head, where the base has made its layers anew."""
        if self._tap is not None:
            self._tap = HeadTap(self._base, **self._tap.describe())

    def captured(self, batch: Any) -> Captured:
        """What the head sees of a batch."""
        returns_outputs = self._reader.returns_outputs(self._base)
        with (
            self._reader.quiet(self._base),
            self._ready(lambda: self._reader.run(self._base, batch), returns_outputs) as (tap, run),
            tap.capture(),
        ):
            run()
            return tap.take()

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the base's `forward` returns, as `ResMemModule.forward` says."""
        if not has_forward(self._base):
            return Answer.outputs_of(self._memory, *self._captured_whole(*args, **kwargs))
        said: list[Tensor] = []

        def combine(captured: Captured) -> Tensor:
            said.append(Answer.outputs_of(self._memory, *captured))
            return said[-1].clone()  # the base may go on in place

        with self._ready(lambda: self._base(*args, **kwargs), returns_outputs=True) as (tap, run), tap.route(combine):
            returned = run()
            tap.check_calls(len(said))
        if _has_logits(returned):
            return returned
        (outputs,) = said
        if isinstance(returned, Tensor) and swapped(outputs, returned):
            return outputs.transpose(1, 2).contiguous()
        is_flat = isinstance(returned, Tensor) and returned.shape == outputs.shape[:-1] and outputs.shape[-1] == 1
        return outputs[..., 0] if is_flat else outputs

    @contextmanager
    def combined(self) -> Iterator[None]:
        """Let the base itself answer with the memory, in this thread."""
        if self._tap is None:
            raise InputError(
                "combined() replaces what the head of the base returns, and the head is not known yet: give "
                f'ResMemModule(..., head="{likely_head(self._base)}"), or what its name is, or call the module with a '
                "batch before."
            )

        def combine(captured: Captured) -> Tensor:
            with self._memory.reading():
                self._watch.check("The base goes on")
                return Answer.outputs_of(self._memory, *captured)

        self._watch.check("ResMemModule.combined() starts", surely=True)
        with evaluation_mode(self._base), self._tap.route(combine):
            yield

    @contextmanager
    def _ready(self, run: Callable[[], Any], returns_outputs: bool) -> Iterator[tuple[HeadTap, Callable[[], Any]]]:
        """The head, which is found by a run of the base where nobody has named it."""
        with evaluation_mode(self._base):
            self._watch.check("ResMemModule runs")
            if self._tap is None:
                self._tap = HeadTap.find(self._base, run, self._reader.embedding, returns_outputs)
            yield self._tap, run

    def _captured_whole(self, *args: Any, **kwargs: Any) -> Captured:
        """What the head saw of the one argument, a batch; for a base without a forward."""
        wanted = f"{type(self._base).__name__} has no forward, so ResMemModule takes a batch as the loaders yield it"
        if len(args) != 1 or kwargs:
            raise InputError(f"{wanted}, and got {len(args) + len(kwargs)} arguments.")
        try:
            return self.captured(args[0])
        except InputError as error:
            raise InputError(f"{wanted}. {error}") from error


def _has_logits(returned: Any) -> bool:
    """Whether a model returned a dataclass with its logits, as those of transformers do, perhaps beside a loss."""
    return dataclasses.is_dataclass(returned) and isinstance(getattr(returned, "logits", None), Tensor)
