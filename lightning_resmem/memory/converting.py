"""Saved memories kept in another way, and two of one base made one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_resmem.errors import InputError, StaleMemoryError
from lightning_resmem.memory.local import LocalMemory
from lightning_resmem.memory.search.faiss_index import FaissIndex
from lightning_resmem.memory.storage.saved import Saved
from lightning_resmem.memory.values.dense import DenseConfig
from lightning_resmem.memory.values.sparse import SparseConfig
from lightning_resmem.tasks import check_finite

# Bytes of the rows that are taken over at once.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Kept:
    """How the rows of a converted memory are kept; None is as they are.

    Args:
        index: As for `LocalMemory`.
        values: The kind of values.
        key_dtype: As for `LocalMemory`.
    """

    index: str | FaissIndex | None = None
    values: DenseConfig | SparseConfig | None = None
    key_dtype: torch.dtype | None = None


def converted(sources: Sequence[Saved], kept: Kept, renumber: bool = False) -> LocalMemory:
    """One memory with the rows of saved ones, which all have the same base.

    Args:
        sources: Params, provenance and metric are those of the first.
        kept: How the rows are kept, by default as the first keeps them.
        renumber: Move the ids of each behind those of the one before, where they are rows of different data sets.

    Raises:
        InputError: If the sources have different tasks or widths or an id in common, or numbers do not fit a dtype.
        StaleMemoryError: If they were filled with different weights or embeddings.
        StorageError: If a source is damaged.
    """
    first = sources[0]
    memory = LocalMemory(
        first.task,
        first.params,
        kept.index or first.index,
        kept.values or first.config,
        kept.key_dtype or first.tensors["keys"].dtype,
        metric=first.metric,
    )
    if first.key_map is not None:  # distances stay what they are
        memory.measure_with(first.key_map)
    memory.provenance, memory.tunable = _provenance(sources), first.tunable
    memory.reserve(sum(len(source.tensors["ids"]) for source in sources))
    for source in sources[1:]:
        _check_belongs(first, source)
    if not renumber:
        _check_ids(torch.cat([source.tensors["ids"] for source in sources]))
    for source in sources:
        source.verify()
        offset = memory.last_id + 1 if renumber else 0
        for rows in _chunks(source):
            _take(memory, source, {**rows, "ids": rows["ids"] + offset})
    memory.build()
    return memory


def _provenance(sources: Sequence[Saved]) -> dict[str, str]:
    """That of the first; of several memories it is not told how many rows they are a sample of."""
    told = dict(sources[0].provenance)
    if len(sources) > 1:
        for name in ("max_rows", "rows_seen", "keep"):
            told.pop(name, None)
        if any(source.provenance.get("keep") == "residual" for source in sources):
            told["keep"] = "residual"
    return told


def _take(memory: LocalMemory, source: Saved, rows: dict[str, Tensor]) -> None:
    num_outputs = source.values.num_outputs
    if memory.values_config(num_outputs) == source.config:
        check_finite(f"keys (as key_dtype={memory.key_dtype})", rows["keys"].to(memory.key_dtype), rows["ids"])
        memory.add_stored(rows, num_outputs)
    else:
        values = source.values.like()
        values.replace(rows)
        memory.add(rows["keys"], values.outputs, values.targets, rows["ids"], rows.get("times"))


def _chunks(source: Saved) -> Iterator[dict[str, Tensor]]:
    step = max(1, _CHUNK_BYTES // max(1, sum(tensor[:1].nbytes for tensor in source.rows.values())))
    for start in range(0, len(source.tensors["ids"]), step):
        yield {name: tensor[start : start + step] for name, tensor in source.rows.items()}


def _check_belongs(first: Saved, other: Saved) -> None:
    names = f"{first.files.path} and {other.files.path}"
    for what, one, two in (
        ("task", first.task.name, other.task.name),
        ("width of the keys", first.tensors["keys"].shape[1], other.tensors["keys"].shape[1]),
        ("number of outputs", first.values.num_outputs, other.values.num_outputs),
    ):
        if one != two:
            raise InputError(f"{names} cannot be one memory: the {what} is {one} in the first, {two} in the second.")
    for what in ("fingerprint", "head", "embedding"):
        told = first.provenance.get(what), other.provenance.get(what)
        if told[0] != told[1]:
            raise StaleMemoryError(
                f"{names} were not filled by one base: the {what} is {told[0]} in the first, {told[1]} in the second. "
                "Memorize the rows of both with the same weights, head and embedding."
            )


def _check_ids(ids: Tensor) -> None:
    ordered = ids.sort().values
    both = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(both):
        raise InputError(
            f"{len(both)} ids are in more than one of the memories, {int(both[0])} the first of them. Rows of "
            "different data sets can be given other ids (--renumber); rows that are in both are dropped from one "
            "of them first, by LocalMemory.load(...).remove(ids)."
        )
