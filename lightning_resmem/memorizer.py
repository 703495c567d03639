"""Fill a memory inside a Trainer, and tune it: what `ResMemCallback` does after `fit`, and `memorize` without one."""

import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torchmetrics import MetricCollection

from lightning_resmem.collection.chunks import Chunk
from lightning_resmem.collection.loaders import check_agreement, plan
from lightning_resmem.collection.memory_pass import Pass
from lightning_resmem.collection.parts import Part, count_rows
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.collection.rehearsal import Storable
from lightning_resmem.collection.row_limit import Kept, RowLimit
from lightning_resmem.collection.samplers import draws_unevenly
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.base_quality import look_at_base
from lightning_resmem.memory.capacity import check_capacity, free_bytes, size
from lightning_resmem.memory.following import build_near
from lightning_resmem.memory.interface import ResidualMemory
from lightning_resmem.memory.knn_lm import note_knn_lm
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.model.batches import BatchReader
from lightning_resmem.model.fingerprint import buffer_sums, describe_weights
from lightning_resmem.model.head import HeadTap
from lightning_resmem.model.modes import evaluating
from lightning_resmem.model.placing import device_of
from lightning_resmem.progress import working
from lightning_resmem.trainer.fit_watch import Rehearsed
from lightning_resmem.trainer.limits import memorize_limits
from lightning_resmem.trainer.save_directory import kind
from lightning_resmem.tuning.keys import check_choice, choose_key, settle, side_by_side, told_choice, told_keys
from lightning_resmem.tuning.rehearsal import try_rows
from lightning_resmem.tuning.result import TuningResult
from lightning_resmem.tuning.tuner import Tuner

# Rows below which a memory without validation rows is not tuned on its own.
_LEAST_ROWS = 50


class Memorized(NamedTuple):
    """What tuning found, if it did, or why it failed."""

    tuning: TuningResult | None
    failure: Exception | None = None


@dataclass(frozen=True)
class Memorizer:
    """Fills a memory and tunes it, inside a trainer whose strategy is set up."""

    memory: ResidualMemory
    tuner: Tuner | None
    reader: BatchReader
    show_progress: bool = False
    limit: RowLimit = RowLimit()  # noqa: RUF009 -- frozen

    def rehearse(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        loaders: Any,
        val_loaders: Any = None,
        limit_batches: int | None = None,
        metrics: MetricCollection | None = None,
    ) -> Rehearsed | None:
        """Find out with a few rows what would fail in `run` or afterwards.

        Args:
            trainer: With its strategy set up.
            model: On its device.
            loaders: The training rows.
            val_loaders: The validation rows, if any.
            limit_batches: As for `run`.
            metrics: Users' own, which will see such rows.

        Returns:
            What was found out, unless nobody names the head and reading a few rows would use them up.
        """
        self.limit.check_tuning(self.tuner is not None and not self._tunes_on(val_loaders))
        check_choice(self.reader.embedding, self.memory, self._tunes_on(val_loaders))
        reading = self._reading(trainer, model)
        parts = self._plan(reading, loaders, limit_batches)
        all_rows = count_rows(reading.ranks, parts)
        val_parts = self._plan_validation(reading, val_loaders) if self._tunes_on(val_loaders) else []
        if val_parts and count_rows(reading.ranks, val_parts) == 0:
            rank_zero_warn(
                "The validation loader has no rows, so there are none to tune the memory on: it is tuned on its own "
                f"rows, each left out of it, if it has at least {_LEAST_ROWS}. Give a validation set with rows.",
                category=ResMemWarning,
            )
        for note in (part.note for part in (*parts, *val_parts) if part.note):
            rank_zero_warn(f"ResMem: {note}", category=ResMemWarning)
        check = Storable()
        with reading.ranks.together("rehearsing the memory pass on a few rows"):
            chunks = reading.rehearse(parts, check)
            usable = next((rows for rows in map(reading.labels.usable, chunks) if len(rows.ids)), None)
            if usable is not None:
                widths = () if reading.tap is None else reading.tap.widths
                all_rows = self.limit.of(reading.rows_of(all_rows))
                try_rows(self.memory, self.tuner, metrics, usable, widths, all_rows)
        with reading.ranks.together("rehearsing tuning on a few validation rows"):
            chunks += reading.rehearse(val_parts, check, compare=False)
        num_outputs = chunks[0].outputs.shape[1] if chunks else None
        return None if reading.tap is None else Rehearsed(reading.tap.head, num_outputs)

    def rehearse_and_run(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        loaders: Any,
        val_loaders: Any = None,
        limit_batches: int | float | None = None,
    ) -> None:
        """For a model that is trained already: no hours lie between the two.

        Args:
            trainer: With its strategy set up.
            model: On its device.
            loaders: The training rows.
            val_loaders: The validation rows, if any.
            limit_batches: As for `run`; None is for loaders that have an end.
        """
        tuned_on = val_loaders if self._tunes_on(val_loaders) else None
        limits = memorize_limits(trainer, loaders, tuned_on, limit_batches)
        self.memory.clear()
        self.rehearse(trainer, model, loaders, val_loaders, limits[0])
        failure = self.run(trainer, model, loaders, val_loaders, *limits).failure
        if failure is not None:
            raise failure

    def run(
        self,
        trainer: L.Trainer,
        model: L.LightningModule,
        loaders: Any,
        val_loaders: Any = None,
        limit_batches: int | None = None,
        limit_val_batches: int | None = None,
    ) -> Memorized:
        """Fill the memory with all rows and tune it, if there is a tuner: without validation rows on its own.

        Args:
            trainer: With its strategy set up.
            model: On its device.
            loaders: The training rows.
            val_loaders: The validation rows, if any.
            limit_batches: Read only so many batches of training rows on each rank.
            limit_val_batches: Read only so many batches of validation rows on each rank.

        Raises:
            Exception: If there is no memory then. What fails in tuning alone is returned.
        """
        started = time.monotonic()
        reading, memory = self._reading(trainer, model), self.memory
        memory.clear()
        reading.ranks.share_buffers(model)
        try:
            with evaluating(model):
                before = buffer_sums(model)
                self._fill(reading, model, self._plan(reading, loaders, limit_batches))
                self._describe(reading, model, before)
            result, failure, seconds = None, None, time.monotonic() - started
            tuned_on = val_loaders if self._tunes_on(val_loaders) else None
            keys = side_by_side(reading.ranks.gather_objects(None if reading.tap is None else reading.tap.sides))
            if isinstance(memory, LocalMemory) and reading.tap is not None and len(keys) > 1:
                result, failure = self._try_tuning(reading, tuned_on, limit_val_batches, keys)
                reading.tap = settle(memory, reading.tap, model, result, keys)
                with reading.ranks.together("building the memory"):
                    build_near(memory, device_of(model))
            with reading.ranks.together("looking at the base"):
                if reading.ranks.rank == 0:
                    look_at_base(memory)
            rank_zero_info(
                f"ResMem: memorized {self.limit.told(memory)} ({size(memory.stats()['bytes'])}, head "
                f"{memory.provenance['head']!r}{told_choice(self.reader.embedding, keys)}) in {seconds:.1f} s."
            )
            if result is None and failure is None:
                result, failure = self._try_tuning(reading, tuned_on, limit_val_batches, {})
            if result is not None:
                if result.balanced is not None and draws_unevenly([loaders, trainer.train_dataloader]):
                    result = replace(result, balanced=result.balanced._replace(uneven=True))
                memory.params = result.params
                note_knn_lm(memory, result.knn_lm)
                rank_zero_info(f"ResMem: {result.summary()}.")
            memory.publish()
            return Memorized(result, failure)
        except BaseException as error:
            memory.clear()  # half a memory would answer, wrongly
            error.add_note(
                "This was ResMem's memory pass: nothing was memorized, and the model is as training left it. "
                "memorize(trainer, model, dataloader) repeats the pass."
            )
            raise

    def _fill(self, reading: Pass, model: L.LightningModule, parts: list[Part]) -> None:
        memory, kept = self.memory, Kept(self.limit, self.memory)
        counted = count_rows(reading.ranks, parts)
        with reading.ranks.together("rehearsing the memory pass on two rows"):
            sample = reading.sample(parts)
            all_rows = self.limit.of(reading.rows_of(counted))
            if sample is not None:
                Storable()(sample)
            if all_rows and sample is not None:
                shape = sample.embeddings.shape[1], sample.outputs.shape[1]
                needed = memory.estimate_bytes(all_rows, *shape)
                words = check_capacity(needed, free_bytes(memory.device), copies=reading.num_local_processes)
                keys = told_keys(reading.tap)
                rank_zero_info(f"ResMem: memorizing {all_rows} training rows takes about {words}{keys}.")
            memory.reserve(self.limit.of(reading.rows_of(sum(part.num_rows or 0 for part in parts))) or 0)
        if reading.ranks.group is not None:
            with reading.ranks.together("reaching the memory"):
                memory.join(reading.ranks.group)
        reading.run(parts, kept.add, "collecting training rows")
        with reading.ranks.together("choosing which rows to keep"):
            kept.finish(reading.ranks)
        memory.show_progress = reading.show_progress
        show = reading.show_progress and isinstance(memory, LocalMemory)  # others tell how far their parts are
        with reading.ranks.together("building the memory"), working(show, "building the memory"):
            if reading.ranks.group is not None:
                memory.gather(reading.ranks.group)
            if not len(memory):
                raise InputError("The training loader yielded no rows to memorize: is its dataset empty?")
            if reading.tap is None or len(reading.tap.names) < 2:  # of several keys one is chosen first
                build_near(memory, device_of(model))

    def _describe(self, reading: Pass, model: L.LightningModule, before: dict[str, int]) -> None:
        """Note where the rows come from: all ranks the same."""
        # A rank without rows has not met the head.
        taps = reading.ranks.gather_objects(None if reading.tap is None else reading.tap.describe())
        names = next(found for found in taps if isinstance(found, dict))
        if reading.tap is None:
            reading.tap = HeadTap(model, **names)
        changed = {name for name, found in buffer_sums(model).items() if before.get(name) != found}
        # What the pass itself has changed (observers, counters) will not be what it was at any later time.
        ignored = set[str]().union(
            *(names for names in reading.ranks.gather_objects(changed) if isinstance(names, set))
        )
        weights = describe_weights(model, ignored) | {"base": kind(model)}
        self.memory.provenance.update(weights | names | self.reader.provenance | reading.describe_rows())

    def _tunes_on(self, val_loaders: Any) -> bool:
        return self.tuner is not None and val_loaders is not None and val_loaders != []  # both mean none to Lightning

    def _try_tuning(
        self, reading: Pass, val_loaders: Any, limit_batches: int | None, keys: dict[str, int]
    ) -> tuple[TuningResult | None, Exception | None]:
        """What tuning found on validation rows or on the memory's own, or why it failed, on all ranks."""
        if self.tuner is None:
            return None, None
        try:
            result = None
            if val_loaders is not None:
                parts = self._plan_validation(reading, val_loaders, limit_batches)
                result = self._tune(reading, self.tuner, parts, keys)
            if result is None and len(keys) < 2 and len(self.memory) >= _LEAST_ROWS and self.limit.may_tune():
                result = self._tune_leave_one_out(reading.ranks, self.tuner, reading.show_progress)
            return result, None
        except Exception as error:
            reading.ranks.gather_objects("alive")  # if a rank was lost, the memory is, too
            error.add_note(
                "This was ResMem's tuning: the memory has all its rows, and params that are measured, not tuned. Mend "
                "what has failed, and tune the saved memory with `resmem tune`, or start over with memorize(trainer, "
                "model, dataloader, val_dataloader); memory.params = ResMemParams(...) sets params by hand."
            )
            return None, error

    def _tune(self, reading: Pass, tuner: Tuner, parts: list[Part], keys: dict[str, int]) -> TuningResult | None:
        chunks: list[Chunk] = []
        reading.run(parts, chunks.append, "collecting validation rows")
        # A rank without rows takes part with none of the others' kind.
        kinds = reading.ranks.gather_objects(Chunk(*(column[:0].cpu() for column in chunks[0])) if chunks else None)
        chunks = chunks or [kind for kind in kinds if isinstance(kind, Chunk)][:1]
        if not chunks:  # limit_val_batches=0
            return None
        with reading.ranks.together("tuning"), working(reading.show_progress, "tuning"):
            rows = Chunk(*(torch.cat(column) for column in zip(*chunks, strict=True)))
            if isinstance(self.memory, LocalMemory) and len(keys) > 1:
                return choose_key(self.memory, tuner, keys, rows, reading.ranks.gather)
            memory, gather = self.memory.at(rows.asked_at), reading.ranks.gather
            return tuner.tune(memory, *rows[:3], gather=gather, groups=memory.sequences_of(rows.ids))

    def _tune_leave_one_out(self, ranks: Ranks, tuner: Tuner, show_progress: bool) -> TuningResult:
        with ranks.together("tuning"), working(show_progress, "tuning"):
            return tuner.tune_leave_one_out(self.memory, gather=ranks.gather, rank=ranks.rank, num_ranks=ranks.size)

    def _reading(self, trainer: L.Trainer, model: L.LightningModule) -> Pass:
        return Pass(trainer, model, self.reader, self.memory.task, self.show_progress)

    def _plan_validation(self, reading: Pass, loaders: Any, limit_batches: int | None = None) -> list[Part]:
        return [replace(part, kind="validation rows") for part in self._plan(reading, loaders, limit_batches)]

    def _plan(self, reading: Pass, loaders: Any, limit_batches: int | None = None) -> list[Part]:
        ranks = reading.ranks
        with ranks.together("planning which rows to read"):
            parts = plan(loaders, reading.rows.count_rows, ranks.rank, ranks.size, limit_batches)
        check_agreement(ranks.gather_objects([part.drawn for part in parts]))
        if ranks.size > 1 and not self.reader.gives_ids and not all(part.drawn for part in parts):
            rank_zero_warn(
                f"A loader without positions (an IterableDataset) is read by {ranks.size} ranks: each of them must "
                "yield rows of its own, or rows are memorized twice. Give an ids_fn to have that noticed.",
                category=ResMemWarning,
            )
        return parts
