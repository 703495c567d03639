"""The rows of a pool into the files of a saved memory and back, part by part: no process holds all of them."""

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from lightning_resmem.cluster.client import ShardClient
from lightning_resmem.cluster.measuring import map_of
from lightning_resmem.errors import EmptyMemoryError
from lightning_resmem.memory.storage.saved import map_tensors
from lightning_resmem.memory.storage.tensor_file import Streamed

# Bytes that are read from a shard or a file at once.
_CHUNK_BYTES = 16 * 2**20


def to_files(shards: ShardClient) -> dict[str, Tensor | Streamed]:
    """The tensors of a saved memory, in the order of the ids, read from the shards when they are written.

    Args:
        shards: Built, with at least one row. What is read later than now has to be what it is now: see `Shard.stored`.
    """
    versions = shards.ask("version").result()
    owned = [torch.from_numpy(part.copy()) for part in shards.ask("ids").result()]
    if not any(map(len, owned)):
        raise EmptyMemoryError("The memory is empty, as another process has removed its rows: nothing is saved.")
    ids, order = torch.cat(owned).sort()
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).split([len(o) for o in owned])
    sample = shards.rows(next(shard for shard, own in enumerate(owned) if len(own)), 0, 1)

    def parts(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        step = max(1, _CHUNK_BYTES // max(1, sample[name].nbytes))
        for shard, own in enumerate(places):
            for start in range(0, len(own), step):
                yield own[start : start + step], shards.rows(shard, start, start + step, [name], versions[shard])[name]

    rows = {
        name: ids if name == "ids" else Streamed((len(ids), *row.shape[1:]), row.dtype, partial(parts, name))
        for name, row in sample.items()
    }
    return rows | map_tensors(map_of(shards))


def in_parts(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The rows of a memory in chunks, from its tensors (or those over its files), `(N, ...)` each."""
    step = max(1, _CHUNK_BYTES // sum(tensor[:1].nbytes for tensor in tensors.values()))
    for start in range(0, len(tensors["ids"]), step):
        yield {name: tensor[start : start + step] for name, tensor in tensors.items()}
