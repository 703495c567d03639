"""The memory pass: every row of a loader once, through the trained model, into whoever wants it."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.core.hooks import DataHooks
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_resmem.collection.chunks import Chunk, Labels, Waiting, report_left_out
from lightning_resmem.collection.parts import Part
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.rehearsal import Sample, check_augmentation, check_order, naming
from lightning_resmem.errors import InputError
from lightning_resmem.memory.checks import as_ids
from lightning_resmem.memory.token_ids import STRIDE, token_ids
from lightning_resmem.model.batches import TRANSFER_HOOKS, BatchReader, tensors_of
from lightning_resmem.model.candidates import find_tap
from lightning_resmem.model.head import Captured, HeadTap
from lightning_resmem.model.modes import evaluation_mode
from lightning_resmem.model.places import AUTO
from lightning_resmem.model.placing import device_of
from lightning_resmem.model.returned import DivergedError, check_diverged, check_returned
from lightning_resmem.model.sequences import RowReader, merged
from lightning_resmem.model.tail import check_tail
from lightning_resmem.model.times import read_times
from lightning_resmem.progress import progress_bar
from lightning_resmem.tasks import Regression, Task

# A pass is timed over its first batches; one of more than so many seconds is announced.
_TIMED_BATCHES = 5
_LONG_SECONDS = 20.0


class _Read(NamedTuple):
    """A batch: its rows, how many rows or sequences it had, and how many positions of sequences are no rows."""

    chunk: Chunk
    size: int
    padding: int = 0


class Pass:
    """Reads rows through a model under a trainer: evaluation mode, no gradients, the trainer's precision and transfers.

    Args:
        trainer: With its strategy set up (inside `fit`, or another of its entry points).
        model: On its device.
        reader: Reads batches, and names the head if it is not to be found.
        task: Of the memory: what targets are.
        show_progress: Whether rank zero shows progress bars.

    Attributes:
        labels: Which targets rows may have.
        rows: Reads targets; of sequences it knows whether they are shifted.
        length: Positions of the longest sequence so far; 0 where rows are no positions of sequences.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        reader: BatchReader,
        task: Task,
        show_progress: bool = False,
    ) -> None:
        self._trainer, self._model, self._reader = trainer, model, reader
        self._task, self.labels = task, Labels(task, model)
        self.rows, self.length = RowReader(reader, model, task), 0
        self.ranks = Ranks(trainer)
        self.num_local_processes = trainer.num_devices
        self._transfers = _transfers(trainer)
        self.show_progress = show_progress and self.ranks.rank == 0
        # Holds the tap's hooks, from the first batch to the end of a pass.
        self._capturing = ExitStack()
        self._tapped = self._trains = False
        self.tap: HeadTap | None = None  # found in the first forward, as far as names do not tell
        if reader.head is not None and reader.embedding != AUTO:
            self.tap = HeadTap(model, reader.head, reader.embedding)

    def sample(self, parts: Sequence[Part]) -> Chunk | None:
        """Read one small batch; randomness is left as it was.

        Returns:
            The rows, or None if reading them would use them up.
        """
        for part in parts:
            if part.sample is not None:
                with self._evaluating(), self._capturing:
                    return self._checked(self._sample(part)[0].chunk, part)
        return None

    def rehearse(self, parts: Sequence[Part], check: Callable[[Chunk], None], compare: bool = True) -> list[Chunk]:
        """Read the first rows of every part, so that what is wrong shows before hours of training.

        Args:
            parts: From `loaders.plan`.
            check: Is given the rows of each part.
            compare: They are to be memorized: read them twice, and warn if they differ.

        Returns:
            The rows of each part that can be read without using them up; randomness is left as it was.
        """
        chunks, self._trains = [], self._trainer.state.fn == TrainerFn.FITTING
        with self._evaluating(), self._capturing:
            for part in parts:
                with naming(part.dataset if compare and len(parts) > 1 else None):
                    found = self._rehearsed(part, compare)
                    if found is not None:
                        check(found)
                        chunks.append(found)
        return chunks

    def _rehearsed(self, part: Part, compare: bool) -> Chunk | None:
        if part.sample is not None:
            sample, source = self._sample(part)
            if compare:
                check_augmentation(sample, self._samples(part, source)[0], part.dataset)
            return self._checked(sample.chunk, part)
        if part.start is None or self._reader.gives_ids:
            return None
        samples = self._samples(part, part.start)
        check_order(samples, self._samples(part, part.start), part.dataset)
        return self._checked(samples[0].chunk, part) if samples else None

    def _checked(self, chunk: Chunk, part: Part) -> Chunk:
        check_diverged(torch.cat([chunk.outputs, chunk.embeddings], dim=1))
        try:
            self.labels.check(self.labels.usable(chunk), self._numbered(part))
        except InputError as error:
            raise InputError(str(error) + self._hints()) from error
        return chunk

    def _hints(self) -> str:
        """What nobody has said of targets that cannot be, and may be the cause."""
        hints = ""
        if self._reader.targets_fn is None:
            hints += (
                " (If the steps give the loss other targets than the batch holds, mapped, converted or one column of "
                "them, give targets_fn=lambda batch: ... that returns those.)"
            )
        if self._reader.head is None and self.tap is not None:
            hints += (
                f" (The head that was found is {self.tap.head!r}: if another module makes the prediction, name it with "
                "head=.)"
            )
        return hints

    def _sample(self, part: Part) -> tuple[Sample, Iterable[Any]]:
        """A small batch with a row that is finite, if any of a few has one, and the loader that it is from."""
        assert part.sample is not None
        found: list[tuple[Sample, Iterable[Any]]] = []
        failures: list[DivergedError] = []
        for source in (part.sample, *part.others):
            try:
                found.append((self._samples(part, source)[0], source))
            except DivergedError as error:  # the head cannot be told by outputs that are NaN
                failures.append(error)
            else:
                if len(self.labels.usable(found[-1][0].chunk).ids):
                    return found[-1]
        if not found:
            raise failures[0]
        return found[0]

    def _samples(self, part: Part, batches: Iterable[Any]) -> list[Sample]:
        samples, first_row = list[Sample](), 0
        for index, batch in enumerate(batches):
            batch = self._moved(batch)
            # Copies: the model may change its input in place.
            inputs = [tensor.detach().clone() for tensor in tensors_of(batch)]
            found = self._read(batch, part, index, first_row)
            first_row += found.size
            samples.append(Sample(found.chunk, inputs))
        return samples

    def run(self, parts: Sequence[Part], consume: Callable[[Chunk], None], doing: str) -> int:
        """Read all rows of this rank and hand them on, a few batches at a time.

        Args:
            parts: From `loaders.plan`.
            consume: Takes each chunk of some MiB.
            doing: For the progress bar and for errors: "collecting training rows".

        Returns:
            Number of rows read by this rank.
        """
        rows, started = 0, time.monotonic()
        if self._reader.gives_ids:  # which are no positions that start at some id
            parts = [replace(part, first_id=0) for part in parts]
        num_batches = sum(part.num_batches or 0 for part in parts)
        total = num_batches if all(part.num_batches is not None for part in parts) else None
        waiting = Waiting(consume, self.labels)
        with (
            self.ranks.together(doing) as check,
            self._evaluating(),
            self._capturing,
            progress_bar(self.show_progress, doing, total) as advance,
        ):
            for part in parts:
                read = 0
                for index, batch in enumerate(part.batches):
                    check()
                    chunk, count, padding = self._read(self._moved(batch), part, index, read)
                    waiting.add(chunk, self._numbered(part), padding)
                    read, rows = read + count, rows + len(chunk.ids)
                    advance()
                    if index == _TIMED_BATCHES and part is parts[0]:
                        seconds = (time.monotonic() - started) / (index + 1) * num_batches
                        if seconds > _LONG_SECONDS:
                            rank_zero_info(f"ResMem: {doing} will take about {seconds:.0f} s.")
                if part.num_rows is not None and read != part.num_rows:
                    raise InputError(
                        f"A loader yielded {read} rows for {part.num_rows} positions, so ids would be wrong: its "
                        "collate_fn (or batch_size) drops rows, or puts the positions of sequences first, (T, B). "
                        "Give memory_dataloader= with one row for each position."
                    )
                waiting.flush(self._numbered(part))
        report_left_out(self.ranks, waiting, rows, doing.removeprefix("collecting "))
        return rows

    def rows_of(self, count: int | None) -> int | None:
        """How many rows so many rows of a dataset are: of sequences, each position of the longest so far."""
        return None if count is None else count * max(1, self.length)

    def describe_rows(self) -> dict[str, str]:
        """What a memory's provenance says of rows that are positions of sequences; every rank calls this.

        Raises:
            InputError: If ranks found different things about them.
        """
        found = self.ranks.gather_objects(self.rows.describe() if self.length else None)
        if not any(of_rank is not None for of_rank in found):
            return {}
        shift = merged(found)
        if shift.get("shift") == "1":
            rank_zero_info(
                "ResMem: the labels are the model's own inputs, so the output at position t belongs to the label at "
                "t + 1, as in causal language models. If it does not, give a targets_fn."
            )
        return {"stride": str(STRIDE), **shift}

    def _moved(self, batch: Any) -> Any:
        """A batch as the model gets it: the same steps, in the same order, as in the trainer's own evaluation loop."""
        batch = self._trainer.precision_plugin.convert_input(batch)
        if self._transfers:
            batch = self._trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
            batch = self._trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        return batch

    def _read(self, batch: Any, part: Part, index: int, first_row: int) -> _Read:
        trainer, model = self._trainer, self._model
        with trainer.precision_plugin.forward_context():
            if self.tap is None:
                self.tap = find_tap(model, self._reader, lambda: self._reader.run(model, batch))
            if not self._tapped:
                self._capturing.enter_context(self.tap.capture())
                self._capturing.callback(setattr, self, "_tapped", False)
                self._tapped = True
            self.tap.clear()
            returned = self._reader.run(model, batch)
            captured = self.tap.take()
        if index == 0:
            returns_outputs, is_regression = self._reader.returns_outputs(model), isinstance(self._task, Regression)
            check_returned(model, self.tap.head, *captured, returned, returns_outputs, is_regression)
            if self._trains and returns_outputs:
                # A context of its own: autocast of older torch keeps the casts of weights made without gradients.
                with trainer.precision_plugin.forward_context():
                    check_tail(model, self.tap.head, lambda: self._reader.run(model, batch), trainer.optimizers)
        return self._rows(captured, batch, part, index, first_row)

    def _rows(self, captured: Captured, batch: Any, part: Part, index: int, first_row: int) -> _Read:
        targets, kept, positions = self.rows.targets(batch, captured.output.shape)
        count = len(captured.embedding)
        if not targets.ndim or len(targets) != count:
            raise InputError(
                f"A batch has {count} embeddings and targets of shape {tuple(targets.shape)}: the number of rows must "
                "be the same. Give a targets_fn that returns one target for each row."
            )
        ids = self._reader.ids(batch)
        ids = part.ids(index, first_row, count) if ids is None else ids
        times_fn = self._reader.times_fn
        times = ids.new_empty(len(ids), 0) if times_fn is None else read_times(times_fn, batch)
        chunk, padding = Chunk(*captured, targets.detach(), ids, times), 0
        if kept is not None and positions is not None:
            if times_fn is not None:
                raise InputError("times_fn is for rows, and here each position of a sequence is one: leave it out.")
            chunk = chunk._replace(times=times.new_empty(*kept.shape, 0))
            self.length = max(self.length, kept.shape[1])
            chunk = chunk._replace(ids=token_ids(_of_sequences(chunk.ids, count), positions.to(chunk.ids.device)))
            chunk = chunk.rows(kept)
            padding = kept.numel() - len(chunk.ids)
        # Autocast leaves bfloat16 or float16 here, which distances and softmax are not computed in.
        embeddings, outputs = _at_least_float32(chunk.embeddings), _at_least_float32(chunk.outputs)
        return _Read(chunk._replace(embeddings=embeddings, outputs=outputs), count, padding)

    def _numbered(self, part: Part) -> Part:
        """A part with ids as its rows have them, once a batch was read."""
        return replace(part, stride=STRIDE) if self.length else part

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        model, state = self._model, self._trainer.state
        stage, device = state.stage, device_of(model)
        # Loaders and augmentations draw random numbers; training goes on as if nobody had. Rows outlive this pass, and
        # tensors made in inference mode could never be changed again.
        with (
            isolate_rng(include_cuda=False),  # all GPUs would be touched, those of other ranks, too
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            evaluation_mode(model),
            self._reader.quiet(model),
        ):
            # Transfer hooks of users ask `self.trainer.training` whether to augment.
            state.stage = RunningStage.PREDICTING
            try:
                yield
            finally:
                state.stage = stage


def _transfers(trainer: L.Trainer) -> bool:
    """Whether a transfer changes anything: finding out for every batch costs as much as a small model's forward."""
    owners = [owner for owner in (trainer.lightning_module, trainer.datamodule) if owner is not None]  # type: ignore[attr-defined]
    hooked = any(is_overridden(hook, owner, DataHooks) for hook in TRANSFER_HOOKS for owner in owners)
    return hooked or trainer.strategy.root_device.type != "cpu"


def _of_sequences(ids: Tensor, count: int) -> Tensor:
    """Ids of sequences `(B,)`; raises an error if they are something else."""
    if ids.shape != (count,):
        raise InputError(
            f"ids_fn returned ids of shape {tuple(ids.shape)} for a batch of {count} sequences: give one for each "
            "sequence, and the positions are added."
        )
    return as_ids(ids)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
