"""Rows of a pass on their way to whoever wants them, without those that are not finite or that the loss ignores."""

from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_resmem.collection.parts import Part
from lightning_resmem.collection.ranks import Ranks
from lightning_resmem.errors import InputError, ResMemWarning
from lightning_resmem.memory.checks import as_compared
from lightning_resmem.model.ignored import ignored_labels
from lightning_resmem.tasks import Task

# Rows wait until there are so many bytes of them, so that a memory's checks are not paid for every batch.
_CHUNK_BYTES = 4 * 2**20
# A larger batch is handed on in parts of so many bytes: of outputs that a memory cuts, it never copies more.
_PART_BYTES = 64 * 2**20
# Of the rows, the share that may be left out.
_MOST_LEFT_OUT = 0.01
_NAMED_ROWS = 5


class Chunk(NamedTuple):
    """Some rows of a pass: embeddings `(n, D)`, outputs `(n, C)`, targets, ids `(n,)`, times `(n, 2)` or `(n, 0)`."""

    embeddings: Tensor
    outputs: Tensor
    targets: Tensor
    ids: Tensor
    times: Tensor

    @property
    def given_times(self) -> Tensor | None:
        """When rows are asked for and known, `(n, 2)`, if they have times."""
        return self.times if self.times.shape[1] else None

    @property
    def asked_at(self) -> Tensor | None:
        """When rows are asked for, `(n,)`, if they have times."""
        return None if self.given_times is None else self.times[:, 0]

    def unusable(self) -> dict[str, Tensor]:
        """By column: which rows have a NaN or infinite entry there, shape `(n,)`. Columns without such are left out."""
        columns = {"embeddings": as_compared(self.embeddings), "outputs": self.outputs, "targets": self.targets}
        found = {}
        for name, column in columns.items():
            # The sum is finite almost always, and one reduction is much cheaper than a mask of the tensor.
            if column.is_floating_point() and len(column) and not torch.isfinite(column.sum()):
                rows = ~torch.isfinite(column.reshape(len(column), -1)).all(dim=1)
                if rows.any():
                    found[name] = rows
        return found

    def rows(self, kept: Tensor) -> "Chunk":
        """The rows of a mask `(n,)`."""
        return Chunk(*(column[kept.to(column.device)] for column in self))

    def usable(self) -> "Chunk":
        """The rows that are finite."""
        unusable = list(self.unusable().values())
        if not unusable:
            return self
        return self.rows(~torch.stack([rows.to(self.ids.device) for rows in unusable]).any(dim=0))


class Labels:
    """What may stand as a target: rows whose label the loss ignores are left out, other labels are an error.

    Args:
        task: Of the memory.
        model: Whose losses ignore labels.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task, self._ignored = task, ignored_labels(model)

    def kept(self, chunk: Chunk) -> Tensor | None:
        """The rows that the loss does not ignore, a mask `(n,)`; None if these are all."""
        ignored = self._task.ignored(chunk.targets, chunk.outputs.shape[1], self._ignored)
        return None if ignored is None or not ignored.any() else ~ignored

    def usable(self, chunk: Chunk) -> Chunk:
        """The rows that are finite and have a label."""
        kept = self.kept(chunk)
        return (chunk if kept is None else chunk.rows(kept)).usable()

    def check(self, chunk: Chunk, part: Part) -> None:
        """Raise an error that names dataset and positions of targets, in usable rows of a part, that cannot be."""
        targets, numbers, width = chunk.targets.cpu(), part.numbers(chunk.ids.cpu()), chunk.outputs.shape[1]
        try:
            self._task.check_targets(targets, width, numbers)
        except InputError as error:
            if part.stride > 1:
                self._check_sequences(targets, width, numbers, part)
            raise InputError(f"In {part.named}: {error}" if part.dataset else str(error)) from error

    def check_batch(self, targets: Tensor, num_outputs: int) -> None:
        """The same of a batch `(n, ...)` that no model has seen: the positions are those in the batch."""
        ignored = self._task.ignored(targets, num_outputs, self._ignored)
        kept = torch.isfinite(targets)[:, None].flatten(1).all(dim=1)  # of an empty batch, too
        kept = kept if ignored is None else kept & ~ignored
        self._task.check_targets(targets[kept].cpu(), num_outputs, kept.nonzero()[:, 0].cpu())

    def _check_sequences(self, targets: Tensor, width: int, numbers: Tensor, part: Part) -> None:
        """The same, with positions of a sequence in the place of rows."""
        for sequence in (numbers // part.stride).unique().tolist():
            rows = numbers // part.stride == sequence
            try:
                self._task.check_targets(targets[rows], width, numbers[rows] % part.stride)
            except InputError as error:
                where = f"sequence {sequence} of {part.named}"
                raise InputError(f"In {where}, whose positions are the rows: {error}") from error


class Waiting:
    """Joins small chunks into larger ones, and leaves out the rows that are not finite or that the loss ignores.

    Attributes:
        left_out: Numbers of those that are not finite, by column and dataset: see `Part.numbers`.
        ignored: Numbers of those whose label is ignored, by dataset.
        stride: Of the parts.
        padding: Positions of sequences that are no rows.
        empty: Batches of sequences of which no position is a row.
    """

    def __init__(self, consume: Callable[[Chunk], None], labels: Labels) -> None:
        self._consume, self._labels = consume, labels
        self._chunks: list[Chunk] = []
        self._bytes = 0
        self.left_out: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        self.ignored: defaultdict[str, list[int]] = defaultdict(list)
        self.stride, self.padding, self.empty = 1, 0, 0

    def add(self, chunk: Chunk, part: Part, padding: int = 0) -> None:
        """Take some rows of a part; of sequences, so many positions beside them are no rows."""
        self.stride, self.padding = part.stride, self.padding + padding
        if padding and not len(chunk.ids):
            self.empty += 1
            return
        size = chunk.embeddings.nbytes + chunk.outputs.nbytes
        if self._chunks and (
            size >= _CHUNK_BYTES
            or any(new.shape[1:] != old.shape[1:] for new, old in zip(chunk, self._chunks[0], strict=True))
        ):
            self.flush(part)  # the memory says what is wrong with other shapes
        self._chunks.append(chunk)
        self._bytes += size
        if self._bytes >= _CHUNK_BYTES:
            self.flush(part)

    @property
    def sequences(self) -> tuple[int, int, int]:
        """`padding`, `empty` and `stride`."""
        return self.padding, self.empty, self.stride

    def flush(self, part: Part) -> None:
        """Hand on what there is; all of it is of one part."""
        if not self._chunks:
            return
        chunk, joined = self._chunks[0], len(self._chunks) > 1
        if joined:
            chunk = Chunk(*(torch.cat(column) for column in zip(*self._chunks, strict=True)))
        step = max(1, _PART_BYTES * len(chunk.ids) // max(1, self._bytes))
        self._chunks.clear()
        self._bytes = 0
        kept = self._labels.kept(chunk)
        if kept is not None:
            self.ignored[part.dataset] += part.numbers(chunk.ids[~kept.to(chunk.ids.device)]).tolist()
            chunk = chunk.rows(kept)
        named: set[int] = set()
        for column, rows in chunk.unusable().items():
            ids = [i for i in part.numbers(chunk.ids[rows.to(chunk.ids.device)]).tolist() if i not in named]
            named.update(ids)
            if ids:
                self.left_out[column, part.dataset] += ids
        usable = chunk.usable() if named else chunk
        if len(usable.ids):
            self._labels.check(usable, part)
        for start in range(0, len(usable.ids), step):
            taken = Chunk(*(column[start : start + step] for column in usable))
            # A copy: the model may use its output's memory again.
            self._consume(taken if joined else Chunk(*(column.clone() for column in taken)))


def report_left_out(ranks: Ranks, waiting: Waiting, total: int, kind: str) -> None:
    """Name the rows that all ranks left out: in one warning those that are not finite, in another those ignored.

    Args:
        ranks: Each of which calls this.
        waiting: After the last row.
        total: Rows of this rank, with those that it left out.
        kind: Of the rows: "training rows".

    Raises:
        InputError: If those that are not finite are more than one in a hundred.
    """
    merged: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    ignored: defaultdict[str, list[int]] = defaultdict(list)
    rows = padding = empty = 0
    stride = waiting.stride
    for of_rank in ranks.gather_objects((total, dict(waiting.left_out), dict(waiting.ignored), *waiting.sequences)):
        assert isinstance(of_rank, tuple)
        rows += of_rank[0]
        padding, empty, stride = padding + of_rank[3], empty + of_rank[4], max(stride, of_rank[5])
        for key, ids in of_rank[1].items():
            merged[key] += ids
        for dataset, ids in of_rank[2].items():
            ignored[dataset] += ids
    if stride > 1:
        none = f"; {empty:,} batches have none" if empty else ""
        rank_zero_info(
            f"ResMem: {rows:,} of {rows + padding:,} positions of sequences are {kind}, the others are padding or have "
            f"a label that the loss ignores{none}."
        )
    if ignored:
        where = "; ".join(f"rows {_listed(ids)} of {dataset}" for dataset, ids in ignored.items())
        rank_zero_warn(
            f"ResMem: {sum(map(len, ignored.values())):,} of {rows:,} {kind} are left out, as the loss ignores their "
            f"label: {where}.",
            category=ResMemWarning,
        )
    count = sum(map(len, merged.values()))
    if not count:
        return
    where = "; ".join(
        f"{column} has NaN or infinite entries in {_named(ids, stride)} of {dataset}"
        for (column, dataset), ids in merged.items()
    )
    look = (
        "Look at these rows: their input may hold such values, the training may have diverged, or a half-precision "
        "forward may overflow."
    )
    if count > _MOST_LEFT_OUT * rows:
        raise InputError(
            f"{count:,} of {rows:,} {kind} cannot be used, which is more than one in a hundred: {where}. {look}"
        )
    rank_zero_warn(f"ResMem: {count:,} of {rows:,} {kind} are left out: {where}. {look}", category=ResMemWarning)


def _named(ids: list[int], stride: int) -> str:
    """The first few rows, or of sequences the first one's place."""
    if stride == 1:
        return f"rows {_listed(ids)}"
    more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    return "sequence {}, position {}{}".format(*divmod(min(ids), stride), more)


def _listed(ids: list[int]) -> str:
    more = f" and {len(ids) - _NAMED_ROWS} more" if len(ids) > _NAMED_ROWS else ""
    return ", ".join(map(str, sorted(ids)[:_NAMED_ROWS])) + more
